"""Starts from public anatomy in files: what comes back, and what is refused."""

from pathlib import Path

import pytest
import torch

from meduet_models.anatomy_start import load_start, save_start, started_unet
from meduet_models.volume_unet import VolumeUNet
from meduet_models.weights import save_weights


def test_a_start_comes_back_as_it_was_to_half_precision_and_is_small(tmp_path: Path) -> None:
    network = VolumeUNet(seed=1)
    path = tmp_path / "start.safetensors"
    save_start(path, "canonical", network.state_dict(), {"settings": "{}"})
    stored = load_start(path)
    assert stored.kind == "canonical" and stored.provenance["settings"] == "{}"
    for name, tensor in network.state_dict().items():
        assert torch.equal(stored.network.state_dict()[name], tensor.half().float())
    assert path.stat().st_size < 2_000_000
    started = started_unet("canonical", path=path).state_dict()
    assert all(torch.equal(started[name], t) for name, t in stored.network.state_dict().items())


def test_a_start_of_another_kind_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "start.safetensors"
    save_start(path, "shapes", VolumeUNet().state_dict(), {})
    with pytest.raises(ValueError, match="anatomy_start=canonical; the file is of shapes"):
        started_unet("canonical", path=path)


def test_none_is_the_seed() -> None:
    started, own = started_unet("none", seed=9).state_dict(), VolumeUNet(seed=9).state_dict()
    assert all(torch.equal(started[name], own[name]) for name in own)


def test_weights_of_something_else_and_weights_that_are_no_numbers_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "start.safetensors"
    save_weights(path, {"weight": torch.zeros(2)}, {})
    with pytest.raises(ValueError, match="start from public anatomy"):
        load_start(path)
    save_weights(path, {"weight": torch.zeros(2)}, {"anatomy_start": "canonical"})
    with pytest.raises(ValueError, match="weights of a U-Net on the volume"):
        load_start(path)
    broken = VolumeUNet().state_dict()
    broken["stem.0.norm.bias"][0] = torch.nan
    save_start(path, "canonical", broken, {})
    with pytest.raises(ValueError, match="finite weights"):
        load_start(path)
    with pytest.raises(ValueError, match="Check the path"):
        load_start(tmp_path / "absent.safetensors")
