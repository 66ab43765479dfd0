"""Labelled scans: latents with what is to be predicted, and which patients' labels are used.

A label share is a share of patients, never of scans, and the patients of a smaller share are among those of
every larger one: the order depends on a seed and the patient's name alone; a hospital gives a seed that it
alone knows (`client/exchanges/finetuning.py`). Does not do: decide who is held out
(`client/scans/cohort.py`), draw crops of whole scans (`whole_labelled.py`), or train
(`client/training/finetuning.py`).

Axes: b = scans, m = scans of a step, c d h w = latents, D H W = voxels, ... = what an answer is made of.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Float16, Float32, Int64, Shaped
from torch import Tensor

from client.latents.batches import TrainingScans
from client.latents.latent_set import LatentSet
from client.latents.whole_labelled import WholeScan, as_classes
from federation.exchanges.finetuning import LocalFinetuning
from meduet_models.downstream.task import Target
from meduet_models.seeds import digest_of
from scans.volume_plan import VolumePlan


class NoLabels(ValueError):
    """There is nothing to learn from: no scan of this split has a label or a known target."""


@runtime_checkable
class ScansWithLabels(TrainingScans, Protocol):
    """What fine-tuning needs of a site's latents (`client/latents/latent_set.py`)."""

    @property
    def has_label(self) -> Sequence[bool]:
        """Whether each scan has a label volume."""

    def labels(self, indices: Sequence[int], view: int = 0) -> Int64[Tensor, "b 1 D H W"] | None:
        """Label volumes of these scans."""


@runtime_checkable
class ScansWithVolumes(ScansWithLabels, Protocol):
    """What networks that see volumes need besides."""

    def volumes(
        self, indices: Sequence[int], plan: VolumePlan, view: int = 0
    ) -> Float16[Tensor, "b 1 D H W"]:
        """The prepared volumes that the latents encode."""


@dataclass(frozen=True)
class LabelledScans:
    """Scans with their answers."""

    latents: Float32[Tensor, "b c d h w"]
    """Their latents."""
    answers: Shaped[Tensor, "b ..."]
    """What is to be predicted of each, as the task reads it: a label volume, a class, a number."""
    patient: tuple[str, ...]
    """Patient of each scan."""
    site: tuple[int, ...]
    """Site label of each scan."""
    volumes: Float[Tensor, "b 1 D H W"] | None = None
    """The prepared volumes that were encoded, for networks that see them."""
    whole: tuple[WholeScan, ...] | None = None
    """Where whole scans were encoded, these; latents and label volumes above are their central crops."""

    def __post_init__(self) -> None:
        """Refuse rows that do not belong together."""
        sizes = {len(self.latents), len(self.answers), len(self.patient), len(self.site)}
        if len(sizes) > 1:
            raise ValueError(f"Expected as many answers, patients and sites as scans; got {sorted(sizes)}.")
        if self.volumes is not None and len(self.volumes) != len(self.latents):
            raise ValueError(
                f"Expected as many volumes as scans; got {len(self.volumes)} of {len(self.latents)}."
            )
        if self.whole is not None and len(self.whole) != len(self.latents):
            raise ValueError(
                f"Expected as many whole scans as scans; got {len(self.whole)} of {len(self.latents)}."
            )

    def __len__(self) -> int:
        """Scans."""
        return len(self.patient)

    @property
    def patients(self) -> tuple[str, ...]:
        """The patients, in alphabetical order."""
        return tuple(sorted(set(self.patient)))

    def rows(self, indices: Sequence[int]) -> "LabelledScans":
        """Some of the scans."""
        chosen = torch.tensor(list(indices), dtype=torch.long)
        return LabelledScans(
            self.latents[chosen],
            self.answers[chosen],
            tuple(self.patient[i] for i in indices),
            tuple(self.site[i] for i in indices),
            None if self.volumes is None else self.volumes[chosen],
            None if self.whole is None else tuple(self.whole[i] for i in indices),
        )

    @property
    def per_voxel(self) -> bool:
        """Whether the answers are label volumes."""
        return self.answers.ndim == 5

    @property
    def by_voxel(self) -> tuple[WholeScan, ...]:
        """The whole scans whose every voxel is to be predicted; none, where that is not so."""
        return (self.whole or ()) if self.per_voxel else ()

    def drawn(
        self, rows: Sequence[int], least_foreground: float, generator: torch.Generator
    ) -> tuple[Float32[Tensor, "m c d h w"], Shaped[Tensor, "m ..."]]:
        """What a step is shown of scans, with the answers: of whole scans a crop of each, drawn."""
        if self.whole is None:
            return self.latents[rows], self.answers[rows]
        parts = [self.whole[row].draw(least_foreground, generator, self.per_voxel) for row in rows]
        labels = [label for _, label in parts if label is not None]
        answers = torch.stack(labels) if self.per_voxel else self.answers[rows]
        return torch.stack([latents for latents, _ in parts]), answers

    def share(self, share: float, seed: int) -> "LabelledScans":
        """The scans of this share of the patients (at least one patient); a larger share holds a smaller."""
        if not 0 < share <= 1:
            raise ValueError(f"Expected a label share above 0 and at most 1; got {share}.")
        order = sorted(self.patients, key=lambda patient: _place(seed, patient))
        kept = set(order[: max(1, math.floor(share * len(order) + 0.5))])
        return self.rows([i for i, patient in enumerate(self.patient) if patient in kept])


def labelled_scans(
    scans: ScansWithLabels,
    rows: Sequence[int],
    local: LocalFinetuning,
    target: str = "",
    values: Sequence[str] = (),
    volumes: VolumePlan | None = None,
) -> LabelledScans:
    """Those of `rows` whose answer is known to the task; with their volumes, where `volumes` says how they
    were prepared.

    Raises `NoLabels` when no row has an answer.
    """
    from meduet_models.downstream.tasks import task_of  # MONAI takes seconds to import

    task, named = task_of(local.task), Target(target, tuple(values))
    known = [row for row in rows if task.known(scans, row, named)]
    if not known:
        raise NoLabels(f"Expected scans with {target or 'a label'}; none of {len(rows)} has one.")
    return LabelledScans(
        scans.latents(known),
        as_classes(task.answers(scans, known, named), local.label_values),
        tuple(scans.patients[row] for row in known),
        tuple(int(scans.site_index[row]) for row in known),
        None if volumes is None else _volumes(scans, known, volumes),
        _whole(scans, known, local.label_values),
    )


def _whole(
    scans: ScansWithLabels, rows: Sequence[int], label_values: Mapping[int, int]
) -> tuple[WholeScan, ...] | None:
    if not isinstance(scans, LatentSet) or scans.crop is None:
        return None
    return tuple(WholeScan(scans, row, label_values) for row in rows)


def _volumes(scans: ScansWithLabels, rows: Sequence[int], plan: VolumePlan) -> Tensor:
    assert isinstance(scans, ScansWithVolumes), "who asks for volumes has scans with volumes"
    return scans.volumes(rows, plan)


def join(parts: Sequence[LabelledScans]) -> LabelledScans:
    """Scans of several places as one set; patients keep their names, so name them apart before."""
    return LabelledScans(
        torch.cat([part.latents for part in parts]),
        torch.cat([part.answers for part in parts]),
        tuple(patient for part in parts for patient in part.patient),
        tuple(site for part in parts for site in part.site),
        _joined([part.volumes for part in parts]),
        _all_whole(parts),
    )


def _joined(parts: Sequence[Tensor | None]) -> Tensor | None:
    seen = [part for part in parts if part is not None]
    return torch.cat(seen) if seen and len(seen) == len(parts) else None


def _all_whole(parts: Sequence[LabelledScans]) -> tuple[WholeScan, ...] | None:
    if any(part.whole is None for part in parts):
        return None
    return tuple(one for part in parts for one in part.whole or ())


def _place(seed: int, patient: str) -> bytes:
    return digest_of(f"fedmeduet labels {seed}", patient, separator="\0")
