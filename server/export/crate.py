"""The record of an export or a run: `ro-crate-metadata.json`, which says of every file what it is.

RO-Crate 1.1 (https://w3id.org/ro/crate/1.1): what catalogues and workflow tools read. Files are named by
their hash. Written last, over what lies there. Of a run's folder only what the centre wrote is listed: sites
that were simulated in it, checkpoints and whatever a run needs to go on are not part of its record.
"""

import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from federation.plan.plan import RunPlan
from meduet_models.diffusion.artefact import DIFFUSION_MODEL
from meduet_models.published.pretrained import MODEL
from meduet_models.weights import sha256_of_file
from server.export.facts import INTENDED, Release
from server.promises import sentences
from storage.files import write_whole

CRATE = "ro-crate-metadata.json"
_TYPES = {
    ".json": "application/json", ".jsonl": "application/jsonl", ".csv": "text/csv", ".html": "text/html",
    ".png": "image/png", ".yaml": "application/yaml", ".md": "text/markdown", ".onnx": "application/onnx",
}  # fmt: skip
_OF_RUN = (
    "plan.json", "metrics.json", "metrics.csv", "journal.jsonl", MODEL, DIFFUSION_MODEL, "config.yaml",
    "versions.json", "report.html", "figures/*.png", "audit/audit.json", "audit/audit.html",
)  # fmt: skip
_NO_LICENCE = (
    "None is given: this folder is the consortium's own. Weights get a licence when they are exported "
    "(meduet-server export --licence)."
)


def write_crate(release: Release, out: Path) -> None:
    """Write the record of everything in the export's folder `out`."""
    config = release.config()
    root = {
        "name": release.plan.name,
        "description": f"Weights of a MeDUET network, pretrained across hospitals. {INTENDED}",
        "license": release.licence,
        "identifier": config["tensors_sha256"],
    }
    files = [path for path in out.rglob("*") if path.is_file() and path.name != CRATE]
    _write(out, root, _run(release.plan, config["rounds"]), files)


def write_run_crate(folder: Path) -> None:
    """Write the record of the run in `folder`, which has its plan and metrics."""
    plan = RunPlan.from_json((folder / "plan.json").read_text(encoding="utf-8"))
    metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    root = {
        "name": f"Run of {plan.name}",
        "description": f"A federated pretraining of MeDUET by {len(plan.sites)} sites: the plan, the "
        "measurements of every round, the journal of the coordinating centre and the final weights.",
        "license": _NO_LICENCE,
        "identifier": plan.sha256,
    }
    files = [path for pattern in _OF_RUN for path in folder.glob(pattern)]
    _write(folder, root, _run(plan, len(metrics["rounds"])), files)


def _run(plan: RunPlan, rounds: int) -> dict[str, Any]:
    return {
        "@id": "#run",
        "@type": "CreateAction",
        "name": f"Federated pretraining of {plan.name}",
        "instrument": {"@id": "#fedmeduet"},
        "result": {"@id": "./"},
        "description": f"Plan {plan.sha256}; {len(plan.sites)} sites; {rounds} rounds. "
        + " ".join(sentences(plan)),
    }


def _write(out: Path, root: Mapping[str, Any], run: Mapping[str, Any], paths: Sequence[Path]) -> None:
    files = [_file(path, out) for path in sorted(paths)]
    software = {
        "@id": "#fedmeduet",
        "@type": "SoftwareApplication",
        "name": "FedMeDUET",
        "version": version("fedmeduet"),
        "url": "https://arxiv.org/abs/2602.17901",
    }
    dataset = {
        "@id": "./",
        "@type": "Dataset",
        **root,
        "datePublished": datetime.now(UTC).date().isoformat(),
        "hasPart": [{"@id": one["@id"]} for one in files],
        "mentions": {"@id": "#run"},
    }
    descriptor = {
        "@id": CRATE,
        "@type": "CreativeWork",
        "conformsTo": {"@id": "https://w3id.org/ro/crate/1.1"},
        "about": {"@id": "./"},
    }
    graph = [descriptor, dataset, run, software, *files]
    crate = {"@context": "https://w3id.org/ro/crate/1.1/context", "@graph": graph}
    write_whole(out / CRATE, json.dumps(crate, indent=1) + "\n")


def _file(path: Path, out: Path) -> dict[str, Any]:
    return {
        "@id": path.relative_to(out).as_posix(),
        "@type": "File",
        "name": path.name,
        "contentSize": str(path.stat().st_size),
        "encodingFormat": _TYPES.get(path.suffix, "application/octet-stream"),
        "identifier": f"sha256:{sha256_of_file(path)}",
    }
