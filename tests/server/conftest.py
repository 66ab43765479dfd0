"""A plan of two sites for tests of the centre."""

import pytest

from federation.plan.plan import RunPlan
from server.config import compose_config, plain, plan_from


@pytest.fixture(scope="session")
def tiny_plan() -> RunPlan:
    return plan_from(
        plain(compose_config(["name=tiny", "training.rounds=3"])),
        sites=("north", "south"),
        tokenizer_sha256="0" * 64,
        latent_channels=4,
        stride=4,
    )
