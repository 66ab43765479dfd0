"""Downstream on whole scans: every voxel of the patient is asked once, and answers lie where she does."""

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from client.latents.cache import LatentCache
from client.latents.latent_set import LatentSet
from client.scans.cohort import open_cohort, read_entry
from client.whole_segmentation import segment_whole
from meduet_models.downstream.whole_scans import predict_voxels
from meduet_models.tokenizer.tokenizer import Tokenizer
from scans.volume_plan import VolumePlan

VOLUMES = VolumePlan(
    modality="any", window="fixed", fixed_window=(0.0, 1.0), spacing_mm=(2.0, 2.0, 2.0), shape=(16, 16, 16),
    extent="scan", registered=False,
)  # fmt: skip
GRID = (4, 4, 4)
OBLIQUE = np.array([[-2.0, 0.1, 0, 9], [0.1, 1.9, 0, -8], [0, 0, 2.1, 4], [0, 0, 0, 1]])


class Means(nn.Module):
    """Means of 4 x 4 x 4 voxels."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def posterior_mean(self, volumes: Tensor) -> Tensor:
        return nn.functional.avg_pool3d(volumes, 4) * self.weight


class Bright(nn.Module):
    """Class 1 where the first latent is high, in the window that it is given; refuses other sizes."""

    def __init__(self, threshold: float) -> None:
        super().__init__()
        self.threshold = nn.Parameter(torch.tensor(threshold))

    def forward(self, latents: Tensor) -> Tensor:
        assert tuple(latents.shape[2:]) == GRID
        score = nn.functional.interpolate(latents[:, :1] - self.threshold, scale_factor=4.0)
        return torch.cat([-score, score], dim=1)


@pytest.fixture
def scans(tmp_path: Path) -> LatentSet:
    values = np.zeros((60, 44, 40), np.float32)
    values[6:50, 6:38, 6:34] = 0.2 + 0.1 * np.random.default_rng(0).random((44, 32, 28))
    values[30:46, 20:34, 8:30] += 0.6
    (tmp_path / "scans" / "p1").mkdir(parents=True)
    nib.save(nib.Nifti1Image(values, OBLIQUE), tmp_path / "scans" / "p1" / "t1.nii.gz")
    cohort = open_cohort(tmp_path / "scans", plan=VOLUMES, split_salt="s")
    return LatentCache(
        tmp_path / "cache", Tokenizer(Means(), {"kind": "means", "channels": 1}), VOLUMES
    ).encode(cohort)


def test_a_whole_scan_is_segmented_on_the_patients_own_grid(scans: LatentSet) -> None:
    made, affine = segment_whole(Bright(0.5), scans, 0)
    scan, _ = read_entry(scans.entries[0], VOLUMES)
    assert made.shape == scan.array.shape and np.allclose(affine, scan.affine)
    bright = scan.array > 0.6
    assert 2 * (made * bright).sum() / (made.sum() + bright.sum()) > 0.8, "cells are 8 mm"


def test_windows_of_a_network_that_sees_one_cell_are_the_whole_at_once(scans: LatentSet) -> None:
    network, latents = Bright(0.6), torch.tensor(scans.whole(0))
    score = (
        latents[:1].repeat_interleave(4, 1).repeat_interleave(4, 2).repeat_interleave(4, 3)
        - network.threshold
    )
    expected = torch.cat([-score, score]).detach()
    torch.testing.assert_close(predict_voxels(network, latents, GRID), expected, rtol=0, atol=1e-4)
