"""`meduet-site check` looks at the machine: memory, the folder that is written to, its disk."""

import os
import shutil
from pathlib import Path

import pytest

from client.checks import machine as machine_checks
from client.checks.machine import disk_check, folder_check, launcher_check, memory_check
from client.settings import SiteConfig

MEMINFO = "MemTotal:       16777216 kB\nMemFree:          100000 kB\nMemAvailable:   {} kB\n"


def test_free_memory_is_told_and_too_little_is_to_be_looked_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    meminfo = tmp_path / "meminfo"
    monkeypatch.setattr(machine_checks, "_MEMINFO", meminfo)
    monkeypatch.setattr(machine_checks, "_LIMIT", tmp_path / "none")
    meminfo.write_text(MEMINFO.format(8 * 2**20))
    assert memory_check() == ("ok", "8.0 of 16.0 GiB free", "")
    meminfo.write_text(MEMINFO.format(2**20))
    verdict, found, advice = memory_check()
    assert (verdict, found) == ("look", "1.0 of 16.0 GiB free") and "leave 2.0 GiB free" in advice
    meminfo.unlink()
    assert memory_check()[0] == "look"


def test_a_containers_limit_counts_when_it_is_narrower(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("_MEMINFO", "_LIMIT", "_USED"):
        monkeypatch.setattr(machine_checks, name, tmp_path / name)
    (tmp_path / "_MEMINFO").write_text(MEMINFO.format(8 * 2**20))
    (tmp_path / "_LIMIT").write_text(f"{4 * 2**30}\n")
    (tmp_path / "_USED").write_text(f"{3 * 2**30}\n")
    assert memory_check()[:2] == ("look", "1.0 of 4.0 GiB free")
    (tmp_path / "_LIMIT").write_text("max\n")
    assert memory_check()[:2] == ("ok", "8.0 of 16.0 GiB free")


def test_the_real_memory_of_this_machine_is_read() -> None:
    assert "GiB free" in memory_check()[1]


def test_a_folder_is_made_for_its_owner_alone_and_one_that_others_read_is_shown(tmp_path: Path) -> None:
    state = tmp_path / "state"
    assert folder_check(state) == ("ok", str(state), "")
    state.chmod(0o750)
    verdict, found, advice = folder_check(state)
    assert verdict == "look" and "mode 050" in found and advice == f"chmod 700 {state}"


def test_a_folder_that_cannot_be_made_or_written_fails_with_the_command_that_helps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    verdict, found, advice = folder_check(tmp_path / "file" / "state")
    assert verdict == "failed" and "Not a directory" in found and "chown" in advice
    state = tmp_path / "state"
    state.mkdir(mode=0o700)
    (state / "ledger.jsonl").write_text("")
    allowed = os.access  # tests may run as root, who may write everything
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) == state and allowed(path, mode))
    assert "1 things" in folder_check(state)[1]
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != state)
    assert "cannot be written by this user" in folder_check(state)[1]


def test_what_is_still_to_be_written_has_to_fit_with_room_to_spare(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: type("Usage", (), {"free": 3_000_000_000})())
    assert disk_check(tmp_path) == ("ok", "3.0 GB free, 1 GB needed", "")
    verdict, found, advice = disk_check(tmp_path, 2_500_000_000)
    assert (verdict, found) == ("failed", "3.0 GB free, 3.5 GB needed") and "state_dir" in advice


def test_a_launcher_that_is_not_there_is_said_before_anything_is_asked(tmp_path: Path) -> None:
    def verdict(*launcher: str) -> str:
        settings = {"name": "north", "data_root": tmp_path / "scans", "state_dir": tmp_path / "state"}
        return launcher_check(SiteConfig(**settings, launcher=launcher))[0]  # type: ignore[arg-type]

    assert verdict("env", "-i") == "ok"
    assert verdict("sbatch-of-nowhere", "--wait") == "failed"
