"""`meduet-site segment`: every voxel of the patient is asked once, and answers lie where she does."""

import dataclasses
import io
import json
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

from client.cli import main
from client.products.segmentation import Segmenter, laid_back, load_finetuned
from federation.exchanges.finetuning import FinetunePlan, LocalFinetuning
from meduet_models.downstream.networks import PretrainedNetwork
from meduet_models.downstream.starting import start_sha256, starting_network
from meduet_models.downstream.tasks import task_of
from meduet_models.downstream.whole_scans import predict_voxels
from meduet_models.meduet import FactorNetwork
from meduet_models.tokenizer.tokenizer import Tokenizer, TokenizerSpec, load_tokenizer
from meduet_models.weights import save_weights
from scans.volume_plan import VolumePlan
from scans.volumes import Geometry, read_scan
from tests.client.conftest import make_plan
from tests.worlds import small_network

WHOLE = VolumePlan(
    modality="any", window="fixed", fixed_window=(0.0, 1.0), spacing_mm=(2.0, 2.0, 2.0), shape=(16, 24, 16),
    extent="scan", registered=False,
)  # fmt: skip
CROP = dataclasses.replace(WHOLE, extent="crop")
GRID = (4, 6, 4)
OBLIQUE = np.array([[-2.0, 0.1, 0, 9], [0.1, 1.9, 0, -8], [0, 0, 2.1, 4], [0, 0, 0, 1]])


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return load_tokenizer(TokenizerSpec())


@pytest.fixture
def scan(tmp_path: Path) -> Path:
    """A body with a bright organ that reaches far outside the central crop."""
    values = np.zeros((60, 44, 40), np.float32)
    values[6:50, 6:38, 6:34] = 0.2 + 0.1 * np.random.default_rng(0).random((44, 32, 28))
    values[30:46, 20:34, 8:30] += 0.6
    nib.save(nib.Nifti1Image(values, OBLIQUE), tmp_path / "a.nii.gz")
    return tmp_path / "a.nii.gz"


def finetuned(folder: Path, tokenizer: Tokenizer, volumes: VolumePlan, **local: Any) -> Path:
    """A network that was never trained, as a fine-tuning leaves it."""
    network = small_network(latent_channels=tokenizer.latent_channels, style_map_grid=(2, 3, 2))
    plan = make_plan(volumes=volumes, tokenizer_sha256=tokenizer.sha256, network=network)
    settings = LocalFinetuning(
        **{"task": "segmentation", "classes": 3, "label_values": {7: 1, 9: 2}, **local}
    )
    task = task_of(settings.task)
    started = starting_network(
        task, settings.network, FactorNetwork(plan.network, seed=1), settings.classes, trainable=True, seed=2
    )
    made = FinetunePlan(
        run_sha256=plan.sha256,
        pretrained_sha256=start_sha256(started),
        local=settings,
        target="" if task.per_voxel else "sex",
        target_values=() if task.per_voxel else ("F", "M"),
    )
    said = {"plan": plan.to_json(), "finetuning": made.to_json()}
    save_weights(folder / "finetuned.safetensors", started.state_dict(), said)
    return folder / "finetuned.safetensors"


def run(*arguments: object) -> tuple[int, str]:
    text = io.StringIO()
    status = main(["segment", *map(str, arguments)], Console(file=text, width=300))
    return status, text.getvalue()


class Bright(PretrainedNetwork):
    """Class 1 where a mean of voxels is high, in the window that it is given; refuses other sizes."""

    def __init__(self, threshold: float) -> None:
        super().__init__()
        self.threshold = nn.Parameter(torch.tensor(threshold))

    def forward(self, latents: Tensor) -> Tensor:
        assert tuple(latents.shape[2:]) == GRID
        score = nn.functional.interpolate(latents[:, :1] - self.threshold, scale_factor=4.0)
        return torch.cat([-score, score], dim=1)


class Means(nn.Module):
    """Means of 4 x 4 x 4 voxels."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def posterior_mean(self, volumes: Tensor) -> Tensor:
        return nn.functional.avg_pool3d(volumes, 4) * self.weight


def test_the_command_labels_a_whole_scan_on_the_patients_own_grid(
    scan: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    model = finetuned(tmp_path, tokenizer, WHOLE)
    status, said = run(scan, "--model", model, "-o", tmp_path / "labels.nii.gz")
    assert status == 0 and "Predicted, not drawn: not for diagnosis. Patient data" in said
    made: Any = nib.load(tmp_path / "labels.nii.gz")
    original: Any = nib.load(scan)
    assert made.shape == original.shape and np.allclose(made.affine, original.affine)
    assert made.get_data_dtype() == np.uint8
    facts = json.loads((tmp_path / "labels.json").read_text())
    assert facts["patient_data"] is True and facts["label_values"] == {"7": 1, "9": 2}
    labels = np.asarray(made.dataobj)
    assert facts["voxels"] == {str(n): int((labels == n).sum()) for n in (1, 2)}
    assert b"predicted label map" in made.header["descrip"].item()
    again = Segmenter(load_finetuned(model), tokenizer)(read_scan(scan))
    assert np.array_equal(again.array, labels), "the same scan has the same labels"


def test_a_network_of_crops_labels_the_central_crop_and_nothing_else(
    scan: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    for network in ("tokens", "volume_unet", "joined"):
        model = finetuned(tmp_path, tokenizer, CROP, network=network)
        status, _ = run(scan, "--model", model, "-o", tmp_path / "labels.nii.gz")
        assert status == 0
        labels = np.asarray(nib.load(tmp_path / "labels.nii.gz").dataobj)  # type: ignore[attr-defined]
        outside = np.ones(labels.shape, bool)
        outside[20:40, 8:36, 10:30] = False
        assert labels.any() and not labels[outside].any()


def test_a_bright_organ_is_found_wherever_it_lies(scan: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    loaded = load_finetuned(finetuned(tmp_path, tokenizer, WHOLE))
    means = Tokenizer(Means(), {"kind": "means", "channels": 1})
    plan = dataclasses.replace(loaded.plan, tokenizer_sha256=means.sha256)
    model = dataclasses.replace(loaded, network=Bright(0.5), plan=plan)
    read = read_scan(scan)
    made = Segmenter(model, means)(read)
    bright = read.array > 0.6
    assert np.allclose(made.affine, read.affine)
    assert 2 * (made.array * bright).sum() / (made.array.sum() + bright.sum()) > 0.8, "cells are 8 mm"


def test_windows_of_a_network_that_sees_one_cell_are_the_whole_at_once() -> None:
    network, latents = Bright(0.6), torch.rand(1, 9, 7, 6, generator=torch.Generator().manual_seed(0))
    score = (
        latents[:1].repeat_interleave(4, 1).repeat_interleave(4, 2).repeat_interleave(4, 3)
        - network.threshold
    )
    expected = torch.cat([-score, score]).detach()
    torch.testing.assert_close(predict_voxels(network, latents, GRID), expected, rtol=0, atol=1e-4)


def test_what_cannot_be_meant_is_one_line(scan: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    model = finetuned(tmp_path, tokenizer, WHOLE)
    out = tmp_path / "labels.nii.gz"
    cases = [
        ((scan, "--model", model, "-o", scan), "Expected -o to be no scan"),
        ((tmp_path / "b.nii.gz", "--model", model, "-o", out), "Expected a scan at"),
        ((scan, "--model", scan, "-o", out), "Expected"),
    ]
    save_weights(tmp_path / "other.safetensors", {"a": torch.zeros(1)}, {"kind": "other"})
    cases.append(((scan, "--model", tmp_path / "other.safetensors", "-o", out), "no such plan"))
    (tmp_path / "sex").mkdir()
    sex = finetuned(tmp_path / "sex", tokenizer, WHOLE, task="classification", classes=2, label_values={})
    cases.append(((scan, "--model", sex, "-o", out), "it was trained for classification"))
    for arguments, expected in cases:
        status, said = run(*arguments)
        assert status == 2 and expected in said and len(said.strip().splitlines()) == 1
    (tmp_path / "wreck.nii.gz").write_bytes(b"no scan")
    status, said = run(tmp_path / "wreck.nii.gz", scan, "--model", model, "-o", tmp_path / "out")
    assert status == 1 and "Not usable" in said
    assert [path.name for path in sorted((tmp_path / "out").iterdir())] == [
        "a_segmented.json", "a_segmented.nii.gz"
    ]  # fmt: skip


def test_large_numbers_of_classes_survive_the_way_back() -> None:
    logits = torch.zeros(300, 4, 4, 4)
    logits[299] = 1.0
    geometry = Geometry(np.eye(4), (4, 4, 4), np.eye(4), (4, 4, 4))
    labels, _ = laid_back(logits, geometry)
    assert (labels == 299).all()
