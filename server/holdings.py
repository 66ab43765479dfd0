"""The centre's own part of an audit, which needs no patient: its book, its models, what it holds of whom, the
counts that sites told of their own audits, and what a model keeps of public scans (`public_memory.py`).

The journal says which site told what over how many patients, and the plan how many numbers that is. From
these two follows what whoever holds scans could do at most: products of fewer vectors than they have numbers
are spanned by them alone, and a mean of many numbers over few patients leans towards each of them.

What this file does not do: attack anything, which takes candidates' scans: a site's `meduet-site audit`.
"""

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from scipy.stats import norm

from audit.attacks.algebra import tracing_area
from audit.attacks.claims import pooled_claims
from audit.evidence import Evidence
from audit.findings import Finding
from audit.policy import Behind
from audit.record.artefacts import Artefact, Audited
from federation.exchanges.audit_counts import BLIND
from federation.exchanges.erasure import numbers_told
from federation.exchanges.style_code import CODE, STYLE_CODE, code_promise, code_shapes
from federation.exchanges.survey import survey_layout
from federation.journal import read_journal
from federation.plan.plan import RunPlan
from forms.json_text import sha256_of
from meduet_models.diffusion.artefact import DIFFUSION_MODEL, load_generative_model
from meduet_models.published.pretrained import MODEL
from meduet_models.sharing import encoder_keys
from meduet_models.weights import load_weights, sha256_of_file, sha256_of_tensors
from privacy.chain import BrokenChain
from server.exchanges.audit_counts import FILE as COUNTS
from server.exchanges.audit_counts import read_audit_counts
from server.public_memory import NAME, public_memory

JOURNAL = "journal.jsonl"
_TOLD = 0.6
"""Area from which a mean is said to tell."""
_KINDS: Mapping[str, str] = {
    "query.survey": "survey",
    "query.erasure": "erasure",
    "query.probe": "probe",
    STYLE_CODE.route: "style_code",
}
Line = Mapping[str, Any]


def centre_audit(folder: Path) -> tuple[Evidence, Audited]:
    """What the run in `folder` left at the centre. Raises `ValueError` when there is none."""
    if not (folder / "plan.json").is_file():
        raise ValueError(f"Expected the folder of a run; {folder} has no plan.json. Nothing was audited.")
    plan = RunPlan.from_json((folder / "plan.json").read_text(encoding="utf-8"))
    replies, problems = _book(folder, plan)
    told, wrong = _told(folder, plan)
    problems += _diffusion(folder, plan)
    rows = [_books_row(len(replies), [*problems, *wrong]), *told]
    if memory := public_memory(folder, plan):
        rows.append(Artefact(NAME, 1, (), math.inf, 0.0, tuple(memory)))
    behind: list[Behind] = []
    patients = _patients(replies)
    for (site, kind), lines in _by_kind(replies).items():
        hashes = tuple(str(line["sha256"]) for line in lines)
        if kind == "style_code":
            promise, own = code_promise(plan), _noised(plan, site)
            row = Artefact(
                own.artefact, len(lines), hashes, promise.epsilon.upper, promise.delta or 0.0, (own,)
            )
            rows.append(row)
            continue
        finding = _held(plan, site, kind, patients.get(site, 0))
        if finding is not None:
            behind.append(Behind(finding.artefact, finding.n_in, numbers_of(plan, kind)))
            rows.append(Artefact(finding.artefact, len(lines), hashes, float("inf"), 0.0, (finding,)))
    files = {name: folder / name for name in ("plan.json", JOURNAL, MODEL, DIFFUSION_MODEL, COUNTS)}
    evidence = Evidence(
        name=f"{plan.name}, seen by its centre",
        plan=plan,
        books={},
        releases=[],
        cohorts={},
        hashes={name: sha256_of_file(path) for name, path in files.items() if path.is_file()},
        unfinished="" if (folder / MODEL).is_file() else "The run is not finished.",
    )
    return evidence, Audited(rows, 0, 0, behind)


def _told(folder: Path, plan: RunPlan) -> tuple[list[Artefact], list[str]]:
    """What sites told of their own audits, by what was attacked, and what does not hold of it."""
    path = folder / COUNTS
    if plan.audit_counts is None or not path.is_file():
        return [], []
    text = path.read_text(encoding="utf-8")
    try:
        noted = [entry.record.get("file_sha256") for entry in read_journal(folder / JOURNAL)]
        told = read_audit_counts(text)
    except ValueError:
        return [], [f"{COUNTS} cannot be held against the journal."]
    if sha256_of(text) not in noted or told.plan_sha256 != plan.sha256:
        return [], [f"{COUNTS} is not what the journal says that sites told."]
    rows = []
    for name, attack in ((MODEL, "loss"), ("all sites: survey", "tracing")):
        finding = pooled_claims(name, attack, told.attacks[attack], told.attacks[BLIND], told.cell)
        rows.append(Artefact(name, told.sites, (sha256_of(text),), math.inf, 0.0, (finding,)))
    return rows, []


def numbers_of(plan: RunPlan, kind: str) -> int:
    """In a vector that is summed."""
    match kind:
        case "survey":
            shapes = survey_layout(plan).shapes()
            return sum(math.prod(shape) for name, shape in shapes.items() if name != "count")
        case "erasure":
            return numbers_told(plan)
        case "style_code":
            return math.prod(code_shapes(plan)[CODE])
        case _:
            return plan.network.code_size


def _book(folder: Path, plan: RunPlan) -> tuple[Sequence[Line], list[str]]:
    """The replies that the journal knows, and what does not hold."""
    try:
        lines: list[Line] = [entry.record for entry in read_journal(folder / JOURNAL)]
    except BrokenChain as error:
        return [], [str(error).replace(str(folder), "the run")]
    except ValueError:
        return [], ["There is no journal: what crossed cannot be checked."]
    own = [line for line in lines if line.get("plan") == plan.sha256]
    replies = [line for line in own if line["kind"] == "reply"]
    return replies, [*_answered_twice(replies), *_model(folder, own)]


def _answered_twice(replies: Sequence[Line]) -> Iterator[str]:
    """Places for which a site told two different answers: equations about the same patients."""
    told = defaultdict(set)
    for line in replies:
        told[line["site"], line["to"], line.get("round", 0)].add(line["sha256"])
    for (site, to, round_number), hashes in told.items():
        if len(hashes) > 1 and to in _KINDS:
            yield f"{site} told {len(hashes)} different answers to '{to}' of round {round_number}."


def _model(folder: Path, own: Sequence[Line]) -> Iterator[str]:
    """The published model is the one that the journal ends with."""
    ends = [line["tensors_sha256"] for line in own if line["kind"] == "end"]
    if (folder / MODEL).is_file() and ends and sha256_of_tensors(load_weights(folder / MODEL)[0]) != ends[-1]:
        yield f"{MODEL} is not the model with which the journal ends."


def _diffusion(folder: Path, plan: RunPlan) -> Iterator[str]:
    """The published diffusion model makes latents of the plan's tokenizer, told what the published model
    reads."""
    if not (folder / DIFFUSION_MODEL).is_file():
        return
    own = load_generative_model(folder / DIFFUSION_MODEL)
    if own.tokenizer_sha256 != plan.tokenizer_sha256:
        yield f"{DIFFUSION_MODEL} makes latents of another tokenizer than the plan's."
    if (folder / MODEL).is_file():
        whole, told = load_weights(folder / MODEL)[0], own.encoder.state_dict()
        if any(not torch.equal(whole[name], told[name]) for name in encoder_keys(own.encoder)):
            yield f"{DIFFUSION_MODEL} is told what another encoder than that of {MODEL} reads."


def _books_row(replies: int, problems: Sequence[str]) -> Artefact:
    def row(verdict: Any, sentence: str) -> Finding:
        return Finding(
            artefact="centre: books",
            attack="books",
            measure="problems",
            n_in=replies,
            n_out=0,
            value=float(len(problems)),
            verdict=verdict,
            sentence=sentence,
        )

    whole = f"The chain is whole, {replies} replies are in it, and the model is the one that it ends with."
    findings = [row("contradiction", one) for one in problems] or [row("not found", whole)]
    return Artefact("centre: books", replies, (), 0.0, 0.0, tuple(findings))


def _patients(replies: Sequence[Line]) -> dict[str, int]:
    """Of each site, as it said; its scans where it told no survey."""
    scans = {str(line["site"]): int(line["examples"]) for line in replies if "examples" in line}
    return scans | {
        str(line["site"]): int(line["num_patients"]) for line in replies if "num_patients" in line
    }


def _by_kind(replies: Sequence[Line]) -> dict[tuple[str, str], list[Line]]:
    lines: dict[tuple[str, str], list[Line]] = defaultdict(list)
    for line in replies:
        if line["to"] in _KINDS:
            lines[str(line["site"]), _KINDS[line["to"]]].append(line)
    return lines


def _noised(plan: RunPlan, site: str) -> Finding:
    """What a sum with noise allows at most: who knows all other patients sees one number move by a bound."""
    mechanism = code_promise(plan).mechanism
    assert mechanism is not None, "a style code has noise"
    most = float(norm.cdf(1 / (math.sqrt(2) * mechanism.noise_multiplier)))
    return Finding(
        artefact=f"{site}: style_code",
        attack="numbers",
        measure="AUC",
        n_in=0,
        n_out=0,
        value=most,
        verdict="not found",
        sentence=f"{site} told {numbers_of(plan, 'style_code')} numbers with noise: even who knows all its "
        f"other patients tells one by her scan with an area of {most:.2f} at most.",
    )


def _held(plan: RunPlan, site: str, kind: str, patients: int) -> Finding | None:
    """What sums of these numbers over these patients allow; None where nobody said over how many."""
    if not patients:
        return None
    numbers, behind = numbers_of(plan, kind), patients // (plan.probes.folds if kind == "probe" else 1)
    if kind == "probe":
        exact = behind < numbers
        said = (
            f"Sums of products of {numbers} numbers over about {behind} patients of {site} at a time have at "
            f"most {min(behind, numbers)} directions: "
            + ("whoever holds a scan reads whether its patient is among them." if exact else "all of them.")
        )
        value = float(exact)
    else:
        value = tracing_area(float(patients), numbers)
        said = (
            f"The {kind} of {site} told a mean of {numbers} numbers over {patients} patients: who knows all "
            f"that is usual tells a patient by her scan with an area of {value:.2f} at most."
        )
    return Finding(
        artefact=f"{site}: {kind}",
        attack="numbers",
        measure="exact" if kind == "probe" else "AUC",
        n_in=behind,
        n_out=0,
        value=value,
        low=value,
        verdict="found" if value > _TOLD else "not found",
        sentence=said,
    )
