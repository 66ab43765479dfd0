"""Attacks by asking: each reads a patient where its defence is taken away, and nothing where it stands."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Message
from torch import Tensor

from client.app import make_client_app
from client.books import refusals
from client.consent.exact_sums import TooFewForSums
from client.exchanges import erasure, probes, survey
from client.exchanges.probes import probe_hits, probed_patients
from client.latents.style_moments import own_moments
from client.training.site_state import StateFolder
from federation.exchanges.erasure import ErasureAsk, erasure_sums, numbers_told
from federation.exchanges.probes import (
    ANATOMY,
    HITS,
    PROBES,
    ProbeAsk,
    fold_moments,
    joint_bound,
    probe_shapes,
)
from federation.exchanges.survey import SurveyAsk
from federation.plan.plan import ProbePlan, RunPlan, TrainingPlan
from federation.wire.messages import Refusal, kind_of
from meduet_models.content_code import CodeSums
from meduet_models.erasure import patient_means
from meduet_models.meduet import MeDUET
from meduet_models.sharing import home_keys, shared_keys
from privacy.ledger import AnsweredBefore
from simulations.engines.in_process import InProcessGrid
from tests.worlds import Hospital, coded, coded_network

PATIENTS = [f"p{n}" for n in range(12)]


@pytest.fixture
def plan(toy_plan: Callable[..., RunPlan]) -> RunPlan:
    return toy_plan(
        probes=ProbePlan(every_rounds=1, folds=3),
        training=TrainingPlan(rounds=20, steps_per_round=1, batch_size=4),
    )


@pytest.fixture
def site(tmp_path: Path, toy_scans: Any, plan: RunPlan) -> Hospital:
    site = Hospital(tmp_path / "north", toy_scans(PATIENTS))
    StateFolder(site.state_dir / "state", plan.sha256).enter(1, lambda: parts(plan, home_keys))
    return site


def parts(plan: RunPlan, keys: Any) -> dict[str, Tensor]:
    model = MeDUET(plan.network, len(plan.sites), seed=plan.seed)
    named = model.state_dict()
    return {n: named[n] for n in keys(model, plan.style.head, plan.aggregation.method)}


def student(plan: RunPlan) -> MeDUET:
    return MeDUET(plan.network, len(plan.sites), seed=plan.seed).eval()


# One patient's content, from counts of hits: a linear reading with a threshold that is moved until nobody but
# the patient who is farthest along a direction passes; then the direction is turned a little, axis by axis.


def content_of_the_farthest(
    hits: Callable[[Tensor, float], int], width: int, direction: Tensor, bound: float
) -> Tensor:
    def farthest(along: Tensor) -> float:
        low, high = -bound, bound
        for _ in range(24):
            middle = (low + high) / 2
            low, high = (middle, high) if hits(along, middle) > 0 else (low, middle)
        return low

    rows = [direction, *(direction + 1e-2 * axis for axis in torch.eye(width, dtype=torch.float64))]
    lengths = torch.tensor([farthest(row) for row in rows], dtype=torch.float64)
    return torch.linalg.lstsq(torch.stack(rows), lengths[:, None]).solution[:, 0]


@pytest.mark.parametrize("defended", [False, True])
def test_probe_questions_under_one_settlement_do_not_read_a_patients_content(
    site: Hospital, plan: RunPlan, defended: bool
) -> None:
    width, network = plan.network.code_size, coded_network(plan)
    probed = probed_patients(site.held, plan, 0, site.secret)
    with torch.no_grad():
        latents = site.held.values[:, 0]
        joint = torch.cat([network.content_code(latents), network.pooled_style(latents)], 1)
    means = patient_means(joint.double(), PATIENTS)[:, :width]
    direction = means[0] - means.mean(0)  # somebody else's scan of a patient is enough to point at her
    direction = direction / direction.norm()
    victim = means[int((means @ direction).argmax())]
    shared = coded(plan, parts(plan, shared_keys))
    answered: list[int] = []

    def hits(along: Tensor, threshold: float) -> int:
        probe = {n: torch.zeros(s, dtype=torch.float64) for n, s in probe_shapes(plan).items()}
        probe["content_weight"][:, :, 0] = along
        probe["content_bias"][:, 0] = -threshold
        probe["content_bias"][:, 2] = -1e30
        if not defended:  # what one answer for each question gives
            return int(probe_hits(network, site.held, probed, plan, probe, 0)[HITS][0])
        ask = ProbeAsk(plan_json=plan.to_json(), round=1, shared=shared, bank={}, probe=probe)
        try:
            released = probes.ANSWER.once(site, ask, plan)
        except AnsweredBefore:
            return 0
        answered.append(1)
        return int(released.tensors[HITS][0])

    found = content_of_the_farthest(hits, width, direction, joint_bound(plan))
    if not defended:
        assert float((found - victim).abs().max()) < 1e-3
        return
    assert float((found - victim).norm()) > 0.3 * float(victim.norm())
    assert len(answered) == 1 and site.ledger.verify() == 2 and site.journal.verify() == 1


# A newcomer, from two surveys: the sums with her less the sums without.


@pytest.mark.parametrize("defended", [False, True])
def test_two_surveys_around_a_newcomer_do_not_give_her_statistics(
    site: Hospital, plan: RunPlan, toy_scans: Any, tmp_path: Path, defended: bool
) -> None:
    def surveyed() -> Tensor:
        sums = survey.ANSWER.once(site, SurveyAsk(plan_json=plan.to_json()), plan).tensors
        return torch.cat([sums[name].flatten() for name in sorted(sums) if name != "count"]).double()

    before = surveyed()
    site.held = toy_scans([*PATIENTS, "new"])
    site.held.values[: len(PATIENTS)] = toy_scans(PATIENTS).values
    if not defended:  # books that forget
        site.state_dir = tmp_path / "forgetful"
    difference = surveyed() - before
    if defended:
        assert not bool(difference.any()) and site.ledger.verify() == 2
        return
    site.held.train = [len(PATIENTS)]
    hers = own_moments(site.held, plan).to_tensors()
    own = torch.cat([hers[name].flatten() for name in sorted(hers) if name != "count"]).double()
    assert float((difference - own).abs().max()) < 1e-5 < 1e-1 < float(own.abs().max())


# The largest mean latent of a patient, from whether a question is answered: style heads under which a number
# overflows where it is larger than a guess.


def overflowing_above(guess: float, shared: dict[str, Tensor]) -> dict[str, Tensor]:
    tensors = {name: tensor.clone() for name, tensor in shared.items()}
    tensors["latent_mean"].zero_()
    tensors["latent_deviation"].fill_(1.0)
    tensors["style_head.expand.weight"].zero_()[0, 0] = 1e30
    tensors["style_head.expand.bias"].zero_()[0] = -1e30 * guess
    tensors["style_head.contract.weight"].fill_(1e30)
    return tensors


@pytest.mark.parametrize("defended", [False, True])
def test_whether_questions_are_answered_does_not_read_a_latent(
    site: Hospital, plan: RunPlan, monkeypatch: pytest.MonkeyPatch, defended: bool
) -> None:
    if not defended:
        monkeypatch.setattr(refusals, "MOST", 10**9)
    plan = replace(plan, style=replace(plan.style, head="shared", anchor=0.0))
    StateFolder(site.state_dir / "state", plan.sha256).enter(1, lambda: parts(plan, home_keys))
    grid = InProcessGrid(make_client_app(lambda context: site), 1)
    words: list[str] = []
    sound = coded(plan, parts(plan, shared_keys))

    def is_answered(round_number: int, guess: float) -> bool:
        shared = overflowing_above(guess, sound)
        ask = ProbeAsk(plan_json=plan.to_json(), round=round_number, shared=shared, bank={}, probe={})
        (reply,) = grid.send_and_receive([Message(ask.to_record(), 1000, PROBES.route, ttl=60.0)])
        if kind_of(reply.content) != "refusal":
            return True
        words.append(Refusal.from_record(reply.content).kind.value)
        return False

    low, high = -4.0, 4.0
    for round_number in range(1, 21):  # each in a place of its own: the law of one answer does not stop this
        middle = (low + high) / 2
        low, high = (low, middle) if is_answered(round_number, middle) else (middle, high)
    truth = float(site.held.values[:, 0, 0].mean((1, 2, 3)).max())
    lines = [e.record for e in site.journal.entries() if e.record["kind"] == "refusal"]
    assert len(lines) == len(words) and all(len(line["question"]) == 64 for line in lines)
    assert lines[0]["reason"] == "internal"
    if not defended:
        assert abs(low - truth) < 1e-4 and set(words) == {"not_answered"}
        return
    assert abs(low - truth) > 1e-3  # the answers between three refusals tell a little
    assert words[:3] == ["not_answered"] * 3 and set(words[3:]) == {"stopped"}
    refusals.resume(site.journal, plan.sha256)  # the site's people looked
    assert not refusals.is_stopped(site.journal.entries(), plan.sha256)


# Who is among few patients, and what was measured of them, from the sums of their products.


def traced(read: Callable[[Tensor], Tensor], left: CodeSums, members: Any, strangers: Any) -> float:
    """How often a member leans to the mean that left more than a stranger does (area under the curve).

    Who holds the scans, and others of the same kind, knows what is usual, and how it varies.
    """

    def leaning(cohort: Any) -> Tensor:
        with torch.no_grad():
            codes = read(cohort.values[:, 0]).double()
        return (codes - usual) @ torch.linalg.solve(varies, left.total / left.count - usual)

    with torch.no_grad():
        told = read(strangers.values[:, 0]).double()
    usual, varies = told.mean(0), torch.cov(told.T)
    varies += 1e-3 * varies.diagonal().mean() * torch.eye(len(usual), dtype=torch.float64)
    inside, outside = leaning(members), leaning(strangers)
    return float((inside[:, None] > outside[None]).double().mean())


@pytest.mark.parametrize("agreed", [True, False])
def test_the_mean_of_few_codes_tells_members_only_where_the_site_agreed(
    site: Hospital, plan: RunPlan, toy_scans: Any, agreed: bool
) -> None:
    site.exact_sums, network, size = agreed, coded_network(plan), plan.network.code_size
    shared = coded(plan, parts(plan, shared_keys))
    ask = ErasureAsk(plan_json=plan.to_json(), shared=shared)
    if not agreed:
        with pytest.raises(TooFewForSums, match=f"at least {size} patients .* got {len(PATIENTS)}"):
            erasure.ANSWER.once(site, ask, plan)
        assert site.journal.verify() == 0
        return
    left = erasure_sums(erasure.ANSWER.once(site, ask, plan).tensors, plan)
    strangers = toy_scans([f"s{n}" for n in range(200)], seed=9)
    assert traced(network.content_code, left.codes, site.held, strangers) > 0.9
    assert traced(network.pooled_content, left.pooled, site.held, strangers) > 0.75


@pytest.mark.parametrize("agreed", [True, False])
def test_probe_sums_tell_what_was_measured_of_each_patient_only_where_the_site_agreed(
    site: Hospital, plan: RunPlan, agreed: bool
) -> None:
    """Whoever holds other copies of the scans knows their factors; products with the target do the rest."""
    plan = replace(plan, probes=replace(plan.probes, anatomy={"age": (20.0, 90.0)}))
    StateFolder(site.state_dir / "state", plan.sha256).enter(1, lambda: parts(plan, home_keys))
    site.exact_sums, network = agreed, coded_network(plan)
    ages = torch.linspace(25.0, 85.0, len(PATIENTS), dtype=torch.float64)
    site.held.covariates = [{"age": age} for age in ages.tolist()]
    shared = coded(plan, parts(plan, shared_keys))
    ask = ProbeAsk(plan_json=plan.to_json(), round=1, shared=shared, bank={}, probe={})
    if not agreed:
        with pytest.raises(TooFewForSums, match="patients behind sums of products"):
            probes.ANSWER.once(site, ask, plan)
        assert site.journal.verify() == 0
        return
    folds = fold_moments(probes.ANSWER.once(site, ask, plan).tensors, ANATOMY, plan)
    probed = probed_patients(site.held, plan, 0, site.secret)
    with torch.no_grad():
        x = site.held.values[:, 0]
        joint = torch.cat([network.content_code(x), network.pooled_style(x)], 1).double()
    joint = joint * (joint_bound(plan) / joint.norm(dim=1, keepdim=True).clamp(min=joint_bound(plan)))
    for number, fold in enumerate(folds):
        mine = [i for i, name in enumerate(PATIENTS) if probed.folds[name] == number]
        products = fold.outer[: joint.shape[1], -1]  # sum of factors times target
        solved = torch.linalg.lstsq(joint[mine].T, products[:, None]).solution[:, 0]
        assert torch.allclose((solved + 1) / 2 * 70 + 20, ages[mine], atol=0.05)


def test_from_one_patient_per_number_the_mean_leaves_and_tells_members_less_well(
    site: Hospital, plan: RunPlan, toy_scans: Any
) -> None:
    site.exact_sums, size = False, plan.network.code_size
    site.held = toy_scans([f"p{n}" for n in range(size)])
    shared = coded(plan, parts(plan, shared_keys))
    ask = ErasureAsk(plan_json=plan.to_json(), shared=shared)
    left = erasure_sums(erasure.ANSWER.once(site, ask, plan).tensors, plan)
    strangers = toy_scans([f"s{n}" for n in range(200)], seed=9)
    assert traced(coded_network(plan).content_code, left.codes, site.held, strangers) < 0.85
    assert float(left.pooled.to_vector().norm()) == 0.0  # a patient for each number of a code, not of both


def test_pooled_content_leaves_from_a_patient_for_each_number_of_both_means(
    site: Hospital, plan: RunPlan, toy_scans: Any
) -> None:
    site.exact_sums, least = False, numbers_told(plan)
    site.held = toy_scans([f"p{n}" for n in range(least)])
    shared = coded(plan, parts(plan, shared_keys))
    ask = ErasureAsk(plan_json=plan.to_json(), shared=shared)
    left = erasure_sums(erasure.ANSWER.once(site, ask, plan).tensors, plan)
    assert float(left.pooled.count) == least
    strangers = toy_scans([f"s{n}" for n in range(200)], seed=9)
    assert traced(coded_network(plan).pooled_content, left.pooled, site.held, strangers) < 0.7
