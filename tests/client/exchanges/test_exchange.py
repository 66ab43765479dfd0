from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from client.declared import GateRefusal
from client.exchanges import erasure, survey
from client.exchanges import pretraining as answers
from client.exchanges.exchange import AskRefused, before_deadline
from client.release import Released
from client.training.site_state import StateMissing
from client.training.trainee import WrongWeights
from federation.exchanges.erasure import ErasureAsk, erasure_sums
from federation.exchanges.pretraining import TrainAsk
from federation.exchanges.survey import SurveyAsk, survey_layout
from federation.journal import Journal
from federation.plan.plan import ReleasePlan, RunPlan, TrainingPlan
from federation.wire.wire import RefusalKind
from meduet_models.meduet import MeDUET
from meduet_models.sharing import home_keys, shared_keys
from meduet_models.style.moments import CohortTooSmall, StyleMoments
from privacy.clipping import joint_norm
from privacy.ledger import AnsweredBefore, Ledger, LedgerRefusal
from tests.worlds import Hospital, coded, unanswered_places

answer_survey, answer_round, answer_erasure = survey.ANSWER.once, answers.ANSWER.once, erasure.ANSWER.once
PATIENTS = [f"p{n // 2}" for n in range(12)]
Tensors = dict[str, torch.Tensor]


@dataclass
class ToySite(Hospital):
    """A hospital that remembers how often its scans were opened, and may refuse."""

    opened: int = 0
    refuses: bool = False

    def accept(self, plan: RunPlan, finetuning_sha256: str = "") -> None:
        if self.refuses:
            raise AskRefused("Expected another plan.", RefusalKind.PLAN_NOT_ACCEPTED)

    def scans(self, plan: RunPlan) -> Any:
        self.opened += 1
        return self.held


@pytest.fixture
def site(tmp_path: Path, toy_scans: Any) -> ToySite:
    return ToySite(tmp_path / "north", toy_scans(PATIENTS))


@pytest.fixture
def plan(toy_plan: Callable[..., RunPlan]) -> RunPlan:
    return toy_plan()


def weights(plan: RunPlan) -> tuple[Tensors, Tensors]:
    model = MeDUET(plan.network, len(plan.sites), seed=plan.seed)
    named = model.state_dict()
    method = plan.aggregation.method
    return (
        {n: named[n] for n in shared_keys(model, plan.style.head, method)},
        {n: named[n] for n in home_keys(model, plan.style.head, method)},
    )


def ask(plan: RunPlan, bank: Any, round_number: int = 1, shared: Tensors | None = None) -> TrainAsk:
    start, home = weights(plan)
    return TrainAsk(
        plan_json=plan.to_json(),
        round=round_number,
        shared=start if shared is None else shared,
        bank=bank.to_tensors(),
        home=home if round_number == 1 else None,
    )


def same(one: Any, other: Any) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def add(shared: Tensors, released: Released) -> Tensors:
    examples = released.counts["examples"]
    return {name: tensor + released.tensors[name] / examples for name, tensor in shared.items()}


def test_a_round_releases_examples_times_the_difference_of_the_shared_weights_alone(
    site: ToySite, plan: RunPlan, toy_bank: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = []
    train = answers.train_round
    monkeypatch.setattr(answers, "train_round", lambda *a: results.append(train(*a)) or results[-1])
    released = answer_round(site, ask(plan, toy_bank(plan)), plan)
    (result,) = results
    shared, home = weights(plan)
    assert released.tensors.keys() == shared.keys() and not released.tensors.keys() & home.keys()
    assert released.counts == {"examples": 12}
    for name, tensor in released.tensors.items():
        assert torch.equal(tensor, 12 * result.update[name])
    assert released.metrics["clip_factor"] == 1.0


def test_an_update_beyond_the_plans_bound_is_cut_to_it(site: ToySite, toy_plan: Any, toy_bank: Any) -> None:
    plan = toy_plan(release=ReleasePlan(update_clip_norm=1e-3, wire_dtype="bfloat16"))
    released = answer_round(site, ask(plan, toy_bank(plan)), plan)
    assert 0.98 * 12e-3 < joint_norm(released.tensors) <= 12e-3
    assert released.metrics["clip_factor"] == pytest.approx(1e-3 / released.metrics["update_norm"])
    assert released.metrics["clip_factor"] < 1


def test_a_run_interrupted_between_rounds_equals_one_that_never_stopped(
    plan: RunPlan, toy_scans: Any, toy_bank: Any, tmp_path: Path
) -> None:
    def run(folder: str, repeat: tuple[int, ...]) -> list[Released]:
        shared, released = weights(plan)[0], []
        for round_number in (1, 2, 3):
            for _ in range(
                2 if round_number in repeat else 1
            ):  # a new site object each time: nothing but the disk
                site = ToySite(tmp_path / folder, toy_scans(PATIENTS))
                last = answer_round(site, ask(plan, toy_bank(plan), round_number, shared), plan)
            released.append(last)
            shared = add(shared, last)
        return released

    whole, repeated = run("a", ()), run("b", (1, 2, 3))
    for one, other in zip(whole, repeated, strict=True):
        assert same(one.tensors, other.tensors)
        assert one.record["sha256"] == other.record["sha256"]
    a, b = (Ledger(tmp_path / folder / "ledger.jsonl") for folder in "ab")
    assert a.verify() == b.verify() == 6  # a round delivered twice is charged once
    assert Journal(tmp_path / "b" / "journal.jsonl").verify() == 6  # but what crossed twice is written twice


def test_a_centre_that_goes_back_a_round_gets_the_same_answer_as_the_first_time(
    site: ToySite, plan: RunPlan, toy_bank: Any
) -> None:
    shared = [weights(plan)[0]]
    first = []
    for round_number in (1, 2, 3):
        first.append(answer_round(site, ask(plan, toy_bank(plan), round_number, shared[-1]), plan))
        shared.append(add(shared[-1], first[-1]))
    for round_number in (3, 2, 3):  # one round back, another one, and forward again
        again = answer_round(site, ask(plan, toy_bank(plan), round_number, shared[round_number - 1]), plan)
        assert same(again.tensors, first[round_number - 1].tensors)
    restarted = answer_round(site, ask(plan, toy_bank(plan), 1, shared[0]), plan)
    assert same(restarted.tensors, first[0].tensors)


def test_the_ledger_refuses_before_the_first_scan_is_opened(
    site: ToySite, plan: RunPlan, toy_bank: Any
) -> None:
    site.epsilon_ceiling = 3.0
    shared = weights(plan)[0]
    questions: list[Callable[[], Released]] = [
        lambda: answer_survey(site, SurveyAsk(plan_json=plan.to_json()), plan),
        lambda: answer_round(site, ask(plan, toy_bank(plan)), plan),
        lambda: answer_erasure(site, ErasureAsk(plan_json=plan.to_json(), shared=shared), plan),
    ]
    for question in questions:
        with pytest.raises(LedgerRefusal, match="Nothing was read"):
            question()
    assert site.opened == 0
    assert site.ledger.verify() == site.journal.verify() == 0
    assert not (site.state_dir / "state").exists()


def test_a_plan_that_the_site_does_not_accept_reserves_and_opens_nothing(
    site: ToySite, plan: RunPlan, toy_bank: Any
) -> None:
    site.refuses = True
    with pytest.raises(AskRefused):
        answer_survey(site, SurveyAsk(plan_json=plan.to_json()), plan)
    with pytest.raises(AskRefused):
        answer_round(site, ask(plan, toy_bank(plan)), plan)
    assert site.opened == 0 and site.ledger.verify() == 0


def test_a_place_in_the_ledger_is_taken_before_scans_are_opened(
    site: ToySite, plan: RunPlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(self: ToySite, plan: RunPlan) -> Any:
        raise OSError("disk gone")

    monkeypatch.setattr(ToySite, "scans", broken)
    with pytest.raises(OSError, match="disk gone"):
        answer_survey(site, SurveyAsk(plan_json=plan.to_json()), plan)
    assert unanswered_places(site.state_dir / "ledger.jsonl") == [("survey", 0)]


def test_the_survey_tells_sums_counts_and_nothing_else(site: ToySite, plan: RunPlan) -> None:
    site.held.train = list(range(8))
    released = answer_survey(site, SurveyAsk(plan_json=plan.to_json()), plan)
    moments = StyleMoments.from_tensors(released.tensors, survey_layout(plan))
    expected = StyleMoments.of(site.held.values[:8, 0], PATIENTS[:8], survey_layout(plan))
    torch.testing.assert_close(moments.to_vector().float(), expected.to_vector().float())
    assert released.counts == {"num_patients": 4, "num_scans": 8}
    assert released.metrics == {}
    assert released.record["not_covered"] == ["count"]


def test_too_small_a_cohort_tells_no_style_and_no_content(site: ToySite, plan: RunPlan) -> None:
    site.held.train = list(range(4))  # two patients, and the plan wants three
    with pytest.raises(CohortTooSmall, match="at least 3 patients"):
        answer_survey(site, SurveyAsk(plan_json=plan.to_json()), plan)
    site.held.train = list(range(12))
    site.minimum_cohort = 7  # six patients are enough for the plan, not for the site
    with pytest.raises(CohortTooSmall, match="at least 7 patients"):
        answer_survey(site, SurveyAsk(plan_json=plan.to_json()), plan)
    states = answers.StateFolder(site.state_dir / "state", plan.sha256)
    states.enter(1, lambda: weights(plan)[1])
    with pytest.raises(CohortTooSmall, match="at least 7 patients"):
        answer_erasure(site, ErasureAsk(plan_json=plan.to_json(), shared=coded(plan, weights(plan)[0])), plan)
    assert site.journal.verify() == 0


def test_erasure_sums_are_those_of_the_final_networks_codes(
    site: ToySite, plan: RunPlan, toy_bank: Any
) -> None:
    shared = coded(plan, add(weights(plan)[0], answer_round(site, ask(plan, toy_bank(plan)), plan)))
    question = ErasureAsk(plan_json=plan.to_json(), shared=shared)
    told = erasure_sums(answer_erasure(site, question, plan).tensors, plan)
    sums, pooled = told.codes, told.pooled
    student = MeDUET(plan.network, 3)
    state = answers.StateFolder(site.state_dir / "state", plan.sha256).before(4)
    student.load_state_dict({**state.home, **shared})
    with torch.no_grad():
        codes = student.content_code(site.held.values[:, 0]).double().reshape(6, 2, -1).mean(1)
        whole = student.pooled_content(site.held.values[:, 0]).double().reshape(6, 2, -1).mean(1)
    assert float(sums.count) == 6 and float(codes.norm(dim=1).max()) < sums.bound
    torch.testing.assert_close(sums.total, codes.sum(0), rtol=1e-5, atol=1e-5)
    assert float(pooled.count) == 6 and float(whole.norm(dim=1).max()) < pooled.bound
    torch.testing.assert_close(pooled.total, whole.sum(0), rtol=1e-5, atol=1e-5)
    with pytest.raises(AnsweredBefore):
        answer_erasure(site, replace(question, shared={**shared, "code_mean": 0 * shared["code_mean"]}), plan)


def test_without_axes_of_a_code_no_sums_are_told(site: ToySite, plan: RunPlan) -> None:
    answers.StateFolder(site.state_dir / "state", plan.sha256).enter(1, lambda: weights(plan)[1])
    with pytest.raises(AskRefused, match="axes of a content code") as refusal:
        answer_erasure(site, ErasureAsk(plan_json=plan.to_json(), shared=weights(plan)[0]), plan)
    assert refusal.value.kind is RefusalKind.MALFORMED and site.journal.verify() == 0


@pytest.mark.parametrize(("round_number", "text"), [(0, "got round 0"), (4, "got round 4")])
def test_a_round_outside_the_plan_is_malformed(
    site: ToySite, plan: RunPlan, toy_bank: Any, round_number: int, text: str
) -> None:
    with pytest.raises(AskRefused, match=text) as refusal:
        answer_round(site, ask(plan, toy_bank(plan), round_number), plan)
    assert refusal.value.kind is RefusalKind.MALFORMED
    assert site.opened == 0


def test_home_weights_in_a_later_round_do_not_replace_the_anchor(
    site: ToySite, plan: RunPlan, toy_bank: Any
) -> None:
    answer_round(site, ask(plan, toy_bank(plan)), plan)
    states = answers.StateFolder(site.state_dir / "state", plan.sha256)
    first = states.start().home
    other = {name: tensor + 1 for name, tensor in weights(plan)[1].items()}
    answer_round(site, replace(ask(plan, toy_bank(plan), 2), home=other), plan)
    assert states.rounds() == [0, 1, 2]
    start = states.start().home
    assert all(torch.equal(start[name], tensor) for name, tensor in first.items())


def test_a_site_that_missed_round_1_begins_from_the_start_that_comes_later(
    site: ToySite, plan: RunPlan, toy_bank: Any
) -> None:
    answer_round(site, replace(ask(plan, toy_bank(plan), 2), home=weights(plan)[1]), plan)
    assert answers.StateFolder(site.state_dir / "state", plan.sha256).rounds() == [0, 2]


def test_a_site_that_never_had_a_start_is_out_of_order(site: ToySite, plan: RunPlan, toy_bank: Any) -> None:
    with pytest.raises(StateMissing, match="does not have it"):
        answer_round(site, ask(plan, toy_bank(plan), 2), plan)


def test_shared_weights_of_another_shape_or_a_bank_of_other_sites_are_refused_before_scans_are_opened(
    site: ToySite, plan: RunPlan, toy_bank: Any
) -> None:
    bank, shared = toy_bank(plan), weights(plan)[0]
    with pytest.raises(WrongWeights, match="embed"):
        answer_round(site, ask(plan, bank, 1, shared | {"embed.bias": torch.zeros(3)}), plan)
    assert site.opened == 0
    tensors = bank.to_tensors()
    wrong = replace(ask(plan, bank), bank=tensors | {"count": tensors["count"][:2]})
    with pytest.raises(AskRefused, match="style bank of 3 sites"):
        answer_round(site, wrong, plan)


def test_a_round_that_outlives_the_plans_deadline_is_given_up(
    site: ToySite, plan: RunPlan, toy_bank: Any
) -> None:
    late = replace(plan, aggregation=replace(plan.aggregation, deadline_s=1e-3))
    with pytest.raises(AskRefused) as refusal:
        answer_round(site, ask(late, toy_bank(late)), late)
    assert refusal.value.kind is RefusalKind.DEADLINE
    assert site.journal.verify() == 0
    assert unanswered_places(site.state_dir / "ledger.jsonl") == [("round", 1)]


def test_a_round_gives_up_while_there_is_time_to_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [50.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    seen: list[int] = []
    on_step = before_deadline(10.0, lambda step, loss: seen.append(step))
    now[0] = 59.0
    on_step(1, 0.0)
    now[0] = 59.1
    with pytest.raises(AskRefused, match=r"0\.9 of aggregation\.deadline_s \(10 s\); it was at step 2"):
        on_step(2, 0.0)
    assert seen == [1]


def test_when_the_gate_stays_shut_no_state_is_kept_and_the_round_can_be_asked_again(
    site: ToySite, plan: RunPlan, toy_bank: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    question = ask(plan, toy_bank(plan))
    train = answers.train_round
    monkeypatch.setattr(
        answers, "train_round", lambda *a: replace(train(*a), metrics={"patient": 1.0, "update_norm": 1.0})
    )
    with pytest.raises(GateRefusal, match="agreed names"):
        answer_round(site, question, plan)
    folder = answers.StateFolder(site.state_dir / "state", plan.sha256)
    assert folder.rounds() == [0]
    monkeypatch.setattr(answers, "train_round", train)
    answer_round(site, question, plan)
    assert folder.rounds() == [0, 1]


def test_every_step_is_reported_as_it_happens(site: ToySite, toy_plan: Any, toy_bank: Any) -> None:
    plan = toy_plan(training=TrainingPlan(rounds=1, steps_per_round=3, batch_size=4))
    steps: list[int] = []
    answer_round(site, ask(plan, toy_bank(plan)), plan, lambda step, loss: steps.append(step))
    assert steps == [1, 2, 3]
