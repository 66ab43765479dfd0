"""Held-out scans as the observer of a simulation sees them: latents, who, where, what is known of anatomy.

Two sources: a hospital's own patients of given splits, and, with phantoms, patients that every scanner saw.
Anatomical targets: volumes of labelled structures on the prepared grid (mm³; what the crop cuts off is not
counted), covariates that are numbers, sex (F 0, M 1); of paired phantoms also the slowest waves of the
deformation that made them (mm, orthonormal cosine transform of the velocity field), which no label shows.
What this file does not do: it measures no model (`evaluation.py`).

Axes: b = scans, t = anatomical targets, c d h w = latents.
"""

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from scipy.fft import dctn
from torch import Tensor

from client.latents.latent_set import LatentSet
from client.site import Site
from federation.plan.plan import RunPlan
from simulations.hospitals.plans import TRUTH, Hospital

_WAVES = ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1))
_SEXES = {"F": 0.0, "M": 1.0}


@dataclass(frozen=True)
class Held:
    """Scans that trained nothing, one row each."""

    latents: Float[Tensor, "b c d h w"]
    """Their latents."""
    site: tuple[int, ...]
    """Hospital whose scanner made each."""
    patient: tuple[str, ...]
    """Patient of each; the same name at two sites means the same anatomy on both scanners."""
    anatomy: Float[Tensor, "b t"]
    """Anatomical targets of each scan, NaN where unknown; t may be 0."""
    anatomy_names: tuple[str, ...]
    """What they are: `volume_<label>` in mm³, covariates by name, `deformation_<axis>_<wave>` in mm."""

    @property
    def paired(self) -> bool:
        """Whether patients were scanned at more than one site."""
        return len(set(self.patient)) < len(set(zip(self.patient, self.site, strict=True)))

    def rows(self, site: int) -> list[int]:
        """Rows of a site, by patient."""
        return sorted((i for i, s in enumerate(self.site) if s == site), key=lambda i: self.patient[i])


def own_scans(plan: RunPlan, scans: LatentSet, index: int, splits: Sequence[str]) -> Held:
    """A hospital's own patients of these splits, named `<index>/<patient>`: another hospital's are others.

    Raises `ValueError` when there is no such patient.
    """
    rows = [row for split in splits for row in scans.indices(split)]
    if not rows:
        raise ValueError(f"Expected patients in the splits {', '.join(splits)}; hospital {index} keeps none.")
    return _held(scans, rows, index, f"{index}/", [_targets(plan, scans, row) for row in rows])


def paired_scans(plan: RunPlan, site: Site, hospital: Hospital, index: int) -> Held | None:
    """The phantoms that every scanner saw, through this hospital's; None where nothing is simulated."""
    scans = paired_set(plan, site, hospital)
    if scans is None or hospital.paired is None:
        return None
    truth = hospital.paired.parent / TRUTH / hospital.name
    targets = [
        _targets(plan, scans, row) | _deformation(truth / f"{scans.patients[row]}.npz")
        for row in range(scans.num_scans)
    ]
    return _held(scans, range(scans.num_scans), index, "", targets)


def paired_set(plan: RunPlan, site: Site, hospital: Hospital) -> LatentSet | None:
    """The encoded scans behind `paired_scans`."""
    if hospital.paired is None:
        return None
    config = dataclasses.replace(
        site.config,
        data_root=hospital.paired,
        state_dir=site.state_dir.parent.parent / "paired" / site.name,
        layout="plain",
        split_fractions=(0.0, 0.0, 1.0),
    )
    return Site(config, site.tokenizer).prepared(plan)


def join(parts: Sequence[Held]) -> Held:
    """All rows together; a target that a part does not know is NaN there. Raises `ValueError` for none."""
    if not parts:
        raise ValueError("Expected held-out scans to join; got none.")
    names = sorted({name for part in parts for name in part.anatomy_names})
    anatomy = torch.full((sum(len(part.site) for part in parts), len(names)), torch.nan)
    first = 0
    for part in parts:
        columns = [names.index(name) for name in part.anatomy_names]
        anatomy[first : first + len(part.site), columns] = part.anatomy
        first += len(part.site)
    anatomy = _absent_is_zero(anatomy, names)
    return Held(
        torch.cat([part.latents for part in parts]),
        tuple(itertools.chain.from_iterable(part.site for part in parts)),
        tuple(itertools.chain.from_iterable(part.patient for part in parts)),
        anatomy,
        tuple(names),
    )


def _held(
    scans: LatentSet, rows: Sequence[int], index: int, prefix: str, targets: Sequence[Mapping[str, float]]
) -> Held:
    names = sorted({name for known in targets for name in known})
    anatomy = torch.tensor([[known.get(name, math.nan) for name in names] for known in targets])
    return Held(
        scans.latents(rows),
        (index,) * len(rows),
        tuple(prefix + scans.patients[row] for row in rows),
        _absent_is_zero(anatomy.float().reshape(len(rows), len(names)), names),
        tuple(names),
    )


def _absent_is_zero(anatomy: Tensor, names: Sequence[str]) -> Tensor:
    """A structure that a labelled scan does not show has no volume; without a label it is unknown."""
    volumes = torch.tensor([name.startswith("volume_") for name in names], dtype=torch.bool)
    labelled = (~torch.isnan(anatomy) & volumes).any(1, keepdim=True)
    return torch.where(torch.isnan(anatomy) & volumes & labelled, 0.0, anatomy)


def _targets(plan: RunPlan, scans: LatentSet, row: int) -> dict[str, float]:
    """What is known about the anatomy of a scan."""
    known = {name: v for name, v in scans.covariates[row].items() if isinstance(v, float)}
    if (sex := str(scans.covariates[row].get("sex", ""))) in _SEXES:
        known["sex"] = _SEXES[sex]
    if scans.has_label[row]:
        label = scans.labels([row])
        assert label is not None
        voxel_mm3 = math.prod(plan.volumes.spacing_mm)
        counts = torch.bincount(label.flatten())
        known |= {f"volume_{value}": float(n) * voxel_mm3 for value, n in enumerate(counts) if value and n}
    return known


def _deformation(path: Path) -> dict[str, float]:
    """The slowest waves of a phantom's velocity field along each axis, from its truth file."""
    with np.load(path) as truth:
        waves = dctn(truth["velocity"], axes=(1, 2, 3), norm="ortho")
    return {
        f"deformation_{axis}_{''.join(map(str, wave))}": float(waves[(place, *wave)])
        for place, axis in enumerate("xyz")
        for wave in _WAVES
    }
