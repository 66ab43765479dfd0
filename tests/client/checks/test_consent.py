import re
from pathlib import Path
from typing import Any

import pytest

from client.checks.site import _consent
from client.settings import SiteConfig
from federation.plan.plan import RunPlan
from tests.worlds import protected_plan, public_latents, small_plan

PROTECTED, PLAIN = protected_plan(public_latents(), epsilon=3.0), small_plan()


@pytest.mark.parametrize(
    ("settings", "plan", "verdict", "found"),
    [
        ({}, None, "failed", "nothing may leave"),
        ({"allow_non_private": True}, PLAIN, "ok", "without differential privacy"),
        ({"epsilon_ceiling": 3.0}, None, "ok", r"at most epsilon 3 \(delta 1e-05\)"),
        ({"epsilon_ceiling": 3.0}, PROTECTED, "ok", "only releases with noise"),
        (
            {"epsilon_ceiling": 2.0},
            PROTECTED,
            "failed",
            "asks for epsilon 3 .*ceiling is 2",
        ),
        ({"epsilon_ceiling": 3.0, "delta_ceiling": 1e-7}, PROTECTED, "failed", r"asks for epsilon 3\.70"),
        ({"epsilon_ceiling": 3.0}, PLAIN, "failed", "asks for epsilon inf"),
    ],
)
def test_consent_is_held_against_what_the_plan_asks_for(
    tmp_path: Path, settings: dict[str, Any], plan: RunPlan | None, verdict: str, found: str
) -> None:
    config = SiteConfig(name="a", data_root=tmp_path / "data", state_dir=tmp_path / "state", **settings)
    check = _consent(config, plan)
    assert check.verdict == verdict
    assert re.search(found, check.found)


def test_a_ceiling_beside_the_consent_to_releases_without_noise_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="epsilon_ceiling has no effect with allow_non_private"):
        SiteConfig(
            name="a",
            data_root=tmp_path / "data",
            state_dir=tmp_path / "state",
            allow_non_private=True,
            epsilon_ceiling=3.0,
        )
