"""What every export says of its weights: where they come from, under which promise, and who may use them how.

Read from the header of the final weights and, where the run's folder is given, from its metrics and its last
audit; no number is typed by hand. The plan itself, the sites' names and their counts stay at the consortium:
an export names the plan's hash, the number of sites, and how many patients, rounded down to whole minimum
cohorts. What this file does not do: write a form (its neighbours do).
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from federation.exchanges.demographics import AGES, SEX_NAMES, SEXES, age_bands
from federation.exchanges.survey import smallest_cohort
from federation.plan.plan import RunPlan
from forms.json_text import read_json
from meduet_models.published.expiry import EXPIRES
from meduet_models.published.pretrained import CANARIES, MODEL, Pretrained, load_pretrained
from meduet_models.published.scan_model import tokenizer_of
from meduet_models.tokenizer.tokenizer import Tokenizer
from meduet_models.weights import load_weights, sha256_of_tensors
from scans.volume_plan import VolumePlan
from server.promises import sentences

if TYPE_CHECKING:
    from audit.record.record import Record

_KEPT = (
    "model", "network", "tokenizer_sha256", "volumes", "plan_sha256", "rounds", "tensors_sha256", "readers",
    EXPIRES,
    CANARIES,
)  # fmt: skip
"""Of the header; the rest (the plan, counts and probes of sites) stays at the consortium."""
INTENDED = (
    "Research on 3D medical scans of the kind described by `volumes`: a start for networks that learn from "
    "few labels, and codes to compare scans by. Not a medical device; not for diagnosis."
)
UNTESTED = (
    "Other modalities, body parts and voxel sizes; scanners unlike those of the sites; any clinical use."
)


@dataclass(frozen=True)
class Release:
    """A run's final weights, and what is said of them."""

    pretrained: Pretrained
    tensors: dict[str, Tensor]
    """All of the file."""
    tokenizer: Tokenizer
    plan: RunPlan
    licence: str
    """As the consortium says: an SPDX identifier, or a sentence."""
    patients: int
    """Of all sites, rounded down to whole minimum cohorts; 0: told by none."""
    demographics: Mapping[str, Mapping[str, int]]
    """Patients by age and by sex, where the plan asked for them."""
    sites: Sequence[Mapping[str, float]]
    """Losses of each site's own scans in the last round, best first, so that the order names nobody; empty
    where no site told its own."""
    audit: "Record | None"
    """What meduet-audit found in the run last."""

    @property
    def volumes(self) -> VolumePlan:
        """How scans become volumes."""
        return self.plan.volumes

    @property
    def promises(self) -> list[str]:
        """What was promised of all that left the sites for these weights."""
        return sentences(self.plan)

    def header(self) -> dict[str, str]:
        """Header of the exported weights."""
        header = {n: text for n, text in self.pretrained.provenance.items() if n in _KEPT}
        return header | {"promise": json.dumps(self.promises), "licence": self.licence}

    def config(self) -> dict[str, Any]:
        """The same as plain values: `config.json`, metadata of other forms."""
        return {
            "model_type": "meduet",
            "network": asdict(self.plan.network),
            "volumes": asdict(self.volumes),
            "tokenizer": {"name": self.tokenizer.name, "sha256": self.tokenizer.sha256},
            "code_size": self.plan.network.code_size if self.pretrained.network.has_content_code else 0,
            "rounds": int(self.pretrained.provenance["rounds"]),
            "sites": len(self.plan.sites),
            "patients_at_least": self.patients,
            "plan_sha256": self.plan.sha256,
            "tensors_sha256": self.pretrained.provenance["tensors_sha256"],
            "promise": self.promises,
            "licence": self.licence,
            "fedmeduet_version": version("fedmeduet"),
        }


def release_of(run: Path, licence: str, tokenizer: Path | None = None) -> Release:
    """The release of a finished run: its folder, or its `model.safetensors`.

    Raises `ValueError` when the weights are damaged, were changed since, or are not a run's.
    """
    if not licence.strip() or "\n" in licence:
        raise ValueError("Expected --licence to be an SPDX identifier or one sentence; got none.")
    path = run / MODEL if run.is_dir() else run
    pretrained = load_pretrained(path)
    header = pretrained.provenance
    if missing := sorted({"plan", "plan_sha256", "rounds", "tensors_sha256", "volumes"} - set(header)):
        raise ValueError(f"Expected the final weights of a run in {path}; their header lacks {missing[0]!r}.")
    plan = RunPlan.from_json(header["plan"])
    if plan.sha256 != header["plan_sha256"]:
        raise ValueError(f"Expected the plan in {path.name} to have the hash that it says; it has another.")
    tensors, _ = load_weights(path)
    if sha256_of_tensors(tensors) != header["tensors_sha256"]:
        raise ValueError(f"Expected the weights in {path.name} as they were written; they have changed.")
    found = tokenizer_of(path, pretrained, tokenizer)
    folder = path.parent
    return Release(
        pretrained,
        tensors,
        found,
        plan,
        licence,
        _patients(header, plan),
        _demographics(header, plan),
        _sites(folder, plan),
        _audit(folder, plan),
    )


def _demographics(header: Mapping[str, str], plan: RunPlan) -> dict[str, dict[str, int]]:
    """Patients by age and by sex, bands in their order; none where the plan did not ask."""
    if plan.demographics is None or "demographics" not in header:
        return {}
    told = read_json(header["demographics"], "the demographics of a run")
    bands = {AGES: age_bands(plan.demographics.age_edges), SEXES: SEX_NAMES}
    return {what: {band: int(told[what][band]) for band in names} for what, names in bands.items()}


def _sites(folder: Path, plan: RunPlan) -> list[dict[str, float]]:
    """Losses of each site in the last round, if the run of `plan` lies in `folder`."""
    agreed, metrics = folder / "plan.json", folder / "metrics.json"
    if not metrics.is_file() or not agreed.is_file():
        return []
    if RunPlan.from_json(agreed.read_text(encoding="utf-8")).sha256 != plan.sha256:
        return []
    rounds = read_json(metrics.read_text(encoding="utf-8"), "the metrics of a run")["rounds"]
    told = [dict(one["loss"]) for one in rounds[-1]["sites"].values()] if rounds else []
    return sorted((loss for loss in told if "total" in loss), key=lambda loss: float(loss["total"]))


def _audit(folder: Path, plan: RunPlan) -> "Record | None":
    """The last audit of the run in `folder`. Raises `ValueError` for that of another plan."""
    from audit.record.record import read_record  # here: a run that ends needs no attacks
    from audit.report import FOLDER as AUDIT

    path = folder / AUDIT / "audit.json"
    if not path.is_file():
        return None
    record = read_record(path)
    if record.plan_sha256 != plan.sha256:
        raise ValueError(f"Expected the audit of plan {plan.sha256[:12]} beside its weights; got another's.")
    return record


def _patients(header: Mapping[str, str], plan: RunPlan) -> int:
    """Patients of the sites whose sums are in the weights, in whole minimum cohorts."""
    sites = read_json(header.get("erasure", "{}"), "the erasure of a run").get("sites", {})
    cohort = smallest_cohort(plan)
    return sum(int(one["patients"]) for one in sites.values()) // cohort * cohort
