"""Batches: which scans a training step sees, in whose style, and next to whom. Drawn, then applied.

A step draws patients (each at most once, where there are enough), a scan of each, a cached view, partners,
and the target style of each scan; all of it from one generator that depends on the site's own secret, the
run's seed, the round and the step alone, so that the site, and nobody else, can replay any step. Applying a
draw reads latents and restyles them to the style bank's entries, labelled with the site of their target
style: that is how a site with one scanner sees all scanners on its own patients. Without entries scans stay
as they are, with their own site's label. Of whole scans (`volumes.extent: scan`) a step draws a crop of the
network's grid of each, from the same generator.

Does not do: augment (views are made before encoding), or keep anything of another site but its bank entry.
Source: patient-balanced choice and virtual cross-site batches are ours; pairing is MeDUET's
(arXiv:2602.17901).

Axes: b = scans of a step, c = latent channels, d h w = latent voxels.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar, runtime_checkable

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from client.latents.style_moments import body_parts, own_moments
from client.latents.whole_scan import draw_start
from client.scans.patients import rows_by_patient
from client.secrets.site_secret import seed_of
from federation.plan.plan import RunPlan
from meduet_models.objective.objective import StepBatch, StepDraws, draw_step
from meduet_models.style.bank import StyleBank
from meduet_models.style.moments import CohortTooSmall

Item = TypeVar("Item")

FEWEST_SCANS = 4
"""Two pairs: with fewer scans no pair has another to be told from."""


@runtime_checkable
class TrainingScans(Protocol):
    """What training needs of a site's latents (`client/latents/cache.py`)."""

    @property
    def patients(self) -> Sequence[str]:
        """Patient of each scan."""

    @property
    def covariates(self) -> Sequence[Mapping[str, str | float]]:
        """What is known of each scan."""

    @property
    def site_index(self) -> Int[Tensor, " n"]:
        """Site label of each scan."""

    def indices(self, split: str) -> Sequence[int]:
        """Scans of a split."""

    def latents(self, indices: Sequence[int], view: int = 0) -> Float[Tensor, "m c d h w"]:
        """Latents of these scans, float32 on the CPU."""


@runtime_checkable
class WholeScans(TrainingScans, Protocol):
    """What training needs beyond that of whole scans (`client/latents/latent_set.py`)."""

    def foreground(self, row: int, view: int = 0) -> Bool[np.ndarray, "d h w"]:
        """Which latent voxels of a scan are foreground."""

    def crops(
        self, indices: Sequence[int], views: Sequence[int], starts: Int[Tensor, "m 3"]
    ) -> Float[Tensor, "m c d h w"]:
        """Latents of these crops, float32 on the CPU."""


def step_generator(secret: bytes, seed: int, round_number: int, step: int) -> torch.Generator:
    """The generator of one step: a keyed hash of run, round and step, so that the site can replay it alone.

    `secret` is the site's own (`client/secrets/site_secret.py`), `seed` the run's.
    """
    return torch.Generator().manual_seed(seed_of(secret, "step", seed, round_number, step))


@dataclass(frozen=True)
class BatchDraw:
    """Every choice of a step; applying it twice gives the same batch."""

    scans: Int[Tensor, " b"]
    """Which scans."""
    views: Int[Tensor, " b"]
    """Which cached view of each."""
    step: StepDraws
    """Partners, exchanged tokens, target styles."""
    starts: Int[Tensor, "b 3"] | None = None
    """First latent voxel of the crop of each; None where scans are crops."""


class Batches:
    """The batches of one site in one round.

    `style_bank` is None, or holds no entries, when sites exchange no style. A site without an entry (too
    small to tell anything, or new) uses its own sums, which stay here. Raises `CohortTooSmall` below four
    training scans.
    """

    def __init__(self, scans: TrainingScans, plan: RunPlan, style_bank: StyleBank | None) -> None:
        self._scans = scans
        self._plan = plan
        self._rows = _rows_of_patients(scans)
        self.num_scans = sum(map(len, self._rows))
        """Training scans: the weight of this site's update."""
        if self.num_scans < FEWEST_SCANS:
            raise CohortTooSmall(
                f"Expected at least {FEWEST_SCANS} training scans; got {self.num_scans}. Nothing is trained."
            )
        self._site = torch.as_tensor(scans.site_index).long()
        self._part = body_parts(scans, plan)
        names = sorted({patient for patient in scans.patients})
        order = {patient: number for number, patient in enumerate(names)}
        self._patient = torch.tensor([order[patient] for patient in scans.patients])
        self._style_bank = (
            self._with_own_style(style_bank) if style_bank is not None and style_bank.present else None
        )
        self._choices = (
            ()
            if self._style_bank is None
            else tuple(self._style_bank.sites.index(site) for site in self._style_bank.present)
        )

    @property
    def training_rows(self) -> list[int]:
        """Rows of the training scans, in order."""
        return sorted(row for rows in self._rows for row in rows)

    @property
    def is_small(self) -> bool:
        """Whether a step shows a scan more than once."""
        return self.num_scans < self._plan.training.batch_size

    def draw(self, generator: torch.Generator) -> BatchDraw:
        """Draw a step: patients uniformly without replacement, then a scan of each, a view, partners, styles,
        and, of whole scans, crops.

        With fewer patients than `batch_size`, second scans of patients come in before any scan comes twice.
        """
        plan = self._plan
        scans = self._draw_scans(generator, plan.training.batch_size)
        views = torch.randint(plan.volumes.views, (len(scans),), generator=generator)
        step = draw_step(generator, len(scans), plan.network.num_tokens, plan.objective, self._choices)
        return BatchDraw(scans, views, step, self._draw_starts(generator, scans, views))

    def apply(self, draw: BatchDraw, device: torch.device) -> StepBatch:
        """The batch that was drawn, on `device`: scans in their target style, and the known answer of
        the swap: each scan in the style of its partner.
        """
        latents = self._read(draw).to(device)  # b c d h w
        own, part, subject = self._site[draw.scans], self._part[draw.scans], self._patient[draw.scans]
        if self._style_bank is None or draw.step.target_site is None:
            return StepBatch(latents, own.to(device), subject=subject.to(device))
        target = self._possible(own, draw.step.target_site, part)
        swapped = self._possible(own, target[draw.step.partner], part)
        return StepBatch(
            latents=self._style_bank.restyle(latents, own, target, part),
            site=target.to(device),
            restyled=self._style_bank.restyle(latents, own, swapped, part),
            restyled_site=swapped.to(device),
            subject=subject.to(device),
        )

    @property
    def styles(self) -> tuple[int, ...]:
        """Sites whose style scans can be restyled to, as labels; none without a bank."""
        return self._choices

    def in_style(self, rows: Sequence[int], site: int) -> Float[Tensor, "b c d h w"]:
        """These scans in the style of a site of `styles`; where their body part has no such style, as they
        are.
        """
        index = torch.tensor(list(rows))
        own, part, latents = self._site[index], self._part[index], self._scans.latents(list(rows))
        if self._style_bank is None:
            raise ValueError("Expected a style bank to render scans with; the plan exchanges no styles.")
        return self._style_bank.restyle(
            latents, own, self._possible(own, torch.full_like(own, site), part), part
        )

    def _with_own_style(self, style_bank: StyleBank) -> StyleBank:
        labels = {int(self._site[row]) for rows in self._rows for row in rows}
        own = style_bank.sites[labels.pop()]
        if labels or own in style_bank.present:
            return style_bank
        return style_bank.joined_by(own, own_moments(self._scans, self._plan))

    def _possible(self, own: Tensor, target: Tensor, part: Tensor) -> Tensor:
        """The target where both styles of that body part are in the bank, else the scan stays as it is."""
        assert self._style_bank is not None
        known = self._style_bank.count > 0  # s p
        return torch.where(known[own, part] & known[target, part], target, own)

    def _draw_starts(self, generator: torch.Generator, scans: Tensor, views: Tensor) -> Tensor | None:
        """Last of all draws, so that a step of crops is drawn as if there were no whole scans."""
        if self._plan.volumes.extent == "crop":
            return None
        assert isinstance(self._scans, WholeScans), "whole scans were encoded for this plan"
        crop, least = self._plan.network.latent_grid, self._plan.volumes.crop_foreground
        starts = [
            draw_start(self._scans.foreground(scan, view), crop, least, generator)
            for scan, view in zip(scans.tolist(), views.tolist(), strict=True)
        ]
        return torch.stack(starts)

    def _read(self, draw: BatchDraw) -> Tensor:
        if draw.starts is not None:
            assert isinstance(self._scans, WholeScans), "crops are drawn of whole scans"
            return self._scans.crops(draw.scans.tolist(), draw.views.tolist(), draw.starts)
        if self._plan.volumes.views == 1:
            return self._scans.latents(draw.scans.tolist())
        one_by_one = [
            self._scans.latents([scan], view)
            for scan, view in zip(draw.scans.tolist(), draw.views.tolist(), strict=True)
        ]
        return torch.cat(one_by_one)

    def _draw_scans(self, generator: torch.Generator, batch_size: int) -> Tensor:
        if len(self._rows) >= batch_size:
            patients = torch.randperm(len(self._rows), generator=generator)[:batch_size].tolist()
            return torch.tensor([_one_of(self._rows[patient], generator) for patient in patients])
        chosen: list[int] = []
        while len(chosen) < batch_size:  # a lap: each scan once, patients in turn
            left = [_shuffled(rows, generator) for rows in _shuffled(self._rows, generator)]
            while left:
                chosen += [rows.pop() for rows in left]
                left = [rows for rows in left if rows]
        return torch.tensor(chosen[:batch_size])


def _rows_of_patients(scans: TrainingScans) -> list[list[int]]:
    return list(rows_by_patient(scans.patients, scans.indices("train")).values())


def _one_of(rows: list[int], generator: torch.Generator) -> int:
    return rows[int(torch.randint(len(rows), (), generator=generator))]


def _shuffled(items: Sequence[Item], generator: torch.Generator) -> list[Item]:
    return [items[i] for i in torch.randperm(len(items), generator=generator).tolist()]
