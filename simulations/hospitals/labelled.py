"""Labels of several hospitals side by side: how many classes there are, and whose answer is known.

What this file does not do: read a file (`client/latents/labelled.py`), or train.
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence

from client.latents.labelled import LabelledScans, NoLabels, join, labelled_scans
from client.latents.latent_set import LatentSet
from federation.exchanges.finetuning import LocalFinetuning
from meduet_models.downstream.task import Target
from meduet_models.downstream.tasks import task_of
from scans.volume_plan import VolumePlan

Part = tuple[str, LatentSet, Sequence[int]]
"""A hospital, its scans, and which of them."""


def num_classes(hospitals: Iterable[LatentSet]) -> int:
    """Highest label of the training patients, anywhere in what was encoded, and one more; 0 where no hospital
    has labels."""
    highest = [
        int(label.max())
        for scans in hospitals
        for row in scans.indices("train")
        if (label := scans.whole_label(row)) is not None
    ]
    return max(highest) + 1 if highest else 0


def known_answers(
    parts: Sequence[Part],
    local: LocalFinetuning,
    target: str = "",
    target_values: tuple[str, ...] = (),
    volumes: VolumePlan | None = None,
) -> LabelledScans | None:
    """Those scans whose answer is known, patients named apart by hospital; None where there is none.

    With their volumes, where `volumes` says how they were prepared.
    """
    found = []
    for name, scans, rows in parts:
        known = known_rows(scans, rows, local.task, target, target_values)
        try:
            own = labelled_scans(scans, known, local, target, target_values, volumes)
        except NoLabels:
            continue
        patients = tuple(f"{name}/{patient}" for patient in own.patient)
        found.append(dataclasses.replace(own, patient=patients))
    return join(found) if found else None


def known_rows(
    scans: LatentSet, rows: Sequence[int], task: str, target: str = "", target_values: tuple[str, ...] = ()
) -> list[int]:
    """Those rows whose answer is known to the task."""
    named = Target(target, target_values)
    return [row for row in rows if task_of(task).known(scans, row, named)]


def known_covariates(
    parts: Sequence[Part], local: LocalFinetuning, target: str = "", target_values: tuple[str, ...] = ()
) -> list[Mapping[str, str | float]]:
    """What else is known of each scan of `known_answers`, in its order."""
    return [
        scans.covariates[row]
        for _, scans, rows in parts
        for row in known_rows(scans, rows, local.task, target, target_values)
    ]


def labels_for_segmenters(
    training: Sequence[Part], held: Sequence[Part]
) -> tuple[LabelledScans, LabelledScans] | None:
    """Scans with label maps to learn from and to test on, of whole scans the central crops; None where either
    has none."""
    classes = num_classes(scans for _, scans, _ in training)
    if classes < 2:
        return None
    local = LocalFinetuning(task="segmentation", classes=classes)
    learn, test = known_answers(training, local), known_answers(held, local)
    if learn is None or test is None:
        return None
    return dataclasses.replace(learn, whole=None), dataclasses.replace(test, whole=None)
