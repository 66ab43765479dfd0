"""A site's answer to the probes: what its patients' content and style say, as sums that add over sites.

Patients are dealt into folds by a keyed hash of their names, evenly, the same in every plan: folds that the
centre could deal anew would tell single patients by their differences. Each fold holds the minimum cohort or
nothing is told. A patient is one vector, the mean over her scans. With a style bank her scans are also seen
in every other site's style: is she recognised among this site's own patients, and do the swapped scans look
like the other site's?

What this file does not do: it fits no probe and
knows no other site's patients: recognition here is top-1 within a site, not among all patients of the
federation. Fitted probes that come back are counted under whatever weights were sent: a count of hits answers
a question of the centre's choosing about these patients, which the minimum cohort does not blunt; hence the
ledger.

Axes: b = scans, n = patients, k = content channels, s = style channels, t = targets, v = sums.
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from client.consent.exact_sums import check_sums
from client.exchanges.exchange import Answer, AskRefused, OnStep, SiteAtWork, bank_of
from client.latents.batches import TrainingScans
from client.release import Gate, Released
from client.secrets.site_secret import digest_of
from client.training.site_state import StateFolder
from client.training.trainee import student_of
from federation.exchanges.probes import (
    ANATOMY,
    FACTORS,
    HITS,
    PROBES,
    RECOGNITION,
    SWAPPED,
    SWAPPED_PATIENTS,
    UNBOUNDED,
    ProbeAsk,
    ProbeReply,
    anatomy_bound,
    content_part,
    hits_shapes,
    joint_bound,
    probe_shapes,
    style_part,
    style_vector,
    sums_shapes,
    told_of_swaps,
    widest_sums,
)
from federation.exchanges.survey import smallest_cohort, survey_layout
from federation.plan.plan import RunPlan
from federation.wire.wire import RefusalKind
from meduet_models.erasure import ErasureMoments, patient_means
from meduet_models.factors import Factors
from meduet_models.meduet import MeDUET, layer_normed
from meduet_models.probes.recognition import recognised
from meduet_models.probes.sums import site_hits
from meduet_models.style.bank import StyleBank
from meduet_models.style.moments import CohortTooSmall, StyleMoments

_SCANS_AT_ONCE = 16
_SEXES = {"F": 0.0, "M": 1.0}


@runtime_checkable
class LabelledScans(Protocol):
    """What volumes of structures need of a site's scans, beyond what training needs."""

    @property
    def has_label(self) -> Sequence[bool]:
        """Whether a row has a label."""

    def labels(self, indices: Sequence[int]) -> Int[Tensor, "b 1 D H W"] | None:
        """Labels of these rows on the prepared grid."""


@runtime_checkable
class ScansWithForeground(Protocol):
    """What is read beyond that of whole scans, of which a probe sees the crops around the foreground's
    centre."""

    def central_foreground(self, indices: Sequence[int]) -> Bool[Tensor, "b d h w"]:
        """Which latent voxels of these crops are foreground."""


@dataclass(frozen=True)
class Probed:
    """The patients that are read, one row per scan."""

    rows: tuple[int, ...]
    """Rows of the site's latent set."""
    patients: tuple[str, ...]
    """Patient of each row."""
    folds: Mapping[str, int]
    """Fold of each patient, in the order of first appearance."""
    least: int
    """Fewest patients behind any sum that is told."""


def answer_probe(site: SiteAtWork, ask: ProbeAsk, plan: RunPlan, gate: Gate, on_step: OnStep) -> Released:
    """Sums of the factors of this site's patients after a round; asked with fitted probes, their hits.

    Raises `CohortTooSmall` when a fold would hold fewer than the minimum, `TooFewForSums` when it holds fewer
    than ten times the width of what is summed, `AskRefused` for probes of other shapes.
    """
    fitted = bool(ask.probe)
    states = StateFolder(site.state_dir / "state", ask.plan_sha256)
    student = student_of(plan, ask.shared, states.before(ask.round + 1)).to(site.device).eval()
    if not student.has_content_code:
        raise AskRefused("Expected the axes of a content code; none came.", RefusalKind.MALFORMED)
    style_bank, index = bank_of(plan, ask.bank), plan.sites.index(site.name)
    scans = site.scans(plan)
    probed = probed_patients(scans, plan, site.minimum_cohort, site.secret)
    if fitted:
        try:
            tensors = probe_hits(student, scans, probed, plan, ask.probe, index)
        except ValueError as error:
            raise AskRefused(str(error), RefusalKind.MALFORMED) from error
    else:
        check_sums(len(probed.folds) // plan.probes.folds, widest_sums(plan), site.exact_sums)
        tensors = probe_sums(student, scans, probed, plan, style_bank, index)
    return gate.release(
        tensors,
        hits_shapes() if fitted else sums_shapes(plan),
        weight=float(len(probed.folds)),
        not_covered=UNBOUNDED & set(tensors),
    )


def probe_mail(released: Released, ask: ProbeAsk, site: str) -> ProbeReply:
    """The reply."""
    return ProbeReply(
        plan_sha256=ask.plan_sha256,
        site=site,
        round=released.record["round"],
        sums=dict(released.tensors),
    )


def probed_patients(scans: TrainingScans, plan: RunPlan, site_minimum: int, secret: bytes) -> Probed:
    """Whose scans are read, and their folds, dealt by the site's own secret.

    Raises `CohortTooSmall` when a fold would hold fewer patients than the stricter of plan and site wants.
    """
    splits = ("train",) if plan.probes.patients == "train" else ("validation", "test")
    rows = tuple(row for split in splits for row in scans.indices(split))
    patients = tuple(scans.patients[row] for row in rows)
    names = list(dict.fromkeys(patients))
    least = smallest_cohort(plan, site_minimum)
    if len(names) < least * plan.probes.folds:
        raise CohortTooSmall(
            f"Expected at least {least} patients in each of {plan.probes.folds} folds of a probe; got "
            f"{len(names)} patients."
        )
    order = sorted(names, key=lambda name: digest_of(secret, "fold", name))
    place = {name: i % plan.probes.folds for i, name in enumerate(order)}
    return Probed(rows, patients, {name: place[name] for name in names}, least)


def probe_sums(
    student: MeDUET,
    scans: TrainingScans,
    probed: Probed,
    plan: RunPlan,
    style_bank: StyleBank | None,
    site: int,
) -> dict[str, Tensor]:
    """The first exchange: shapes of `federation.exchanges.probes.sums_shapes`.

    Guarantee: adding or removing one patient of a fold changes the tensors that are not in `UNBOUNDED` by at
    most `federation.exchanges.probes.sums_bound` in L2, while the others stay in their folds.
    """
    joint = _joint(student, scans, probed)
    sums = {FACTORS: _by_fold(joint, probed, plan, joint_bound(plan))}
    if plan.probes.anatomy:
        sums[ANATOMY] = _anatomy(joint, scans, probed, plan)
    if told_of_swaps(plan):
        sums |= _restyled_sums(student, scans, probed, plan, style_bank, site, joint)
    return sums


def probe_hits(
    student: MeDUET,
    scans: TrainingScans,
    probed: Probed,
    plan: RunPlan,
    probe: Mapping[str, Tensor],
    site: int,
) -> dict[str, Tensor]:
    """The second exchange: patients whom the fitted probes read as this site's, by content and by style.

    Each patient is read by the probe that was fitted without her fold. Raises `ValueError` when the probe has
    other shapes than the plan says, or is not finite.
    """
    expected = probe_shapes(plan)
    if {name: tuple(tensor.shape) for name, tensor in probe.items()} != expected:
        raise ValueError(f"Expected fitted site probes of {expected}; they have other shapes.")
    if not all(bool(torch.isfinite(tensor).all()) for tensor in probe.values()):
        raise ValueError("Expected fitted site probes of finite numbers; got NaN or infinity.")
    means = patient_means(_joint(student, scans, probed).double(), probed.patients)
    means = means * (joint_bound(plan) / means.norm(dim=1, keepdim=True).clamp(min=joint_bound(plan)))
    folds = torch.tensor(list(probed.folds.values()))
    content, style = _factors(means, plan)
    hits = [
        site_hits(values, folds, probe[f"{factor}_weight"], probe[f"{factor}_bias"], site)
        for factor, values in (("content", content), ("style", style))
    ]
    return {HITS: torch.tensor([*hits, len(means)], dtype=torch.float64)}


@torch.no_grad()
def _joint(student: MeDUET, scans: TrainingScans, probed: Probed) -> Float[Tensor, "b z"]:
    """Content code and pooled style of every scan, side by side."""
    return torch.cat([_coded(student, latents).cpu() for latents, _ in _chunks(student, scans, probed)])


def _coded(student: MeDUET, latents: Float[Tensor, "b c d h w"]) -> Float[Tensor, "b z"]:
    factors = student.encode(latents)
    return torch.cat([student.coded(factors.content), layer_normed(factors.style).mean(dim=1)], dim=1)


def _factors(joint: Float[Tensor, "n z"], plan: RunPlan) -> tuple[Tensor, Tensor]:
    """Content and style of joint vectors."""
    return joint[:, content_part(plan)], joint[:, style_part(plan)]


def _chunks(student: MeDUET, scans: TrainingScans, probed: Probed) -> Iterator[tuple[Tensor, list[int]]]:
    device = student.latent_mean.device
    for first in range(0, len(probed.rows), _SCANS_AT_ONCE):
        chosen = list(range(first, min(first + _SCANS_AT_ONCE, len(probed.rows))))
        yield scans.latents([probed.rows[i] for i in chosen]).to(device), chosen


def _by_fold(
    joint: Float[Tensor, "b z"], probed: Probed, plan: RunPlan, bound: float
) -> Float[Tensor, "f v"]:
    """Sums of each fold, as one vector each."""
    fold_of = [probed.folds[patient] for patient in probed.patients]
    vectors = []
    for fold in range(plan.probes.folds):
        mine = [i for i, own in enumerate(fold_of) if own == fold]
        vectors.append(ErasureMoments.of(joint[mine], [probed.patients[i] for i in mine], bound).to_vector())
    return torch.stack(vectors)


def _anatomy(
    joint: Float[Tensor, "b z"], scans: TrainingScans, probed: Probed, plan: RunPlan
) -> Float[Tensor, "f v"]:
    """Sums with the targets, over the patients of whom all are known in some scan; zeros where these are
    fewer than the minimum in a fold."""
    targets = torch.tensor(
        [[target_of(scans, row, name, plan) for name in plan.probes.anatomy] for row in probed.rows],
        dtype=torch.float64,
    )
    known = (~torch.isnan(targets)).all(1)
    names = {patient for patient, complete in zip(probed.patients, known.tolist(), strict=True) if complete}
    per_fold = [sum(probed.folds[name] == fold for name in names) for fold in range(plan.probes.folds)]
    width = joint.shape[1] + targets.shape[1]
    if min(per_fold) < probed.least:
        nobody = ErasureMoments.none(width, anatomy_bound(plan)).to_vector()
        return nobody.expand(plan.probes.folds, -1).clone()
    rows = known.nonzero()[:, 0].tolist()
    complete = dataclasses.replace(
        probed, rows=tuple(probed.rows[i] for i in rows), patients=tuple(probed.patients[i] for i in rows)
    )
    both = torch.cat([joint[rows].double(), targets[rows]], dim=1)
    return _by_fold(both, complete, plan, anatomy_bound(plan))


def target_of(scans: TrainingScans, row: int, name: str, plan: RunPlan) -> float:
    """A target of a scan, its range mapped to [-1, 1] and cut there; NaN when it is not known."""
    low, high = plan.probes.anatomy[name]
    value = scans.covariates[row].get(name, math.nan)
    if name.startswith("volume_"):
        value = math.nan
        if isinstance(scans, LabelledScans) and scans.has_label[row]:
            label = scans.labels([row])
            if label is not None:
                voxels = float((label == int(name.removeprefix("volume_"))).sum())
                value = voxels * math.prod(plan.volumes.spacing_mm)
    elif name == "sex":
        value = _SEXES.get(str(value), math.nan)
    if not isinstance(value, float):
        return math.nan
    return min(1.0, max(-1.0, 2 * (value - low) / (high - low) - 1)) if value == value else math.nan


@torch.no_grad()
def _restyled_sums(
    student: MeDUET,
    scans: TrainingScans,
    probed: Probed,
    plan: RunPlan,
    style_bank: StyleBank | None,
    site: int,
    joint: Float[Tensor, "b z"],
) -> dict[str, Tensor]:
    """This site's scans in every other present site's style: recognised? like that site's?

    `joint` are the factors of its scans as they are.
    """
    shapes = sums_shapes(plan)
    sums = {
        name: torch.zeros(shapes[name], dtype=torch.float64)
        for name in (SWAPPED, SWAPPED_PATIENTS, RECOGNITION)
    }
    if style_bank is None or plan.sites[site] not in style_bank.present:
        return sums
    names = list(probed.folds)
    gallery = _factors(patient_means(joint, probed.patients), plan)
    for target in range(len(plan.sites)):
        if target == site or plan.sites[target] not in style_bank.present:
            continue
        queries, tokens, total = [], torch.zeros(0), 0
        for latents, _ in _chunks(student, scans, probed):
            here = torch.full((len(latents),), site)
            restyled = style_bank.restyle(latents, here, torch.full_like(here, target))
            queries.append(_coded(student, restyled).cpu())
            style = student.encode(restyled).style.sum(0)
            tokens = style if total == 0 else tokens + style
            total += len(latents)
        asked = _factors(patient_means(torch.cat(queries), probed.patients), plan)
        hits = [float(recognised(q, g, names, names).sum()) for q, g in zip(asked, gallery, strict=True)]
        sums[RECOGNITION] += torch.tensor([*hits, len(names), 1.0], dtype=torch.float64)
        swapped = _swapped(student, scans, probed, plan, tokens / total)
        sums[SWAPPED][target], sums[SWAPPED_PATIENTS][target] = (
            style_vector(swapped),
            swapped.sums["count"][0],
        )
    return sums


def _swapped(
    student: MeDUET, scans: TrainingScans, probed: Probed, plan: RunPlan, style: Float[Tensor, "n s"]
) -> StyleMoments:
    """Style sums of the scans' content decoded in `style`."""
    decoded = [
        student.decode(Factors(student.encode(latents).content, style.expand(len(latents), -1, -1))).cpu()
        for latents, _ in _chunks(student, scans, probed)
    ]
    layout = survey_layout(plan)
    if plan.volumes.extent == "crop":
        return StyleMoments.of(torch.cat(decoded), list(probed.patients), layout)
    assert isinstance(scans, ScansWithForeground), "whole scans were encoded for this plan"
    rows: dict[str, list[Tensor]] = {}  # of the foreground alone, as the bank's entries
    inside = scans.central_foreground(probed.rows)
    for patient, made, where in zip(probed.patients, torch.cat(decoded), inside, strict=True):
        rows.setdefault(patient, []).append(made[:, where])
    return sum((StyleMoments.of_voxels(own, layout) for own in rows.values()), StyleMoments.none(layout))


ANSWER = Answer(PROBES, answer_probe, probe_mail)
