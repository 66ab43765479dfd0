"""The systemd units and the Dockerfile hold: they are read without a complaint, and start what exists.

No image is built here: that needs Docker and the network.
"""

import importlib
import json
import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
UNITS = sorted((ROOT / "docs" / "deploy").glob("*.service"))
DOCKERFILE = (ROOT / "Dockerfile").read_text(encoding="utf-8")
IGNORED = (ROOT / ".dockerignore").read_text(encoding="utf-8")


def instructions(stage: str) -> list[tuple[str, str]]:
    """Name and rest of each instruction of a stage of the Dockerfile, in order."""
    (text,) = re.findall(rf"^FROM \S+ AS {stage}\n(.*?)(?=^FROM |\Z)", DOCKERFILE, re.MULTILINE | re.DOTALL)
    lines = re.sub(r"^#.*\n", "", text.replace("\\\n", " "), flags=re.MULTILINE).splitlines()
    return [(name, rest) for name, _, rest in (line.partition(" ") for line in lines if line.strip())]


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
    commands = (ROOT / module / "commands" / "service.py").read_text(encoding="utf-8")
    assert f'"{command}",' in commands


def test_the_image_is_made_of_files_that_are_there_and_not_ignored() -> None:
    let_through = {line[1:] for line in IGNORED.splitlines() if line.startswith("!")}
    assert "*" in IGNORED.splitlines()
    copied = {
        source
        for name, rest in instructions("build")
        if name == "COPY"
        for source in rest.split()[:-1]
    }  # fmt: skip
    assert copied == let_through
    assert all((ROOT / source).exists() for source in copied)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert copied >= set(project["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"])
    assert copied >= {project["project"]["readme"], *project["project"]["license-files"]}


def test_every_stage_is_built_on_an_exact_tag_or_an_earlier_stage() -> None:
    (image,) = re.findall(r"^ARG PYTHON_IMAGE=(\S+)$", DOCKERFILE, re.MULTILINE)
    assert re.fullmatch(r"python:3\.1[1-3]\.\d+-slim-\w+(@sha256:[0-9a-f]{64})?", image)
    earlier: set[str] = set()
    for source, stage in re.findall(r"^FROM (\S+) AS (\w+)$", DOCKERFILE, re.MULTILINE):
        assert source == "${PYTHON_IMAGE}" or source in earlier
        earlier.add(stage)
    assert len(re.findall(r"^FROM ", DOCKERFILE, re.MULTILINE)) == len(earlier) == 4


@pytest.mark.parametrize(("target", "program"), [("site", "meduet-site"), ("server", "meduet-server")])
def test_a_container_runs_our_program_under_an_init_and_not_as_root(target: str, program: str) -> None:
    own = dict(instructions(target))
    assert own["USER"].isdigit() and int(own["USER"]) >= 1000
    assert f"--uid {own['USER']} " in dict(instructions("base"))["RUN"]
    assert dict(instructions("base"))["STOPSIGNAL"] == "SIGTERM"
    init, dashes, path = json.loads(own["ENTRYPOINT"])
    assert (init, dashes, path) == ("/usr/bin/tini", "--", f"/opt/fedmeduet/.venv/bin/{program}")
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["scripts"]
    module, function = scripts[program].split(":")
    main = getattr(importlib.import_module(module), function)
    command = json.loads(own["CMD"])
    with pytest.raises(SystemExit) as done:
        main([command[0], "--help"])
    assert done.value.code == 0 and command[1] == "--config"


@pytest.mark.skipif(shutil.which("hadolint") is None, reason="needs hadolint")
def test_hadolint_has_nothing_to_say() -> None:
    done = subprocess.run(["hadolint", "-"], input=DOCKERFILE, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")
