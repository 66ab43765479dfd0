"""The words of a run's page."""

import dataclasses

from federation.plan.plan import AggregationPlan
from simulations.page import _summary, erasure_text
from tests.contracts.test_conf import plan_of


def test_a_method_that_nobody_described_is_shown_by_its_name() -> None:
    aggregation = AggregationPlan(method="gossip")  # type: ignore[arg-type]
    plan = dataclasses.replace(plan_of(), aggregation=aggregation)
    assert "3 patients work by the method gossip" in _summary(plan, [{"patients": 3}], "", ())


def test_a_page_says_what_the_error_of_means_leaves_and_on_whom_the_erasure_was_fitted() -> None:
    sites = {"north": {"patients": 27}, "south": {"patients": 90}}
    told = {"rank": 1, "sites": sites, "pooled": ["north", "south"], "shift_left": 2.16}
    said = erasure_text(told)
    assert "27 at the smallest" in said and "2.2 standard deviations apart" in said and "in 86%" in said
    assert "pooled" not in said and "only as far as the code shows" in erasure_text(
        told | {"pooled": ["north"]}
    )
    public = erasure_text({"rank": 1, "fitted_on": "public scans"})
    assert "fitted on public scans" in public and "no patient is in it" in public
    assert "nobody told" in erasure_text({"skipped": "nobody told", "rank": 0, "sites": {}})
    assert erasure_text({}) == ""
