"""Scans that trained nothing, side by side: what probes are read on.

A hospital's own patients of some splits, or the paired patients that every scanner saw. Only a simulation has
them in one place.

Axes: b = scans, t = anatomical targets.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from client.latent_set import LatentSet
from client.site import Site
from federation.plan import RunPlan
from simulations import evaluation
from simulations.hospital_plans import Hospital


@dataclass(frozen=True)
class Held(evaluation.Held):
    """Scans that trained nothing, one row each, with what is known of their anatomy."""

    anatomy: Float[Tensor, "b t"]
    """Anatomical targets of each, NaN where unknown."""
    anatomy_names: tuple[str, ...]
    """What each target is."""


def own_scans(plan: RunPlan, scans: LatentSet, index: int, splits: Sequence[str]) -> Held:
    """A hospital's own patients of these splits; `ValueError` when there are none.

    `index`: the hospital's site label, which may lie beyond the plan's sites.
    """
    rows = [row for split in splits for row in scans.indices(split)]
    if not rows:
        raise ValueError(f"Expected patients of {' or '.join(splits)} at hospital {index}; it has none.")
    patients = tuple(f"{index}/{scans.patients[row]}" for row in rows)
    return Held(scans.latents(rows), (index,) * len(rows), patients, torch.zeros(len(rows), 0), ())


def paired_scans(plan: RunPlan, site: Site, hospital: Hospital, index: int) -> Held | None:
    """The patients that every scanner saw, through this hospital's; none where nothing is simulated."""
    if hospital.paired is None:
        return None
    config = dataclasses.replace(
        site.config,
        data_root=hospital.paired,
        state_dir=site.state_dir.parent.parent / "paired" / site.name,
        layout="plain",
        split_fractions=(0.0, 0.0, 1.0),
    )
    scans = Site(config, site.tokenizer).scans(plan)
    rows = range(scans.num_scans)
    return Held(
        scans.latents(rows), (index,) * len(rows), tuple(scans.patients), torch.zeros(len(rows), 0), ()
    )


def join(parts: Sequence[Held]) -> Held:
    """All rows of several hospitals, whose anatomical targets are the same."""
    return Held(
        torch.cat([part.latents for part in parts]),
        tuple(site for part in parts for site in part.site),
        tuple(patient for part in parts for patient in part.patient),
        torch.cat([part.anatomy for part in parts]),
        parts[0].anatomy_names,
    )
