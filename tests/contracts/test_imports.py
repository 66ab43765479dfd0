"""The arrows between packages point one way (pyproject: import-linter)."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_the_import_contracts_are_kept() -> None:
    lint = Path(sys.executable).with_name("lint-imports")
    done = subprocess.run([lint, "--no-cache"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_no_package_holds_a_junk_drawer() -> None:
    drawers = {"utils", "util", "helpers", "common", "misc", "core", "base", "constants"}
    found = [p for p in ROOT.rglob("*.py") if ".venv" not in p.parts and p.stem in drawers]
    assert found == []
