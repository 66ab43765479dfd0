"""Labelled scans: latents with what is to be predicted, and which patients' labels are used.

A label share is a share of patients, never of scans, and the patients of a smaller share are among those of
every larger one: the order depends on the seed and the patient's name alone. Does not do: decide who is held
out (`client/scans/cohort.py`), or train (`client/training/finetuning.py`).

Axes: b = scans, c d h w = latents, D H W = voxels.
"""

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float32, Int64
from torch import Tensor

from client.latents.batches import TrainingScans
from federation.exchanges.finetuning import LocalFinetuning

VALUES_SHOWN = 8
"""Values of labels that do not fit, in the error."""


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


@dataclass(frozen=True)
class LabelledScans:
    """Scans with the answer: a class per voxel (`labels`), or per scan (`target`)."""

    latents: Float32[Tensor, "b c d h w"]
    """Their latents."""
    labels: Int64[Tensor, "b 1 D H W"] | None
    """A class per voxel of the encoded volume."""
    target: Int64[Tensor, " b"] | None
    """A class per scan."""
    patient: tuple[str, ...]
    """Patient of each scan."""
    site: tuple[int, ...]
    """Site label of each scan."""

    def __post_init__(self) -> None:
        """Refuse rows that do not belong together."""
        sizes = {len(self.latents), len(self.patient), len(self.site)}
        sizes |= {len(t) for t in (self.labels, self.target) if t is not None}
        if len(sizes) > 1:
            raise ValueError(f"Expected as many labels, patients and sites as scans; got {sorted(sizes)}.")

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
            None if self.labels is None else self.labels[chosen],
            None if self.target is None else self.target[chosen],
            tuple(self.patient[i] for i in indices),
            tuple(self.site[i] for i in indices),
        )

    def answers(self, local: LocalFinetuning) -> Tensor:
        """What `local.task` predicts: labels or targets.

        Raises `ValueError` when it is missing or a class is out of range.
        """
        answers = self.labels if local.task == "segmentation" else self.target
        if answers is None:
            raise NoLabels(f"Expected what a {local.task} predicts with the scans; got none.")
        if len(answers) and not (0 <= int(answers.min()) and int(answers.max()) < local.classes):
            found = torch.unique(answers).tolist()
            odd = next(value for value in found if not 0 <= value < local.classes)
            raise ValueError(
                f"Expected classes from 0 to {local.classes - 1}; found {_listed(found)}. Say which values "
                f"are which classes, e.g. label_values: {{{odd}: 1}}, or set classes."
            )
        return answers

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
) -> LabelledScans:
    """Those of `rows` whose answer is known: with a label volume, or with one of `values` as `target`.

    Raises `NoLabels` when no row has an answer.
    """
    if local.task == "segmentation":
        known = [row for row in rows if scans.has_label[row]]
    else:
        known = [row for row in rows if covariate_text(scans.covariates[row], target) in values]
    if not known:
        raise NoLabels(f"Expected scans with {target or 'a label'}; none of {len(rows)} has one.")
    classes = (
        [list(values).index(covariate_text(scans.covariates[row], target)) for row in known]
        if values
        else None
    )
    return LabelledScans(
        scans.latents(known),
        _classes(scans.labels(known), local.label_values) if local.task == "segmentation" else None,
        None if classes is None else torch.tensor(classes),
        tuple(scans.patients[row] for row in known),
        tuple(int(scans.site_index[row]) for row in known),
    )


def _classes(
    labels: Int64[Tensor, "b 1 D H W"] | None, label_values: Mapping[int, int]
) -> Int64[Tensor, "b 1 D H W"] | None:
    """Labels as classes: each value's class, every value without one background."""
    if labels is None or not label_values:
        return labels
    classes = torch.zeros_like(labels)
    for value, label in label_values.items():
        classes[labels == value] = label
    return classes


def _listed(values: Sequence[int]) -> str:
    shown = ", ".join(map(str, values[:VALUES_SHOWN]))
    return shown + (f", … {values[-1]}" if len(values) > VALUES_SHOWN else "")


def join(parts: Sequence[LabelledScans]) -> LabelledScans:
    """Scans of several places as one set; patients keep their names, so name them apart before."""
    labels = [part.labels for part in parts if part.labels is not None]
    targets = [part.target for part in parts if part.target is not None]
    return LabelledScans(
        torch.cat([part.latents for part in parts]),
        torch.cat(labels) if labels else None,
        torch.cat(targets) if targets else None,
        tuple(patient for part in parts for patient in part.patient),
        tuple(site for part in parts for site in part.site),
    )


def covariate_text(covariates: Mapping[str, str | float], target: str) -> str:
    """A covariate as the text that a plan names it by; empty when it is not known."""
    value = covariates.get(target, "")
    return f"{value:g}" if isinstance(value, float) else str(value)


def _place(seed: int, patient: str) -> bytes:
    return hashlib.sha256(f"fedmeduet labels {seed}\0{patient}".encode()).digest()
