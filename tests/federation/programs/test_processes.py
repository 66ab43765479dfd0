"""The supervisor: restarts what ends, stops what it started, and leaves nothing behind."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from federation.programs import processes
from federation.programs.processes import AlreadySupervised, ChildProcess, Supervisor, read_state

ROOT = Path(__file__).resolve().parents[3]
SLEEPS = (sys.executable, "-c", "import time; time.sleep(60)")
PARENT_OF_ONE = (
    sys.executable, "-c",
    "import pathlib, subprocess, sys, time; "
    "p = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']); "
    "pathlib.Path('grandchild').write_text(str(p.pid)); time.sleep(60)",
)  # fmt: skip


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def until(true: Callable[[], bool], seconds: float = 10.0) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def test_a_child_that_is_killed_is_started_again_and_both_are_on_record(tmp_path: Path) -> None:
    said: list[str] = []
    child = ChildProcess(name="one", command=SLEEPS, meanings={-9: "somebody killed it"})
    with Supervisor([child], tmp_path, said.append, pauses_s=(0.1,)) as supervisor:
        first = supervisor.pid("one")
        assert first is not None
        os.kill(first, signal.SIGKILL)

        def again() -> bool:
            supervisor.poll()
            return supervisor.pid("one") not in (None, first)

        until(again)
        state = read_state(tmp_path)
        assert state is not None and state["pid"] == os.getpid()
        assert state["processes"]["one"]["restarts"] == 1
        assert state["processes"]["one"]["last_exit"] == -9
        assert state["processes"]["one"]["pid"] == supervisor.pid("one")
    assert len(said) == 1 and "SIGKILL: somebody killed it" in said[0]


def test_the_pauses_grow_and_a_steady_child_begins_again_with_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    child = ChildProcess(name="one", command=(sys.executable, "-c", "raise SystemExit(7)"))
    with Supervisor([child], tmp_path, said.append, pauses_s=(0.1, 0.2, 0.3)) as supervisor:

        def ended(times: int) -> Callable[[], bool]:
            return lambda: supervisor.poll() is None and len(said) == times

        until(ended(4))
        assert [line.split("again in ")[1].split(" s")[0] for line in said] == ["0.1", "0.2", "0.3", "0.3"]
        assert all("exit 7" in line for line in said)
        monkeypatch.setattr(processes, "STEADY_S", 0.0)
        until(ended(5))
        assert "again in 0.1 s" in said[-1]


def test_an_exit_status_that_is_told_in_words_is_read_from_what_was_written_since_the_start(
    tmp_path: Path,
) -> None:
    (tmp_path / "one.log").write_text("Exit Code: 200\n")  # of another life
    said: list[str] = []
    child = ChildProcess(
        name="one",
        command=(sys.executable, "-c", "print('Exit Code: 305'); raise SystemExit(1)"),
        meanings={305: "the centre refuses", 200: "wrong"},
        exit_pattern=r"Exit Code: (\d+)",
    )
    with Supervisor([child], tmp_path, said.append, pauses_s=(60.0,)) as supervisor:
        until(lambda: supervisor.poll() is None and len(said) == 1)
        state = read_state(tmp_path)
        assert state is not None and state["processes"]["one"]["last_exit"] == 305
    assert "exit 305: the centre refuses" in said[0]


def test_a_child_is_started_again_as_asked_without_a_pause_and_without_counting_as_a_failure(
    tmp_path: Path,
) -> None:
    said: list[str] = []
    child = ChildProcess(name="one", command=SLEEPS)
    with Supervisor([child], tmp_path, said.append, pauses_s=(60.0,)) as supervisor:
        first = supervisor.pid("one")
        supervisor.restart("one")
        supervisor.restart("one")  # asked twice, ended once

        def again() -> bool:
            supervisor.poll()
            return supervisor.pid("one") not in (None, first)

        until(again)
        state = read_state(tmp_path)
        assert state is not None and state["processes"]["one"]["restarts"] == 1
        second = supervisor.pid("one")
        time.sleep(0.1)
        supervisor.poll()
        assert supervisor.pid("one") == second
        assert said == ["one ended as asked, and is started again"]
        assert second is not None
        os.kill(second, signal.SIGKILL)  # an end that nobody asked for has its pause
        until(lambda: supervisor.poll() is None and len(said) == 2)
        assert "again in 60 s" in said[1]
        supervisor.restart("one")  # waits already: left alone
        supervisor.poll()
        assert supervisor.pid("one") is None


def test_a_child_that_does_not_end_when_asked_is_killed_and_started_again(tmp_path: Path) -> None:
    deaf = (
        "import pathlib, signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); "
        "pathlib.Path('ready').touch(); time.sleep(60)"
    )
    child = ChildProcess(name="one", command=(sys.executable, "-c", deaf))
    with Supervisor([child], tmp_path, grace_s=0.3) as supervisor:
        until((tmp_path / "ready").is_file)
        first = supervisor.pid("one")
        supervisor.restart("one")
        until(lambda: supervisor.poll() is None and supervisor.pid("one") not in (None, first))
        state = read_state(tmp_path)
        assert state is not None and state["processes"]["one"]["last_exit"] == -signal.SIGKILL


def test_stopping_ends_children_and_what_they_started(tmp_path: Path) -> None:
    with Supervisor([ChildProcess(name="one", command=PARENT_OF_ONE)], tmp_path) as supervisor:
        until(lambda: (tmp_path / "grandchild").is_file() and (tmp_path / "grandchild").read_text() != "")
        pids = [supervisor.pid("one"), int((tmp_path / "grandchild").read_text())]
    until(lambda: not any(alive(pid) for pid in pids if pid))
    state = read_state(tmp_path)
    assert state is not None and state["pid"] is None
    assert state["processes"]["one"]["state"] == "stopped"


def test_a_child_that_ignores_the_request_is_killed(tmp_path: Path) -> None:
    deaf = (
        "import pathlib, signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); "
        "pathlib.Path('deaf').touch(); time.sleep(60)"
    )
    said: list[str] = []
    child = ChildProcess(name="one", command=(sys.executable, "-c", deaf))
    with Supervisor([child], tmp_path, said.append, grace_s=0.3) as supervisor:
        until((tmp_path / "deaf").is_file)
        pid = supervisor.pid("one")
    assert pid is not None and not alive(pid)
    assert said == ["one does not stop: killed"]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_children_never_outlive_the_supervisor(tmp_path: Path, number: signal.Signals) -> None:
    program = (
        "import pathlib, sys; from federation.programs.processes import ChildProcess, Supervisor\n"
        f"child = ChildProcess(name='one', command={SLEEPS!r})\n"
        f"with Supervisor([child], pathlib.Path({str(tmp_path)!r})) as supervisor: supervisor.run()\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT)
    until((tmp_path / "processes.json").is_file)
    time.sleep(0.3)  # the parent is in `run`
    child = json.loads((tmp_path / "processes.json").read_text())["processes"]["one"]["pid"]
    assert alive(child)
    parent.send_signal(number)
    parent.wait(10)
    until(lambda: not alive(child))
    state = read_state(tmp_path)
    assert state is not None and state["pid"] is None


def test_a_second_supervisor_of_the_folder_is_refused(tmp_path: Path) -> None:
    child = ChildProcess(name="one", command=SLEEPS)
    with Supervisor([child], tmp_path), pytest.raises(AlreadySupervised, match="a supervisor does"):
        Supervisor([child], tmp_path).__enter__()


def test_there_is_no_state_where_nothing_ever_ran(tmp_path: Path) -> None:
    assert read_state(tmp_path) is None


def test_a_file_that_is_read_once_restarts_its_child_when_it_is_fit_and_nobody_is_disturbed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "_FILES_LOOK_S", 0.05)
    said: list[str] = []
    read, busy = tmp_path / "certificate", tmp_path / "busy"
    read.write_text("first")
    check = f"import sys; text = open({str(read)!r}).read(); print('it is', text); sys.exit('bad' in text)"
    works = (
        "import pathlib, subprocess, sys, time\n"
        f"busy = pathlib.Path({str(busy)!r})\n"
        "while True:\n"
        "    if busy.exists():\n"
        "        child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        "        while busy.exists(): time.sleep(0.02)\n"
        "        child.kill()\n"  # and never waited for: what has ended does not count
        "    time.sleep(0.02)\n"
    )
    children = (
        ChildProcess(
            name="node",
            command=SLEEPS,
            reads_once=(str(read), str(tmp_path / "key")),
            check=(sys.executable, "-c", check),
            not_while="worker",
        ),
        ChildProcess(name="worker", command=(sys.executable, "-c", works)),
    )
    with Supervisor(children, tmp_path / "state", said.append) as supervisor:
        first, worker = supervisor.pid("node"), supervisor.pid("worker")

        def says(words: str) -> Callable[[], bool]:
            return lambda: supervisor.poll() is None and any(words in line for line in said)

        read.write_text("bad one")
        until(says("not taken up: it is bad one"))
        busy.touch()
        until(lambda: bool(processes._descendants(worker)))
        read.write_text("good one")
        until(says("is taken up: it is good one"))
        for _ in range(20):
            supervisor.poll()
            time.sleep(0.02)
        assert supervisor.pid("node") == first, "started again while a question was being answered"
        busy.unlink()
        until(says("node ended as asked"))
        until(lambda: supervisor.poll() is None and supervisor.pid("node") not in (None, first))
        assert supervisor.pid("worker") == worker
        again = supervisor.pid("node")
        (tmp_path / "key").write_text("a file that was not there")
        until(lambda: supervisor.poll() is None and supervisor.pid("node") not in (None, again))
    assert sum("taken up" in line for line in said) == 3
