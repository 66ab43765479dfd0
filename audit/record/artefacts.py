"""What was attacked, and all that was found of it: a row of the page for everything that left a site, or was
published, under one name.

What this file does not do: attack (`attacks.py`), or judge by a policy (`policy.py`).
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

from audit.books import Charged
from audit.findings import Finding
from audit.policy import Behind
from audit.statistics.guarantee import largest_rate
from audit.statistics.intervals import ONE_SIDE, clopper_pearson


@dataclass(frozen=True)
class Artefact:
    """What left, or was published, under one name: a row of the page."""

    name: str
    releases: int
    sha256: tuple[str, ...]
    epsilon: float
    """Charged in the ledger; infinite where there was no noise."""
    delta: float
    findings: tuple[Finding, ...]

    @property
    def epsilon_low(self) -> float | None:
        """The largest lower bound of any attack."""
        bounds = [f.epsilon_low for f in self.findings if f.epsilon_low is not None]
        return max(bounds, default=None)

    @property
    def reached(self) -> float | None:
        """The largest share of members found at one false alarm in a hundred."""
        rates = [f.true_positive_rate for f in self.findings if f.true_positive_rate is not None]
        return max(rates, default=None)

    def largest_rate(self, at: float) -> float:
        """The largest that any attacker could reach."""
        return largest_rate(at, self.epsilon, self.delta)


@dataclass(frozen=True)
class Audited:
    """Everything that was found."""

    artefacts: list[Artefact]
    alarms: int
    """False alarms under nobody's membership."""
    tried: int
    """Of how many tries."""
    behind: list[Behind] = field(default_factory=list)

    @property
    def findings(self) -> list[Finding]:
        """All of them."""
        return [finding for artefact in self.artefacts for finding in artefact.findings]

    @property
    def alarm_interval(self) -> tuple[float, float]:
        """95% interval of the share of false alarms; nominal is .025."""
        return clopper_pearson(self.alarms, self.tried) if self.tried else (0.0, 1.0)

    @property
    def honest(self) -> bool:
        """Whether the share of false alarms is not told from more than the nominal one."""
        return self.alarm_interval[0] <= ONE_SIDE


def published(
    name: str, hashes: tuple[str, ...], charged: Iterable[Charged], findings: Sequence[Finding]
) -> Artefact:
    """The row of what all sites made together: a patient of one site is charged what that site was."""
    each = list(charged)
    epsilon = max((one.epsilon for one in each), default=math.inf)
    return Artefact(name, 1, hashes, epsilon, max((one.delta for one in each), default=0.0), tuple(findings))


def held_to_promise(artefact: Artefact) -> Artefact:
    """The row, with a contradiction first where an attack shows more than the ledger charged."""
    low = artefact.epsilon_low
    if low is None or low <= artefact.epsilon or artefact.name.endswith(": books"):
        return artefact
    said = Finding(
        artefact=artefact.name,
        attack="books",
        measure="epsilon",
        n_in=0,
        n_out=0,
        value=low,
        ceiling=artefact.epsilon,
        verdict="contradiction",
        sentence=f"An attack shows an epsilon of at least {low:.2f}; the ledger charged "
        f"{artefact.epsilon:.2f}. The promise does not hold.",
    )
    return replace(artefact, findings=(said, *artefact.findings))


def not_audited(artefact: str, why: str) -> Finding:
    """The row of what was not attacked."""
    return Finding(
        artefact=artefact,
        attack="none",
        measure="none",
        n_in=0,
        n_out=0,
        verdict="not audited",
        sentence=f"Not audited. {why}",
    )
