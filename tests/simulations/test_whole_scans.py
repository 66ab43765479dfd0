"""A whole simulation on whole scans: from settings to page; interrupted in the middle, to the same bits."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from meduet_models.weights import load_weights
from server.config import compose_config
from simulations import observer
from simulations.downstream import measuring
from simulations.downstream.run import run_downstream
from simulations.run import run
from tests.small_simulation import small_simulation

WHOLE = [
    *small_simulation(patients=7, paired=2),
    "volumes.spacing_mm=[4,5,5]",
    "volumes.extent=scan",
    "volumes.registered=false",
    "engine.workers=auto",
]


def settings(folder: Path, *more: str) -> Any:
    return compose_config([*WHOLE, *more, f"folder={folder}"])


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_weights(folder / "model.safetensors")[0]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "undisturbed"
    run(settings(folder))
    return folder


def test_whole_scans_are_trained_on_and_the_page_shows_them(undisturbed: Path) -> None:
    metrics = json.loads((undisturbed / "metrics.json").read_text())
    assert [entry["round"] for entry in metrics["rounds"]] == [1, 2]
    assert (undisturbed / "report.html").is_file()
    plan = json.loads((undisturbed / "plan.json").read_text())
    assert plan["volumes"]["extent"] == "scan" and plan["network"]["latent_grid"] == [8, 6, 6]
    cached = [load_weights(path) for path in undisturbed.glob("**/cache/??/*.safetensors")]
    shapes = {tuple(tensors["latents"].shape[1:]) for tensors, _ in cached}
    assert cached and all(min(a - b for a, b in zip(shape, (8, 6, 6), strict=True)) >= 0 for shape in shapes)
    assert any(shape != (8, 6, 6) for shape in shapes), "scans are larger than what the network sees at once"


@pytest.mark.slow
def test_interrupted_and_resumed_it_ends_in_the_same_bits(
    undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended = observer.Witness.on_round_end

    def interrupt(
        witness: Any, round_number: int, shared: Mapping[str, Any], metrics: Mapping[str, Any]
    ) -> Any:
        if round_number == 1:
            raise KeyboardInterrupt
        return ended(witness, round_number, shared, metrics)

    monkeypatch.setattr(observer.Witness, "on_round_end", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run(settings(tmp_path / "run"))
    monkeypatch.undo()
    run(settings(tmp_path / "run"))
    assert all(torch.equal(weights(undisturbed)[n], t) for n, t in weights(tmp_path / "run").items())


def test_downstream_learns_from_crops_and_is_measured_on_all_of_the_patient(
    undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured_on: list[tuple[tuple[int, ...], tuple[int, ...]]] = []
    back = measuring.laid_back

    def watched(logits: Any, geometry: Any) -> Any:
        labels, affine = back(logits, geometry)
        assert labels.shape == geometry.source_shape, "on the patient's own grid"
        measured_on.append((tuple(logits.shape[1:]), labels.shape))
        return labels, affine

    monkeypatch.setattr(measuring, "laid_back", watched)

    def downstream(*more: str, network: str = "tokens") -> list[dict[str, Any]]:
        settings = [
            f"pretrained={undisturbed}", f"folder={tmp_path}", "modes=[finetuned,unet]", "steps=2",
            "label_counts=[]", "label_shares=[1.0]", "bootstrap=5", "batch_size=2",
        ]  # fmt: skip
        config = compose_config([*settings, *more], "downstream")
        config.network = network  # Hydra takes the word on a command line for a group of settings
        run_downstream(config)
        rows: list[dict[str, Any]] = json.loads((tmp_path / "downstream.json").read_text())["rows"]
        return rows

    rows = downstream("federated=true", "rounds=1")
    assert {row["mode"] for row in rows} == {"finetuned", "unet", "federated"}
    assert {row["metric"] for row in rows} == {"dice", "surface_dice", "hd95"}
    shape = tuple(json.loads((undisturbed / "plan.json").read_text())["volumes"]["shape"])
    assert any(encoded != shape for encoded, _ in measured_on), "more than what the network sees at once"
    for mode, why in (("frozen", "fitted to each place"), ("unet_volume", "shown volumes")):
        with pytest.raises(ValueError, match=rf"Expected modes among .*extent=scan.*{mode} is {why}"):
            downstream(f"modes=[{mode}]")
    with pytest.raises(ValueError, match=r"Expected network=tokens with volumes.extent=scan"):
        downstream("federated=true", network="volume_unet")
    rows = downstream(
        "task=regression", "target=age", "target_values=[20,90]", "modes=[frozen,ridge,finetuned,unet]"
    )
    assert {row["mode"] for row in rows} == {"frozen", "ridge", "finetuned", "unet"}
