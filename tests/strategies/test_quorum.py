import time

import pytest
from flwr.clientapp import ClientApp
from flwr.proto.node_pb2 import NodeInfo

from simulations.engines.in_process import InProcessGrid
from strategies.quorum import Roster, RoundFailed, check_quorum, needed, numbered, wait_for_nodes


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


def test_a_node_is_the_site_that_it_is_registered_as_whatever_it_says() -> None:
    roster = Roster(("oslo", "lyon"))
    assert roster.asked([numbered(7, 0), numbered(8, 1)]) == [7, 8]
    assert roster.objection(7, "oslo") is None
    assert "Expected a reply of 'oslo', as this node is registered; it says 'lyon'" in (
        roster.objection(7, "lyon") or ""
    )
    assert "node 9 is none" in (roster.objection(9, "oslo") or "")
    assert (roster.name(7), roster.name(9)) == ("oslo", "node 9")


def test_sites_are_asked_in_the_plans_order_and_nodes_that_are_none_never() -> None:
    roster = Roster(("oslo", "lyon", "turin"))
    nobody = [numbered(2, 3), NodeInfo(node_id=1), NodeInfo(node_id=6, name="oslo")]
    assert roster.asked([numbered(9, 2), numbered(3, 1), *nobody, numbered(5, 0)]) == [5, 3, 9]
    assert roster.asked([numbered(9, 2), *nobody]) == [9]
    assert roster.name(5) == "oslo"  # it was


def test_a_site_with_another_key_is_another_node_of_the_same_name() -> None:
    names = {b"old": "oslo", b"key": "lyon"}
    roster = Roster(("oslo", "lyon"), lambda node: names.get(node.public_key, ""))
    old, lyon, new = (NodeInfo(node_id=n, public_key=k) for n, k in ((4, b"old"), (5, b"key"), (6, b"new")))
    assert roster.asked([old, lyon, new]) == [4, 5]
    names.pop(b"old")
    names[b"new"] = "oslo"
    assert roster.asked([old, lyon, new]) == [6, 5]


def test_who_is_not_there_is_awaited_for_a_while_and_not_until_the_deadline() -> None:
    grid = InProcessGrid(ClientApp(), 2)
    roster = Roster(("oslo", "lyon", "turin"))
    start = time.monotonic()
    assert wait_for_nodes(grid, roster, 2, 60.0, patience_s=0.3) == [1000, 1001]
    assert 0.3 <= time.monotonic() - start < 30.0
    with pytest.raises(RoundFailed, match=r"at least 3 connected sites within 0\.3 s; got 2"):
        wait_for_nodes(grid, roster, 3, 0.3, patience_s=0.1)
