"""One cell of bench/round_overhead.py: a consortium of real processes, one run, what it cost.

The consortium is that of `meduet-server poc`: authority, certificates, nginx with mutual TLS, SuperLink,
SuperExec, a SuperNode and a SuperExec per site, a process per question; new ones for every cell, because a
process's high-water mark never falls. FedMeDUET and FedAvg are submitted to it in the same way and watched in
the same way: by files, and by asking Flower for its runs twice a minute (`meduet-server run` asks every 5 s;
each question is a program that takes more than a second of CPU, which would be measured, too). Nothing is
submitted again: a run that fails is a cell that failed.
"""

import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from round_overhead_processes import Watcher

from federation.journal import Journal
from federation.programs.processes import GRACE_S, ChildProcess, Supervisor
from meduet_models.meduet import MeDUET
from meduet_models.sharing import shared_keys
from server.config import compose_config, plain
from server.deployment.app_folder import ROOT, write_app_folder
from server.deployment.control import Control, ControlFailed
from server.run_folder import is_complete
from simulations.poc import SMALL, Poc, provision
from simulations.progress import Live
from simulations.run import Made, prepare

NETWORKS = {
    1: ("width=96", "depth=3", "heads=4", "decoder_width=60", "decoder_depth=2", "decoder_heads=4"),
    20: ("width=320", "depth=7", "heads=5", "decoder_width=160", "decoder_depth=3", "decoder_heads=5"),
    180: ("width=720", "depth=12", "heads=12", "decoder_width=384", "decoder_depth=8", "decoder_heads=12"),
}
"""Megabytes of the content branch in bfloat16 (real ones: 0.94, 19.97, 182.18) and the network that has them;
180 is ViT-B with width 720 in place of 768, which would be 204."""
SUMMED = ("aggregation.secure_sum=true", "aggregation.norm_tolerance=0")
_LOOK_S = 30.0
_LEAST_MB = 1500.0
_APP = Path(__file__).with_name("round_overhead_app")


class CellFailed(RuntimeError):
    """The run did not come to its end; the text says why."""


@dataclass(frozen=True)
class Cell:
    """What is measured."""

    program: Literal["ours", "summed", "fedavg"]
    """FedMeDUET, FedMeDUET with secure sums, or Flower's own."""
    megabytes: int
    sites: int
    state: Literal["sqlite", "memory"]
    wire_dtype: str = "mxint8"
    """How FedMeDUET's weights and updates travel; FedAvg's are always float32."""

    def __str__(self) -> str:
        """In words, and as a folder's name."""
        return f"{self.program}-{self.megabytes}MB-{self.sites}sites-{self.state}-{self.wire_dtype}"


def measure(cell: Cell, rounds: int, limit_s: float, work: Path) -> dict[str, Any]:
    """Run a cell within `limit_s` (making hospitals not counted); everything it started is stopped."""
    folder = work / str(cell)
    shutil.rmtree(folder, ignore_errors=True)
    measurement: dict[str, Any] = {
        **asdict(cell),
        "when": datetime.now().astimezone().isoformat(timespec="seconds"),
        "load_before": os.getloadavg()[0],
    }
    poc = _provisioned(cell, rounds, work, folder)
    measurement |= _sizes(poc)
    supervisor = Supervisor(_processes(poc, cell), folder / "processes", _say, grace_s=3 * GRACE_S)
    watcher, began = Watcher(), time.monotonic()
    try:
        with supervisor:
            watcher.start()  # after the fork of those that the supervisor starts
            measurement |= _see_through(cell, poc, supervisor, began + limit_s)
    except CellFailed as error:
        measurement["failed"] = str(error)
    finally:
        left = watcher.finish() if watcher.is_alive() else []
    measurement |= {
        "seconds": round(time.monotonic() - began, 1),
        "processes": watcher.peaks_mb(),
        "together_mb": watcher.together_mb,
        "left_over": left,
        "locked": _locked(folder / "centre" / "superlink.log"),
        "database_mb": sum(p.stat().st_size for p in folder.glob("centre/superlink.db*")) / 1e6,
    }
    if "failed" not in measurement:
        shutil.rmtree(folder)
    return measurement


def _provisioned(cell: Cell, rounds: int, work: Path, folder: Path) -> Poc:
    """Certificates, settings and plan of this cell; hospitals are made once for each number of them."""
    overrides = [
        f"hospitals.num_hospitals={cell.sites}", "hospitals.patients=9", "volumes.spacing_mm=[6,8,8]",
        "volumes.shape=[32,24,24]", "style.minimum_cohort=2", f"release.wire_dtype={cell.wire_dtype}",
        *(f"network.{setting}" for setting in NETWORKS[cell.megabytes]),
        f"training.rounds={rounds}", "training.steps_per_round=1", "training.batch_size=4",
        "training.learning_rate=1e-4", "training.final_learning_rate=1e-4", "aggregation.deadline_s=900",
        *SUMMED * (cell.program == "summed"),
    ]  # fmt: skip
    hospitals = work / f"hospitals-{cell.sites}"
    with Live() as live:
        first = prepare(plain(compose_config([*SMALL, *overrides, f"folder={hospitals}"])), live)
        made = Made(first.hospitals, hospitals / "encodings")
        return provision(folder, overrides, live, made)


def _sizes(poc: Poc) -> dict[str, Any]:
    plan = poc.plan
    network = MeDUET(plan.network, len(plan.sites), seed=plan.seed)
    weights = network.state_dict()
    shared = shared_keys(network, plan.style.head, plan.aggregation.method)
    return {
        "values": sum(tensor.numel() for tensor in weights.values()),
        "values_shared": sum(weights[name].numel() for name in shared),
        "tensors_shared": len(shared),
        "rounds_asked": plan.training.rounds,
    }


def _processes(poc: Poc, cell: Cell) -> Sequence[ChildProcess]:
    """Those of the consortium; with the state in memory, the centre is `round_overhead_centre.py`."""
    if cell.state == "sqlite":
        return poc.processes()
    program = str(Path(__file__).with_name("round_overhead_centre.py"))
    command = (sys.executable, program, str(poc.server_yaml))
    return [replace(child, command=command) if child.name == "centre" else child for child in poc.processes()]


def _see_through(cell: Cell, poc: Poc, supervisor: Supervisor, end: float) -> dict[str, Any]:
    """Submit the run and wait for it; its rounds and its traffic."""
    control, run, next_look = Control(poc.config), "", 0.0
    ours = cell.program != "fedavg"
    plan = poc.plan_path if ours else poc.folder / "plan.json"  # without our envelope
    settings = {"plan": str(plan), "folder": str(poc.run_folder)}
    if ours:
        settings["consortium"] = str(control.consortium.resolve())
    with tempfile.TemporaryDirectory(prefix="overhead-app-") as parent:
        app = write_app_folder(Path(parent)) if ours else _baseline(Path(parent))
        while not (run and _is_done(cell, poc)):
            supervisor.poll()
            if time.monotonic() > end:
                raise CellFailed("not done within the time limit")
            if (left := _available_mb()) < _LEAST_MB:
                raise CellFailed(f"stopped, as the machine had {left:.0f} MB of memory left")
            if time.monotonic() >= next_look:
                try:
                    run = run or control.start(app, settings)
                    (status,) = [one.status for one in control.runs() if one.identity == run]
                    if status.startswith("finished") and not _is_done(cell, poc):
                        raise CellFailed(f"{status}: {' '.join(control.log(run).split())[-600:]}")
                except ControlFailed as error:
                    if run:
                        _say(str(error))
                next_look = time.monotonic() + (_LOOK_S if run else 1.0)
            time.sleep(0.2)
        rounds = _our_rounds(poc) if ours else _fedavg_rounds(poc)
        # what Flower counted on the fleet routes, of the whole run
        (listed,) = [one for one in control._flwr("list", "centre")["runs"] if one["run-id"] == run]
    return {"rounds": rounds, "traffic": listed["network-traffic"]}


def _available_mb() -> float:
    lines = Path("/proc/meminfo").read_text("utf-8").splitlines()
    return next(float(line.split()[1]) / 1024 for line in lines if line.startswith("MemAvailable"))


def _locked(log: Path) -> int:
    """How often SuperLink answered 500 because its database was locked for 5 s; each may cost a reply."""
    return log.read_text("utf-8", "replace").count("database is locked") if log.is_file() else 0


def _baseline(parent: Path) -> Path:
    folder = parent / "fedavg"
    shutil.copytree(_APP, folder, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(
        ROOT / "meduet_models",
        folder / "meduet_models",
        ignore=shutil.ignore_patterns("__pycache__", "*.safetensors"),
    )
    return folder


def _is_done(cell: Cell, poc: Poc) -> bool:
    if cell.program == "fedavg":
        return (poc.run_folder / "rounds.json").is_file()
    return is_complete(poc.run_folder, poc.plan.sha256)


def _our_rounds(poc: Poc) -> list[dict[str, float]]:
    """Rounds as the run's own metrics tell them; ends from its journal, when a round is on disk."""
    metrics = json.loads((poc.run_folder / "metrics.json").read_text("utf-8"))
    ends = {
        entry.record["round"]: datetime.fromisoformat(entry.utc).timestamp()
        for entry in Journal(poc.run_folder / "journal.jsonl").entries()
        if entry.record["kind"] == "round"
    }
    rounds = []
    for report in metrics["rounds"]:
        sites = report["sites"].values()
        if report["refused"] or report.get("burnt"):
            raise CellFailed(f"round {report['round']}: refused {report['refused']}")
        rounds.append(
            {
                "round": report["round"],
                "end": ends[report["round"]],
                "round_s": report["seconds"],
                # of a masked round no site tells its seconds
                "training_s": max(site.get("seconds", 0.0) for site in sites),
                "down": sum(site["bytes_down"] for site in sites),
                "up": sum(site["bytes_up"] for site in sites),
            }
        )
    return rounds


def _fedavg_rounds(poc: Poc) -> list[dict[str, float]]:
    rounds = []
    for report in json.loads((poc.run_folder / "rounds.json").read_text("utf-8")):
        sites = report["sites"]
        if len(sites) != len(poc.plan.participants):
            raise CellFailed(f"round {report['round']}: {len(sites)} replies")
        rounds.append(
            {
                "round": report["round"],
                "end": report["end"],
                "round_s": report["end"] - report["begin"],
                "training_s": max(site["seconds"] for site in sites),
                "down": report["down"] * len(sites),
                "up": sum(site["up"] for site in sites),
            }
        )
    return rounds


def _say(line: str) -> None:
    print(f"  {line}", flush=True)
