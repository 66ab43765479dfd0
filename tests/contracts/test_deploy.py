"""The systemd units hold: systemd reads them without a complaint, and they start commands that exist."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
UNITS = sorted((ROOT / "docs" / "deploy").glob("*.service"))


def test_there_are_units_for_both_sides_and_a_run() -> None:
    assert [unit.name for unit in UNITS] == [
        "meduet-run@.service",
        "meduet-server.service",
        "meduet-site.service",
    ]


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="needs systemd-analyze")
@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.name)
def test_systemd_accepts_the_unit(unit: Path, tmp_path: Path) -> None:
    program = tmp_path / "bin"
    program.mkdir()
    for name in ("meduet-server", "meduet-site"):  # verify looks whether the program is there
        (program / name).write_text("#!/bin/sh\n")
        (program / name).chmod(0o755)
    text = unit.read_text(encoding="utf-8").replace("/opt/fedmeduet/.venv/bin", str(program))
    for original in UNITS:
        (tmp_path / original.name).write_text(original.read_text(encoding="utf-8"))
    (tmp_path / unit.name).write_text(text)
    done = subprocess.run(
        ["systemd-analyze", "verify", str(tmp_path / unit.name)],
        capture_output=True,
        text=True,
        check=False,
        env={"SYSTEMD_UNIT_PATH": f"{tmp_path}:", "PATH": "/usr/bin:/bin"},
    )
    assert done.returncode == 0, done.stderr
    ours = [line for line in done.stderr.splitlines() if "meduet" in line and unit.name in line]
    assert ours == []


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.name)
def test_the_unit_starts_a_command_that_exists(unit: Path) -> None:
    found = re.search(r"^ExecStart=\S*/(meduet-\w+) (\w+) ", unit.read_text(encoding="utf-8"), re.MULTILINE)
    assert found is not None
    program, command = found.groups()
    module = {"meduet-server": "server", "meduet-site": "client"}[program]
    commands = (ROOT / module / "service_commands.py").read_text(encoding="utf-8")
    assert f'"{command}",' in commands
