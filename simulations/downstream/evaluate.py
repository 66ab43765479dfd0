"""Downstream evaluation: what pretrained content is worth with few labels, on seen and on unseen hospitals.

For each number of labelled patients: the pretrained encoder frozen and read in closed form, from its content
code or from its tokens (`meduet_models/downstream/frozen.py`), and fine-tuned; and what it has to be above
(`baselines.py` there): the mean label, ridge on raw latents, a random encoder read in the same way, the same
network from scratch, a small U-Net over latents and one on the volume. What is in closed form is fitted for
many draws of labelled patients, what is trained for few; the number is told. Trained by the loop that a
hospital runs (`client/training/finetuning.py`), stopped by validation patients of the training hospitals;
test scans are looked at once, after everything is trained.

Does not do: pretrain, federate (`server/exchanges/finetuning.py`), compare (`comparisons.py`), draw
(`report.py`).
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from client.latents.labelled import LabelledScans
from client.training.finetuning import check_answers
from meduet_models.downstream.tasks import task_of
from meduet_models.meduet import FactorNetwork
from meduet_models.style.bank import StyleBank
from simulations.downstream.fairness import LEAST_PATIENTS, Fairness, fairness_score
from simulations.downstream.learning import Fitted, fitted_mode, predictor_of
from simulations.downstream.measuring import measured
from simulations.downstream.metrics import estimates, resampled, value_on
from simulations.downstream.settings import (
    CLOSED_FORM,
    MODES,
    PRETRAINED,
    SEES_VOLUMES,
    DownstreamSettings,
    Mode,
    check_whole_scans,
)

__all__ = [
    "MODES",
    "DownstreamRow",
    "DownstreamSettings",
    "Evaluated",
    "Fitted",
    "LabelledScans",
    "Mode",
    "evaluate_downstream",
    "predictor_of",
    "rows_of",
]


@dataclass(frozen=True)
class DownstreamRow:
    """One number of the table."""

    task: str
    mode: str
    labels: str
    """How many patients had labels: a number (of each class, where there are classes), or a share."""
    test: str
    """Which test scans: "seen", "held_out", or any other name."""
    metric: str
    """Name of one of the task's metrics."""
    value: float
    """Mean over patients, or of all of them, averaged over draws. NaN where there is none."""
    low: float
    high: float
    """95% interval, bootstrap over test patients."""
    patients: int
    """Test patients."""
    undefined: int
    """Of these, without a value."""
    labelled: int
    """Patients whose labels were used in training."""
    draws: int = 1
    """Draws of the labelled patients that were averaged."""
    spread: float = 0.0
    """Standard deviation over the draws."""
    resamples: tuple[float, ...] = ()
    """The main metric on every resample of the test patients, the same for every mode, to be compared."""
    first_draws: int = 1
    """How many draws what is trained has."""
    first_value: float = math.nan
    """The main metric over these first draws alone, to be compared with what has no more."""
    first_resamples: tuple[float, ...] = ()
    """The same on every resample."""


Groups = Mapping[str, Mapping[str, Sequence[str]]]
"""By test set and grouping, the group of each scan; empty where unknown."""


@dataclass(frozen=True)
class Evaluated:
    """Everything a downstream evaluation tells."""

    rows: list[DownstreamRow]
    fairness: list[Fairness]


def evaluate_downstream(
    model: FactorNetwork | None,
    train: LabelledScans,
    validation: LabelledScans,
    tests: Mapping[str, LabelledScans],
    settings: DownstreamSettings,
    seed: int,
    *,
    style_bank: StyleBank | None = None,
    groups: Groups | None = None,
    progress: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> Evaluated:
    """Train every mode at every number of labels, then measure each on every test set.

    `model` None: only modes that need no pretrained encoder. With a `style_bank`, half of the scans of a
    batch are restyled to another site. `groups` are those of which the FairnessScore is told, at the largest
    number of labels, beside sites. `progress` is called with what is trained, steps done and steps in all.
    Raises `ValueError` for modes that cannot be, and for labels that are missing or out of range.
    """
    _check(model, train, settings, style_bank)
    fitted = [
        own
        for mode in settings.modes
        for own in fitted_mode(mode, model, train, validation, settings, seed, style_bank, progress)
    ]
    measured: dict[tuple[int, str], list[DownstreamRow]] = {}
    rows: list[DownstreamRow] = []
    fairness: list[Fairness] = []
    for own in fitted:
        for name, scans in tests.items():
            key = (id(own.predictors), name)  # numbers of labels that come to the same patients
            if key not in measured:
                measured[key] = rows_of(own, scans, settings, seed, name)
            rows += [replace(row, labels=own.labels) for row in measured[key]]
            if own.labels == fitted[-1].labels:
                fairness += _fairness(own, scans, settings, name, (groups or {}).get(name, {}))
    return Evaluated(rows, fairness)


def rows_of(
    fitted: Fitted, scans: LabelledScans, settings: DownstreamSettings, seed: int, test: str, mode: str = ""
) -> list[DownstreamRow]:
    """Measure the predictors of one mode on one test set; the main metric over all draws, the others where
    there is one draw."""
    who = mode or fitted.mode
    check_answers(task_of(settings.task), scans, settings.classes)
    alone = len(fitted.predictors) == 1
    each = [measured(predictor, scans, settings, everything=alone) for predictor in fitted.predictors]
    draws = [own.main for own in each]
    patients, rows = len(scans.patients), []
    for metric in draws[0]:
        over = resampled([draw[metric] for draw in draws], scans.patient, settings.bootstrap, seed)
        few = over
        if len(draws) > settings.trained_draws:
            chosen = [draw[metric] for draw in draws[: settings.trained_draws]]
            few = resampled(chosen, scans.patient, settings.bootstrap, seed)
        rows.append(
            DownstreamRow(
                settings.task, who, fitted.labels, test, metric, over.value, over.low, over.high,
                patients, over.undefined, fitted.labelled, len(draws), over.spread, over.resamples,
                min(len(draws), settings.trained_draws), few.value, few.resamples,
            )
        )  # fmt: skip
    if alone:
        rows += [
            DownstreamRow(
                settings.task, who, fitted.labels, test, metric, e.value, e.low, e.high,
                patients, e.undefined, fitted.labelled,
            )
            for metric, e in estimates(each[0].others, scans.patient, settings.bootstrap, seed).items()
        ]  # fmt: skip
    return rows


def _fairness(
    fitted: Fitted,
    scans: LabelledScans,
    settings: DownstreamSettings,
    test: str,
    groups: Mapping[str, Sequence[str]],
) -> list[Fairness]:
    """The FairnessScore of the first draw, over sites and every other grouping of the test scans."""
    main = measured(fitted.predictors[0], scans, settings, everything=False).main
    scores = []
    for grouping, names in {"site": [str(site) for site in scans.site], **groups}.items():
        rows = {one: [i for i, name in enumerate(names) if name == one] for one in sorted(set(names)) if one}
        who = {one: len({scans.patient[i] for i in own}) for one, own in rows.items()}
        for metric, own in main.items():
            read = {
                one: value_on(own, scans.patient, chosen)
                for one, chosen in rows.items()
                if who[one] >= LEAST_PATIENTS
            }
            read = {one: value for one, value in read.items() if math.isfinite(value)}
            if len(read) > 1:
                overall = value_on(
                    own, scans.patient, sorted(row for chosen in rows.values() for row in chosen)
                )
                score = fairness_score(overall, list(read.values()))
                of_groups = {one: who[one] for one in read}
                scores.append(
                    Fairness(
                        mode=fitted.mode, labels=fitted.labels, test=test, metric=metric, grouping=grouping,
                        score=score, groups=read, patients=of_groups,
                    )
                )  # fmt: skip
    return scores


def _check(
    model: FactorNetwork | None,
    train: LabelledScans,
    settings: DownstreamSettings,
    style_bank: StyleBank | None,
) -> None:
    if train.whole is not None:
        check_whole_scans(settings.modes, settings.task)
    wanted = [mode for mode in settings.modes if mode in PRETRAINED]
    if model is None and wanted:
        raise ValueError(f"Expected a pretrained model for {', '.join(wanted)}; got none.")
    for mode in settings.modes:
        settings.local_of(mode)  # refuses a network that cannot learn this task
    if settings.anatomy_start != "none" and not {"volume_start", "joined"} & set(settings.modes):
        raise ValueError("anatomy_start has no effect without mode volume_start or joined: leave it out.")
    if "volume_start" in settings.modes and settings.anatomy_start == "none":
        raise ValueError("Expected anatomy_start for mode volume_start; from none it is mode volume_unet.")
    if model is not None and settings.network is not None:
        raise ValueError(
            "network has no effect beside a pretrained model, whose shape is taken: leave it out."
        )
    for mode in ("scratch", "random", "ridge", "ridge_neighbours"):
        if model is None and settings.network is None and mode in settings.modes:
            raise ValueError(f"Expected network for mode {mode} without a pretrained model; got none.")
    for mode in SEES_VOLUMES:
        if train.volumes is None and mode in settings.modes:
            raise ValueError(f"Expected prepared volumes for mode {mode}; got none.")
    if style_bank is not None and {"volume_unet", "volume_start"} & set(settings.modes):
        raise ValueError(
            "bank has no effect on a U-Net on the volume, which sees no latents: leave one of them out."
        )
    if style_bank is not None and all(mode in CLOSED_FORM for mode in settings.modes):
        raise ValueError(
            f"bank has no effect on {', '.join(settings.modes)}, fitted in closed form: leave it out."
        )
    if task_of(settings.task).per_voxel and "frozen_tokens" in settings.modes:
        raise ValueError("frozen_tokens is frozen with task=segmentation, which reads tokens: leave it out.")
