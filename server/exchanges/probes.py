"""Federated probes: what the centre reads about content and style, from sums, while a run goes on.

Two exchanges. First the sites' sums: ridge readings (anatomy, content through style), recognition among each
site's own patients, and swap fidelity follow at once; the linear site probe of each fold is fitted. Then the
fitted probes go out to the sites whose sums came, and the hits come back. The readings equal those of the
pooled patients; with style heads at home, each site's style is what its own head says. A site that refuses is
listed and the run goes on.

After the site erasure the linear site probe of content is not read from the patients that it was fitted
on: it made the site means of exactly these patients coincide, so leaving some out moves the others' mean the
other way, and a cross-validated probe falls below chance (measured: .13 at a chance of .33, while patients
held out gave .46). With `probes.patients: held_out` it is read.

What this file does not do: it changes no weight, and sees nothing but sums.
"""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from flwr.serverapp import Grid
from torch import Tensor

from federation.exchanges.probes import (
    ANATOMY,
    FACTORS,
    HITS,
    NEVER,
    PROBES,
    RECOGNISED,
    RECOGNITION,
    SWAPPED,
    SWAPPED_PATIENTS,
    UNBOUNDED,
    ProbeAsk,
    ProbeReply,
    content_part,
    fold_moments,
    hits_shapes,
    joint_width,
    known_sites,
    probe_shapes,
    style_moments,
    style_part,
    sums_bound,
    sums_shapes,
)
from federation.exchanges.survey import smallest_cohort
from federation.plan.plan import RunPlan
from federation.reply_book import ReplyBook
from federation.wire.limits import MOST_PATIENTS
from federation.wire.messages import Tensors
from meduet_models.content_code import code_of
from meduet_models.erasure import ErasureMoments
from meduet_models.probes.sums import explained_from_sums, pooled_folds, site_probes_by_fold
from meduet_models.probes.swap_fidelity import style_gap_closed
from meduet_models.published.pretrained import CodeReader
from meduet_models.style.bank import StyleBank
from meduet_models.style.moments import StyleEntry, StyleMoments
from privacy.clipping import joint_norm
from server.exchanges.directions import directions_of_sums
from server.exchanges.queries import ask_sites
from server.exchanges.readers import readers_of_sums
from strategies.aggregation import ReplyRefused
from strategies.quorum import Roster

_ROUNDING = 1 + 1e-6


class FederatedProbes:
    """Asks the sites of a run, every few rounds."""

    def __init__(self, grid: Grid, roster: Roster, plan: RunPlan, book: ReplyBook) -> None:
        self._grid, self._roster, self._plan, self._book = grid, roster, plan, book
        self.directions: dict[str, Tensor] = {}
        """Directions of anatomy in content, under the weights that were last read (`directions.py`)."""
        self.readers: dict[str, CodeReader] = {}
        """Readers of anatomy from the content code, under these weights (`readers.py`)."""
        self._patients: dict[str, float] = {}
        """Patients behind the sums of each site that told any."""

    def due(self, round_number: int) -> bool:
        """Whether a round is followed by probes."""
        return round_number in PROBES.rounds(self._plan)

    def read(
        self, round_number: int, shared: Tensors, style_bank: Tensors, erased: bool = False
    ) -> dict[str, Any]:
        """Readings by name, patients by site, and who was put aside why.

        Readings are absent where fewer than two sites told their sums. `erased` says that these weights hold
        an erasure, fitted on the patients trained on; they are asked about under the round that would follow.
        """
        self._round, self.directions, self.readers, self._patients = round_number, {}, {}, {}
        replies, refused = self._ask(shared, style_bank, {}, self._check_sums)
        if len(replies) < 2:
            return {"readings": {}, "sites": {}, "refused": refused}
        sums = {site: reply.sums for site, reply in replies.items()}
        self.directions = directions_of_sums(sums, self._plan, code_of(shared))
        self.readers = readers_of_sums(sums, self._plan)
        fitted = fitted_probes(sums, self._plan)
        hits, refused_hits = self._ask(shared, style_bank, fitted, self._check_hits, only=set(sums))
        readings = readings_of_sums(sums, style_bank, self._plan)
        readings |= readings_of_hits({site: reply.sums for site, reply in hits.items()})
        if erased and self._plan.probes.patients == "train":
            readings.pop("site_from_content", None)
        sites = {
            site: int(sum(float(f.count) for f in fold_moments(own, FACTORS, self._plan)))
            for site, own in sums.items()
        }
        return {"readings": readings, "sites": sites, "refused": refused_hits | refused}

    def _ask(
        self,
        shared: Tensors,
        style_bank: Tensors,
        probe: Tensors,
        check: Callable[[ProbeReply], None],
        only: Collection[str] | None = None,
    ) -> tuple[dict[str, ProbeReply], dict[str, str]]:
        ask = ProbeAsk(
            plan_json=self._plan.to_json(), round=self._round, shared=shared, bank=style_bank, probe=probe
        )
        return ask_sites(
            self._grid,
            self._roster,
            self._plan,
            PROBES,
            ask,
            check,
            self._book,
            stops=False,
            only=only,
        )

    def _check_sums(self, reply: ProbeReply) -> None:
        """Sums of declared shapes that whole patients of whole folds can have, within what was agreed for
        each."""
        self._check_shapes(reply, sums_shapes(self._plan))
        folds = fold_moments(reply.sums, FACTORS, self._plan)
        self._check_moments(folds)
        least = smallest_cohort(self._plan)
        if any(float(f.count) < least for f in folds):
            raise ReplyRefused(f"Expected at least {least} patients in each fold of a probe; got fewer.")
        if self._plan.probes.anatomy:
            known = fold_moments(reply.sums, ANATOMY, self._plan)
            self._check_moments(known)
            if any(float(some.count) > float(fold.count) for some, fold in zip(known, folds, strict=True)):
                raise ReplyRefused("Expected no more patients with anatomy than there are; got more.")
        patients = sum(float(f.count) for f in folds)
        covered = {name: tensor for name, tensor in reply.sums.items() if name not in UNBOUNDED}
        if joint_norm(covered) > patients * sums_bound(self._plan) * _ROUNDING:
            raise ReplyRefused("Expected probe sums within the bound per patient; they are longer.")
        self._check_counts(reply.sums, patients)
        self._patients[reply.site] = patients

    def _check_moments(self, received: Sequence[ErasureMoments | StyleMoments]) -> None:
        try:
            for moments in received:
                moments.check(MOST_PATIENTS)
        except ValueError as reason:
            raise ReplyRefused(str(reason)) from reason

    def _check_counts(self, sums: Tensors, patients: float) -> None:
        """What the bound leaves out: counts, and sums of nobody are none."""
        if RECOGNITION in sums:
            content, style, asked, chance = sums[RECOGNITION].tolist()
            if not 0 <= max(content, style, chance) <= asked <= len(self._plan.sites) * patients:
                raise ReplyRefused("Expected no more recognised than there were; got others.")
            if min(content, style, chance) < 0:
                raise ReplyRefused("Expected counts of recognised patients of 0 and more; got others.")
        for vector, count in zip(sums.get(SWAPPED, ()), sums.get(SWAPPED_PATIENTS, ()), strict=True):
            if not (count == 0 and not bool(vector.any())) and count != patients:
                raise ReplyRefused("Expected swapped scans of all patients or of none; got others.")
            self._check_moments([style_moments(vector, count, self._plan)])

    def _check_hits(self, reply: ProbeReply) -> None:
        """Counts, no more hits than patients, who are those whose sums came before."""
        self._check_shapes(reply, hits_shapes())
        content, style, patients = reply.sums[HITS].tolist()
        if patients != self._patients.get(reply.site):
            raise ReplyRefused("Expected hits of the patients whose sums the site told; got others.")
        if not (0 <= content <= patients and 0 <= style <= patients):
            raise ReplyRefused("Expected no more hits of a probe than patients; got others.")

    def _check_shapes(self, reply: ProbeReply, shapes: Mapping[str, tuple[int, ...]]) -> None:
        if reply.round != self._round:
            raise ReplyRefused(f"Expected probe sums of round {self._round}; got those of {reply.round}.")
        if {name: tuple(tensor.shape) for name, tensor in reply.sums.items()} != dict(shapes):
            raise ReplyRefused("Expected probe sums of the shapes that the plan says; got others.")
        if not all(bool(torch.isfinite(tensor).all()) for tensor in reply.sums.values()):
            raise ReplyRefused("Expected finite probe sums; got NaN or infinity.")


def fitted_probes(sums: Mapping[str, Tensors], plan: RunPlan) -> Tensors:
    """The linear site probes of each fold, for all sites of the plan; `probe_shapes`."""
    folds = {site: fold_moments(own, FACTORS, plan) for site, own in sums.items()}
    columns = [plan.sites.index(site) for site in folds]
    probes = {name: torch.zeros(shape, dtype=torch.float64) for name, shape in probe_shapes(plan).items()}
    for factor, part in (("content", content_part(plan)), ("style", style_part(plan))):
        weight, bias = site_probes_by_fold(folds, part)
        probes[f"{factor}_weight"][:, :, columns] = weight
        probes[f"{factor}_bias"].fill_(NEVER)
        probes[f"{factor}_bias"][:, columns] = bias
    return probes


def readings_of_hits(hits: Mapping[str, Tensors]) -> dict[str, float]:
    """Balanced accuracy of the linear site probe, from content and from style."""
    counts = [tuple(own[HITS].tolist()) for own in hits.values()]
    if not counts:
        return {}
    return {
        "site_from_content": sum(c / n for c, _, n in counts) / len(counts),
        "site_from_style": sum(s / n for _, s, n in counts) / len(counts),
        "chance_site": 1 / len(counts),
    }


def readings_of_sums(sums: Mapping[str, Tensors], style_bank: Tensors, plan: RunPlan) -> dict[str, float]:
    """Everything that follows from the first exchange."""
    folds = pooled_folds({site: fold_moments(own, FACTORS, plan) for site, own in sums.items()})
    content, style = content_part(plan), style_part(plan)
    readings = {"content_through_style": float(explained_from_sums(folds, style, content, together=True))}
    return readings | _anatomy(sums, plan) | _recognition(sums) | _swaps(sums, style_bank, plan)


def _anatomy(sums: Mapping[str, Tensors], plan: RunPlan) -> dict[str, float]:
    """R² of each target out of fold, over the sites that know all of them."""
    sites = known_sites(sums, plan)
    if not sites:
        return {}
    folds, targets = pooled_folds(sites), slice(joint_width(plan), None)
    readings: dict[str, float] = {}
    for factor, part in (("content", content_part(plan)), ("style", style_part(plan))):
        explained = explained_from_sums(folds, part, targets).tolist()
        known = {n: v for n, v in zip(plan.probes.anatomy, explained, strict=True) if math.isfinite(v)}
        readings |= {f"anatomy_from_{factor}_{name}": value for name, value in known.items()}
        if known:
            readings[f"anatomy_from_{factor}"] = sum(known.values()) / len(known)
    return readings


def _recognition(sums: Mapping[str, Tensors]) -> dict[str, float]:
    """Top-1 in other styles among each site's own patients; not among all patients of the federation."""
    hits = [own[RECOGNITION] for own in sums.values() if RECOGNITION in own]
    total = torch.stack(hits).sum(0).tolist() if hits else []
    found = dict(zip(RECOGNISED, total, strict=False))
    if not found.get("asked"):
        return {}
    return {
        "patient_from_content_within_site": found["content"] / found["asked"],
        "patient_from_style_within_site": found["style"] / found["asked"],
        "chance_patient_within_site": found["chance"] / found["asked"],
    }


def _swaps(sums: Mapping[str, Tensors], style_bank: Tensors, plan: RunPlan) -> dict[str, float]:
    """Share of the style gap closed, over ordered pairs of sites."""
    if not style_bank or not any(SWAPPED in own for own in sums.values()):
        return {}
    entries = StyleBank.from_tensors(style_bank, plan.sites).entries
    gaps = []
    for site, own in sums.items():
        source = plan.sites.index(site)
        for target in range(len(plan.sites)):
            if (count := own[SWAPPED_PATIENTS][target]) < 1:
                continue
            swapped = style_moments(own[SWAPPED][target], count, plan).entry()
            ends = [_entry(entries, place).to_vector() for place in (source, target)]
            gaps.append(style_gap_closed(swapped.to_vector(), *ends))
    return {"style_gap_closed": sum(gaps) / len(gaps)} if gaps else {}


def _entry(entries: StyleEntry, place: int) -> StyleEntry:
    return entries.each(lambda values: values[place, 0])
