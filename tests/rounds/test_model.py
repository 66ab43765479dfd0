import dataclasses
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from federation.exchanges.erasure import ErasureReply, ErasureSums, erasure_tensors, pooled_bound
from federation.exchanges.survey import SurveyReply, survey_layout
from meduet_models.content_code import CodeSums, code_bound, code_of
from meduet_models.meduet import MeDUET
from meduet_models.style.bank import StyleBank
from meduet_models.style.moments import StyleMoments
from server.model import MeduetModel
from strategies.aggregation import ReplyRefused

METHODS = ["content_share", "fedavg", "pooled", "alone"]


def surveyed(plan: Any, site: str, seed: int, num: int = 8) -> SurveyReply:
    latents = torch.randn(num, 2, 4, 6, 4, generator=torch.Generator().manual_seed(seed)) + seed / 2
    moments = StyleMoments.of(latents, [str(i) for i in range(num)], survey_layout(plan))
    return SurveyReply(
        plan_sha256=plan.sha256, site=site, moments=moments.to_tensors(), num_patients=num, num_scans=num
    )


def codes(plan: Any, seed: int, num: int = 8) -> torch.Tensor:
    return torch.randn(num, plan.network.code_size, generator=torch.Generator().manual_seed(seed)) + seed / 2


def pooled(plan: Any, seed: int, num: int = 8) -> torch.Tensor:
    drawn = torch.randn(num, plan.network.width, generator=torch.Generator().manual_seed(seed))
    return (drawn + seed / 2) / 3


def content(plan: Any, site: str, seed: int, num: int = 8, *, beside: bool = True) -> ErasureReply:
    who = [str(i) for i in range(num)]
    sums = CodeSums.of(codes(plan, seed, num), who, code_bound(plan.network.code_size))
    of_tokens = CodeSums.none(plan.network.width, pooled_bound(plan))
    if beside:
        of_tokens = CodeSums.of(pooled(plan, seed, num), who, pooled_bound(plan))
    moments = erasure_tensors(ErasureSums(sums, of_tokens))
    return ErasureReply(plan_sha256=plan.sha256, site=site, moments=moments)


@pytest.mark.parametrize("method", METHODS)
def test_what_travels_and_what_stays_are_the_whole_network_and_its_common_start(
    miniature: Any, method: str
) -> None:
    plan = miniature.plan(method=method)
    model = MeduetModel(plan)
    (shared, home), (again, _) = model.start(), model.start()
    whole = MeDUET(plan.network, len(plan.sites), seed=plan.seed).state_dict()
    assert {**shared, **home}.keys() == whole.keys() and not set(shared) & set(home)
    assert all(torch.equal({**shared, **home}[name], tensor) for name, tensor in whole.items())
    assert all(torch.equal(shared[name], again[name]) for name in shared)
    assert bool(home) == (method in ("content_share", "alone"))
    assert bool(shared) == model.surveyed == (method != "alone")
    assert model.erased == (method in ("content_share", "fedavg"))


@pytest.mark.parametrize("method", ["content_share", "fedavg", "pooled"])
def test_a_survey_sets_the_latent_scale_to_that_of_the_union(miniature: Any, method: str) -> None:
    plan = miniature.plan(method=method)
    plan = replace(plan, style=replace(plan.style, centre="full"))
    model = MeduetModel(plan)
    replies = {site: surveyed(plan, site, i) for i, site in enumerate(plan.participants)}
    for reply in replies.values():
        model.check_survey(reply)
    done = model.after_survey(model.start()[0], replies)
    union = torch.cat(
        [
            torch.randn(8, 2, 4, 6, 4, generator=torch.Generator().manual_seed(i)) + i / 2
            for i in range(len(plan.participants))
        ]
    )
    assert torch.allclose(done.shared["latent_mean"], union.mean(0), atol=1e-5)
    residual = union - union.mean(0)
    assert torch.allclose(
        done.shared["latent_deviation"], residual.square().mean((0, 2, 3, 4)).sqrt(), atol=1e-4
    )
    assert done.summary["sites"][plan.participants[0]] == {"patients": 8, "scans": 8}
    if method == "content_share":
        assert StyleBank.from_tensors(done.bank, plan.sites).present == plan.sites
    else:
        assert done.bank == {}


def test_a_survey_of_too_small_a_cohort_is_refused_with_its_reason(miniature: Any) -> None:
    plan = miniature.plan()
    with pytest.raises(ReplyRefused, match="at least 5 patients"):
        MeduetModel(plan).check_survey(surveyed(plan, "oslo", 0, num=4))


def test_the_erasure_makes_the_sites_means_equal(miniature: Any) -> None:
    plan = miniature.plan()
    model = MeduetModel(plan)
    replies = {site: content(plan, site, i) for i, site in enumerate(plan.sites)}
    for reply in replies.values():
        model.check_erasure(reply)
    coded = model.with_code(model.start()[0], {})
    shared, summary = model.after_erasure(coded, replies)
    assert summary["rank"] == 2 and set(shared) == set(model.start()[0])
    before, after = code_of(coded), code_of(shared)
    means = torch.stack([codes(plan, i).double().mean(0) for i in range(3)])
    tokens = before.tokens_of(means) + before.tokens_of(torch.zeros(1, plan.network.code_size))
    apart = after.read(tokens) - after.read(tokens)[:1]
    assert float(apart.abs().max()) < 1e-4 < 1.0 < float((means - means[0]).norm())


def test_tokens_are_erased_by_the_pooled_content_of_those_that_told_it_and_else_by_the_code(
    miniature: Any,
) -> None:
    plan = miniature.plan()
    model = MeduetModel(plan)
    coded = model.with_code(model.start()[0], {})

    def erased(*tell: str) -> tuple[torch.Tensor, dict[str, Any]]:
        replies = {s: content(plan, s, i, beside=s in tell) for i, s in enumerate(plan.sites)}
        for reply in replies.values():
            model.check_erasure(reply)
        shared, summary = model.after_erasure(coded, replies)
        means = torch.stack([pooled(plan, i).mean(0) for i in range(3)])
        return (means - means[0]) @ shared["erasure_matrix"].T, summary

    apart, summary = erased(*plan.sites)
    assert summary["pooled"] == sorted(plan.sites) and float(apart.abs().max()) < 1e-5
    two, summary = erased(*plan.sites[:2])  # the third is left out of it
    assert summary["pooled"] == sorted(plan.sites[:2]) and summary["rank"] == 1
    assert float(two[1].abs().max()) < 1e-5 < 0.1 < float(two[2].abs().max())
    for tell in ((), plan.sites[:1]):
        by_code, summary = erased(*tell)
        assert summary["rank"] == 2 and float(by_code.abs().max()) > 0.1
    with pytest.raises(ReplyRefused, match="pooled content of nobody or of 8; got 9"):
        moments = content(plan, "oslo", 0).moments | {"pooled": content(plan, "oslo", 0, 9).moments["pooled"]}
        model.check_erasure(dataclasses.replace(content(plan, "oslo", 0), moments=moments))


def with_threads(number: int, make: Callable[[], dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        return make()
    finally:
        torch.set_num_threads(before)


def test_the_axes_of_the_code_follow_from_the_plan_and_the_weights_alone(miniature: Any) -> None:
    plan = miniature.plan()
    shared = MeduetModel(plan).start()[0]
    one, other = (with_threads(number, lambda: MeduetModel(plan).with_code(shared, {})) for number in (1, 3))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert set(one) == set(shared)
    assert bool(one["code_matrix"].any()) and not bool(shared["code_matrix"].any())


def test_content_sums_that_no_cohort_can_have_are_refused(miniature: Any) -> None:
    plan = miniature.plan()
    model, good = MeduetModel(plan), content(plan, "oslo", 0)

    def with_sums(sums: torch.Tensor) -> ErasureReply:
        return dataclasses.replace(good, moments={**good.moments, "sums": sums})

    sums = good.moments["sums"]
    nan, few, long = sums.clone(), sums.clone(), sums * 1000
    nan[5], few[0], long[0] = torch.nan, 2.0, sums[0]
    for broken, reason in ((nan, "NaN"), (few, "at least 5"), (long, "bound"), (sums[:-1], "code sums")):
        with pytest.raises(ValueError, match=reason):
            model.check_erasure(with_sums(broken))
