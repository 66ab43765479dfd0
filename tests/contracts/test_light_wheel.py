"""The wheel without its extras holds all that published weights need: no Flower, Ray, Opacus or Hydra.

The dependencies that are not declared without extras are made absent by a finder that refuses them: a clean
environment would need a network, and half a gigabyte of PyTorch.
"""

import os
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from importlib.metadata import PackageNotFoundError, distribution, packages_distributions
from pathlib import Path

import numpy as np
import pytest
from packaging.requirements import Requirement

from federation.extras import EXTRAS
from tests.published_weights import a_scan, published, written

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
HEAVY = {"flwr", "ray", "opacus", "hydra", "omegaconf", "dp_accounting", "nilearn", "tensorboard", "grpc"}
REFUSE = """
import sys
REFUSED = {refused!r}
class Refusing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in REFUSED:
            raise ModuleNotFoundError("not declared without extras: " + name, name=name)
sys.meta_path.insert(0, Refusing())
"""


def brought(requirements: list[str]) -> set[str]:
    """Import names of everything that installing `requirements` brings."""
    seen: set[tuple[str, frozenset[str]]] = set()
    todo = list(map(Requirement, requirements))
    names: set[str] = set()
    while todo:
        wanted = todo.pop()
        key = (re.sub(r"[-_.]+", "-", wanted.name).lower(), frozenset(wanted.extras))
        if key in seen:
            continue
        seen.add(key)
        try:
            found = distribution(wanted.name)
        except PackageNotFoundError:  # of another platform
            continue
        tops = {
            Path(file).parts[0].partition(".")[0]
            for file in found.files or ()
            if "dist-info" not in str(file)
        }
        names |= tops - {"__pycache__", ""}
        asked = ("", *wanted.extras)
        todo += [
            one
            for one in map(Requirement, found.requires or [])
            if one.marker is None or any(one.marker.evaluate({"extra": extra}) for extra in asked)
        ]
    return names


def without_extras() -> set[str]:
    """Import names of everything that `pip install fedmeduet`, without extras, brings."""
    return brought(PROJECT["dependencies"])


def refused() -> set[str]:
    """Import names of whatever else is installed here, ours apart."""
    ours = {name for name, owners in packages_distributions().items() if owners == ["fedmeduet"]}
    return set(packages_distributions()) - without_extras() - ours - {"pip", "setuptools", "_distutils_hack"}


def embedded(tmp_path: Path, *places: Path) -> subprocess.CompletedProcess[str]:
    """`meduet embed` and every module of the models, with packages from `places`, all else refused."""
    run, scan = published(tmp_path / "run"), written(tmp_path / "scan.nii.gz", *a_scan())
    blocker = tmp_path / "blocker"
    blocker.mkdir()
    (blocker / "sitecustomize.py").write_text(REFUSE.format(refused=refused()))
    script = (
        "import importlib, pkgutil, sys, meduet_models, scans\n"
        "for package in (meduet_models, scans):\n"
        "    for found in pkgutil.walk_packages(package.__path__, package.__name__ + '.'):\n"
        "        importlib.import_module(found.name)\n"
        "from client.weights_cli import main\n"
        f"status = main(['embed', {str(scan)!r}, '--model', {str(run)!r}, '-o', 'out.npy'])\n"
        f"assert not {HEAVY!r} & {{name.partition('.')[0] for name in sys.modules}}\n"
        "print(meduet_models.__file__)\n"
        "sys.exit(status)\n"
    )
    search = os.pathsep.join(map(str, (blocker, *places)))
    return subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, env={"PYTHONPATH": search, "PATH": os.environ["PATH"]},
        capture_output=True, text=True, check=False,
    )  # fmt: skip


def test_what_a_light_installation_lacks_is_found() -> None:
    allowed = without_extras()
    assert {"torch", "nibabel", "pydicom", "safetensors", "rich"} <= allowed
    assert not HEAVY & allowed
    assert HEAVY & refused() >= {"flwr", "ray", "opacus", "hydra"}
    refuse = REFUSE.format(refused=refused()) + "import hydra"
    done = subprocess.run([sys.executable, "-c", refuse], capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "not declared without extras: hydra" in done.stderr


def test_models_and_embedding_need_nothing_of_the_federation(tmp_path: Path) -> None:
    done = embedded(tmp_path, ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    assert np.load(tmp_path / "out.npy").shape == (8,)


@pytest.mark.parametrize(
    ("program", "arguments"),
    [
        ("meduet-site", ["check", "--config", "site.yaml"]),
        ("meduet-server", ["status", "run"]),
        ("meduet-simulate", []),
        ("meduet-audit", ["run", "--quick"]),
    ],
)
def test_a_program_whose_packages_are_an_extra_says_in_one_line_what_to_install(
    program: str, arguments: list[str], tmp_path: Path
) -> None:
    module, _, function = PROJECT["scripts"][program].partition(":")
    (tmp_path / "sitecustomize.py").write_text(REFUSE.format(refused=refused()))
    script = f"import sys\nfrom {module} import {function}\nsys.exit({function}())\n"
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments], cwd=tmp_path, capture_output=True, text=True, check=False,
        env={"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}", "PATH": os.environ["PATH"]},
    )  # fmt: skip
    said = (done.stdout + done.stderr).splitlines()
    assert done.returncode == 2, said
    assert re.fullmatch(
        r"Expected the package \w+; it is not installed: pip install 'fedmeduet\[federation\]'\.", said[-1]
    )
    assert len([line for line in said if not line.startswith("loading")]) == 1


def test_every_package_of_an_extra_that_the_code_imports_has_its_extra_named() -> None:
    owners = packages_distributions()
    for extra in set(EXTRAS.values()):
        theirs = {package for package, named in EXTRAS.items() if named == extra}
        assert theirs <= brought(PROJECT["optional-dependencies"][extra])
    ours = {name for name, held in owners.items() if held == ["fedmeduet"]}
    imported = {
        found.group(1)
        for top in ours
        for path in (ROOT / top).rglob("*.py")
        for found in re.finditer(r"^ *(?:from|import) (\w+)", path.read_text("utf-8"), re.MULTILINE)
    }
    lacking = imported - without_extras() - ours - sys.stdlib_module_names - set(EXTRAS)
    assert not lacking & set(owners), lacking


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["wheel", "sdist"])
def test_the_built_package_embeds_where_it_is_installed(kind: str, tmp_path: Path) -> None:
    built, installed = tmp_path / "dist", tmp_path / "installed"
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", kind, "-d", built], cwd=ROOT, check=True
    )
    (file,) = built.iterdir()
    if kind == "wheel":
        inside = zipfile.ZipFile(file).namelist()
    else:
        inside = tarfile.open(file).getnames()
    assert any(re.search(r"meduet_models/tokenizer/tokenizer_\dch\.safetensors$", name) for name in inside)
    pip = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--no-index",
        "--no-build-isolation",
    ]
    subprocess.run([*pip, "--target", installed, file], check=True)
    done = embedded(tmp_path, installed)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.strip().endswith(f"{installed}/meduet_models/__init__.py")
    assert (installed / "bin" / "meduet").is_file()
