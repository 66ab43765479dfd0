"""The record of an export: `ro-crate-metadata.json`, which says of every file in the folder what it is.

RO-Crate 1.1 (https://w3id.org/ro/crate/1.1): what catalogues and workflow tools read. The facts are those of
the model card; files are named by their hash. Written last, over what lies there.
"""

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from meduet_models.weights import sha256_of_file
from server.export.facts import INTENDED, Release
from storage.files import write_whole

CRATE = "ro-crate-metadata.json"
_TYPES = {".json": "application/json", ".md": "text/markdown", ".onnx": "application/onnx"}


def write_crate(release: Release, out: Path) -> None:
    """Write the record of everything in the folder `out`."""
    files = [_file(path, out) for path in sorted(out.rglob("*")) if path.is_file() and path.name != CRATE]
    config = release.config()
    run: dict[str, Any] = {
        "@id": "#run",
        "@type": "CreateAction",
        "name": f"Federated pretraining of {release.plan.name}",
        "instrument": {"@id": "#fedmeduet"},
        "result": {"@id": "./"},
        "description": f"Plan {config['plan_sha256']}; {config['sites']} sites; {config['rounds']} rounds. "
        + " ".join(config["promise"]),
    }
    software = {
        "@id": "#fedmeduet",
        "@type": "SoftwareApplication",
        "name": "FedMeDUET",
        "version": config["fedmeduet_version"],
        "url": "https://arxiv.org/abs/2602.17901",
    }
    root: dict[str, Any] = {
        "@id": "./",
        "@type": "Dataset",
        "name": release.plan.name,
        "description": f"Weights of a MeDUET network, pretrained across hospitals. {INTENDED}",
        "datePublished": datetime.now(UTC).date().isoformat(),
        "license": release.licence,
        "identifier": config["tensors_sha256"],
        "hasPart": [{"@id": one["@id"]} for one in files],
        "mentions": {"@id": "#run"},
    }
    descriptor = {
        "@id": CRATE,
        "@type": "CreativeWork",
        "conformsTo": {"@id": "https://w3id.org/ro/crate/1.1"},
        "about": {"@id": "./"},
    }
    graph = [descriptor, root, run, software, *files]
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
