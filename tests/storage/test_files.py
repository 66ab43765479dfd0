"""Files are whole, on the disk, and their owner's alone, whatever made the folder."""

import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from meduet_models.published.pretrained import MODEL
from storage.files import OWNER, PUBLIC, private_folder, whole_file, write_once, write_whole
from tests.small_simulation import small_simulation

ROOT = Path(__file__).parents[2]
RUN = small_simulation(paired=0, rounds=1)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.fixture
def open_to_all() -> Iterator[None]:
    before = os.umask(0o022)
    yield
    os.umask(before)


def test_a_file_is_its_owners_alone_unless_it_is_said_to_be_public(tmp_path: Path, open_to_all: None) -> None:
    write_whole(tmp_path / "new" / "cohort.csv", "patient\n")
    assert mode(tmp_path / "new") == 0o700 and mode(tmp_path / "new" / "cohort.csv") == 0o600
    (tmp_path / "old.csv").write_text("patient\n")
    write_whole(tmp_path / "old.csv", "patient\n")
    assert mode(tmp_path / "old.csv") == 0o600
    write_whole(tmp_path / "ca.pem", b"", PUBLIC)
    assert mode(tmp_path / "ca.pem") == 0o644


def test_whatever_is_raised_meanwhile_the_old_file_is_there_and_nothing_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    write_whole(path, "old")
    with pytest.raises(RuntimeError), whole_file(path) as file:
        file.write(b"half of the n")
        raise RuntimeError
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_the_file_and_then_its_name_are_forced_to_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forced = []
    monkeypatch.setattr(
        os, "fsync", lambda handle: forced.append((os.fstat(handle).st_ino, (tmp_path / "a").exists()))
    )
    write_whole(tmp_path / "a", "whole")
    assert forced == [((tmp_path / "a").stat().st_ino, False), (tmp_path.stat().st_ino, True)]


def test_what_is_made_once_is_its_owners_alone_and_is_never_replaced(
    tmp_path: Path, open_to_all: None
) -> None:
    path = tmp_path / "keys/draws.key"
    write_once(path, b"first")
    with pytest.raises(FileExistsError):
        write_once(path, b"second")
    assert (path.read_bytes(), mode(path), mode(path.parent)) == (b"first", OWNER, 0o700)


def test_a_folder_that_was_open_is_closed_and_one_that_everybody_shares_is_refused(tmp_path: Path) -> None:
    state, shared = tmp_path / "state", tmp_path / "shared"
    state.mkdir(0o755)
    state.chmod(0o755)
    assert mode(private_folder(state)) == 0o700
    shared.mkdir()
    shared.chmod(0o1777)
    with pytest.raises(ValueError, match=r"folder of this account alone.*mode 1777.*chmod 700"):
        private_folder(shared)
    assert mode(shared) == 0o1777


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a folder away")
def test_another_accounts_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs").chmod(0o755)
    os.chown(tmp_path / "theirs", 65534, 65534)
    with pytest.raises(ValueError, match="give it to this account"):
        private_folder(tmp_path / "theirs")


def command(module: str, *arguments: str, folder: Path) -> None:
    """One of our commands, started by somebody whose files are for all to read."""
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        cwd=folder,
        umask=0o022,
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def open_folder(path: Path) -> Path:
    path.mkdir(parents=True)
    path.chmod(0o755)
    return path


def readable(folder: Path) -> list[str]:
    """Files that others may read in folders that they may enter, below an open folder that is not ours."""
    found = [] if mode(folder) == 0o700 else [str(folder)]
    for path in folder.rglob("*"):
        if not path.is_symlink() and path.is_file() and mode(path) & 0o077:
            found.append(str(path))
    return found


def test_nobody_else_can_read_a_file_of_a_run_or_of_a_site(tmp_path: Path) -> None:
    run, site = open_folder(tmp_path / "run"), tmp_path / "site"
    command("simulations.cli", *RUN, f"folder={run}", folder=tmp_path)
    names = {path.name for path in run.rglob("*")}
    assert {MODEL, "report.html", "metrics.json", "journal.jsonl", "cohort.csv", "losses.png"} <= names
    assert readable(run) == []
    state, cache = open_folder(site / "state"), open_folder(site / "cache")
    scans = next((run / "hospitals").iterdir())
    settings = {
        "name": scans.name,
        "data_root": str(scans),
        "state_dir": str(state),
        "cache_dir": str(cache),
        "minimum_cohort": 2,
        "allow_non_private": True,
        "plan_approval": "implied",
    }
    (site / "site.yaml").write_text(yaml.safe_dump(settings))
    command(
        "client.cli",
        "prepare",
        "--config",
        str(site / "site.yaml"),
        "--plan",
        str(run / "plan.json"),
        folder=tmp_path,
    )
    assert {"cohort.csv", "exclusions.csv"} <= {path.name for path in state.iterdir()}
    assert any(path.is_file() for path in cache.rglob("*"))
    assert readable(state) == [] and readable(cache) == []
