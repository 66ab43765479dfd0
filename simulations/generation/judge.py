"""A run's diffusion model, judged on what the observer holds: real scans of several hospitals side by side.

Collects what `generation.py` needs of a simulated consortium: scans that trained nothing (paired phantoms,
where there are any), those that did, the prepared volumes behind them, and labels. What this file does not
do: train, sample or measure.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from client.latents.examples import examples_of
from client.latents.labelled import LabelledScans
from client.latents.latent_set import LatentSet
from client.scans.cohort import read_entry
from federation.plan.plan import RunPlan
from meduet_models.diffusion.artefact import GenerativeModel
from meduet_models.diffusion.conditions import Examples
from meduet_models.diffusion.sampling import SamplingSettings
from meduet_models.meduet import MeDUET
from meduet_models.tokenizer.tokenizer import Tokenizer
from scans.whole_volumes import volume_at
from simulations.generation.settings import FOLDER, GenerationSettings
from simulations.hospitals.held_out import Held
from simulations.hospitals.labelled import labels_for_segmenters

_TRAINING_SCANS = 24


@dataclass(frozen=True)
class Bench:
    """What a generative model is judged on."""

    plan: RunPlan
    tokenizer: Tokenizer
    training: Sequence[LatentSet]
    """Scans of the plan's sites, in its order."""
    held: Held
    """Scans that trained nothing."""
    held_scans: Sequence[tuple[LatentSet, Sequence[int]]]
    """Where they come from, in the same order."""

    def volumes(self) -> Float[Tensor, "b 1 D H W"]:
        """The prepared scans behind `held`."""
        prepared = []
        for scans, rows in self.held_scans:
            for row in rows:
                scan, _ = read_entry(scans.entries[row], self.plan.volumes)
                prepared.append(volume_at(scan, self.plan.volumes, scans.geometry(row)))
        return torch.stack(prepared)

    def examples(self) -> Examples:
        """Training scans of all sites."""
        return Examples.join([examples_of(s, s.indices("train"), self.plan) for s in self.training])

    def labelled(self) -> tuple[LabelledScans, LabelledScans] | None:
        """Training scans with labels, and held-out ones; none where either has none."""
        own = [(name, s, s.indices("train")) for name, s in zip(self.plan.sites, self.training, strict=True)]
        held = [(str(place), scans, rows) for place, (scans, rows) in enumerate(self.held_scans)]
        return labels_for_segmenters(own, held)

    def training_latents(self) -> list[Tensor]:
        """Some training latents of each site."""
        return [scans.latents(scans.indices("train")[:_TRAINING_SCANS]) for scans in self.training]


def judge(
    model: GenerativeModel,
    bench: Bench,
    folder: Path,
    settings: GenerationSettings,
    progress: Callable[[str, int, int], None],
    swap_model: MeDUET | None = None,
) -> dict[str, Any]:
    """Sample, measure and draw below `folder`; what `generation/quality.json` says.

    Where the same patients were seen by several scanners, harmonisation is measured against the truth too.
    """
    # MONAI takes seconds to import, and few runs have such a model
    from simulations.generation.evaluate import evaluate_generation
    from simulations.generation.harmonisation import measure_harmonisation

    volumes = bench.volumes()
    judged = evaluate_generation(
        model,
        bench.plan,
        bench.tokenizer,
        bench.held,
        bench.examples(),
        folder,
        settings,
        volumes=volumes,
        labelled=None if settings.use is None else bench.labelled(),
        progress=progress,
    )
    conditions = model.transformer.config.sizes.names
    if bench.held.paired and model.bank is not None and {"content", "style"} <= set(conditions):
        measure_harmonisation(
            model,
            bench.plan,
            bench.tokenizer,
            bench.held,
            bench.training_latents(),
            folder / FOLDER,
            volumes=volumes,
            settings=SamplingSettings(
                steps=settings.steps, solver=settings.solver, guidance=settings.guidance
            ),
            swap_model=swap_model,
            on_step=lambda done, total: progress("harmonising", done, total),
        )
    return judged
