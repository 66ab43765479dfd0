"""One cell of the benchmark, in a process of its own: train, measure, downstream, one JSON.

    python -m simulations.benchmark.cell data FILE     make and encode the hospitals of a data set
    python -m simulations.benchmark.cell cell FILE     compute a cell; FILE is its settings as JSON

Trains as `meduet-simulate` does, through the same messages; what was interrupted goes on after its last
checkpoint. Hospitals and encodings are made once per data set and only read here; each run has its own site
states. Measured at the end and only once: on patients that trained nothing, at the hospitals that took part
("seen") and with those held out ("all"). Where a method gives each site a model, numbers are the mean over
them; what is costly is measured once for each different content branch.
"""

import json
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from client.latents.latent_set import LatentSet
from client.latents.style_moments import own_moments
from federation.plan.plan import RunPlan
from meduet_models.meduet import MeDUET
from meduet_models.sharing import constant_keys, content_keys
from meduet_models.style.bank import StyleBank
from meduet_models.threads import fixed_threads
from meduet_models.tokenizer.tokenizer import Tokenizer
from meduet_models.weights import sha256_of_tensors
from server.app import RunObserver
from server.model import MeduetModel
from simulations.benchmark.downstream import Downstream, downstream_rows
from simulations.benchmark.settings import Cell, DataSet
from simulations.downstream.evaluate import evaluate_downstream
from simulations.evaluation import load_model, measure
from simulations.hospitals.held_out import Held, join, own_scans, paired_scans
from simulations.hospitals.make import make_hospitals
from simulations.hospitals.plans import Hospital
from simulations.observer import TRAINING_SCANS, site_models
from simulations.progress import Live
from simulations.run import Made, Simulation, prepare, simulate
from simulations.settings import settings_from
from simulations.yardsticks import yardsticks
from storage.files import write_whole

_MADE = "hospitals.json"

Probes = Callable[[MeDUET, RunPlan, Held, Sequence[Tensor], bool, Tokenizer | None], dict[str, float]]


@dataclass(frozen=True)
class Instruments:
    """What measures a cell."""

    probes: Probes
    """(model, plan, held, training latents of each hospital, thorough, tokenizer) to named numbers."""
    downstream: Downstream
    """Trains and tests the downstream tasks."""


def make_data_set(made: DataSet) -> Made:
    """The hospitals of a data set, made and encoded below its folder unless they are there."""
    folder = Path(made.folder)
    if not (folder / _MADE).is_file():
        hospitals = make_hospitals(settings_from(made.config)[1], folder / "hospitals")
        with _quiet() as live, fixed_threads(1):
            simulation = prepare(made.config, live, Made(hospitals, folder / "cache"))
            _opened(simulation)
            _paired(simulation)
        write_whole(folder / _MADE, json.dumps([asdict(h) for h in hospitals], default=str, indent=1) + "\n")
    return read_made(folder)


def read_made(folder: Path) -> Made:
    """The data set in `folder`; raises `ValueError` when it was not made to the end."""
    try:
        values = json.loads((folder / _MADE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"Expected a data set in {folder}; making it failed. Its log says why.") from None
    paths = ("root", "truth", "paired")
    hospitals = [
        Hospital(**h | {name: None if h[name] is None else Path(h[name]) for name in paths}) for h in values
    ]
    return Made(hospitals, folder / "cache")


def run_cell(cell: Cell, instruments: Instruments) -> dict[str, Any]:
    """Everything that a cell tells, JSON values; goes on with what an interrupted attempt left."""
    seconds, started = dict[str, float](), time.monotonic()
    with _quiet() as live, fixed_threads(1):
        made = read_made(Path(cell.made))
        simulation = prepare(_equal_compute(cell.config, len(made.hospitals)), live, made)
        scans = _opened(simulation)
        models = _models(cell, simulation, scans, live)
        seconds["training"] = time.monotonic() - started
        measures = _measures(cell, simulation, scans, models, instruments.probes)
        seconds["probes"] = time.monotonic() - started - seconds["training"]
        different = [m for m, first in zip(models, _first_of_content(models), strict=True) if first]
        evaluated = downstream_rows(cell, simulation, scans, different, instruments.downstream)
        seconds["total"] = time.monotonic() - started
        seconds["downstream"] = seconds["total"] - seconds["training"] - seconds["probes"]
    return {
        "key": cell.key,
        "data": cell.data,
        "method": cell.method,
        "seed": cell.seed,
        "patients": cell.patients,
        "plan_sha256": simulation.plan.sha256,
        "measures": measures,
        "downstream": [_finite(asdict(row)) for row in evaluated.rows],
        "fairness": [_finite(asdict(one)) for one in evaluated.fairness],
        "seconds": {name: round(value, 1) for name, value in seconds.items()},
    }


def _finite(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row as JSON values, null for what is not a number."""

    def plain(value: Any) -> Any:
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return {
        name: [plain(one) for one in own] if isinstance(own, (tuple, list)) else plain(own)
        for name, own in row.items()
    }


def _equal_compute(config: Mapping[str, Any], num_hospitals: int) -> Mapping[str, Any]:
    """The pooled participant takes as many steps as all sites together: the same number of scans is seen."""
    if config["aggregation"]["method"] != "pooled":
        return config
    training = dict(config["training"])
    training["steps_per_round"] *= num_hospitals - len(config["held_out"])
    return {**config, "training": training}


def _models(cell: Cell, simulation: Simulation, scans: Sequence[LatentSet], live: Live) -> list[MeDUET]:
    """The models to be measured: one, or one for each site; none without pretraining."""
    plan = simulation.plan
    match cell.variant.weights:
        case "none":
            return []
        case "untrained":
            shared, home = MeduetModel(plan, anatomy=simulation.settings.anatomy_path).start()
            model = load_model(plan, {**shared, **home})
            moments = {site: own_moments(own, plan) for site, own in zip(plan.sites, scans, strict=False)}
            style_bank = StyleBank.of(plan.sites, moments, with_entries=False)
            model.set_latent_scale(style_bank.centre, style_bank.scale)
            return [model.eval()]
        case "trained":
            result = simulate(simulation, live, RunObserver())
            models = site_models(plan, simulation.consortium, result.shared, plan.num_rounds)
            for model in models:
                if not cell.variant.erasure:
                    width = plan.network.width
                    model.set_erasure(torch.zeros(width), torch.eye(width))
                    model.set_content_code(None)
            return models


def _opened(simulation: Simulation) -> list[LatentSet]:
    """Every hospital's scans: the plan's sites, then those held out."""
    consortium = simulation.consortium
    return [consortium.site(name).scans(consortium.everyone) for name in consortium.everyone.sites]


def _paired(simulation: Simulation) -> list[Held | None]:
    consortium = simulation.consortium
    return [
        paired_scans(consortium.everyone, consortium.site(hospital.name), hospital, index)
        for index, hospital in enumerate(simulation.hospitals)
    ]


def _measures(
    cell: Cell,
    simulation: Simulation,
    scans: Sequence[LatentSet],
    models: Sequence[MeDUET],
    probes: Probes,
) -> dict[str, dict[str, float]]:
    """Probes by which hospitals were measured: `seen`, and `all` where some were held out."""
    if not models:
        return {}
    plan, everyone = simulation.plan, simulation.consortium.everyone
    paired = [held for held in _paired(simulation) if held is not None] if cell.patients == "test" else []
    num_opened = len(scans) if cell.patients == "test" else len(plan.sites)
    parts = paired or [own_scans(everyone, scans[i], i, [cell.patients]) for i in range(num_opened)]
    training = [own.latents(own.indices("train")[:TRAINING_SCANS]) for own in scans]
    groups = {"seen": len(plan.sites)} | ({"all": len(parts)} if len(parts) > len(plan.sites) else {})
    tokenizer = simulation.consortium.site(plan.sites[0]).tokenizer
    measured = {}
    for name, count in groups.items():
        held, own = join(parts[:count]), training[:count]
        readings = [
            probes(model, plan, held, own, thorough, tokenizer if thorough else None)
            for model, thorough in zip(models, _first_of_content(models), strict=True)
        ]
        measured[name] = _mean(readings)
    return measured


def _mean(readings: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Mean of each number over the models that told it; what is not finite is no number."""
    names = dict.fromkeys(name for one in readings for name in one)
    known = {n: [one[n] for one in readings if n in one and math.isfinite(one[n])] for n in names}
    return {name: sum(values) / len(values) for name, values in known.items() if values}


def _first_of_content(models: Sequence[MeDUET]) -> list[bool]:
    """Whether each model is the first with its content branch."""
    found, first = set[str](), []
    for model in models:
        state = model.state_dict()
        content = {name: state[name] for name in (*content_keys(model), *constant_keys(model))}
        first.append((sha256 := sha256_of_tensors(content)) not in found)
        found.add(sha256)
    return first


def _quiet() -> Live:
    """Progress that nobody watches: the benchmark shows its cells."""
    return Live(Console(stderr=True, quiet=True))


def _probes(
    model: MeDUET,
    plan: RunPlan,
    held: Held,
    training: Sequence[Tensor],
    thorough: bool,
    tokenizer: Tokenizer | None,
) -> dict[str, float]:
    """Probes, and where content is measured for the first time what they are to be read beside."""
    measured = measure(model, plan, held, training, thorough, tokenizer)
    return {**yardsticks(model, plan, held, training), **measured} if thorough else measured


def main(arguments: Sequence[str]) -> None:
    """Entry point of the process: `data FILE` or `cell FILE`."""
    kind, file = arguments
    text = Path(file).read_text(encoding="utf-8")
    match kind:
        case "data":
            make_data_set(DataSet(**json.loads(text)))
        case "cell":
            cell = Cell.from_json(text)
            result = run_cell(cell, Instruments(_probes, evaluate_downstream))
            write_whole(Path(cell.result), json.dumps(result, indent=1, allow_nan=False) + "\n")
        case _:
            raise ValueError(f"Expected data or cell; got {kind!r}.")


if __name__ == "__main__":
    main(sys.argv[1:])
