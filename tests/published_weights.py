"""The folder of a run as somebody takes it home: small weights with a content code, tokenizer beside them."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch

from meduet_models.content_code import public_code
from meduet_models.meduet import MeDUET, layer_normed
from meduet_models.sharing import shared_keys
from meduet_models.tokenizer.tokenizer import save_tokenizer
from meduet_models.weights import save_weights
from scans.volume_plan import VolumePlan
from tests.generative_models import small_tokenizer
from tests.worlds import small_network

VOLUMES = VolumePlan(modality="mr", shape=(16, 24, 16), spacing_mm=(2.0, 2.0, 2.0))
WHOLE = dataclasses.replace(VOLUMES, extent="scan", registered=False)


def network() -> MeDUET:
    made = MeDUET(small_network(width=24, code_size=8, style_map_grid=(2, 3, 2)), 3, seed=3).eval()
    latents = torch.randn(40, 2, 4, 6, 4, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        config, tokens = made.config, layer_normed(made.encode(latents).content)
        made.set_content_code(public_code(tokens, config.code_places, config.code_channels, config.code_size))
    return made


def published(folder: Path, volumes: VolumePlan = VOLUMES, with_style: bool = False) -> Path:
    """A folder with model.safetensors and tokenizer.safetensors."""
    folder.mkdir(parents=True, exist_ok=True)
    made, tokenizer = network(), small_tokenizer()
    weights = made.state_dict()
    names = (
        shared_keys(made, "shared", "fedavg") if with_style else shared_keys(made, "local", "content_share")
    )
    provenance = {
        "model": "MeDUET",
        "network": json.dumps(dataclasses.asdict(made.config)),
        "tokenizer_sha256": tokenizer.sha256,
        "volumes": json.dumps(dataclasses.asdict(volumes)),
    }
    save_weights(folder / "model.safetensors", {name: weights[name] for name in names}, provenance)
    save_tokenizer(folder / "tokenizer.safetensors", tokenizer, {})
    return folder


def a_scan(seed: int = 0, sides: tuple[int, int, int] = (30, 40, 28)) -> tuple[np.ndarray, np.ndarray]:
    """Smooth anatomy in a box of air, 1.5 x 1.2 x 2 mm, and its affine."""
    draws = np.random.default_rng(seed)
    grid = np.stack(np.meshgrid(*(np.linspace(-1, 1, n) for n in sides), indexing="ij"))
    inside = (grid**2).sum(0) < 0.8
    waves = sum(
        np.sin(draws.uniform(2, 6) * (grid * draws.normal(size=(3, 1, 1, 1))).sum(0)) for _ in range(4)
    )
    affine = np.diag([1.5, 1.2, 2.0, 1.0])
    affine[:3, 3] = (-20.0, 5.0, 11.0)
    return np.where(inside, np.round(500 + 100 * waves), 0.0), affine


def written(path: Path, array: np.ndarray, affine: np.ndarray, **changes: Any) -> Path:
    nib.save(nib.Nifti1Image(array.astype(changes.get("dtype", np.int16)), affine), path)
    return path
