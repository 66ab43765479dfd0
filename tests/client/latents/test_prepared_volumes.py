"""Prepared volumes beside latents: what the tokenizer was shown, prepared once, gone with their patient."""

import shutil
import stat
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from client.latents.cache import LatentCache
from client.latents.labelled import labelled_scans
from client.latents.latent_set import LatentSet
from client.latents.prepared_volumes import volume_path
from client.scans.cohort import open_cohort, read_entry
from federation.exchanges.finetuning import LocalFinetuning
from meduet_models.tokenizer.tokenizer import Tokenizer
from scans.scans import UnusableScan
from scans.volume_plan import VolumePlan
from scans.volumes import prepare

PLAN = VolumePlan(modality="t1", shape=(8, 12, 8), spacing_mm=(2.0, 2.0, 2.0), views=2)
PATIENTS = ("Doe", "Nowak", "Rossi", "Silva")


class Means(nn.Module):
    """A codec of nothing but means."""

    def posterior_mean(self, volumes: Tensor) -> Tensor:
        return nn.functional.avg_pool3d(volumes, 4)

    def reconstruct(self, latents: Tensor) -> Tensor:
        return nn.functional.interpolate(latents, scale_factor=4.0)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = tmp_path / "scans"
    for number, name in enumerate(PATIENTS):
        random = np.random.default_rng(number)
        folder = root / name
        folder.mkdir(parents=True)
        for file, values in (
            ("t1.nii.gz", random.random((14, 20, 15)).astype(np.float32)),
            ("t1_seg.nii.gz", (random.random((14, 20, 15)) > 0.5).astype(np.uint8)),
        ):
            nibabel.save(nibabel.Nifti1Image(values, np.diag([1.3, 1.3, 1.3, 1])), folder / file)
    return root


def cache_of(root: Path) -> LatentCache:
    return LatentCache(root.parent / "cache", Tokenizer(Means(), {"kind": "means", "channels": 1}), PLAN)


def encoded(root: Path) -> LatentSet:
    return cache_of(root).encode(open_cohort(root, plan=PLAN, split_salt="salt"))


def test_a_volume_is_what_the_tokenizer_was_shown_for_every_view(root: Path) -> None:
    scans = encoded(root)
    for view in range(2):
        volumes = scans.volumes([2, 0], PLAN, view)
        for row, volume in zip((2, 0), volumes, strict=True):
            scan, label = read_entry(scans.entries[row], PLAN)
            assert torch.equal(volume, prepare(scan, PLAN, view, label).volume.half())
        torch.testing.assert_close(
            nn.functional.avg_pool3d(volumes.float(), 4), scans.latents([2, 0], view), rtol=0, atol=1e-3
        )


def test_a_volume_is_prepared_once_and_only_its_owner_may_read_it(root: Path) -> None:
    scans = encoded(root)
    first = scans.volumes([0, 1], PLAN)
    for row in (0, 1):
        kept = volume_path(scans.path(row))
        assert stat.S_IMODE(kept.stat().st_mode) == 0o600
        assert all(name.encode() not in kept.read_bytes() for name in PATIENTS)
    shutil.rmtree(root)  # what is kept needs no scan
    assert torch.equal(scans.volumes([0, 1], PLAN), first)
    with pytest.raises(UnusableScan):
        scans.volumes([2], PLAN)


@pytest.mark.parametrize("damage", [b"", b"nothing of a volume"])
def test_a_damaged_volume_is_prepared_again(root: Path, damage: bytes) -> None:
    scans = encoded(root)
    first = scans.volumes([0], PLAN)
    volume_path(scans.path(0)).write_bytes(damage)
    assert torch.equal(scans.volumes([0], PLAN), first)
    assert torch.equal(scans.volumes([0], PLAN), first)


def test_the_volume_of_a_patient_who_withdrew_goes_with_the_latents(root: Path) -> None:
    scans = encoded(root)
    scans.volumes(range(4), PLAN)
    assert cache_of(root).state(scans.cohort).unused == 0
    withdrawn = [path for row in range(4) if scans.patients[row] == "Nowak" for path in [scans.path(row)]]
    stays = [scans.path(row) for row in range(4) if scans.patients[row] != "Nowak"]
    shutil.rmtree(root / "Nowak")
    left = encoded(root)
    assert cache_of(root).prune(left) == 3  # two views, one volume
    assert not any(volume_path(path).exists() or path.exists() for path in withdrawn)
    assert all(volume_path(path).exists() and path.exists() for path in stays)


def test_labelled_scans_have_volumes_where_the_network_sees_them(root: Path) -> None:
    scans = encoded(root)
    tokens = LocalFinetuning(task="segmentation", classes=2)
    volume = LocalFinetuning(task="segmentation", classes=2, network="volume_unet")
    rows = range(4)
    assert labelled_scans(scans, rows, tokens).volumes is None
    found = labelled_scans(scans, rows, volume, volumes=PLAN)
    assert found.volumes is not None and torch.equal(found.volumes, scans.volumes(rows, PLAN))
    few = found.share(0.5, seed=0)
    assert few.volumes is not None and len(few.volumes) == 2
    assert torch.equal(few.volumes[0], found.volumes[found.patient.index(few.patient[0])])
