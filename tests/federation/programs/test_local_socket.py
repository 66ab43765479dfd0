"""Another account of the machine: with Flower's own programs it controls the centre and takes a hospital's
question; with ours it reaches nothing but the routes that sites need."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from federation.programs.processes import ChildProcess, die_with_parent
from server.cli import main
from server.consortium.provisioning import ConsortiumSettings, SiteEntry, provision
from server.deployment.app_folder import write_app_folder
from server.deployment.config import ServerConfig, load_server_config
from server.deployment.control import Control, ControlFailed, FlowerRun
from server.deployment.superlink import superlink_processes
from simulations.poc import reserve_ports
from tests.local_account import attack

HOSPITAL = Path(__file__).with_name("hospital_with_a_question.py")


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> ServerConfig:
    folder = tmp_path_factory.mktemp("centre")
    sites = (SiteEntry(name="north"),)
    provision(ConsortiumSettings(name="test", server="localhost:1", sites=sites), folder / "consortium")
    port, health, public = reserve_ports(3)
    (folder / "server.yaml").write_text(
        f"state_dir: state\nconsortium: consortium\nport: {port}\nhealth_port: {health}\n"
        f"public_port: {public}\nproxy: none\n"
    )
    return load_server_config(folder / "server.yaml")


@contextmanager
def up(child: ChildProcess, folder: Path, says: str, flowers_own: str = "") -> Iterator[None]:
    """A program that has said that it is up; `flowers_own`: Flower's program in place of ours."""
    command = child.command
    if flowers_own:
        command = (str(Path(sys.executable).with_name(flowers_own)), *child.command[4:])
    log = folder / "said"
    with log.open("wb") as said:
        process = subprocess.Popen(
            command, env={**os.environ, **child.environment}, stdout=said, stderr=said, cwd=folder,
            preexec_fn=die_with_parent(),
        )  # fmt: skip
    end = time.monotonic() + 60
    while says not in log.read_text():
        assert process.poll() is None and time.monotonic() < end, log.read_text()
        time.sleep(0.1)
    try:
        yield
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(30)


def test_at_flowers_own_superlink_another_account_submits_lists_and_stops(
    config: ServerConfig, tmp_path: Path
) -> None:
    superlink, _ = superlink_processes(config)
    with up(superlink, tmp_path, "Uvicorn running", "flower-superlink"):
        got = attack("control", f"127.0.0.1:{config.port}", str(config.state_dir / "superlink.sock"))
    run = got["submit by port"]
    assert run.isdigit() and got["list by port"] == run and got["stop by port"] == "True"


def served(control: Control) -> list[FlowerRun]:
    """What the centre's own account is told; SuperLink may need a moment."""
    for _ in range(60):
        try:
            return control.runs()
        except ControlFailed:
            time.sleep(0.5)
    return control.runs()


def test_at_our_superlink_its_own_account_submits_and_stops_and_another_reaches_the_sites_routes_only(
    config: ServerConfig, tmp_path: Path
) -> None:
    superlink, _ = superlink_processes(config)
    with up(superlink, tmp_path, "Application startup complete"):
        control = Control(config)
        served(control)
        submitted = control.start(write_app_folder(tmp_path), {})
        before = control.runs()
        got = attack("control", f"127.0.0.1:{config.port}", str(config.state_dir / "superlink.sock"))
        assert control.runs() == before
        assert [run.identity for run in before if not run.finished] == [submitted]
        assert main(["stop", "--config", str(config.consortium.parent / "server.yaml")]) == 0
        assert all(run.finished for run in control.runs())
    assert {words for tried, words in got.items() if "port" in tried} == {"status 403"}
    assert {words for tried, words in got.items() if "socket" in tried} == {
        "refused: [Errno 13] Permission denied"
    }


def hospital(tmp_path: Path, whose: str) -> tuple[ChildProcess, int]:
    """A SuperNode's local server with one question, and a task that was told its token."""
    (port,) = reserve_ports(1)
    tmp_path.chmod(0o700)
    variables = {"MEDUET_FLOWER_SOCKET": str(tmp_path / "supernode.sock")}
    command = (sys.executable, str(HOSPITAL), whose, str(port), str(tmp_path / "token"))
    return ChildProcess(name="hospital", command=command, environment=variables), port


def test_with_flowers_own_supernode_another_account_takes_the_question(tmp_path: Path) -> None:
    child, port = hospital(tmp_path, "flower")
    with up(child, tmp_path, "a task runs"):
        got = attack("runtime", f"127.0.0.1:{port}", str(tmp_path / "supernode.sock"))
    assert (tmp_path / "token").read_text() in got["tokens seen"].split()
    assert got["question by port"] == "7"


def test_with_our_supernode_another_account_sees_no_token_and_a_token_is_of_no_use(tmp_path: Path) -> None:
    child, port = hospital(tmp_path, "ours")
    with up(child, tmp_path, "a task runs"):
        token = (tmp_path / "token").read_text()
        got = attack("runtime", f"127.0.0.1:{port}", str(tmp_path / "supernode.sock"), token)
    assert token not in got["tokens seen"].split()
    assert got["question by port"] == "refused: [Errno 111] Connection refused"
    assert got["question by socket"] == "refused: [Errno 13] Permission denied"
