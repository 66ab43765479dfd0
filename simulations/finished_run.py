"""A finished run of `meduet-simulate`, opened again: plan, hospitals, encodings, encoder and style bank.

Hospitals are those that the run made; encodings come from the sites' caches. What this file does not do: it
changes nothing of the run but the books of its sites, which record what leaves them.
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from omegaconf import OmegaConf

from client.latents.latent_set import LatentSet
from federation.plan.plan import RunPlan
from meduet_models.meduet import FactorNetwork
from meduet_models.published.pretrained import MODEL, load_pretrained
from meduet_models.style.bank import StyleBank
from server.checkpoints import Checkpoints
from server.config import plain
from simulations.consortium import Consortium, site_configs
from simulations.hospitals.make import make_hospitals
from simulations.hospitals.plans import Hospital
from simulations.progress import Live
from simulations.settings import SimulationSettings, settings_from


@dataclass(frozen=True)
class FinishedRun:
    """A finished run, opened."""

    folder: Path
    plan: RunPlan
    settings: SimulationSettings
    consortium: Consortium
    hospitals: list[Hospital]
    """Those of the plan in its order, then those held out."""
    pretrained: FactorNetwork
    held_out: tuple[str, ...]
    scans: dict[str, LatentSet]
    """Of the sites of the plan."""

    def outside(self, name: str) -> LatentSet:
        """The scans of a hospital that the plan does not list, under the plan's volumes; the label of its
        site is one more than the plan's."""
        plan = dataclasses.replace(self.plan, sites=(*self.plan.sites, name))
        return self.consortium.site(name).scans(plan)

    def bank(self) -> StyleBank:
        """The style bank of the run's last checkpoint. Raises `ValueError` when its sites exchanged none."""
        last = Checkpoints(self.folder / "checkpoints", self.plan.sha256).latest()
        if last is None or not last.bank:
            raise ValueError(f"Expected a run whose sites exchanged style; {self.folder} has no style bank.")
        return StyleBank.from_tensors(last.bank, self.plan.sites)


def open_run(folder: Path, live: Live) -> FinishedRun:
    """Open the folder of a finished run. Raises `ValueError` when it holds none."""
    if not (folder / "config.yaml").is_file() or not (folder / MODEL).is_file():
        raise ValueError(
            f"Expected the folder of a finished run, with config.yaml and {MODEL}; got {folder}. Run "
            "meduet-simulate first; method=alone shares no model."
        )
    run = begun_run(folder, live)
    scans = {}
    for name in run.plan.sites:
        with live.reading(name) as reading:
            scans[name] = run.consortium.site(name).scans(run.plan, reading)
    network = load_pretrained(folder / MODEL).network
    return FinishedRun(
        folder, run.plan, run.settings, run.consortium, run.hospitals, network, run.held_out, scans
    )


@dataclass(frozen=True)
class BegunRun:
    """A run of which there are settings and plan; whether it came to its end is another question."""

    plan: RunPlan
    settings: SimulationSettings
    consortium: Consortium
    hospitals: list[Hospital]
    held_out: tuple[str, ...]


def begun_run(folder: Path, live: Live) -> BegunRun:
    """Plan and hospitals of the run in a folder that has config.yaml and plan.json; opens no scan.

    Raises `ValueError` where config.yaml lacks a setting: another version made the run.
    """
    config = plain(OmegaConf.load(folder / "config.yaml"))  # type: ignore[arg-type]
    try:
        settings, hospitals_plan = settings_from({**config, "folder": str(folder), "fresh": False})
    except KeyError as missing:
        raise ValueError(
            f"Expected every setting of this version in {folder / 'config.yaml'}; {missing.args[0]} is not "
            "there, so another version made the run: open it with that one, or make it again."
        ) from missing
    plan = RunPlan.from_json((folder / "plan.json").read_text(encoding="utf-8"))
    with live.counting("finding the hospitals") as progress:
        made = make_hospitals(hospitals_plan, folder / "hospitals", progress)
    held_out = tuple(config.get("held_out") or ())
    hospitals = [h for h in made if h.name not in held_out] + [h for h in made if h.name in held_out]
    state = folder / "sites"
    consortium = Consortium(plan, site_configs(hospitals, plan, settings, state), state)
    return BegunRun(plan, settings, consortium, hospitals, held_out)
