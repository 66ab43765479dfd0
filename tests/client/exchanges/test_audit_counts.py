"""Counts of a site's audit leave in whole cells; a perfect attack is told, and nobody's score."""

from pathlib import Path
from typing import Any

import pytest
import torch

from audit.attacks.claims import claims_of, fix_threshold
from audit.cohort import Cohort
from client.commands.plan_words import plan_words
from client.exchanges.audit_counts import ANSWER
from federation.exchanges.audit_counts import AUDIT_COUNTS, TRIED, AuditCountsAsk, cell_of
from federation.plan.plan import AggregationPlan, AuditCountsPlan, RunPlan, StylePlan
from federation.published_plan import PublishedPlan
from meduet_models.meduet import MeDUET
from meduet_models.sharing import shared_keys
from meduet_models.style.moments import CohortTooSmall
from privacy.whole_cohorts import in_whole_cohorts
from server.exchanges.audit_counts import check_audit_counts, pooled
from strategies.aggregation import ReplyRefused
from tests.worlds import Hospital, ViewedScans, protected_plan, public_latents, small_network, small_plan

MEMBERS, OTHERS = 60, 130


def plan(**changes: Any) -> RunPlan:
    return small_plan(
        network=small_network(code_size=24), audit_counts=AuditCountsPlan(false_alarms=0.5), **changes
    )


class Scans(ViewedScans):
    """The first `MEMBERS` patients were trained on, the others are the test split."""

    def indices(self, split: str) -> list[int]:
        return self.train if split == "train" else self.rest if split == "test" else []

    @property
    def rest(self) -> list[int]:
        return [row for row in range(len(self.patients)) if row not in self.train]


def scans(others: int = OTHERS) -> Scans:
    drawn = ViewedScans.of([f"p{n}" for n in range(MEMBERS + others)])
    return Scans(drawn.patients, drawn.values, drawn.site_index, list(range(MEMBERS)), drawn.covariates)


def network(asked: RunPlan) -> MeDUET:
    return MeDUET(asked.network, len(asked.sites), seed=asked.seed).eval()


def ask(asked: RunPlan) -> AuditCountsAsk:
    student = network(asked)
    keys = shared_keys(student, asked.style.head, asked.aggregation.method)
    state = student.state_dict()
    return AuditCountsAsk(plan_json=asked.to_json(), shared={name: state[name] for name in keys})


def cohort(held: Scans) -> Cohort:
    took_part = tuple(row in held.train for row in range(len(held.patients)))
    return Cohort("north", held.values[:, 0], tuple(held.patients), took_part)


def test_what_leaves_is_whole_cells_once_through_ledger_and_journal(tmp_path: Path) -> None:
    asked, held = plan(), scans()
    site = Hospital(tmp_path / "north", held)
    left = ANSWER.once(site, ask(asked), asked)
    claims = claims_of(cohort(held), asked, network(asked))
    assert claims is not None and set(left.tensors) == set(TRIED)
    for attack in TRIED:
        exact = claims[attack].sum(0)
        assert left.tensors[attack].equal(in_whole_cohorts(exact, 20))
        assert exact[:2].sum() == MEMBERS and 0 < exact[2:].sum() < OTHERS
    check_audit_counts(dict(left.tensors), asked)
    (line,) = [entry.record for entry in site.journal.entries()]
    assert line["kind"] == "audit_counts" and "not differentially private" in line["promise"]
    assert '"kind":"audit_counts"' in (site.state_dir / "ledger.jsonl").read_text()
    assert not line["counts"] and not line["metrics"]
    again = ANSWER.once(site, ask(asked), asked)
    assert again.record == left.record and len(list(site.journal.entries())) == 2


def test_nobody_who_fixes_a_threshold_is_counted_and_a_newcomer_deals_nobody_anew() -> None:
    held = scans()
    people = cohort(held)
    fixes, claims = fix_threshold(people), claims_of(people, plan(), network(plan()))
    assert claims is not None and not (fixes & people.member).any() and 45 <= fixes.sum() <= 85
    for cells in claims.values():
        assert (cells.sum(1).numpy() == ~fixes).all()
    fewer = Cohort("north", people.latents[:-1], people.patients[:-1], people.took_part[:-1])
    assert (fix_threshold(fewer) == fixes[:-1]).all()


def test_a_patient_who_was_trained_on_changes_her_own_cell_of_the_loss_and_no_other() -> None:
    people = cohort(scans())
    fewer = Cohort("north", people.latents[1:], people.patients[1:], people.took_part[1:])
    with_her, without = (claims_of(one, plan(), network(plan())) for one in (people, fewer))
    assert with_her is not None and without is not None
    assert (with_her["loss"].sum(0) - without["loss"].sum(0)).equal(with_her["loss"][0])
    bound = AUDIT_COUNTS.promise(plan(), ask(plan())).bound
    share = torch.cat([with_her[attack][0] for attack in TRIED])
    assert float(share.norm()) <= bound * (1 + 1e-12)


@pytest.mark.parametrize("minimum, others", [(21, OTHERS), (0, 30)])
def test_a_site_with_a_larger_minimum_or_few_others_tells_nothing(
    tmp_path: Path, minimum: int, others: int
) -> None:
    site = Hospital(tmp_path / "north", scans(others), minimum_cohort=minimum)
    with pytest.raises(CohortTooSmall):
        ANSWER.once(site, ask(plan()), plan())
    assert not list(site.journal.entries())


@pytest.mark.parametrize("wrong", [19.0, -20.0, float("nan"), float("inf"), float(20 << 20)])
def test_counts_that_no_site_may_tell_are_put_aside(wrong: float) -> None:
    good = {attack: torch.full((4,), 20.0, dtype=torch.float64) for attack in TRIED}
    check_audit_counts(good, plan())
    with pytest.raises(ReplyRefused):
        check_audit_counts(good | {"loss": torch.tensor([20.0, wrong, 20.0, 20.0])}, plan())
    with pytest.raises(ReplyRefused, match="other tensors"):
        check_audit_counts({"loss": good["loss"]}, plan())


def test_pooled_are_the_sites_that_told_a_cell_of_a_side() -> None:
    each = [torch.tensor(one) for one in ([20.0, 40, 0, 0], [0.0, 20, 20, 20], [0.0, 0, 0, 0])]
    told = pooled(each)
    assert (told.members.claimed, told.members.missed, told.members.sites) == (20, 60, 2)
    assert (told.others.claimed, told.others.missed, told.others.sites) == (20, 20, 1)


def test_no_plan_asks_unless_it_says_so_and_none_with_privacy_or_without_a_model_may() -> None:
    assert not AUDIT_COUNTS.rounds(small_plan()) and list(AUDIT_COUNTS.rounds(plan())) == [3]
    with pytest.raises(ValueError, match="false_alarms"):
        small_plan(audit_counts=AuditCountsPlan(false_alarms=0.9))
    with pytest.raises(ValueError, match="no place in a plan with privacy"):
        protected_plan(public_latents(), plan)
    with pytest.raises(ValueError, match="audit_counts has no effect"):
        plan(aggregation=AggregationPlan(method="alone"), style=StylePlan(exchange="none"))


def test_the_hospital_reads_what_it_would_tell_and_how_often() -> None:
    text = " ".join(words for _, words in plan_words(PublishedPlan(plan=plan(), bundle_sha256="0" * 64)))
    assert "whole cells of 20" in text and "No score leaves" in text and "counts of your own audit: 1" in text
    unasked = PublishedPlan(plan=small_plan(), bundle_sha256="0" * 64)
    assert "whole cells" not in " ".join(words for _, words in plan_words(unasked))
    assert cell_of(plan()) == 20
