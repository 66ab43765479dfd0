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
