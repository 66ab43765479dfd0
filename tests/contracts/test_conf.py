"""Every configuration composes into a plan, names no class, and has no setting that nobody reads."""

import dataclasses
from pathlib import Path

import pytest
from hydra.errors import ConfigCompositionException

from federation.plan.plan import (
    RunPlan,
)
from server.config import CONF, compose_config, plain, plan_from

ROOT = Path(__file__).resolve().parents[2]
OPTIONS = [
    f"{folder.name}={choice.stem}"
    for folder in sorted(CONF.iterdir())
    if folder.is_dir() and folder.name != "__pycache__"
    for choice in sorted(folder.glob("*.yaml"))
]


def plan_of(*overrides: str) -> RunPlan:
    return plan_from(
        plain(compose_config(overrides)),
        sites=("a", "b", "c"),
        tokenizer_sha256="0" * 64,
        latent_channels=4,
        stride=4,
    )


@pytest.mark.parametrize("option", OPTIONS)
def test_every_configuration_makes_a_plan(option: str) -> None:
    volumes = ["volumes.shape=[96,96,96]"] if option == "network=paper" else []
    noised = option in ("diffusion=aggregate", "diffusion=synthetic")
    plan = plan_of(option, "root=/somewhere", *volumes, *(["privacy=sums"] if noised else []))
    assert RunPlan.from_json(plan.to_json()) == plan


@pytest.mark.parametrize("method", ["alone", "fedavg", "fedavg_mae", "fedbn", "fedprox", "pooled"])
def test_a_baseline_named_after_the_published_method_has_its_objective_and_no_term_of_ours(
    method: str,
) -> None:
    own, published = (
        plan_of(option, "style.exchange=none").objective
        if option.startswith("objective")
        else plan_of(option).objective
        for option in (f"method={method}", "objective=published")
    )
    if method != "fedavg_mae":  # which asks for no factors, and hides single scans
        assert own == published
    assert own.estimator == published.estimator
    terms = {name for name, weight in dataclasses.asdict(own.weights).items() if weight}
    assert terms <= {name for name, weight in dataclasses.asdict(published.weights).items() if weight}


def test_the_paper_preset_has_the_published_values() -> None:
    plan = plan_of("experiment=paper", "root=/somewhere")
    assert (plan.network.width, plan.network.depth, plan.network.heads) == (768, 12, 12)
    assert plan.network.latent_grid == (24, 24, 24)
    assert plan.volumes.shape == (96, 96, 96)
    weights = plan.objective.weights
    assert (weights.site_adversary, weights.mftd, weights.siqc) == (0.2, 0.5, 0.3)
    assert plan.training.learning_rate == 1e-4
    assert plan.training.teacher_momentum == (0.997, 0.9997)


def test_an_unknown_setting_is_an_error() -> None:
    with pytest.raises(ConfigCompositionException, match="rouns"):
        compose_config(["training.rouns=3"])
    with pytest.raises(ValueError, match=r"plan\.training has no setting 'rouns'"):
        plan_of("+training.rouns=3")


@pytest.mark.parametrize(
    ("overrides", "what"),
    [
        (["style.head=shared"], "style.anchor"),
        (["aggregation.trim=0.3"], "aggregation.trim"),
        (["aggregation.momentum=0.5"], "aggregation.momentum"),
        (["style.exchange=none", "objective.weights.invariance=1"], "objective.weights.invariance"),
        (["aggregation.method=fedprox", "style.head=shared", "style.anchor=0"], "training.proximal"),
        (["probes.every_rounds=2", "method=pooled"], "probes.every_rounds"),
        (["probes.folds=2"], "probes.folds"),
        (["+probes.anatomy.age=[90,20]"], "probes.anatomy.age"),
        (["training.batch_size=5"], "training.batch_size"),
        (["volumes.shape=[41,48,40]"], "volumes.shape"),
        (
            ["diffusion=raw", "diffusion.training.start=encoder", "diffusion.transformer.width=48"],
            "diffusion.training.start=scratch",
        ),
        (
            [
                "diffusion=raw",
                "style.exchange=none",
                "objective.weights.invariance=0",
                "objective.weights.restyled_reconstruction=0",
            ],
            "diffusion.training.site_style",
        ),
    ],
)
def test_a_setting_without_effect_or_that_contradicts_is_refused(overrides: list[str], what: str) -> None:
    with pytest.raises(ValueError, match=what.replace(".", r"\.")):
        plan_of(*overrides)


def test_the_hash_of_a_plan_changes_with_any_setting() -> None:
    assert plan_of().sha256 == plan_of().sha256
    assert plan_of("training.learning_rate=1e-3").sha256 != plan_of().sha256


def test_yaml_never_names_python() -> None:
    for path in CONF.rglob("*.yaml"):
        assert "_target_" not in path.read_text(encoding="utf-8"), path
