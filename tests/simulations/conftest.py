"""Whole simulations, whose probes take fewer steps: what they read is not for these tests to say."""

from collections.abc import Iterator

import pytest

from meduet_models.probes import quick


@pytest.fixture(scope="session", autouse=True)
def few_steps_of_probes() -> Iterator[None]:
    """Of the network that reads a site; `tests/meduet_models/probes` has all of them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quick, "_MLP_STEPS", 20)
        yield
