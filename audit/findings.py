"""A finding: what one attack on one artefact reached, beside what it could have reached.

Does not do: attack anything, or decide whether a finding may be (`policy.py`).
"""

from dataclasses import dataclass
from typing import Final, Literal

Verdict = Literal["contradiction", "found", "void", "under-powered", "not audited", "not found"]
"""`found`: the attack works. `void`: members and others differ without the release, so nothing follows.
`under-powered`: it could not have been found. `contradiction`: books or promises do not hold."""

ORDER: Final[tuple[Verdict, ...]] = (
    "contradiction",
    "found",
    "void",
    "under-powered",
    "not audited",
    "not found",
)
"""Worst first."""

TESTS: Final = {
    "books": "hash chains, reservations, questions, charges",
    "numbers": "how many numbers were told of how many patients, and what that allows",
    "span": "is a candidate in the span of what was summed",
    "leverage": "how far a candidate reaches into sums over many",
    "measured": "what was measured of each patient, by least squares",
    "pool": "who of a pool is in a sum, by least squares",
    "tracing": "does a candidate lean towards a mean",
    "difference": "one release less another, a patient apart",
    "hits": "can one count tell one patient",
    "counts": "do counts tell one patient to whoever knows all others",
    "update": "loss before a round less loss after it",
    "alignment": "does an update point along a candidate's own gradient",
    "inversion": "a group's gradient turned back into its scans, all draws known",
    "blind_inversion": "the same, draws guessed",
    "loss": "loss of the model on a candidate",
    "calibrated_loss": "the same, less the loss of an earlier model",
    "invariance": "how little noise moves the content of a candidate",
    "parts": "is a part of a candidate found again in the whole more sharply",
    "combined": "all scores of a model together, weighted on half of the candidates and told of the other",
    "public_loss": "loss of the model on public scans that it was trained on, beside fresh ones",
    "shadow": "the loss, beside models retrained without the candidate",
    "decode": "the scan behind a released latent",
    "recognition": "is a released latent found again among other acquisitions",
    "diffusion_loss": "loss of the diffusion model on a candidate",
    "diffusion_sima": "noise that the diffusion model sees in a candidate's clean scan",
    "diffusion_pia": "a candidate's own noise, as the diffusion model sees it along the path",
    "copies": "are samples nearer to training scans than to held-out ones",
    "canaries": "which of a plan's made-up contributors are in, and what so many right guesses prove",
    "input_canaries": "the same of phantoms with an odd mark",
    "returned": "does a model that is told a scan return it better if it was trained on",
}
"""Every test by name; a policy may require any of them."""


OF_NOBODY: Final = "AUC of public scans"
"""The measure of findings of which no patient is a part: no policy forbids one."""


@dataclass(frozen=True, kw_only=True)
class Picture:
    """Slices side by side. It shows patients: it lies where the report lies."""

    caption: str
    """What stands in its columns, from left to right, and in its rows."""
    png: str
    """The file, in base64."""


@dataclass(frozen=True, kw_only=True)
class Rate:
    """How many of one side an attack claims at its threshold, as sites told it, in whole cells."""

    claimed: int
    missed: int
    sites: int
    """Sites that told."""
    value: float | None
    """Share of those told of whom it claims; None: no site told."""
    low: float
    high: float
    """Exact interval (97.5%), over all that the rounding may hide."""


@dataclass(frozen=True, kw_only=True)
class Pooled:
    """What sites told of one attack on their own patients: its true- and its false-positive rate."""

    cell: int
    """Every site's counts are multiples of it."""
    members: Rate
    others: Rate


@dataclass(frozen=True, kw_only=True)
class CanaryBounds:
    """What guesses of canaries' coins show of a promise."""

    canaries: int
    guesses: tuple[int, ...]
    """How many coins were guessed, fixed beforehand."""
    right: tuple[int, ...]
    """How many of them rightly."""
    releases: int
    """How many releases were at hand."""
    promised: float | None
    """Upper bound of epsilon, charged in the ledger; None: infinite."""
    epsilon_low: float
    """Lower bound (95%), whatever the mechanism is."""
    epsilon_low_gaussian: float
    """The same if the mechanism is a Gaussian one."""
    ceiling: float
    """Lower bound if every guess were right: so many canaries show no more."""
    expected: float
    """Lower bound on average where the promise holds, to whoever reads the noisy sums themselves."""
    expected_gaussian: float


@dataclass(frozen=True, kw_only=True)
class Finding:
    """A row of the report. None: there is no such number, and `sentence` says why."""

    artefact: str
    """What was attacked, as `site: kind`, or a published file."""
    attack: str
    """Name of the test, one of `TESTS`."""
    measure: str
    """What `value` is: `AUC`, `share named`, …"""
    n_in: int
    """Members whom the attack was tried on."""
    n_out: int
    """Others."""
    verdict: Verdict
    sentence: str
    """What it means, in plain words."""
    value: float | None = None
    low: float | None = None
    high: float | None = None
    """95% interval."""
    ceiling: float | None = None
    """Smallest value that these numbers could have told from chance."""
    baseline: float | None = None
    """The same of an attacker without the release."""
    true_positive_rate: float | None = None
    """Share of members found at one false alarm in a hundred; None: not estimable."""
    epsilon_low: float | None = None
    """Lower bound of epsilon (95%, add or remove one), where one follows."""
    roc: tuple[tuple[float, float], ...] = ()
    """Share of others claimed and share of members found, by corners; empty where nothing was ranked."""
    worst_group: str = ""
    """The subgroup in which the value is largest, of those with enough patients; empty: none has."""
    worst_value: float | None = None
    """The value there: the largest of several, so above the mean by chance alone."""
    pictures: tuple[Picture, ...] = ()
    pooled: Pooled | None = None
    """Where it is of counts that sites told."""
    canaries: CanaryBounds | None = None
    """Where it is of canaries."""
    seconds: float = 0.0


def parts(artefact: str) -> tuple[str, str]:
    """Site and kind of an artefact; of a published file its name, and no kind."""
    site, _, kind = artefact.partition(": ")
    return site, kind


def worst(findings: list[Finding]) -> Verdict:
    """The worst verdict; `not audited` of none."""
    said = {finding.verdict for finding in findings}
    return next((verdict for verdict in ORDER if verdict in said), "not audited")
