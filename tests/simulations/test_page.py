"""The words of a run's page."""

import dataclasses

from federation.plan import AggregationPlan
from simulations.page import _summary
from tests.contracts.test_conf import plan_of


def test_a_method_that_nobody_described_is_shown_by_its_name() -> None:
    aggregation = AggregationPlan(method="gossip")  # type: ignore[arg-type]
    plan = dataclasses.replace(plan_of(), aggregation=aggregation)
    assert "3 patients work by the method gossip" in _summary(plan, [{"patients": 3}], "", ())
