"""A run as a MONAI bundle: metadata that `monai.bundle verify_metadata` accepts, inference that it runs.

The inference configuration embeds every NIfTI file below `dataset_dir` and writes an array for each; scans
are prepared by `meduet_models`, exactly as at the sites, not by transforms that come close. Weights are
`models/model.safetensors`, not the `model.pt` of the specification: that is a pickle, and we write none.
Source: https://docs.monai.io/en/stable/mb_specification.html. We write bundles and read none: a bundle's
configuration instantiates whatever it names.
"""

import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

from server.export.card import model_card
from server.export.facts import INTENDED, Release
from server.export.folder import write_weights
from storage.files import private_folder, write_whole

SCHEMA = (
    "https://github.com/Project-MONAI/MONAI-extra-test-data/releases/download/0.8.1/meta_schema_20240725.json"
)
_USE = """\
```bash
pip install fedmeduet fire
python -m monai.bundle run --config_file configs/inference.json --bundle_root . --dataset_dir SCANS
```
"""


def write_bundle(release: Release, out: Path) -> None:
    """Write the bundle into the folder `out`, which must be there."""
    for folder in ("configs", "models", "docs"):
        private_folder(out / folder)
    write_weights(release, out / "models")
    for name, content in (("metadata", _metadata(release)), ("inference", _inference())):
        write_whole(out / "configs" / f"{name}.json", json.dumps(content, indent=2, sort_keys=True) + "\n")
    write_whole(out / "docs" / "README.md", model_card(release, _USE))
    write_whole(out / "LICENSE", f"Licence of these weights: {release.licence}\n")


def _metadata(release: Release) -> dict[str, Any]:
    config, volumes = release.config(), release.volumes
    image = {
        "type": "image",
        "format": "hounsfield" if volumes.window == "ct_hu" else "magnitude",
        "modality": volumes.modality,
        "num_channels": 1,
        "spatial_shape": list(volumes.shape),
        "dtype": "float32",
        "value_range": [0, 1],
        "is_patch_data": volumes.extent == "scan",
        "channel_def": {"0": "image"},
    }
    code = {
        "type": "embedding",
        "format": "content code",
        "num_channels": config["code_size"],
        "spatial_shape": [],
        "dtype": "float32",
        "value_range": [],
        "is_patch_data": False,
        "channel_def": {},
    }
    return {
        "schema": SCHEMA,
        "version": "0.1.0",
        "changelog": {"0.1.0": f"round {config['rounds']} of plan {config['plan_sha256']}"},
        "monai_version": version("monai"),
        "pytorch_version": version("torch").partition("+")[0],
        "numpy_version": version("numpy"),
        "required_packages_version": {"fedmeduet": version("fedmeduet"), "nibabel": version("nibabel")},
        "name": release.plan.name,
        "task": "A code of what is where in a 3D scan",
        "description": "MeDUET content encoder, pretrained across hospitals without moving a scan",
        "authors": "the consortium of the plan",
        "copyright": release.licence,
        "data_type": "nibabel",
        "intended_use": INTENDED,
        "references": ["arXiv:2602.17901"],
        "network_data_format": {"inputs": {"image": image}, "outputs": {"code": code}},
        "provenance": config,
    }


def _inference() -> dict[str, Any]:
    return {
        "imports": ["$import meduet_models", "$import numpy", "$from pathlib import Path"],
        "bundle_root": ".",
        "dataset_dir": "$@bundle_root + '/scans'",
        "output_dir": "$@bundle_root + '/codes'",
        "device": "cpu",
        "scans": "$sorted(p for e in ('*.nii', '*.nii.gz') for p in Path(@dataset_dir).rglob(e))",
        "network_def": "$meduet_models.load(@bundle_root + '/models', device=@device)",
        "run": [
            "$Path(@output_dir).mkdir(parents=True, exist_ok=True)",
            "$[numpy.save(Path(@output_dir) / (p.name.split('.')[0] + '.npy'), @network_def.embed(p)) "
            "for p in @scans]",
        ],
    }
