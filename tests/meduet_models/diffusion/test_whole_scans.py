"""Whole scans by windows of one grid: one trajectory, the grid's own when the scan is no larger."""

import dataclasses

import pytest
import torch

from meduet_models.diffusion.conditioner import entries_of_scans
from meduet_models.diffusion.conditions import Conditions
from meduet_models.diffusion.harmonisation import (
    HarmonisationSettings,
    harmonise,
    harmonise_whole,
    site_style,
)
from meduet_models.diffusion.sampling import SamplingSettings, sample
from meduet_models.diffusion.whole_scans import invert_whole, sample_whole
from meduet_models.style.moments import restyle
from meduet_models.windows import Windows
from tests.generative_models import models_of_whole_scans, small_model, small_tokenizer

GRID = (4, 6, 4)
FEW = SamplingSettings(steps=3)


def model() -> object:
    volumes = {"modality": "mr", "shape": [16, 24, 16], "extent": "scan", "registered": False}
    return small_model(small_tokenizer(), volumes=volumes, **models_of_whole_scans())


def whole(*sides: int) -> torch.Tensor:
    return 1.5 * torch.randn(2, *sides, generator=torch.Generator().manual_seed(5)) + 0.3


def test_windows_of_a_whole_blend_to_that_whole() -> None:
    for sides in (GRID, (5, 6, 11), (9, 13, 8), (12, 6, 4)):
        x = whole(*sides)
        windows = Windows.over(sides, GRID)
        blended = windows.blend(lambda numbers, w=windows, x=x: w.cut(x, numbers), x)
        torch.testing.assert_close(blended, x)
    with pytest.raises(ValueError, match="at least"):
        Windows.over((3, 6, 4), GRID)


def test_a_scan_of_the_networks_grid_is_sampled_as_a_crop_is() -> None:
    made = model()
    conditions = made.conditioner.style(whole(*GRID)[None])
    given = Conditions(content=made.conditioner.content(whole(*GRID)[None]), style=conditions)
    noise = torch.randn(2, *GRID, generator=torch.Generator().manual_seed(9))
    one = sample(made.transformer, given, 1, FEW, seed=0, noise=noise[None])[0]
    other = sample_whole(made.transformer, given, Windows.over(GRID, GRID), FEW, seed=0, noise=noise)
    torch.testing.assert_close(other, one, rtol=0, atol=1e-5)


def test_inverted_and_sampled_again_told_the_same_a_whole_scan_comes_back() -> None:
    made, x = model(), whole(9, 8, 6)
    windows = Windows.over((9, 8, 6), GRID)
    parts = windows.cut(x, range(len(windows)))
    given = Conditions(content=made.conditioner.content(parts), style=made.conditioner.style(parts))
    fine = SamplingSettings(steps=60)
    noise = invert_whole(made.transformer, x, given, windows, fine)
    back = sample_whole(made.transformer, given, windows, fine, seed=0, noise=noise)
    assert float((back - x).abs().max()) < 0.05


@pytest.mark.parametrize("method", ["sample", "invert", "restyle"])
def test_neighbouring_places_of_a_whole_scan_agree(method: str) -> None:
    made, x = model(), whole(12, 10, 8)
    foreground = torch.ones(12, 10, 8, dtype=torch.bool)
    foreground[:, :2] = False
    settings = HarmonisationSettings(style="south", method=method, sampling=FEW)  # type: ignore[arg-type]
    steps: list[tuple[int, int]] = []
    moved = harmonise_whole(made, x, foreground, settings, on_step=lambda *done: steps.append(done))
    again = harmonise_whole(made, x, foreground, settings)
    assert moved.shape == x.shape and bool(moved.isfinite().all()) and torch.equal(moved, again)
    assert (steps[-1] if steps else None) == {"sample": (3, 3), "invert": (6, 6), "restyle": None}[method]
    if method == "restyle":
        inside = x[:, foreground]
        torch.testing.assert_close(moved[:, foreground].mean(1), site_style(made, "south").mean)
        assert not torch.allclose(
            moved, restyle(x[None], _entry(x.flatten(1)), site_style(made, "south"))[0], atol=1e-3
        ), "its own style is that of the foreground alone"
        assert torch.isfinite(inside).all()


def _entry(values: torch.Tensor) -> object:
    return entries_of_scans(values[None, :, :, None, None], None)


def test_windows_sampled_one_by_one_disagree_where_the_whole_does_not() -> None:
    """What a trajectory of the whole is for: without it two windows make two anatomies of one place."""
    made, x = model(), whole(8, 6, 4)
    windows = Windows.over((8, 6, 4), GRID)
    parts = windows.cut(x, range(len(windows)))
    alone = harmonise(made, parts, HarmonisationSettings(style="south", sampling=FEW))
    overlap = (alone[0][:, 2:] - alone[1][:, :2]).abs().max()
    assert float(overlap) > 0.5


def test_a_model_of_registered_crops_is_refused_for_a_whole_scan() -> None:
    made = small_model(small_tokenizer())
    with pytest.raises(ValueError, match="registered crops"):
        settings = HarmonisationSettings(style="south", sampling=FEW)
        harmonise_whole(made, whole(8, 8, 8), torch.ones(8, 8, 8, dtype=torch.bool), settings)
    assert dataclasses.is_dataclass(made)
