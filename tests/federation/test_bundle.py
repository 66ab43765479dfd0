"""What is hashed as the code is what the Flower bundle ships."""

import tomllib

from federation.bundle import ROOT, bundle_hash, running_bundle, shipped_modules


def test_the_hash_covers_what_pyproject_ships() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    patterns = settings["tool"]["flwr"]["app"]["fab-include"]
    files = {p.relative_to(ROOT).as_posix() for pattern in patterns for p in ROOT.glob(pattern)}
    assert set(shipped_modules()) == files and len(files) > 100
    assert running_bundle() == bundle_hash() == bundle_hash()
