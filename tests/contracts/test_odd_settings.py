"""Settings that cannot be meant, as people have really typed them (odd_cases/settings of the shared data)."""

import copy
import math
import os
import re
from pathlib import Path
from typing import Any

import pytest

from client.settings import load_site_config
from federation.plan.plan import RunPlan
from server.config import compose_config, plain, plan_from

DATA = Path(os.environ.get("FEDMEDUET_DATA") or Path(__file__).parents[3] / "shared" / "data")
SETTINGS = DATA / "odd_cases" / "settings"
LISTED = SETTINGS / "plan_overrides.txt"
NAN, INF = math.nan, math.inf
OWN = (
    ("training.rounds", 10**9), ("training.rounds", 0), ("training.steps_per_round", -1),
    ("training.batch_size", 10**6), ("training.learning_rate", INF), ("training.learning_rate", 0),
    ("training.final_learning_rate", -0.1), ("training.warmup", -0.1), ("training.weight_decay", NAN),
    ("training.gradient_clip_norm", 0), ("training.teacher_momentum", [2, 0.5]), ("training.proximal", -1),
    ("release.update_clip_norm", 1e300), ("release.update_clip_norm", -1), ("release.style_clip", 0),
    ("style.minimum_cohort", 0), ("style.map_grid", [0, 1, 1]), ("style.anchor", -0.1),
    ("style.body_parts", ["a\u202eb"]), ("aggregation.quorum", 0), ("aggregation.quorum", 2),
    ("aggregation.quorum", NAN), ("aggregation.deadline_s", NAN), ("aggregation.deadline_s", 0),
    ("aggregation.deadline_s", 1e12), ("aggregation.norm_tolerance", -1), ("aggregation.learning_rate", 0),
    ("objective.mask_ratio", 0), ("objective.temperature_style", 0), ("objective.weights.siqc", 1e30),
    ("objective.reversal_warmup", 2), ("network.depth", -1), ("network.depth", 10**5), ("network.heads", 0),
    ("network.width", 0), ("network.patch_size", 0), ("network.style_ratio", NAN), ("network.code_size", 0),
    ("volumes.spacing_mm", [NAN, 1, 1]), ("volumes.shape", [0, 48, 32]), ("volumes.shape", [-32, 48, 32]),
    ("volumes.views", 0), ("volumes.views", 10**6), ("seed", -1), ("name", ""), ("name", "a\nb"),
    ("probes.folds", 0), ("probes.every_rounds", -1),
)  # fmt: skip


def plan_of(settings: dict[str, Any]) -> RunPlan:
    return plan_from(settings, sites=("a", "b", "c"), tokenizer_sha256="0" * 64, latent_channels=4, stride=4)


@pytest.fixture(scope="module")
def settings() -> dict[str, Any]:
    return plain(compose_config())


@pytest.mark.parametrize(("setting", "value"), OWN, ids=[f"{name}={value!a}" for name, value in OWN])
def test_a_setting_that_cannot_be_meant_makes_no_plan_and_is_named(
    setting: str, value: object, settings: dict[str, Any]
) -> None:
    changed = copy.deepcopy(settings)
    *groups, name = setting.split(".")
    inner = changed
    for group in groups:
        inner = inner[group]
    inner[name] = value
    with pytest.raises(ValueError, match=re.escape(setting)) as refused:
        plan_of(changed)
    assert "\n" not in str(refused.value)
    assert plan_of(settings)


def test_the_settings_that_were_collected_make_no_plan_and_are_named() -> None:
    if not LISTED.is_file():
        pytest.skip("needs the odd cases: set FEDMEDUET_DATA to the shared data's folder")
    lines = [line for line in LISTED.read_text(encoding="utf-8").splitlines() if line and line[0] != "#"]
    assert len(lines) > 10
    for override in lines:
        setting = override.split("=")[0].lstrip("+")
        settings = plain(compose_config([override]))
        with pytest.raises(ValueError, match=re.escape(setting)):
            plan_of(settings)


@pytest.mark.parametrize("file", ["octal.yaml", "duplicate_key.yaml"])
def test_a_consent_setting_that_can_be_read_in_two_ways_is_refused(file: str) -> None:
    if not (SETTINGS / file).is_file():
        pytest.skip("needs the odd cases: set FEDMEDUET_DATA to the shared data's folder")
    with pytest.raises(ValueError, match="minimum_cohort") as error:
        load_site_config(SETTINGS / file)
    assert "\n" not in str(error.value)
