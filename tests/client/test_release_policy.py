"""A release policy is one value: whoever speaks of it says its words, and a word that is none is refused."""

import dataclasses
import json
from collections.abc import Callable

import pytest

from client.commands.plan_words import plan_words
from client.exchanges.exchange import AskRefused
from client.exchanges.latents import consent
from federation.exchanges.latents import releasing
from federation.exchanges.private_rounds import latents_promise
from federation.plan.diffusion_plan import DiffusionPlan
from federation.plan.plan import RunPlan
from federation.plan.release_policy import NONE, POLICIES, RAW, ReleasePolicy, check_sentence
from federation.published_plan import PublishedPlan
from meduet_models.diffusion.settings import DiffusionTraining, TransformerShape
from simulations.page import _tiles
from tests.rounds.noised import the_plan
from tests.worlds import RECIPIENT

DIFFUSION = DiffusionPlan(
    policy="raw",
    recipient=RECIPIENT,
    transformer=TransformerShape(patch_size=2, width=12, depth=1, heads=2),
    training=DiffusionTraining(),
)
BLURRED = dataclasses.replace(
    RAW,
    name="blurred",
    consent="We release blurred latents.",
    agreed="blurred latents leave",
    warning="blurred latents",
    beside_sums="AND BLURRED LATENTS",
    sentence="For a diffusion model: BLURRED LATENTS OF {amount} of your training scans.",
    moved="scans; blurred latents left",
)
"""A policy of tomorrow."""


@pytest.fixture
def blurred(monkeypatch: pytest.MonkeyPatch, toy_plan: Callable[..., RunPlan]) -> RunPlan:
    monkeypatch.setitem(POLICIES, "blurred", BLURRED)
    return toy_plan(diffusion=dataclasses.replace(DIFFUSION, policy="blurred"))


def test_a_word_that_is_no_policy_makes_no_plan(toy_plan: Callable[..., RunPlan]) -> None:
    with pytest.raises(
        ValueError, match=r"policy to be one of raw, federated, synthetic, aggregate; got 'protected'"
    ):
        dataclasses.replace(DIFFUSION, policy="protected")
    published = PublishedPlan(plan=toy_plan(diffusion=DIFFUSION), bundle_sha256="0" * 64).to_json()
    assert PublishedPlan.from_json(published)
    values = json.loads(published)
    values["plan"]["diffusion"]["policy"] = "protected"
    with pytest.raises(ValueError, match="one of raw, federated"):
        PublishedPlan.from_json(json.dumps(values))


def test_a_hospital_is_told_the_words_of_the_policy_and_of_no_other(blurred: RunPlan) -> None:
    said = " ".join(
        sentence for _, sentence in plan_words(PublishedPlan(plan=blurred, bundle_sha256="0" * 64))
    )
    assert "BLURRED LATENTS OF all of your training scans" in said and "AND BLURRED LATENTS" in said
    assert "no latent leaves" not in said and "no scan, no file name" not in said
    for sentence in ("", RAW.consent):
        with pytest.raises(AskRefused, match="release blurred latents; this site has not agreed"):
            consent(blurred, sentence)
    check_sentence(BLURRED.consent)
    assert consent(blurred, BLURRED.consent) == "blurred latents leave"
    assert releasing(blurred).release.is_patient_data
    assert (str(0), "scans; blurred latents left") in [
        (tile["value"], tile["label"]) for tile in _tiles(blurred, [], [], {})
    ]


@pytest.mark.parametrize("policy", [NONE, *POLICIES.values()], ids=["none", *POLICIES])
def test_a_policy_that_lets_latents_out_asks_for_a_sentence_and_calls_them_patient_data(
    policy: ReleasePolicy,
) -> None:
    words = " ".join((policy.agreed, policy.beside_sums, policy.sentence, policy.moved)).lower()
    assert policy.releases_latents == bool(policy.consent) == policy.is_patient_data
    assert policy.releases_latents == ("no latent" not in words)


@pytest.mark.parametrize("name", ["none", *POLICIES])
def test_plan_show_says_guarantee_what_is_not_covered_and_the_smallest_cohort(
    toy_plan: Callable[..., RunPlan], name: str
) -> None:
    diffusion = {
        "none": None,
        "raw": DIFFUSION,
        "federated": dataclasses.replace(DIFFUSION, policy="federated", recipient="", rounds=2),
        "synthetic": None,
        "aggregate": None,
    }[name]
    noised = name in ("synthetic", "aggregate")
    plan = the_plan(name) if noised else toy_plan(diffusion=diffusion)
    policy = plan.latent_policy
    said = " ".join(words for _, words in plan_words(PublishedPlan(plan=plan, bundle_sha256="0" * 64)))
    assert policy.name == name
    if plan.diffusion is None:
        assert policy.sentence in said
        return
    for words in (policy.guarantee, policy.not_covered, policy.smallest_cohort):
        assert words and words in said
    assert ("infinite" in policy.guarantee) != noised and "anonym" not in said.lower()
    assert ("key " + RECIPIENT[:12] in said) == policy.sealed == (name in ("raw", "synthetic"))
    if noised:
        assert latents_promise(plan).sentence() in said and "for the whole run" in said
        assert "synthetic latents: 1" in said or "moments of latents: 1" in said
    assert ("Expected quality: with 40 patients" in said) == (name == "synthetic")
