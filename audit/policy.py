"""What a hospital or a board allows: `privacy_policy.yaml`, and the exit status that follows.

Named as disclosure checkers of research environments name their settings (SACRO: `min_cell`). 0: every
finding is within the policy and every required test ran with enough patients. 1: something is not. 2: nothing
is, but a required test could not have found anything, was not run, or something that left has no test.

What this file does not do: say that a release harms nobody. It says what was tried.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from audit.findings import OF_NOBODY, TESTS, Finding
from forms.form import build
from forms.ranges import Range
from forms.yaml_text import read_yaml

PASSED, FAILED, UNDECIDED = 0, 1, 2


@dataclass(frozen=True, kw_only=True)
class Policy:
    """What is allowed."""

    max_epsilon: Annotated[float, Range(above=0, at_most=1000)] | None = None
    """Largest epsilon that a site's ledger may have charged for any kind; none: any, also infinite."""
    max_delta: Annotated[float, Range(above=0, at_most=1)] = 1e-5
    """Largest delta beside it."""
    max_tracing_auc: Annotated[float, Range(at_least=0.5, at_most=1)] = 0.6
    """Largest area under the curve, at the lower end of its interval, of any attack on sums or on a model."""
    min_cell: Annotated[int, Range(at_least=1, at_most=1_000_000)] = 10
    """Fewest patients behind a release of sums."""
    min_patients_per_number: Annotated[float, Range(at_least=0, at_most=1000)] = 0.0
    """Fewest patients for each number of a vector that is summed."""
    max_excess_memorisation: Annotated[float, Range(at_least=0, at_most=1)] = 0.01
    """Largest share of a generative model's samples that are nearer to training than to held-out patients,
    over what chance gives; it counts where it is told from chance."""
    required_tests: tuple[str, ...] = ("books", "tracing", "loss")
    """Tests that must have run with enough patients."""

    def __post_init__(self) -> None:
        """Refuse tests that do not exist, by name."""
        for name in self.required_tests:
            if name not in TESTS:
                raise ValueError(
                    f"Expected required_tests among {', '.join(TESTS)}; got {name[:60]!r}. Nothing was run."
                )


def read_policy(path: Path) -> Policy:
    """The policy in a file. Raises `ValueError` naming the setting that is unknown or out of its range."""
    try:
        values = read_yaml(path.read_text(encoding="utf-8"), path.name)
    except OSError as error:
        raise ValueError(f"Expected a policy in {path.name}; {error.strerror}.") from None
    return build(Policy, values, path.name)


@dataclass(frozen=True)
class Decision:
    """What follows from findings under a policy."""

    status: int
    """0 passed, 1 failed, 2 undecided."""
    failed: list[str]
    """What the policy does not allow, a sentence each."""
    undecided: list[str]
    """What could not be decided."""


@dataclass(frozen=True)
class Behind:
    """How many patients stand behind a release of sums, and of how many numbers."""

    artefact: str
    patients: int
    numbers: int


def decide(
    policy: Policy,
    findings: Sequence[Finding],
    charged: dict[str, tuple[float, float]],
    behind: Sequence[Behind],
) -> Decision:
    """The exit status; `charged` is epsilon and delta of each artefact."""
    failed = [f"{f.artefact}: {f.sentence}" for f in findings if f.verdict == "contradiction"]
    failed += [f"{f.artefact}: {f.sentence}" for f in findings if _too_much(f, policy)]
    for artefact, (epsilon, delta) in charged.items():
        if policy.max_epsilon is not None and epsilon > policy.max_epsilon:
            failed.append(f"{artefact}: epsilon {epsilon:g} was charged; {policy.max_epsilon:g} is allowed.")
        elif policy.max_epsilon is not None and delta > policy.max_delta:
            failed.append(f"{artefact}: delta {delta:g} was charged; {policy.max_delta:g} is allowed.")
    for one in behind:
        if one.patients < policy.min_cell:
            failed.append(f"{one.artefact}: {one.patients} patients; min_cell is {policy.min_cell}.")
        if one.numbers and one.patients / one.numbers < policy.min_patients_per_number:
            failed.append(
                f"{one.artefact}: {one.patients} patients for {one.numbers} numbers; "
                f"min_patients_per_number is {policy.min_patients_per_number:g}."
            )
    undecided = [f"{f.artefact}: {f.sentence}" for f in findings if f.verdict == "not audited"]
    undecided += [
        f"{f.artefact}: '{f.attack}' is required and {f.verdict}. {f.sentence}"
        for f in findings
        if f.attack in policy.required_tests and f.verdict in ("under-powered", "void")
    ]
    ran = {finding.attack for finding in findings}
    undecided += [
        f"'{name}' is required and was not run." for name in policy.required_tests if name not in ran
    ]
    status = FAILED if failed else UNDECIDED if undecided else PASSED
    return Decision(status, failed, undecided)


def _too_much(finding: Finding, policy: Policy) -> bool:
    """Whether an attack found more than the policy allows: areas have their limit, names have none."""
    if finding.verdict != "found" or finding.measure == OF_NOBODY:
        return False
    if finding.measure == "AUC":
        return finding.low is not None and finding.low > policy.max_tracing_auc
    if finding.attack == "copies":
        return finding.value is not None and finding.value > policy.max_excess_memorisation
    return True
