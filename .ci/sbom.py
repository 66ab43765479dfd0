"""What the software is made of, as CycloneDX: one component for each pin of constraints.txt, to stdout.

    python .ci/sbom.py > dist/sbom.cdx.json

Licences are those that the installed packages state; a pin that is not installed here has none.
"""

import json
import re
import sys
import tomllib
from importlib.metadata import PackageNotFoundError, metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


def bill(pins: str, project: dict[str, Any]) -> dict[str, Any]:
    """CycloneDX 1.6 of these pins. Raises `ValueError` for a line that pins nothing."""
    own = {"type": "application", "name": project["name"], "version": project["version"]}
    own["bom-ref"] = f"{own['name']}@{own['version']}"
    return {
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "version": 1,
        "metadata": {"component": own},
        "components": [component(line.strip()) for line in pins.splitlines() if line.strip()],
    }


def component(pin: str) -> dict[str, Any]:
    """One package."""
    found = re.fullmatch(r"([A-Za-z0-9._-]+)==([A-Za-z0-9.+!-]+)", pin)
    if found is None:
        raise ValueError(f"Expected NAME==VERSION in constraints.txt; got {pin!r}.")
    name, version = re.sub(r"[-_.]+", "-", found[1]).lower(), found[2]
    purl = f"pkg:pypi/{name}@{version}"
    made: dict[str, Any] = {
        "type": "library",
        "name": name,
        "version": version,
        "purl": purl,
        "bom-ref": purl,
    }
    try:
        licence = metadata(name).get("License-Expression")
    except PackageNotFoundError:
        licence = None
    return made | ({"licenses": [{"expression": licence}]} if licence else {})


if __name__ == "__main__":
    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    made = bill((ROOT / "constraints.txt").read_text("utf-8"), pyproject["project"])
    sys.stdout.write(json.dumps(made, indent=1) + "\n")
