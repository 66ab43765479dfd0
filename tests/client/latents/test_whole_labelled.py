"""Labels of whole scans: cropped with their latents, met however small, compared where the patient is."""

from dataclasses import replace

import nibabel as nib
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from client.latents.cache import LatentCache
from client.latents.labelled import LabelledScans, labelled_scans
from client.latents.latent_set import LatentSet
from client.scans.cohort import open_cohort
from client.training.finetuning import check_answers, finetune, predicted, validation_score
from federation.exchanges.finetuning import LocalFinetuning
from meduet_models.downstream.networks import PretrainedNetwork
from meduet_models.downstream.tasks import task_of
from meduet_models.downstream.unet import SmallUNet
from meduet_models.tokenizer.tokenizer import Tokenizer
from scans.volume_plan import VolumePlan

VOLUMES = VolumePlan(
    modality="any", window="fixed", fixed_window=(0.0, 1.0), spacing_mm=(2.0, 2.0, 2.0), shape=(16, 16, 16),
    extent="scan", registered=False,
)  # fmt: skip
GRID = (4, 4, 4)
LOCAL = LocalFinetuning(
    task="segmentation", classes=3, label_values={7: 1, 9: 2}, steps=80, batch_size=4, learning_rate=0.05
)
OBLIQUE = np.array([[-2.0, 0.1, 0, 9], [0.1, 1.9, 0, -8], [0, 0, 2.1, 4], [0, 0, 0, 1]])


class Means(nn.Module):
    """Means of 4 x 4 x 4 voxels."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def posterior_mean(self, volumes: Tensor) -> Tensor:
        return nn.functional.avg_pool3d(volumes, 4) * self.weight


class Cells(PretrainedNetwork):
    """A class of each cell from its own latent alone, for the cell's voxels."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Conv3d(1, 32, 1), nn.Tanh(), nn.Conv3d(32, 3, 1))

    def forward(self, latents: Tensor) -> Tensor:
        assert tuple(latents.shape[2:]) == GRID
        return nn.functional.interpolate(self.layers(8 * latents - 4), scale_factor=4.0)


def body(number: int) -> tuple[np.ndarray, np.ndarray]:
    """A body in air with an organ (7), a small bright structure (9) far from its middle, and a label that
    means nothing (3)."""
    random = np.random.default_rng(number)
    values, label = np.zeros((76, 44, 40), np.float32), np.zeros((76, 44, 40), np.int16)
    values[4:72, 6:38, 6:34] = 0.3 + 0.05 * random.random((68, 32, 28))
    at = 40 + number
    values[at : at + 16, 12:30, 10:28] += 0.3
    label[at : at + 16, 12:30, 10:28] = 7
    values[6:16, 10:20, 8:18] = 0.95
    label[6:16, 10:20, 8:18] = 9
    label[30:34, 20:24, 20:24] = 3
    return values, label


@pytest.fixture(scope="module")
def scans(tmp_path_factory: pytest.TempPathFactory) -> LatentSet:
    """Six patients; one label is stored in another order of its axes, one lacks a place of its own."""
    root = tmp_path_factory.mktemp("scans")
    for number in range(6):
        values, label = body(number)
        folder = root / f"p{number}"
        folder.mkdir()
        nib.save(nib.Nifti1Image(values, OBLIQUE), folder / "t1.nii.gz")
        image = nib.Nifti1Image(label, OBLIQUE)
        if number == 1:
            image = image.as_reoriented(np.array([[2, 1], [0, -1], [1, 1]]))
        if number == 2:
            image = nib.Nifti1Image(label, None)
            image.header.set_zooms(np.linalg.norm(OBLIQUE[:3, :3], axis=0))
            image.set_sform(None, 0)
            image.set_qform(None, 0)
        nib.save(image, folder / "t1_seg.nii.gz")
    cohort = open_cohort(root, plan=VOLUMES, split_salt="s", split_fractions=(1.0, 0.0, 0.0))
    assert sum(scan.placed_label for scan in cohort.scans) == 1
    tokenizer = Tokenizer(Means(), {"kind": "means", "channels": 1})
    return LatentCache(tmp_path_factory.mktemp("cache"), tokenizer, VOLUMES).encode(cohort)


@pytest.fixture
def found(scans: LatentSet) -> LabelledScans:
    return labelled_scans(scans, scans.indices("train"), LOCAL)


def test_a_step_sees_crops_with_their_own_labels_and_enough_foreground(found: LabelledScans) -> None:
    draws = [torch.Generator().manual_seed(seed) for seed in range(60)]
    classes: list[Tensor] = []
    places = set()
    for generator in draws:
        latents, answers = found.drawn([0, 3], 0.5, generator)
        assert latents.shape == (2, 1, *GRID) and answers.shape == (2, 1, 16, 16, 16)
        for crop, answer in zip(latents, answers, strict=True):
            assert (crop[0] > 0.1).float().mean() >= 0.5, "of the stated share"
            organ = nn.functional.avg_pool3d((answer == 1).float(), 4)[0]
            assert (crop[0][organ == 1] > 0.55).all() and (crop[0][organ == 1] < 0.7).all()
            places.add(tuple(crop.flatten().tolist()))
        classes.append(answers)
    of_all = torch.cat(classes)
    assert set(of_all.unique().tolist()) == {0, 1, 2}, "values are classes; those not declared background"
    assert len(places) > 60, "crops come from all over the scans"
    small = float((of_all == 2).flatten(1).any(1).float().mean())
    assert small > 1 / 6 - 0.08, "a sixth of the crops lie around the small one, wherever others lie"
    again = found.drawn([0, 3], 0.5, torch.Generator().manual_seed(7))
    assert all(map(torch.equal, again, found.drawn([0, 3], 0.5, torch.Generator().manual_seed(7))))


def test_labels_lie_where_their_files_have_them_whatever_the_order_of_axes(found: LabelledScans) -> None:
    assert found.whole is not None
    for number, one in enumerate(found.whole):
        _, label = body(int(found.patient[number].removeprefix("p")))
        expected = torch.from_numpy(np.where(label == 7, 1, np.where(label == 9, 2, 0)))
        assert torch.equal(one.classes_as_stored()[0], expected)


def test_a_class_out_of_range_is_found_outside_the_central_crop(scans: LatentSet) -> None:
    local = LocalFinetuning(task="segmentation", classes=9)
    found = labelled_scans(scans, [0], local)
    assert found.answers.max() < 9, "the structure is not in the central crop"
    with pytest.raises(ValueError, match="found 0, 3, 7, 9"):
        check_answers(task_of("segmentation"), found, 9)


def test_a_network_of_crops_learns_to_segment_all_of_a_scan(found: LabelledScans) -> None:
    held, scores = found.rows([4, 5]), []
    for train in (found.rows([0, 1, 2, 3]), replace(found.rows([0, 1, 2, 3]), whole=None)):
        network = Cells()
        finetune(network, train, LOCAL, seed=1)
        scores.append(validation_score(network, held, LOCAL))
        kept = Cells()
        done = finetune(kept, train, replace(LOCAL, steps=1), seed=1, validation=held)
        assert done.validation == validation_score(kept, held, LOCAL)
    assert scores[0] > 0.6, "cells of 8 mm, voxels of 2"
    assert scores[1] < scores[0] - 0.2, "central crops alone never show the small structure"


def test_a_number_of_a_scan_is_learned_from_crops_and_told_of_all_of_it(scans: LatentSet) -> None:
    for row in range(len(scans)):
        scans.covariates[row]["size"] = float(row)  # type: ignore[index]
    local = LocalFinetuning(task="regression", classes=1, steps=2, batch_size=3)
    found = labelled_scans(scans, range(6), local, "size", ("0", "5"))
    network = SmallUNet(1, 1, per_voxel=False, seed=0)
    finetune(network, found, local, seed=1)
    windows, weights = found.whole[2].windows()  # type: ignore[index]
    assert len(windows) > 8 and float(weights.sum()) == pytest.approx(1)
    with torch.inference_mode():
        expected = (weights[:, None] * network(windows)).sum()
    assert predicted(network, found)[2].item() == pytest.approx(expected.item(), abs=1e-5)


def test_windows_without_foreground_tell_nothing(found: LabelledScans) -> None:
    assert found.whole is not None
    windows, weights = found.whole[0].windows()
    empty = windows.mean((1, 2, 3, 4)) == 0
    assert (weights[empty] == 0).all()
