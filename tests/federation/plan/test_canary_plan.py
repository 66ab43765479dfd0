"""A plan with canaries says what it cannot have, in a sentence; a site reads what it agrees to."""

from dataclasses import replace
from typing import Any

import pytest

from client.commands.plan_words import plan_words
from federation.plan.canary_plan import AuditCanariesPlan, in_words, pull_on_steps, pull_on_style
from federation.plan.plan import RunPlan
from federation.plan.privacy_plan import NoisySteps
from federation.published_plan import PublishedPlan
from server.promises import sentences
from tests.worlds import protected_plan, public_latents, small_plan

PUBLIC = public_latents()


def sums_plan(**canaries: Any) -> RunPlan:
    return replace(protected_plan(PUBLIC), audit_canaries=AuditCanariesPlan(**canaries))


def noisy_plan(**canaries: Any) -> RunPlan:
    noisy = NoisySteps(steps=4, steps_per_round=2, sampling_rate=0.5, clip_norm=1.0, epsilon_style=1.0)
    plan = protected_plan(PUBLIC, level="adapters", noisy=noisy)
    return replace(plan, audit_canaries=AuditCanariesPlan(**canaries))


@pytest.mark.parametrize(
    ("make", "canaries", "sentence"),
    [
        (sums_plan, {}, "at least 2 canaries of a kind .*got style_code=0, steps=0, inputs=0"),
        (sums_plan, {"style_code": 1}, "at least 2 canaries of a kind"),
        (sums_plan, {"style_code": 5}, "at most privacy.style_dimensions=4, an axis for each; got 5"),
        (sums_plan, {"style_code": 4, "steps": 10}, "privacy.level=sums has no noisy steps"),
        (sums_plan, {"inputs": 10}, "privacy.level=sums has no noisy steps"),
        (noisy_plan, {"steps": 209}, "at most 208, the numbers of the output layer; got 209"),
        (noisy_plan, {"inputs": 73}, "at most privacy.public_scans=72"),
        (noisy_plan, {"steps": -1}, "steps"),
    ],
)
def test_canaries_that_cannot_be_are_refused_with_a_sentence(
    make: Any, canaries: dict[str, int], sentence: str
) -> None:
    with pytest.raises(ValueError, match=sentence):
        make(**canaries)


def test_a_plan_without_noise_has_no_promise_to_test() -> None:
    with pytest.raises(ValueError, match="a plan without noise promises none"):
        small_plan(audit_canaries=AuditCanariesPlan(style_code=4))


def test_a_site_reads_that_it_is_an_audit_run_what_is_added_and_how_it_spoils_the_weights() -> None:
    plan = noisy_plan(style_code=4, steps=200, inputs=20)
    assert RunPlan.from_json(plan.to_json()) == plan
    published = PublishedPlan(plan=plan, bundle_sha256="0" * 64)
    text = " ".join(sentence for _, sentence in plan_words(published))
    assert "THIS IS AN AUDIT RUN" in text
    assert "4 shares of a style code, 200 gradients, 20 phantoms with an odd mark" in text
    assert "what she is charged is the same with canaries and without" in text
    assert "pull on a step as 20 patients do" in text and "they drown the training" in text
    without = PublishedPlan(plan=replace(plan, audit_canaries=None), bundle_sha256="0" * 64)
    assert "canaries" not in " ".join(sentence for _, sentence in plan_words(without)).lower()
    assert "An audit run." in sentences(plan)[-1] and in_words(AuditCanariesPlan(steps=2)) == "2 gradients"


def test_what_canaries_pull_is_the_square_root_of_ways_that_are_apart() -> None:
    canaries = AuditCanariesPlan(style_code=8, steps=200, inputs=6)
    assert pull_on_steps(canaries) == 13.0 and pull_on_style(canaries) == 2.0
