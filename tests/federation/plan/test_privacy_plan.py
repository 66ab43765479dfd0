import dataclasses
from typing import Any

import pytest

from federation.exchanges.private_rounds import latents_promise, noisy_rounds, run_epsilon
from federation.exchanges.style_code import code_promise
from federation.plan.plan import RunPlan
from federation.plan.privacy_plan import NoisySteps
from server.config import compose_config, plain, plan_from


def composed(*overrides: str) -> RunPlan:
    settings = plain(compose_config(["privacy=sums", *overrides]))
    return plan_from(settings, sites=("a", "b"), tokenizer_sha256="0" * 64, latent_channels=4, stride=4)


def test_a_plan_with_privacy_comes_back_from_its_json_and_promises_its_epsilon() -> None:
    plan = composed("privacy.epsilon=1.0")
    assert RunPlan.from_json(plan.to_json()) == plan
    promise = code_promise(plan)
    assert 0.99 < promise.epsilon.upper <= 1.0 and promise.noise_in == "release"
    sentence = promise.sentence()
    for words in ("epsilon 0.999 to 1.000 at delta 1e-05", "each patient, all scans together", "Not covered"):
        assert words in sentence
    assert "anonymous" not in sentence


def test_an_experiment_with_probes_becomes_one_without_under_privacy() -> None:
    assert composed("experiment=hippocampus").probes.every_rounds == 0


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["probes.every_rounds=2"], "privacy does not cover probes.*set probes.every_rounds=0"),
        (["diffusion=federated"], "federated has no place in a plan with privacy: updates .* without noise"),
        (["diffusion=raw"], "raw has no place in a plan with privacy: raw latents.*aggregate or none"),
        (
            ["diffusion=synthetic", "diffusion.synthetic.expected_patients=60"],
            "expected_patients of 500 or more: with 60 .*although_noise_wins=true",
        ),
        (
            ["diffusion=synthetic", "diffusion.synthetic.samples=90000"],
            "at most .* one answer holds",
        ),
        (["diffusion=synthetic", "diffusion.synthetic.transformer.patch_size=4"], "transformer.patch_size=4"),
        (["diffusion=synthetic", "diffusion.synthetic.transformer.heads=5"], "multiple of its 5 heads"),
        (
            ["diffusion=aggregate", "diffusion.aggregate.epsilon_style=3"],
            "below privacy.epsilon=3",
        ),
        (["diffusion=aggregate", "diffusion.aggregate.dimensions=256"], "below privacy.public_scans=256"),
        (["diffusion=aggregate", "diffusion.aggregate.samples=257"], "samples of at most .*public_scans=256"),
        (["diffusion=aggregate", "diffusion.conditions=[spacing]"], "leave the condition spacing out"),
        (["diffusion=aggregate", "+diffusion.steps_per_round=7"], "diffusion.steps_per_round has no effect"),
        (["diffusion=aggregate", "+diffusion.latent_clip=7"], "diffusion.latent_clip has no effect"),
        (["diffusion=aggregate", "diffusion.policy=synthetic"], "Expected diffusion.synthetic with"),
        (
            ["aggregation.method=fedbn"],
            "Expected aggregation.method content_share",
        ),
        (["aggregation.rule=median"], "aggregation.rule has no effect with privacy.level=sums"),
        (["aggregation.norm_tolerance=3"], "aggregation.norm_tolerance has no effect"),
        (["release.style_clip=3"], "release.style_clip has no effect"),
        (["release.wire_dtype=mxint8"], "release.wire_dtype has no effect"),
        (["style.exchange=amplitude"], "privacy needs style.exchange=bank; got amplitude"),
        (["style.head=local"], "set style.head=shared"),
        (["style.centre=full"], "privacy does not cover the mean of every voxel"),
        (["+style.body_parts=[head]"], "With privacy a site tells one style"),
        (
            ["volumes.extent=scan", "volumes.registered=false", "privacy.style_dimensions=4"],
            "set volumes.extent=crop",
        ),
        (["privacy.style_dimensions=200"], "style_dimensions of at most 104 .a style has 104 numbers"),
        (
            ["volumes.registered=false", "privacy.style_dimensions=9"],
            "style_dimensions of at most 8 .a style has 8 numbers",
        ),
        (["privacy.public_scans=64"], "public_scans above network.code_size=64"),
        (["privacy.epsilon=0"], "privacy.epsilon above 0"),
        (["privacy.delta=1e-4"], "privacy.delta above 0 and at most 1e-05; got 0.0001"),
        (["privacy.level=weights"], "privacy.level to be one of sums, adapters, full"),
        (["privacy.level=adapters"], "adapters needs privacy.noisy.*conf/privacy/adapters.yaml"),
        (["+privacy.clip_norm=1.0"], "no setting 'clip_norm'"),
        (["privacy.level=full"], "privacy.level=full needs privacy.noisy"),
        (["aggregation.secure_sum=true"], "secure_sum has no effect with privacy.level=sums"),
    ],
)
def test_what_contradicts_privacy_is_refused_in_a_sentence(overrides: list[str], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        composed(*overrides)


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["privacy.level=sums"], "privacy.noisy has no effect with privacy.level=sums"),
        (["privacy.noisy=null"], "privacy.level=full needs privacy.noisy"),
        (["privacy.noisy.epsilon_style=8.0"], "epsilon_style below privacy.epsilon=8.*got 8"),
        (["privacy.noisy.steps=21"], "privacy.noisy.steps to divide by steps_per_round=5; got 21"),
        (["privacy.noisy.group_size=3"], "privacy.noisy.group_size to be even"),
        (["privacy.noisy.group_size=10"], "group_size of at most training.batch_size=8"),
        (["privacy.noisy.sampling_rate=0"], "privacy.noisy.sampling_rate above 0"),
        (["privacy.noisy.sampling_rate=1.5"], "privacy.noisy.sampling_rate above 0 and at most 1; got 1.5"),
        (["privacy.noisy.clip_norm=0"], "privacy.noisy.clip_norm above 0"),
        (["training.precision=bf16"], "set training.precision=float32"),
        (["training.proximal=0.1"], "training.proximal has no effect with privacy.level=full"),
        (["release.style_clip=3"], "release.style_clip has no effect with privacy.level=full"),
        (
            ["aggregation.secure_sum=true", "aggregation.norm_tolerance=0"],
            "Expected 3 to 32 sites with aggregation.secure_sum=true; got 2",
        ),
        (["privacy.noisy.partners=nobody"], "privacy.noisy.partners to be one of public, private"),
        (["probes.every_rounds=2"], "privacy does not cover probes"),
    ],
)
def test_what_contradicts_noisy_steps_is_refused_in_a_sentence(overrides: list[str], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        composed("privacy=full", *overrides)


UNREACHED = [f"objective.weights.{kind}reconstruction=0" for kind in ("", "visible_", "restyled_")]
UNREACHED += ["objective.masked_share=0"]


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["privacy.level=sums"], "privacy.noisy has no effect with privacy.level=sums"),
        (["privacy.noisy=null"], "privacy.level=adapters needs privacy.noisy"),
        (["training.precision=bf16"], "privacy.level=adapters cuts gradients in float32"),
        (UNREACHED, "learns from reconstructions alone: set objective.weights.reconstruction above 0"),
    ],
)
def test_what_contradicts_steps_of_the_output_layer_is_refused(overrides: list[str], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        composed("privacy=adapters", *overrides)
    assert composed("privacy=adapters", *UNREACHED[1:]).privacy
    assert composed("privacy=full", *UNREACHED).privacy


def test_a_plan_of_noisy_steps_counts_their_rounds_and_lets_what_acts_on_updates_be_set() -> None:
    plan = composed(
        "privacy=full", "training.rounds=7", "aggregation.norm_tolerance=3", "aggregation.rule=median"
    )
    assert RunPlan.from_json(plan.to_json()) == plan
    assert plan.num_rounds == 11 and noisy_rounds(plan) == range(8, 12)
    assert [plan.steps_in(number) for number in (7, 8)] == [plan.training.steps_per_round, 5]
    sums = composed("training.rounds=7")
    assert sums.num_rounds == 7 and len(noisy_rounds(sums)) == 0


@pytest.mark.parametrize("policy", ["synthetic", "aggregate"])
def test_latents_with_noise_cost_the_plans_epsilon_with_the_style_code_and_need_privacy(policy: str) -> None:
    plan = composed(f"diffusion={policy}")
    assert RunPlan.from_json(plan.to_json()) == plan
    assert 1.49 < code_promise(plan).epsilon.upper <= 1.5
    assert 2.9 < run_epsilon(plan).upper <= 3.0 and latents_promise(plan).epsilon.upper < 3.0
    assert latents_promise(plan).noise_in == {"synthetic": "generation", "aggregate": "release"}[policy]
    with pytest.raises(ValueError, match=f"policy={policy} has its noise from privacy, and there is none"):
        dataclasses.replace(plan, privacy=None)
    with pytest.raises(ValueError, match=r"set privacy.level=sums; got full"):
        noisy = NoisySteps(steps=4, steps_per_round=2, sampling_rate=0.5, clip_norm=1.0, epsilon_style=1.0)
        privacy = dataclasses.replace(plan.privacy, level="full", noisy=noisy)  # type: ignore[type-var]
        dataclasses.replace(plan, privacy=privacy)


def test_without_privacy_every_one_of_these_is_a_plan() -> None:
    plan = composed()
    for changes in ({"aggregation": dataclasses.replace(plan.aggregation, rule="median")}, {"privacy": None}):
        settings: dict[str, Any] = {"privacy": None, **changes}
        dataclasses.replace(plan, **settings)
