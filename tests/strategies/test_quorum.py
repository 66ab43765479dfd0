import time

import pytest
from flwr.clientapp import ClientApp

from simulations.engines.in_process import InProcessGrid
from strategies.quorum import Roster, RoundFailed, check_quorum, needed, wait_for_nodes


@pytest.mark.parametrize(
    ("quorum", "sites", "least"),
    [(1.0, 3, 3), (0.67, 3, 3), (0.66, 3, 2), (0.5, 3, 2), (0.01, 3, 1), (0.7, 10, 7)],
)
def test_a_quorum_is_rounded_up_and_never_nobody(quorum: float, sites: int, least: int) -> None:
    assert needed(quorum, sites) == least


@pytest.mark.parametrize("quorum", [0.0, -0.5, 1.1])
def test_a_quorum_is_a_share(quorum: float) -> None:
    with pytest.raises(ValueError, match="quorum"):
        needed(quorum, 3)


def test_a_failed_round_names_everyone_and_why_in_one_line() -> None:
    with pytest.raises(
        RoundFailed, match=r"2 of 3 sites to round 4; got 1.*lyon: late turin: NaN"
    ) as failure:
        check_quorum("round 4", 1, 0.6, 3, {"turin": "NaN", "lyon": "late"})
    assert "\n" not in str(failure.value)
    check_quorum("round 4", 2, 0.6, 3, {"turin": "NaN"})


def test_a_node_keeps_its_name_and_a_name_its_node() -> None:
    roster = Roster(("oslo", "lyon"))
    assert roster.bind(7, "oslo") is None
    assert roster.bind(7, "oslo") is None
    assert "as before" in (roster.bind(7, "lyon") or "")
    assert "one node per site" in (roster.bind(8, "oslo") or "")
    assert "site of the plan" in (roster.bind(7, "turin") or "")
    assert (roster.name(7), roster.name(8)) == ("oslo", "node 8")


def test_known_sites_are_asked_in_the_plans_order_and_strangers_never_again() -> None:
    roster = Roster(("oslo", "lyon", "turin"))
    assert roster.asked([9, 3, 5, 4]) == [3, 4, 5, 9]
    roster.bind(9, "oslo")
    roster.bind(4, "atlantis")
    assert roster.asked([9, 3, 5, 4]) == [9, 3, 5]
    roster.bind(3, "turin")
    roster.bind(5, "lyon")
    assert roster.asked([2, 9, 3, 5]) == [9, 5, 3]
    assert roster.asked([3, 5]) == [5, 3]


def test_who_is_not_there_is_awaited_for_a_while_and_not_until_the_deadline() -> None:
    grid = InProcessGrid(ClientApp(), 2)
    roster = Roster(("oslo", "lyon", "turin"))
    start = time.monotonic()
    assert wait_for_nodes(grid, roster, 2, 60.0, patience_s=0.3) == [1000, 1001]
    assert 0.3 <= time.monotonic() - start < 30.0
    with pytest.raises(RoundFailed, match=r"at least 3 connected sites within 0\.3 s; got 2"):
        wait_for_nodes(grid, roster, 3, 0.3, patience_s=0.1)
