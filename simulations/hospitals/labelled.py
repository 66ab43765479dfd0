"""Labels of several hospitals side by side: how many classes there are, and whose answer is known.

What this file does not do: read a file (`client/latents/labelled.py`), or train.
"""

import dataclasses
from collections.abc import Iterable, Sequence

from client.latents.labelled import LabelledScans, NoLabels, join, labelled_scans
from client.latents.latent_set import LatentSet
from federation.exchanges.finetuning import LocalFinetuning
from federation.plan import VolumePlan

Part = tuple[str, LatentSet, Sequence[int]]
"""A hospital, its scans, and which of them."""


def num_classes(hospitals: Iterable[LatentSet]) -> int:
    """Highest label of the training patients, and one more; 0 where no hospital has labels."""
    highest = [
        int(labels.max())
        for scans in hospitals
        if (rows := [row for row in scans.indices("train") if scans.has_label[row]])
        and (labels := scans.labels(rows)) is not None
    ]
    return max(highest) + 1 if highest else 0


def known_answers(
    parts: Sequence[Part],
    local: LocalFinetuning,
    target: str = "",
    target_values: tuple[str, ...] = (),
    volumes: VolumePlan | None = None,
) -> LabelledScans | None:
    """Those scans whose answer is known, patients named apart by hospital; None where there is none. With
    their volumes, where `volumes` says how they were prepared."""
    found = []
    for name, scans, rows in parts:
        try:
            own = labelled_scans(scans, rows, local, target, target_values, volumes)
        except NoLabels:
            continue
        found.append(dataclasses.replace(own, patient=tuple(f"{name}/{patient}" for patient in own.patient)))
    return join(found) if found else None


def labels_for_segmenters(
    training: Sequence[Part], held: Sequence[Part]
) -> tuple[LabelledScans, LabelledScans] | None:
    """Scans with label maps to learn from and to test on; None where either has none."""
    classes = num_classes(scans for _, scans, _ in training)
    if classes < 2:
        return None
    local = LocalFinetuning(task="segmentation", classes=classes)
    learn, test = known_answers(training, local), known_answers(held, local)
    return None if learn is None or test is None else (learn, test)
