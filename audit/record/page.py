"""The page of an audit: one self-contained HTML file, made from the record and from nothing else.

Plain sentences first, then a row for each artefact, then every finding; readable without scripts, and on
paper. What this file does not do: measure anything; what the page says stands in the record.
"""

from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from audit.findings import ORDER, TESTS, parts
from audit.record.curves import SIDE, curves
from audit.record.record import ArtefactRow, Epsilon, FindingRow, Record, worst_of
from meduet_models.published.pretrained import MODEL

_TEMPLATE = Path(__file__).with_name("page.html")
_STATUS = {
    0: "Within the policy: every required test ran, and none found more than is allowed.",
    1: "Not within the policy.",
    2: "Undecided: nothing was found that the policy does not allow, but not everything that is required "
    "could be tested.",
}


def page_of(record: Record) -> str:
    """The page as HTML."""
    environment = Environment(
        loader=FileSystemLoader(_TEMPLATE.parent), autoescape=True, undefined=StrictUndefined
    )
    artefacts = sorted(record.artefacts, key=lambda one: ORDER.index(one.verdict))
    every = [finding for artefact in record.artefacts for finding in artefact.findings]
    return environment.get_template(_TEMPLATE.name).render(
        record=record,
        status=_STATUS[record.status],
        said=_by_site(first_sentences(record)),
        undecided=record.undecided,
        artefacts=[_cells(one) for one in artefacts],
        findings=[_finding_cells(f) for f in sorted(every, key=lambda f: ORDER.index(f.verdict))],
        could_not=[f"{f.artefact}: {f.sentence}" for f in every if f.verdict in ("under-powered", "void")],
        tests=TESTS,
        curves=curves(record.artefacts),
        side=SIDE,
        pictures=[(f"{f.artefact}, {f.attack}", one) for f in every for one in f.pictures],
        hashes=record.hashes,
        alarms=_alarms(record),
    )


def first_sentences(record: Record) -> list[tuple[str, str]]:
    """What a reader has to know who reads no table: where and what was found, worst first, each once."""
    every = [finding for artefact in record.artefacts for finding in artefact.findings]
    found = [f for f in every if f.verdict in ("contradiction", "found")]
    found.sort(key=lambda f: (ORDER.index(f.verdict), f.measure == "AUC"))
    said = list(dict.fromkeys((parts(f.artefact)[0], _about(f)) for f in found))
    if not said:
        said.append(
            ("all", "No attack that was tried found anything; what these could have found stands below.")
        )
    if any(one.name == MODEL and one.verdict == "not found" for one in record.artefacts):
        said.append((MODEL, "Nothing was found in the published model by the attacks that were tried."))
    return said


def _by_site(said: list[tuple[str, str]]) -> dict[str, list[str]]:
    return {
        site: [text for other, text in said if other == site] for site in dict.fromkeys(s for s, _ in said)
    }


def _about(finding: FindingRow) -> str:
    """The sentence, with what it is about where it does not say so."""
    site, kind = parts(finding.artefact)
    return finding.sentence if site in finding.sentence or not kind else f"{kind}: {finding.sentence}"


def _alarms(record: Record) -> str:
    alarms = record.alarms
    if not alarms.tried:
        return "No score had enough patients for a check against nobody's membership."
    areas = sum(f.measure == "AUC" for artefact in record.artefacts for f in artefact.findings)
    return (
        f"With membership dealt at random within each site, {alarms.claimed} of {alarms.tried} scores were "
        f"claimed ({alarms.claimed / alarms.tried:.1%}, 95% interval {alarms.low:.1%} to {alarms.high:.1%}; "
        f"nominal {alarms.nominal:.1%}). So of the {areas} scores on this page about "
        f"{areas * alarms.nominal:.1f} would be claimed where nothing is."
    )


def _cells(artefact: ArtefactRow) -> dict[str, str]:
    return {
        "name": artefact.name,
        "verdict": artefact.verdict,
        "releases": str(artefact.releases),
        "epsilon": "" if artefact.name.endswith(": books") else _epsilon(artefact.epsilon),
        "epsilon_low": _text(artefact.epsilon_low),
        "largest": "" if artefact.name.endswith(": books") else _rates(artefact),
        "reached": _text(artefact.reached_rate_1) or "not estimable",
        "sentence": worst_of(artefact.findings).sentence if artefact.findings else "",
    }


def _finding_cells(finding: FindingRow) -> dict[str, str]:
    interval = "" if finding.low is None else f"{_text(finding.low)} to {_text(finding.high)}"
    return {
        "artefact": finding.artefact,
        "attack": finding.attack,
        "verdict": finding.verdict,
        "value": _text(finding.value),
        "measure": finding.measure,
        "interval": interval,
        "baseline": _text(finding.baseline),
        "n": f"{finding.n_in} / {finding.n_out}",
        "worst": f"{finding.worst_group} {_text(finding.worst_value)}".strip(),
        "sentence": finding.sentence,
    }


def _rates(artefact: ArtefactRow) -> str:
    return f"{artefact.largest_rate_1:.2g} / {artefact.largest_rate_01:.2g}"


def _epsilon(value: Epsilon) -> str:
    return value if isinstance(value, str) else f"{value:.2f}"


def _text(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}" if abs(value) < 100 else f"{value:.0f}"
