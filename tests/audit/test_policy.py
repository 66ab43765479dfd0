"""What a policy allows, and the exit status; a required test that could find nothing passes nobody."""

from pathlib import Path
from typing import Any

import pytest

from audit.findings import Finding
from audit.policy import FAILED, PASSED, UNDECIDED, Behind, Policy, decide, read_policy


def finding(**changes: Any) -> Finding:
    settings: dict[str, Any] = {
        "artefact": "north: survey",
        "attack": "tracing",
        "measure": "AUC",
        "n_in": 100,
        "n_out": 100,
        "verdict": "not found",
        "sentence": "Nothing.",
    }
    return Finding(**settings | changes)


ONLY = Policy(required_tests=("tracing",))


def test_nothing_found_with_enough_patients_passes() -> None:
    assert decide(ONLY, [finding()], {}, []).status == PASSED


@pytest.mark.parametrize(
    "found",
    [
        finding(verdict="found", low=0.7),
        finding(verdict="found", attack="span", measure="share of members named", low=0.9),
        finding(verdict="contradiction", attack="books"),
    ],
)
def test_what_is_not_allowed_fails(found: Finding) -> None:
    assert decide(ONLY, [finding(), found], {}, []).status == FAILED


def test_an_area_within_the_limit_is_allowed() -> None:
    assert decide(ONLY, [finding(verdict="found", low=0.55)], {}, []).status == PASSED


@pytest.mark.parametrize("verdict", ["under-powered", "void"])
def test_a_required_test_that_could_find_nothing_is_undecided(verdict: Any) -> None:
    decision = decide(ONLY, [finding(verdict=verdict)], {}, [])
    assert decision.status == UNDECIDED and "'tracing' is required" in decision.undecided[0]
    assert decide(ONLY, [finding(), finding(attack="loss", verdict=verdict)], {}, []).status == PASSED


def test_a_required_test_that_did_not_run_is_undecided() -> None:
    assert decide(ONLY, [finding(attack="loss")], {}, []).undecided == [
        "'tracing' is required and was not run."
    ]


def test_a_kind_without_an_attack_is_at_best_undecided() -> None:
    unknown = finding(artefact="north: novelty", attack="none", verdict="not audited")
    assert decide(ONLY, [finding(), unknown], {}, []).status == UNDECIDED


def test_budgets_and_cells_have_limits() -> None:
    strict = Policy(required_tests=(), max_epsilon=3.0, min_cell=10, min_patients_per_number=1.0)
    assert decide(strict, [], {"north: survey": (2.0, 1e-6)}, []).status == PASSED
    assert "epsilon inf was charged" in decide(strict, [], {"a": (float("inf"), 0.0)}, []).failed[0]
    assert "delta 0.1" in decide(strict, [], {"a": (2.0, 0.1)}, []).failed[0]
    assert "min_cell is 10" in decide(strict, [], {}, [Behind("a", 9, 0)]).failed[0]
    assert "60 patients for 64 numbers" in decide(strict, [], {}, [Behind("a", 60, 64)]).failed[0]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("required_tests: [books, sorcery]", "got 'sorcery'"),
        ("min_cells: 10", "min_cells"),
        ("max_tracing_auc: 2", "max_tracing_auc"),
        ("min_cell: ten", "min_cell"),
    ],
)
def test_a_policy_that_means_nothing_is_refused_by_name(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "privacy_policy.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=said):
        read_policy(path)


def test_a_policy_is_read(tmp_path: Path) -> None:
    path = tmp_path / "privacy_policy.yaml"
    path.write_text("min_cell: 20\nmax_epsilon: 3\nrequired_tests: [books]\n")
    assert read_policy(path) == Policy(min_cell=20, max_epsilon=3.0, required_tests=("books",))
    with pytest.raises(ValueError, match=r"Expected a policy in nothing\.yaml"):
        read_policy(tmp_path / "nothing.yaml")
