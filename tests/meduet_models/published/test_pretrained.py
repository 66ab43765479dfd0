"""The file that a run leaves, as a network ready to use."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from meduet_models.meduet import MeDUET
from meduet_models.published.pretrained import load_pretrained
from meduet_models.sharing import shared_keys
from meduet_models.weights import save_weights
from tests.worlds import small_network

CONFIG = small_network()
PROVENANCE = {"network": json.dumps(dataclasses.asdict(CONFIG)), "tokenizer_sha256": "0" * 64}


def saved(path: Path, model: MeDUET, method: str = "content_share", less: int = 0) -> Path:
    names = shared_keys(model, "local" if method == "content_share" else "shared", method)  # type: ignore[arg-type]
    weights = model.state_dict()
    save_weights(path, {name: weights[name] for name in names[less:]}, PROVENANCE)
    return path


def test_content_is_that_of_the_network_that_was_trained(tmp_path: Path) -> None:
    model = MeDUET(CONFIG, 3, seed=7).eval()
    model.set_erasure(torch.zeros(12), torch.eye(12) - torch.full((12, 12), 1 / 12))
    latents = torch.randn(3, 2, 4, 6, 4, generator=torch.Generator().manual_seed(0))
    pretrained = load_pretrained(saved(tmp_path / "model.safetensors", model))
    assert not pretrained.has_style
    assert torch.equal(pretrained.network.pooled_content(latents), model.pooled_content(latents))


def test_a_shared_style_branch_comes_along(tmp_path: Path) -> None:
    model = MeDUET(CONFIG, 3, seed=7).eval()
    latents = torch.randn(3, 2, 4, 6, 4, generator=torch.Generator().manual_seed(0))
    pretrained = load_pretrained(saved(tmp_path / "model.safetensors", model, "fedavg"))
    assert pretrained.has_style
    assert torch.equal(pretrained.network.pooled_style(latents), model.pooled_style(latents))


def test_a_file_without_a_part_of_the_content_branch_is_refused(tmp_path: Path) -> None:
    path = saved(tmp_path / "model.safetensors", MeDUET(CONFIG, 3), less=1)
    with pytest.raises(ValueError, match="is missing"):
        load_pretrained(path)


def test_weights_of_something_else_are_refused(tmp_path: Path) -> None:
    save_weights(tmp_path / "other.safetensors", {"x": torch.zeros(1)}, {"what": "else"})
    with pytest.raises(ValueError, match="its header says none"):
        load_pretrained(tmp_path / "other.safetensors")
