"""Published weights read a scan as the sites did, however it is stored."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

import meduet_models
from meduet_models.published.scan_model import ScanModel
from meduet_models.scan_latents import encoded
from meduet_models.tokenizer.patch_pca import PatchMoments
from meduet_models.tokenizer.tokenizer import pca_tokenizer, save_tokenizer
from scans.scans import UnusableScan
from scans.volumes import read_scan
from tests.generative_models import small_model
from tests.published_weights import VOLUMES, WHOLE, a_scan, network, published, written


@pytest.fixture
def model(tmp_path: Path) -> ScanModel:
    return meduet_models.load(published(tmp_path / "run"))


@pytest.fixture
def whole(tmp_path: Path) -> ScanModel:
    return meduet_models.load(published(tmp_path / "whole", WHOLE))


def test_the_code_is_that_of_the_network_on_what_the_sites_encode(model: ScanModel, tmp_path: Path) -> None:
    path = written(tmp_path / "scan.nii.gz", *a_scan())
    _, latents = encoded(read_scan(path), VOLUMES, model.tokenizer, "cpu")
    with torch.no_grad():
        expected = network().content_code(latents[None])[0].numpy()
    assert np.array_equal(model.embed(path), expected)
    assert np.abs(model.embed(path) - model.embed(written(tmp_path / "b.nii", *a_scan(1)))).max() > 0.1


@pytest.mark.parametrize("kind", ["model", "whole"])
def test_axes_dtype_and_scale_of_intensities_do_not_change_the_code(
    kind: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    asked: ScanModel = request.getfixturevalue(kind)
    array, affine = a_scan()
    code = asked.embed(array, affine)
    order = (2, 0, 1)
    turned = np.transpose(array, order)[::-1, :, ::-1]
    to_old = np.zeros((4, 4))
    to_old[3, 3] = 1
    for new, old in enumerate(order):
        to_old[old, new] = -1 if new != 1 else 1
        to_old[old, 3] = turned.shape[new] - 1 if new != 1 else 0
    assert np.abs(asked.embed(turned, affine @ to_old) - code).max() < 1e-3 * np.abs(code).max()
    for dtype, factor in ((np.float64, 0.37), (np.uint16, 1.0), (np.float32, 41.0)):
        stored = written(tmp_path / "scan.nii.gz", array * factor, affine, dtype=dtype)
        assert np.abs(asked.embed(stored) - code).max() < 1e-3 * np.abs(code).max()
    mirrored = asked.embed(array[::-1], affine)  # the same voxels, said to lie elsewhere: another anatomy
    assert np.abs(mirrored - code).max() > 1e-2 * np.abs(code).max()


def test_a_whole_scan_of_one_window_is_that_window_and_of_more_lies_between_them(whole: ScanModel) -> None:
    small, affine = a_scan(sides=(18, 30, 14))  # 27 x 36 x 28 mm: within one window of 32 x 48 x 32 mm
    _, latents = encoded(whole._scan(small, affine), WHOLE, whole.tokenizer, "cpu")
    assert tuple(latents.shape[1:]) == whole.network.config.latent_grid
    with torch.no_grad():
        one = whole.network.content_code(latents[None])[0].numpy()
        tokens = whole.network.content_tokens(latents[None])[0]
    assert np.allclose(whole.embed(small, affine), one, atol=1e-6)
    assert np.allclose(whole.tokens(small, affine), tokens.unflatten(0, (2, 3, 2)).numpy(), atol=1e-5)
    large, affine = a_scan(sides=(50, 60, 40))
    prepared, latents = encoded(whole._scan(large, affine), WHOLE, whole.tokenizer, "cpu")
    grid = whole.tokens(large, affine)
    assert grid.shape[:3] == tuple(-(-side // 2) for side in latents.shape[1:])
    assert prepared.geometry.prepared_shape > WHOLE.shape
    windows = whole._windows(latents)
    with torch.no_grad():
        each = whole.network.content_code(whole._cut(latents, windows, range(len(windows)))).numpy()
    code = whole.embed(large, affine)
    assert (each.min(0) - 1e-5 <= code).all() and (code <= each.max(0) + 1e-5).all()
    assert np.isfinite(whole.content(large, affine)).all()


def test_style_follows_the_window_that_content_is_freed_of(tmp_path: Path) -> None:
    fixed = dataclasses.replace(VOLUMES, window="fixed", fixed_window=(0.0, 1000.0))
    asked = meduet_models.load(published(tmp_path / "fixed", fixed))
    array, affine = a_scan()
    style, dimmed = asked.style(array, affine), asked.style(0.8 * array, affine)
    assert style.shape == (4,)
    assert np.allclose(dimmed[2:] - style[2:], np.log(0.8), atol=1e-3), "deviations of a linear tokenizer"


def test_a_reconstruction_lies_on_the_scan_and_says_what_it_went_through(tmp_path: Path) -> None:
    array, affine = a_scan()
    alone = meduet_models.load(published(tmp_path / "alone")).reconstruct(array, affine)
    assert alone.through == "tokenizer" and alone.array.shape == array.shape
    assert np.array_equal(alone.affine, affine)
    seen = alone.array > 100
    assert seen.any() and np.corrcoef(alone.array[seen], array[seen])[0, 1] > 0.5
    through = meduet_models.load(published(tmp_path / "all", with_style=True)).reconstruct(array, affine)
    assert through.through == "network" and not np.allclose(through.array, alone.array)
    whole = meduet_models.load(published(tmp_path / "whole", WHOLE)).reconstruct(array, affine)
    assert whole.array.shape == array.shape


def test_harmonising_needs_a_diffusion_model_and_takes_the_one_beside(tmp_path: Path) -> None:
    from meduet_models.diffusion.artefact import save_generative_model

    array, affine = a_scan()
    folder = published(tmp_path / "run")
    with pytest.raises(ValueError, match=r"diffusion\.safetensors beside the weights"):
        meduet_models.load(folder).harmonise(array, "north", affine)
    loaded = meduet_models.load(folder)
    save_generative_model(folder / "diffusion.safetensors", small_model(loaded.tokenizer))
    harmonised = meduet_models.load(folder).harmonise(array, "north", affine)
    assert harmonised.array.shape == array.shape and harmonised.facts["style"] == "north"
    with pytest.raises(ValueError, match="north, south"):
        meduet_models.load(folder).harmonise(array, "nowhere", affine)


def test_another_tokenizer_no_tokenizer_and_no_preprocessing_are_refused(tmp_path: Path) -> None:
    folder = published(tmp_path / "run")
    draws = torch.Generator().manual_seed(9)
    other = pca_tokenizer(PatchMoments.of(torch.rand(4, 1, 16, 16, 16, generator=draws)), 2)
    save_tokenizer(tmp_path / "other.safetensors", other, {})
    with pytest.raises(ValueError, match="Expected tokenizer"):
        meduet_models.load(folder, tokenizer=tmp_path / "other.safetensors")
    (folder / "tokenizer.safetensors").unlink()
    with pytest.raises(ValueError, match="there is none beside"):
        meduet_models.load(folder)


def test_an_array_needs_an_affine_and_a_file_none(model: ScanModel, tmp_path: Path) -> None:
    array, affine = a_scan()
    with pytest.raises(ValueError, match="affine of the array"):
        model.embed(array)
    with pytest.raises(ValueError, match="only with an array"):
        model.embed(written(tmp_path / "a.nii", array, affine), affine)
    with pytest.raises(UnusableScan):
        model.embed(np.zeros((9, 9, 9)), affine)
