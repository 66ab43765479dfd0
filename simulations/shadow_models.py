"""Shadow models: a simulated run made again on other halves of the same patients, for its audit.

Each is a whole run with the run's own settings in a folder of its own, where every hospital trains on half of
its patients, dealt anew. One that is there already is taken as it is; one that was interrupted goes on.

What this file does not do: attack (`audit/attacks/shadows.py`).
"""

import dataclasses
from pathlib import Path

from omegaconf import OmegaConf

from audit.evidence import Shadow
from meduet_models.published.pretrained import MODEL, load_pretrained
from server.app import RunObserver
from server.config import plain
from simulations.consortium import Consortium
from simulations.finished_run import begun_run
from simulations.progress import Live
from simulations.run import Made, Simulation, prepare, simulate

_HALVES = [0.5, 0.0, 0.5]
SHADOWS = "shadows"
"""Their folder, below the audit's."""


def shadow_models(run: Path, folder: Path, count: int, live: Live) -> list[Shadow]:
    """As many models as asked for, retrained below `folder`. Raises what a run raises: `RoundFailed` where
    half of a hospital's patients are too few."""
    hospitals = begun_run(run, live).hospitals
    made = Made(hospitals, folder / "cache")
    shadows = []
    for number in range(1, count + 1):
        live.say(f"shadow model {number} of {count}")
        simulation = _prepared(run, folder, number, live, made)
        path = simulation.folder / MODEL
        if not path.is_file():
            simulate(simulation, live, RunObserver())
        trained_on = {site: _trained(simulation, site) for site in simulation.plan.sites}
        shadows.append(Shadow(load_pretrained(path).network.requires_grad_(False), trained_on))
    return shadows


def _prepared(run: Path, folder: Path, number: int, live: Live, made: Made) -> Simulation:
    """The run again: other halves, and nothing beside the training."""
    own = plain(OmegaConf.load(run / "config.yaml"))  # type: ignore[arg-type]
    name = f"{own['name']} shadow {number}"
    settings = own | {
        "name": name,
        "folder": str(folder / f"{number}"),
        "fresh": False,
        "engine": own["engine"] | {"kind": "process", "workers": 1},
        "site": own["site"] | {"split_fractions": _HALVES},
        "probes": own["probes"] | {"every_rounds": 0},
        "checkpoints": {"keep_early": False},
        "diffusion": None,
        "generation": None,
    }
    simulation = prepare(settings, live, made)
    salted = tuple(
        dataclasses.replace(one, split_salt=f"shadow {number}") for one in simulation.consortium.configs
    )
    dealt = Consortium(simulation.plan, salted, simulation.consortium.state)
    return dataclasses.replace(simulation, consortium=dealt)


def _trained(simulation: Simulation, site: str) -> frozenset[str]:
    scans = simulation.consortium.site(site).scans(simulation.plan)
    return frozenset(
        name for name, split in zip(scans.patients, scans.splits, strict=True) if split == "train"
    )
