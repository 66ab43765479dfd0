"""A consortium of real processes on loopback, and hands to spoil it with.

Everything is as `meduet-server poc` makes it: authority, nginx with mutual TLS, SuperLink, SuperExec, a
SuperNode per hospital, `meduet-server run` that sees the run through. Between hospitals and proxy are
wires that can be cut, and Python in the hospital's processes looks at a script of what goes wrong there
(`saboteur/`). A run is held in the middle of a round until a test lets it go on.
"""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from client.settings import SiteConfig, load_site_config
from client.site_scans import confirm_patients
from federation.programs.processes import ChildProcess, Supervisor, die_with_parent, read_state
from meduet_models.threads import fixed_threads
from meduet_models.weights import load_weights
from server.app import RunObserver
from server.config import compose_config, plain
from server.deployment.app_folder import ROOT
from server.deployment.status import read_status
from simulations.poc import SMALL, Poc, provision
from simulations.progress import Live
from simulations.run import Made, prepare, simulate
from tests.faults.network import Wire
from tests.small_simulation import SMALL_NETWORK

TINY = (
    "hospitals.patients=9",
    *SMALL_NETWORK,
    "training.steps_per_round=2",
)
SABOTEUR = Path(__file__).with_name("saboteur")
RUN = "run"
LONGEST_S = 400.0
"""No fault takes longer; an idle machine with 2 cores needs half of it."""
_TICK_S = 0.2
_PATIENCE = 3.0  # waits are those of a consortium that is alone; `make faults` has seven on the same cores

Weights = dict[str, Tensor]


def undisturbed(folder: Path, overrides: tuple[str, ...]) -> tuple[Made, Weights]:
    """The same plan run in this process, where nothing goes wrong; its hospitals and final weights."""
    settings = plain(compose_config([*SMALL, *TINY, *overrides, f"folder={folder / 'run'}"]))
    with fixed_threads(1), Live() as live:
        first = prepare(settings, live)
        made = Made(first.hospitals, folder / "encodings")
        result = simulate(prepare(settings, live, made), live, RunObserver())
    return made, result.shared


@dataclass
class Consortium:
    """A run under way, in which a test may spoil what it likes."""

    poc: Poc
    supervisor: Supervisor
    wires: dict[str, Wire]
    sabotage: Path
    began: float = field(default_factory=time.monotonic)

    def until(self, happened: Callable[[], Any], what: str, longest_s: float = LONGEST_S) -> float:
        """Wait, keeping processes up, until something is so; seconds that took."""
        begun = time.monotonic()
        while not happened():
            waited = time.monotonic() - begun
            assert waited < _PATIENCE * longest_s, (
                f"{what}: not after {waited:.0f} s; {self.status()}\n{self.log(RUN)[-1500:]}"
            )
            self.supervisor.poll()
            time.sleep(_TICK_S)
        return time.monotonic() - begun

    def script(self, site: str, steps: Mapping[str, dict[str, Any]]) -> None:
        """What happens at a hospital, by place (a round, or a round and a route), once each."""
        folder = self.sabotage / site
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "script.json").write_text(json.dumps(steps))

    def held(self, site: str) -> tuple[str, int] | None:
        """Place and process id in which a hospital is held."""
        path = self.sabotage / site / "held"
        try:
            place, pid = path.read_text().split()
        except (FileNotFoundError, ValueError):
            return None
        return place, int(pid)

    def let_go(self, site: str) -> None:
        """A held hospital goes on."""
        (self.sabotage / site / "held").unlink(missing_ok=True)

    def status(self) -> dict[str, Any]:
        """The run's status; empty before it has one."""
        return read_status(self.poc.run_folder) or {}

    def journal(self, kind: str) -> list[dict[str, Any]]:
        """The lines of this kind in the run's journal; read as they are, a torn one at the end left out."""
        path = self.poc.run_folder / "journal.jsonl"
        content = path.read_text() if path.is_file() else ""
        records = [
            json.loads(line)["record"] for line in content.splitlines(keepends=True) if line[-1] == "\n"
        ]
        return [record for record in records if record["kind"] == kind]

    def rounds_done(self) -> list[int]:
        """Rounds in the journal, in order."""
        return [line["round"] for line in self.journal("round")]

    def log(self, name: str) -> str:
        """All that a process of ours wrote."""
        path = self.poc.folder / "processes" / f"{name}.log"
        return path.read_text(errors="replace") if path.is_file() else ""

    def centre_child(self, name: str) -> int:
        """Process id of SuperLink, SuperExec or nginx."""
        state = read_state(self.poc.config.state_dir)
        assert state is not None
        pid: int = state["processes"][name]["pid"]
        return pid

    def config(self, site: str) -> SiteConfig:
        """A hospital's settings."""
        return load_site_config(self.poc.site_yamls[site])

    def site_log(self, site: str) -> str:
        """What a hospital's own log holds, which stays there."""
        path = self.config(site).state_dir / "site.log"
        return path.read_text(errors="replace") if path.is_file() else ""

    def weights(self) -> Weights:
        """The final weights."""
        return load_weights(self.poc.run_folder / "model.safetensors")[0]


def consortium(
    folder: Path,
    overrides: tuple[str, ...],
    made: Made,
    scripts: Mapping[str, Mapping[str, dict[str, Any]]],
    runs: bool = True,
) -> Consortium:
    """Provision hospitals that were `made`, with wires and saboteurs; nothing is started yet. `runs`: whether
    somebody will submit the run."""
    with Live() as live:
        poc = provision(folder, [*TINY, *overrides], live, made)
    public = yaml.safe_load(poc.server_yaml.read_text())["public_port"]
    sabotage, wires = folder / "sabotage", {}
    for site, path in poc.site_yamls.items():
        wires[site] = Wire(public)
        reroute(path.parent / "keys" / "connection.yaml", wires[site].port)
        values = yaml.safe_load(path.read_text()) | {"progress_every_s": 0.0}
        path.write_text(yaml.safe_dump(values, sort_keys=False))
        (sabotage / site).mkdir(parents=True)
    children = processes(poc, sabotage)
    supervisor = Supervisor(children if runs else children[:-1], folder / "processes")
    whole = Consortium(poc, supervisor, wires, sabotage)
    for site, steps in scripts.items():
        whole.script(site, steps)
    return whole


def reroute(connection: Path, port: int) -> None:
    """Let a hospital reach the centre at another port."""
    values = yaml.safe_load(connection.read_text()) | {"server": f"localhost:{port}"}
    connection.write_text(yaml.safe_dump(values, sort_keys=False))


def processes(poc: Poc, sabotage: Path) -> tuple[ChildProcess, ...]:
    """Centre, hospitals with their saboteurs, and whoever sees the run through."""
    children = []
    for child in poc.processes():
        if child.name in poc.site_yamls:
            path = os.pathsep.join([str(SABOTEUR), str(ROOT)])
            spoilt = {"PYTHONPATH": path, "MEDUET_SABOTAGE": str(sabotage / child.name)}
            child = dataclasses.replace(child, environment={**child.environment, **spoilt})
        children.append(child)
    arguments = ("run", str(poc.plan_path), "--folder", str(poc.run_folder))
    run = ChildProcess(
        name=RUN,
        command=(sys.executable, "-m", "server.cli", *arguments, "--config", str(poc.server_yaml)),
        environment={"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )
    return (*children, run)


@contextmanager
def beside(config: Path, more: Mapping[str, str] | None = None) -> Iterator[Callable[[], str]]:
    """`meduet-site start` as one more process; gives all that its SuperNode has said so far."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **(more or {})}
    confirm_patients(load_site_config(config))  # as a person does there, who would else be asked to
    process = subprocess.Popen(
        [sys.executable, "-m", "client.cli", "start", "--config", str(config)],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        preexec_fn=die_with_parent(),
    )
    path = load_site_config(config).state_dir / "processes" / "supernode.log"
    try:
        yield lambda: path.read_text(errors="replace") if path.is_file() else ""
    finally:
        process.terminate()
        process.wait(60)


def site_command(*arguments: str, config: Path) -> subprocess.CompletedProcess[str]:
    """`meduet-site ... --config CONFIG`, to its end."""
    return command("client.cli", *arguments, "--config", str(config))


def command(module: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """One of our commands, to its end."""
    return subprocess.run(
        [sys.executable, "-m", module, *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


def kill(*pids: int) -> None:
    """`kill -9`, all at once."""
    for pid in pids:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue


def same_bits(ours: Weights, theirs: Weights) -> bool:
    """Whether two sets of weights are the same to the last bit."""
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)
