"""The bill of materials names every pin, by the address under which vulnerabilities are looked up."""

import json
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_every_pin_is_a_component_and_every_dependency_is_pinned() -> None:
    command = [sys.executable, ROOT / ".ci" / "sbom.py"]
    made = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert (made["bomFormat"], made["specVersion"]) == ("CycloneDX", "1.6")
    pins = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line]
    addresses = {one["purl"] for one in made["components"]}
    assert len(addresses) == len(pins) == len({one["bom-ref"] for one in made["components"]})
    assert all(re.fullmatch(r"pkg:pypi/[a-z0-9-]+@[^@\s]+", address) for address in addresses)
    assert any(address.startswith("pkg:pypi/torch@2.13") for address in addresses)
    declared = re.findall(
        r'^ +"([A-Za-z0-9-]+)(?:\[[a-z,]+\])?>=', (ROOT / "pyproject.toml").read_text(), re.M
    )
    assert len(declared) > 20
    missing = {name.lower() for name in declared} - {one["name"] for one in made["components"]}
    assert missing == set()
