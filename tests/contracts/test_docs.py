"""What the documents tell people to type exists and composes; what they point to is there."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from server.config import compose_config, plain, plan_from
from simulations.settings import settings_from

ROOT = Path(__file__).resolve().parents[2]
PAGES = ("README.md", "docs/tutorial.md", "docs/generation.md")
TEXT = {page: (ROOT / page).read_text(encoding="utf-8") for page in PAGES}
COMMANDS = sorted(
    {
        line.replace("\\\n", " ").split("   #")[0].split("  #")[0].strip()
        for text in TEXT.values()
        for line in re.findall(r"^meduet-simulate (?:.*\\\n)*.*$", text, re.MULTILINE)
    }
)


@pytest.mark.parametrize("command", [c for c in COMMANDS if "--" not in c])
def test_every_simulation_in_the_documents_composes(command: str) -> None:
    config = plain(compose_config(shlex.split(command)[1:]))
    settings_from(config)
    plan_from(config, sites=("a", "b"), tokenizer_sha256="0" * 64, latent_channels=4, stride=4)


def test_there_are_commands_to_check() -> None:
    assert len(COMMANDS) >= 6


@pytest.mark.parametrize(
    "page", [*PAGES, "docs/architecture.md", "docs/log.md", "docs/runbook.md", "CHANGELOG.md"]
)
def test_every_link_between_documents_leads_somewhere(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#:]+)\)", text):
        assert ((ROOT / page).parent / target).exists(), f"{page} points to {target}"


def test_the_five_files_to_read_exist() -> None:
    table = re.findall(r"^\| `([a-z_/]+\.py)` \|", TEXT["README.md"], re.MULTILINE)
    assert len(table) == 5
    assert all((ROOT / path).is_file() for path in table)


@pytest.mark.parametrize(
    ("module", "commands"),
    [
        ("client.cli", ("check", "prepare", "harmonise", "encode", "plan show", "watch")),
        ("client.weights_cli", ("embed",)),
        (
            "server.cli",
            ("tokenizer train", "pretrain-public", "synthesize", "export", "watch", "bank forget"),
        ),
    ],
)
def test_every_command_has_help(module: str, commands: tuple[str, ...]) -> None:
    asked = f"""
import sys
from {module} import main
for command in {commands!r}:
    try:
        status = main([*command.split(), "--help"])
    except SystemExit as ended:
        status = ended.code
    if status:
        sys.exit(command)
"""
    done = subprocess.run(
        [sys.executable, "-c", asked], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("usage:") == len(commands)


@pytest.mark.parametrize(
    "command",
    [
        *(
            f"meduet-server {c}"
            for c in (
                "provision",
                "approve",
                "renew",
                "revoke",
                "certificates",
                "publish",
                "start",
                "run",
                "status",
            )
        ),
        *(f"meduet-site {c}" for c in ("request", "install", "check", "start", "plan list", "plan withdraw")),
        *(f"meduet-site {c}" for c in ("plan show", "plan approve", "journal show", "journal verify")),
        *(f"meduet-site {c}" for c in ("ledger show", "ledger close")),
        *(f"meduet-server {c}" for c in ("journal show", "journal verify")),
    ],
)
def test_the_runbook_shows_every_command_for_hospital_it(command: str) -> None:
    assert re.search(
        rf"^{command}\b", (ROOT / "docs" / "runbook.md").read_text(encoding="utf-8"), re.MULTILINE
    )


def layout() -> set[str]:
    """Paths of the modules that the architecture's layout names: files stand below their folder."""
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    block = text[text.index("```\npyproject.toml") :].split("```")[1]
    named: set[str] = set()
    folders: dict[int, str] = {}
    for line in block.splitlines():
        indent = len(line) - len(line.lstrip())
        if heading := re.match(r" *(\w+)/ ", line):
            folders = {depth: name for depth, name in folders.items() if depth < indent}
            folders[indent] = heading[1]
            continue
        folder = "/".join(name for depth, name in sorted(folders.items()) if depth < indent)
        named |= {f"{folder}/{name}" for name in re.findall(r"\w+\.py\b", line)}
    return named


def test_the_layout_names_every_module_where_it_is_and_no_other() -> None:
    packages = [p.parent.name for p in ROOT.glob("*/__init__.py")]
    modules = {p.relative_to(ROOT).as_posix() for package in packages for p in (ROOT / package).rglob("*.py")}
    assert layout() == {name for name in modules if not name.endswith("__init__.py")}


def test_every_file_that_a_document_names_is_there() -> None:
    pages = [ROOT / "README.md", *(p for p in (ROOT / "docs").glob("*.md") if p.name != "log.md")]
    named = {
        (page.name, path)
        for page in pages
        for path in re.findall(r"`((?:\w+/)+[\w.]+\.(?:py|yaml|md|html))`", page.read_text(encoding="utf-8"))
    }
    packages = {p.name for p in ROOT.iterdir() if p.is_dir()}
    lost = sorted(
        f"{path} in {page}"
        for page, path in named
        if path.split("/")[0] in packages - {"runs"}
        and not path.endswith(("/X.py", "/__init__.py"))
        and not (ROOT / path).exists()
    )
    assert lost == []


def test_every_test_that_the_threats_name_is_there() -> None:
    named = set(
        re.findall(r"`(tests/[\w/]+\.py)`", (ROOT / "docs" / "threats.md").read_text(encoding="utf-8"))
    )
    assert len(named) >= 25
    assert sorted(path for path in named if not (ROOT / path).is_file()) == []
