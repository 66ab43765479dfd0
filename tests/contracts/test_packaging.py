"""The import names are ours alone and resolve to this checkout; the Flower bundle holds our modules."""

import importlib
import importlib.metadata
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from federation.bundle import bundle_hash, running_bundle

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = (
    "storage",
    "scans",
    "forms",
    "meduet_models",
    "privacy",
    "federation",
    "strategies",
    "audit",
    "client",
    "server",
    "simulations",
)
BUNDLED = (
    "storage", "scans", "forms", "meduet_models", "privacy", "federation", "strategies", "client", "server"
)  # fmt: skip


@pytest.mark.parametrize("package", PACKAGES)
def test_no_other_distribution_claims_our_name(package: str) -> None:
    owners = set(importlib.metadata.packages_distributions().get(package, [])) - {"fedmeduet"}
    assert owners == set()


@pytest.mark.parametrize("package", PACKAGES)
def test_every_name_resolves_to_this_checkout(package: str) -> None:
    module = importlib.import_module(package)
    assert module.__file__ is not None
    assert Path(module.__file__).parent == ROOT / package


def test_the_bundle_holds_exactly_the_shipped_modules(tmp_path: Path) -> None:
    checkout = tmp_path / "fedmeduet"  # Flower refuses folder names with other than letters, digits, hyphens
    ignored = {".git", ".venv", "runs", "__pycache__"}
    for source in ROOT.rglob("*"):
        if source.is_file() and not ignored & set(source.relative_to(ROOT).parts):
            target = checkout / source.relative_to(ROOT)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(source.read_bytes())
    flwr = Path(sys.executable).with_name("flwr")
    environment = {"FLWR_HOME": str(tmp_path / "home"), "FLWR_TELEMETRY_ENABLED": "0", "PATH": ""}
    environment |= {"FLWR_DISABLE_UPDATE_CHECK": "1"}
    done = subprocess.run(
        [flwr, "build", "--app", str(checkout)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (bundle,) = tmp_path.glob("*.fab")
    with zipfile.ZipFile(bundle) as archive:
        inside = {name for name in archive.namelist() if name.endswith(".py")}
        archive.extractall(tmp_path / "unpacked")
    assert bundle_hash(tmp_path / "unpacked") == running_bundle()  # what a site approved is what arrives
    shipped = {str(p.relative_to(ROOT)) for package in BUNDLED for p in (ROOT / package).rglob("*.py")}
    assert inside == shipped


def test_no_shipped_module_looks_like_a_test() -> None:
    lost = [p for package in BUNDLED for p in (ROOT / package).rglob("*.py") if p.stem.endswith("_test")]
    lost += [p for package in BUNDLED for p in (ROOT / package).rglob("test_*.py")]
    assert lost == []  # Flower drops them from bundles without a word
