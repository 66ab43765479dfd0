"""The application as Flower submits it: the shipped packages and pyproject.toml, alone in a folder.

Flower makes its bundle from a folder and refuses folder names with other than letters, digits and hyphens; a
checkout may be called anything and hold anything else, so what is shipped is copied out of it. The bundle is
what every site runs; its hash is what a site approves.

Does not do: build the bundle or reckon its hash.
"""

import shutil
import tomllib
from pathlib import Path

from federation.bundle import SHIPPED

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = tuple(folder for folder, _ in SHIPPED)
NAME = "fedmeduet"
_SHIPPED = (".py", ".yaml")


def write_app_folder(parent: Path) -> Path:
    """Copy what is shipped to a new folder in `parent`; its path.

    Raises `ValueError` when this is not a checkout: an installed wheel has no pyproject.toml.
    """
    source = ROOT / "pyproject.toml"
    if not source.is_file() or tomllib.loads(source.read_text("utf-8"))["project"]["name"] != NAME:
        raise ValueError(
            f"Expected FedMeDUET's pyproject.toml in {ROOT}; submit from a checkout "
            "(pip install -e '.[federation]')."
        )
    folder = parent / NAME
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    shutil.copy2(source, folder)
    for package in PACKAGES:
        for file in sorted((ROOT / package).rglob("*")):
            if file.suffix in _SHIPPED and "__pycache__" not in file.parts:
                target = folder / file.relative_to(ROOT)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(file, target)
    return folder
