"""`meduet-simulate network.encoder=volume_unet`, whole: on whole scans, from a start that the plan names."""

import json
from pathlib import Path

import pytest
import torch

import meduet_models
from federation.exchanges.pretraining import LEVELS, start_sha256
from meduet_models.anatomy_start import save_start
from meduet_models.published.scan_model import ScanModel
from meduet_models.volume_unet import VolumeUNet
from meduet_models.weights import load_weights
from server.config import compose_config
from simulations.run import run
from tests.small_simulation import small_simulation


@pytest.mark.slow
def test_a_simulation_trains_a_u_net_and_its_weights_read_a_scan(tmp_path: Path) -> None:
    start, folder = tmp_path / "canonical.safetensors", tmp_path / "run"
    network = VolumeUNet(seed=2)
    save_start(start, "canonical", network.state_dict(), {})
    settings = ["network.encoder=volume_unet", "anatomy_start=canonical", f"anatomy={start}"]
    settings += ["volumes.extent=scan", "volumes.registered=false", "volumes.spacing_mm=[4,5,5]"]
    page = run(compose_config([*small_simulation(patients=7, paired=2), *settings, f"folder={folder}"]))
    assert page.is_file()
    weights, provenance = load_weights(folder / "model.safetensors")
    plan = json.loads(provenance["plan"])
    begun = {f"{LEVELS}{n}": t.half().float() for n, t in network.state_dict().items()}
    levels = {name: begun[name] for name in weights if name.startswith(LEVELS)}
    assert plan["anatomy_start"] == "canonical" and plan["anatomy_sha256"] == start_sha256(levels, "float32")
    assert all(not torch.equal(weights[name], tensor) for name, tensor in levels.items())
    metrics = json.loads((folder / "metrics.json").read_text())
    assert not any(entry["refused"] for entry in metrics["rounds"])
    model = meduet_models.load(folder)
    assert isinstance(model, ScanModel)
    scan = next((folder / "hospitals").rglob("*.nii.gz"))
    assert model.embed(scan).shape == (plan["network"]["code_size"],)
