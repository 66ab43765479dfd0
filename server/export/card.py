"""The model card of an export: what the weights are, from what, for what, and what nobody has tested.

Made from the run (`facts.py`); what the centre does not know it says. Source of the headings: Mitchell et al.
2019, Model Cards for Model Reporting (arXiv:1810.03993).
"""

from collections import Counter, defaultdict
from collections.abc import Sequence

from audit.record.record import FindingRow
from federation.exchanges.survey import smallest_cohort
from server.export.facts import INTENDED, UNTESTED, Release

_STATUS = ("within it", "NOT within it", "undecided: a person has to look")

_USE = """\
```python
import meduet_models                      # pip install fedmeduet

model = meduet_models.load("THIS_FOLDER")
code = model.embed("scan.nii.gz")         # {size}
```
"""


def model_card(release: Release, use: str = _USE) -> str:
    """Markdown with the front matter that model hubs read."""
    config, volumes = release.config(), release.volumes
    size = f"{config['code_size']} numbers" if config["code_size"] else "none: this run fitted no code"
    spacing, shape = (" x ".join(f"{n:g}" for n in values) for values in (volumes.spacing_mm, volumes.shape))
    patients = f"at least {release.patients}" if release.patients else "not told"
    lines = [
        "---",
        f"license: {'other' if ' ' in release.licence else release.licence.lower()}",
        "library_name: fedmeduet",
        "pipeline_tag: image-feature-extraction",
        "tags: [medical-imaging, federated-learning, self-supervised-learning, 3d]",
        "---",
        "",
        f"# {release.plan.name}",
        "",
        "A MeDUET network (content and style of 3D scans parted), pretrained across hospitals without moving "
        "a scan. Every number on this page comes from the run.",
        "",
        "| | |",
        "|---|---|",
        f"| sites | {config['sites']} (names stay with the consortium) |",
        f"| patients | {patients} (rounded down to whole minimum cohorts) |",
        f"| scans | {volumes.modality}; window {volumes.window}; {spacing} mm; {shape} voxels; "
        f"{volumes.extent} |",
        f"| rounds | {config['rounds']} of {release.plan.training.steps_per_round} steps at each site |",
        f"| code | {size} |",
        f"| licence of the weights | {release.licence} |",
        f"| plan | `{config['plan_sha256']}` |",
        f"| tensors | `{config['tensors_sha256']}` |",
        f"| tokenizer | {config['tokenizer']['name']}, `{config['tokenizer']['sha256']}` |",
        "",
        "## Use",
        "",
        use.format(size=size).rstrip(),
        "",
        "## Patients",
        "",
        *_patients(release),
        "",
        "## Losses by site",
        "",
        *_sites(release),
        "",
        "## What was promised of what left the sites",
        "",
        *(f"- {sentence}" for sentence in release.promises),
        "",
        "## What an audit found",
        "",
        *_audit(release),
        "",
        "## Intended use",
        "",
        INTENDED,
        "",
        "## Not tested",
        "",
        UNTESTED,
        "",
    ]
    return "\n".join(lines)


def _patients(release: Release) -> list[str]:
    if not release.demographics:
        return [
            "Ages and sexes: the plan did not ask for them, and the coordinating centre does not know them."
        ]
    least = smallest_cohort(release.plan)
    rows = [
        f"| {what} | {band} | {count or f'fewer than {least} at any site, or none'} |"
        for what, bands in release.demographics.items()
        for band, count in bands.items()
    ]
    return [
        f"As the sites told them, each count in whole cohorts of at least {least}:",
        "",
        "| | | patients, at least |",
        "|---|---|---|",
        *rows,
    ]


def _sites(release: Release) -> list[str]:
    if not release.sites:
        return ["Not known: no site told its own, or the weights were exported without the run's folder."]
    terms = sorted(set.intersection(*(set(loss) for loss in release.sites)))
    return [
        "Mean over a site's own training scans in the last round; sites in the order of their loss.",
        "",
        "| site | " + " | ".join(terms) + " |",
        "|---" * (len(terms) + 1) + "|",
        *(
            f"| {number} | " + " | ".join(f"{loss[term]:.4g}" for term in terms) + " |"
            for number, loss in enumerate(release.sites, start=1)
        ),
    ]


def _audit(release: Release) -> list[str]:
    record = release.audit
    if record is None:
        return [
            "No audit lies in the run, or the weights were exported without its folder: nothing is known."
        ]
    found: dict[tuple[str, str, str], list[FindingRow]] = defaultdict(list)
    for artefact in record.artefacts:
        kind = artefact.name.rpartition(": ")[2]  # without the site
        for finding in artefact.findings:
            found[kind, finding.attack, finding.measure].append(finding)
    return [
        f"`meduet-audit` attacked what the run released ({record.audited_utc}); held against a policy it was "
        f"{_STATUS[record.status]}. Findings over all sites:",
        "",
        "| of | attack | measure | values | verdicts |",
        "|---|---|---|---|---|",
        *(
            f"| {kind} | {attack} | {measure} | {_values(findings)} | {_verdicts(findings)} |"
            for (kind, attack, measure), findings in found.items()
        ),
        "",
        "Not tried by it:",
        "",
        *(f"- {sentence}" for sentence in record.not_tested),
    ]


def _values(findings: Sequence[FindingRow]) -> str:
    values = [one.value for one in findings if one.value is not None]
    if not values:
        return ""
    low, high = min(values), max(values)
    return f"{low:.3g}" if low == high else f"{low:.3g} to {high:.3g}"


def _verdicts(findings: Sequence[FindingRow]) -> str:
    return ", ".join(
        f"{verdict}: {number}" for verdict, number in Counter(f.verdict for f in findings).items()
    )
