"""The record that a privacy officer files, as one page of text: what a machine can fill in is filled in.

The order is that of a data protection impact assessment (GDPR Art. 35(7)): what is processed and why, whether
it is needed, the risks, the measures. What only a person can say is left open, and counted. One line each for
what a health data body assesses before an export (re-identification, attribute inference, membership
inference, linkage), and what a research environment must keep (SATRE 3.3.07, 3.3.09: thresholds, rules, tool
versions, tied to the very output).

What this file does not do: measure, or judge; every number stands in the record.
"""

from collections.abc import Iterator

from audit.findings import parts
from audit.record.record import FindingRow, Record, worst_of

OPEN = "________ (a person fills this in)"
_ASSESSED = {
    "re-identification": ("span", "pool", "hits", "recognition", "decode", "inversion", "blind_inversion"),
    "attribute inference": ("measured", "difference"),
    "membership inference": (
        "tracing",
        "leverage",
        "loss",
        "calibrated_loss",
        "shadow",
        "update",
        "alignment",
        "diffusion_loss",
        "diffusion_sima",
        "diffusion_pia",
        "returned",
    ),
    "linkage": ("recognition", "copies"),
}


def dossier(record: Record) -> str:
    """The page."""
    lines = [*_head(record), "", *_processing(record), "", *_risks(record), "", *_measures(record)]
    count = sum(OPEN in line for line in lines)
    return "\n".join([*lines, "", f"Fields left open for a person: {count}."]) + "\n"


def _head(record: Record) -> Iterator[str]:
    yield f"Dossier of the privacy audit of {record.run}"
    yield f"audited {record.audited_utc} by: {record.command}"
    yield f"plan {record.plan_sha256}"
    yield f"Organisation, controller, data protection officer: {OPEN}"
    yield f"Date and signature: {OPEN}"


def _processing(record: Record) -> Iterator[str]:
    yield "(a) What is processed, and why"
    yield f"Purpose and legal basis: {OPEN}"
    yield "What left the sites:"
    for row in record.artefacts:
        if not row.name.endswith(": books"):
            promised = row.epsilon if isinstance(row.epsilon, str) else f"{row.epsilon:g}"
            yield f"  {row.name}: {row.releases} release(s), epsilon {promised}, sha256 {_first(row.sha256)}"
    yield f"Recipients, storage, how long: {OPEN}"
    yield ""
    yield "(b) Necessity and proportionality"
    yield f"Why less would not do: {OPEN}"


def _risks(record: Record) -> Iterator[str]:
    yield "(c) Risks to the rights and freedoms of patients"
    every = [finding for row in record.artefacts for finding in row.findings]
    for name, tests in _ASSESSED.items():
        own = [finding for finding in every if finding.attack in tests]
        yield f"  {name}: {_worst(own)}"
    sites = {parts(f.artefact)[0] for f in every if parts(f.artefact)[1]}
    for site in sorted(sites):
        yield f"  worst at {site}: {_worst([f for f in every if parts(f.artefact)[0] == site])}"
    yield f"  by sex and age band: {OPEN}"
    yield "  not tested:"
    yield from (f"    {text}" for text in record.not_tested)


def _measures(record: Record) -> Iterator[str]:
    yield "(d) Measures, and what they were measured against"
    yield "Risk appetite (privacy_policy.yaml):"
    yield from (f"  {name}: {value}" for name, value in record.policy.items())
    yield f"Exit status: {record.status} (0 within the policy, 1 not, 2 undecided)"
    yield from (f"  not allowed: {text}" for text in record.failed)
    yield from (f"  undecided: {text}" for text in record.undecided)
    yield f"Suppression and perturbation: minimum cell {record.policy['min_cell']}; noise as promised above"
    yield f"Tools: {', '.join(f'{name} {version}' for name, version in record.versions.items())}"
    yield "Files (sha256):"
    yield from (f"  {name}: {sha256}" for name, sha256 in record.hashes.items())
    yield f"Residual risk accepted by: {OPEN}"


def _worst(findings: list[FindingRow]) -> str:
    if not findings:
        return "not tested"
    worst = worst_of(findings)
    return f"{worst.verdict} ({worst.artefact}, {worst.attack}). {worst.sentence}"


def _first(hashes: tuple[str, ...]) -> str:
    if not hashes:
        return "none"
    return hashes[0] if len(hashes) == 1 else f"{hashes[0]} and {len(hashes) - 1} more"
