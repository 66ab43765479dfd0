"""Whole scans in the cache: encoded at their own size, read by crops, drawn where the patient is."""

import dataclasses
import os
from collections import Counter
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

from client.checks.machine import disk_check
from client.latents.batches import Batches, step_generator
from client.latents.cache import LatentCache
from client.latents.cache_files import SealedFiles
from client.latents.latent_set import LatentSet
from client.latents.style_moments import own_moments
from client.latents.whole_scan import central_start, draw_start
from client.scans.cohort import open_cohort, read_entry
from federation.exchanges.survey import survey_layout
from federation.plan.plan import RunPlan, StylePlan
from meduet_models.style.moments import StyleMoments
from meduet_models.tokenizer.tokenizer import Tokenizer, TokenizerSpec, load_tokenizer
from scans.scans import Reason
from scans.volume_plan import VolumePlan
from scans.whole_volumes import prepare_whole, volume_at
from storage.sealed_files import SealingKeys
from tests.client.conftest import make_plan

VOLUMES = VolumePlan(
    modality="any", window="fixed", fixed_window=(0.0, 1.0), spacing_mm=(2.0, 2.0, 2.0), shape=(16, 24, 16),
    extent="scan", registered=False, views=2,
)  # fmt: skip
CROP = (4, 6, 4)
SECRET = b"1" * 32


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return load_tokenizer(TokenizerSpec())


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six patients of different sizes; one has a label, another is air."""
    root = tmp_path_factory.mktemp("scans")
    for number in range(7):
        random = np.random.default_rng(number)
        shape = (30 + 4 * number, 34, 28 + number)
        values = np.zeros(shape, np.float32)
        values[4:-5, 6:-4, 3:-6] = 0.3 + 0.7 * random.random(values[4:-5, 6:-4, 3:-6].shape)
        if number == 6:
            values = 0.05 * random.random(shape).astype(np.float32)
        folder = root / f"patient{number}"
        folder.mkdir()
        nib.save(nib.Nifti1Image(values, np.diag([2.0, 2.0, 2.0, 1.0])), folder / "ct.nii.gz")
        if number == 0:
            label = (values > 0.6).astype(np.uint8)
            nib.save(nib.Nifti1Image(label, np.diag([2.0, 2.0, 2.0, 1.0])), folder / "ct_seg.nii.gz")
    return root


@pytest.fixture(scope="module")
def scans(root: Path, tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> LatentSet:
    cohort = open_cohort(root, plan=VOLUMES, split_salt="s", split_fractions=(1.0, 0.0, 0.0))
    return LatentCache(tmp_path_factory.mktemp("cache"), tokenizer, VOLUMES).encode(cohort)


def plan(**changes: object) -> RunPlan:
    made = make_plan(volumes=VOLUMES, style=StylePlan(minimum_cohort=3))
    network = dataclasses.replace(
        made.network, latent_channels=load_tokenizer(TokenizerSpec()).latent_channels
    )
    return dataclasses.replace(made, network=network, **changes)  # type: ignore[arg-type]


def test_each_scan_is_cached_at_its_own_size_and_equals_the_whole_at_once(
    scans: LatentSet, tokenizer: Tokenizer
) -> None:
    assert len({scans.whole(row).shape for row in range(len(scans))}) > 1
    for row in range(len(scans)):
        scan, _ = read_entry(scans.entries[row], VOLUMES)
        for view in range(2):
            made = prepare_whole(scan, VOLUMES, tokenizer.stride, view)
            expected = tokenizer.encode(made.volume[None])[0]
            torch.testing.assert_close(torch.tensor(scans.whole(row, view)), expected, rtol=0, atol=1e-6)
            assert np.array_equal(scans.foreground(row, view), made.foreground.numpy())
            assert scans.whole_geometry(row, view).to_dict() == made.geometry.to_dict()


def test_a_crop_from_the_cache_is_that_region_of_the_whole(scans: LatentSet) -> None:
    for row in range(len(scans)):
        whole = torch.tensor(scans.whole(row))
        sides = whole.shape[1:]
        starts = torch.tensor([[0, 0, 0], [n - c for n, c in zip(sides, CROP, strict=True)], [1, 0, 1]])
        for start, crop in zip(starts.tolist(), scans.crops([row] * 3, [0] * 3, starts), strict=True):
            region = whole[:, *(slice(a, a + n) for a, n in zip(start, CROP, strict=True))]
            assert torch.equal(crop, region)
    with pytest.raises(IndexError, match="within"):
        scans.crops([0], [0], torch.tensor([[sides[0], 0, 0]]))
    with pytest.raises(IndexError, match="within"):
        scans.crops([0], [0], torch.tensor([[-1, 0, 0]]))


def test_a_crop_reads_its_own_pages_of_the_file(scans: LatentSet, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[int] = []
    read = os.read
    monkeypatch.setattr(os, "read", lambda *given: opened.append(1) or read(*given))
    scans.crops([0], [0], torch.zeros(1, 3, dtype=torch.long))
    assert not opened and isinstance(scans.whole(0).base, np.ndarray) and not scans.whole(0).flags.writeable


def test_sealed_whole_scans_are_read_to_the_bit_by_crops_labels_and_foreground(
    scans: LatentSet, root: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    files = SealedFiles(SealingKeys(bytes(32)))
    sealed = LatentCache(tmp_path, tokenizer, VOLUMES, files).encode(scans.cohort)
    rows, start = range(len(scans)), torch.tensor([1, 0, 2])
    for row in rows:
        assert np.array_equal(sealed.whole(row), scans.whole(row))
        assert np.array_equal(sealed.foreground(row, 1), scans.foreground(row, 1))
        one, other = (given.crops([row], [1], start[None]) for given in (sealed, scans))
        assert torch.equal(one, other)
    assert torch.equal(sealed.latents(rows), scans.latents(rows))
    assert torch.equal(sealed.central_foreground(rows), scans.central_foreground(rows))
    labelled = scans.has_label.index(True)
    assert torch.equal(sealed.label_crop(labelled, start), scans.label_crop(labelled, start))
    one, other = sealed.labels([labelled]), scans.labels([labelled])
    assert one is not None and other is not None and torch.equal(one, other)


def test_who_asks_for_a_scan_gets_the_crop_around_its_foreground_with_its_label_and_place(
    scans: LatentSet,
) -> None:
    latents = scans.latents(range(len(scans)))
    assert latents.shape == (len(scans), 4, *CROP)
    row = scans.has_label.index(True)
    geometry, labels, whole = scans.geometry(row), scans.labels([row]), scans.whole_label(row)
    assert geometry.prepared_shape == VOLUMES.shape and labels is not None and whole is not None
    assert labels.shape[2:] == VOLUMES.shape and whole.shape[1:] == scans.whole_geometry(row).prepared_shape
    scan, _ = read_entry(scans.entries[row], VOLUMES)
    volume = volume_at(scan, VOLUMES, geometry)
    assert torch.equal(labels[0] > 0, volume > 0.6), "image, label and geometry show one place"
    start = central_start(torch.tensor(scans.foreground(row)), CROP)
    assert torch.equal(latents[row], scans.crops([row], [0], torch.tensor([start]))[0])


def test_a_scan_of_air_is_excluded_with_its_reason(scans: LatentSet) -> None:
    reasons = Counter(exclusion.reason for exclusion in scans.cohort.exclusions)
    assert reasons == {Reason.NO_FOREGROUND: 1} and len(scans) == 6


def test_the_same_cache_serves_crops_and_whole_scans_apart(
    root: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    crop = dataclasses.replace(VOLUMES, extent="crop", views=1)
    whole = dataclasses.replace(VOLUMES, views=1)
    for volumes in (crop, whole, crop, dataclasses.replace(whole, crop_foreground=0.9)):
        cohort = open_cohort(root, plan=volumes, split_salt="s")
        LatentCache(tmp_path, tokenizer, volumes).encode(cohort)
    assert len(list(tmp_path.glob("??/*"))) == 7 + 6


def test_drawn_crops_are_where_the_foreground_is_and_everywhere_there() -> None:
    foreground = np.zeros((12, 9, 10), dtype=bool)
    foreground[5:11, 2:8, 3:9] = True
    crop = (4, 4, 4)
    drawn: Counter[tuple[int, ...]] = Counter()
    for seed in range(3000):
        start = draw_start(foreground, crop, 0.5, torch.Generator().manual_seed(seed)).tolist()
        inside = foreground[tuple(slice(a, a + 4) for a in start)]
        assert inside.shape == crop and inside.mean() >= 0.5
        drawn[tuple(start)] += 1
    places = [
        (a, b, c) for a in range(9) for b in range(6) for c in range(7)
        if foreground[a : a + 4, b : b + 4, c : c + 4].mean() >= 0.5
    ]  # fmt: skip
    # Uniform over about a hundred places: 3000 draws, mean 30, sd 5.4; six sd is a false alarm in 10^7.
    assert set(drawn) == set(places)
    assert all(abs(count - 3000 / len(places)) < 6 * (3000 / len(places)) ** 0.5 for count in drawn.values())


def test_rare_foreground_is_found_and_where_there_is_too_little_the_best_is_taken() -> None:
    foreground = np.zeros((40, 40, 40), dtype=bool)
    foreground[30:34, 3:7, 36:40] = True  # one place of 50,653 is full
    for seed in range(3):
        draws = torch.Generator().manual_seed(seed)
        assert draw_start(foreground, (4, 4, 4), 1.0, draws).tolist() == [30, 3, 36]
    foreground[30, 3, 36] = False
    assert draw_start(foreground, (4, 4, 4), 1.0, torch.Generator().manual_seed(0)).tolist() == [30, 3, 36]
    starts = {
        tuple(draw_start(foreground, (4, 4, 4), 0.0, torch.Generator().manual_seed(n)).tolist())
        for n in range(20)
    }
    assert len(starts) == 20, "no share asked: anywhere"


def test_a_step_of_whole_scans_is_replayed_and_other_steps_show_other_crops(scans: LatentSet) -> None:
    batches = Batches(scans, plan(), None)
    draws = [batches.draw(step_generator(SECRET, 7, 1, step)) for step in (0, 0, 1)]
    one, again, other = (batches.apply(draw, torch.device("cpu")) for draw in draws)
    assert one.latents.shape == (4, 4, *CROP) and torch.equal(one.latents, again.latents)
    assert not torch.equal(one.latents, other.latents)
    for scan, view, start, crop in zip(
        draws[0].scans.tolist(), draws[0].views.tolist(), draws[0].starts, one.latents, strict=True
    ):
        assert torch.equal(crop, scans.crops([scan], [view], start[None])[0])
        inside = tuple(slice(int(a), int(a) + n) for a, n in zip(start, CROP, strict=True))
        assert scans.foreground(scan, view)[inside].mean() >= VOLUMES.crop_foreground


def test_style_is_that_of_the_whole_foreground_and_of_nothing_else(scans: LatentSet) -> None:
    moments = own_moments(scans, plan())
    expected = StyleMoments.none(survey_layout(plan()))
    for row in range(len(scans)):
        inside = torch.tensor(scans.whole(row)[:, scans.foreground(row)])
        layout = dataclasses.replace(survey_layout(plan()), latent_grid=(inside.shape[1], 1, 1))
        one = StyleMoments.of_patient(inside[None, :, :, None, None], layout)
        expected += StyleMoments(expected.layout, one.sums)
    torch.testing.assert_close(moments.to_vector(), expected.to_vector())
    everything = StyleMoments.of(scans.latents(range(len(scans))), scans.patients, survey_layout(plan()))
    assert not torch.allclose(moments.to_vector(), everything.to_vector(), rtol=1e-2)


def test_room_for_whole_scans_is_told_by_those_that_are_there_and_until_then_at_least(
    root: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    cohort = open_cohort(root, plan=VOLUMES, split_salt="s")
    cache = LatentCache(tmp_path, tokenizer, VOLUMES)
    before = cache.state(cohort)
    assert before.at_least and "at least" in disk_check(tmp_path, before.bytes_to_write, before.at_least)[1]
    written = sum(path.stat().st_size for path in cache.encode(cohort).files())
    assert before.bytes_to_write < written
    files = sorted(tmp_path.glob("??/*.safetensors"), key=lambda path: path.stat().st_size)
    for path in files[::2]:
        path.unlink()
    half = cache.state(cohort)
    gone = written - sum(path.stat().st_size for path in files[1::2])
    assert not half.at_least and gone / 2 < half.bytes_to_write < 2 * gone  # one of six carries a label, too


def test_maps_of_scans_of_different_sizes_are_refused() -> None:
    layout = dataclasses.replace(survey_layout(plan()), map_grid=(2, 3, 2))
    with pytest.raises(ValueError, match="without maps"):
        StyleMoments.of_voxels([torch.zeros(4, 9)], layout)
