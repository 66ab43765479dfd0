"""Laws of style sums, and what exchanging them is worth on real scans (counterfactual error ratio)."""

import dataclasses
import itertools
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import gaussian_filter
from torch import Tensor

from meduet_models.probes.swap_fidelity import counterfactual_ratio
from meduet_models.style.moments import (
    CohortTooSmall,
    StyleEntry,
    StyleLayout,
    StyleMoments,
    coarse_map,
    restyle,
    upsample,
)

GRID = (4, 6, 4)
LAYOUT = StyleLayout(channels=2, latent_grid=GRID, map_grid=(2, 3, 2), bound=1e6, parts=2, amplitude=True)


def scans(seed: int, count: int, channels: int = 2) -> Tensor:
    return torch.randn(count, channels, *GRID, generator=torch.Generator().manual_seed(seed)) * 1.5 + 0.3


cohorts = st.lists(st.tuples(st.sampled_from("abcd"), st.integers(0, 1)), min_size=1, max_size=7)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), cohort_a=cohorts, cohort_b=cohorts)
def test_sums_of_two_sites_are_the_sums_of_their_union(
    seed: int, cohort_a: list[tuple[str, int]], cohort_b: list[tuple[str, int]]
) -> None:
    x = scans(seed, len(cohort_a) + len(cohort_b))
    patients = [f"site A {p}" for p, _ in cohort_a] + [f"site B {p}" for p, _ in cohort_b]
    parts = [k for _, k in cohort_a + cohort_b]
    n = len(cohort_a)
    a = StyleMoments.of(x[:n], patients[:n], LAYOUT, parts[:n])
    b = StyleMoments.of(x[n:], patients[n:], LAYOUT, parts[n:])
    union = StyleMoments.of(x, patients, LAYOUT, parts)
    assert torch.equal((a + b).to_vector(), a.to_vector() + b.to_vector())
    torch.testing.assert_close((a + b).to_vector(), union.to_vector(), rtol=1e-12, atol=1e-12)
    back = StyleMoments.from_vector(a.to_vector() + b.to_vector(), LAYOUT)
    assert torch.equal(back.to_vector(), (a + b).to_vector())
    assert len(a.to_vector()) == LAYOUT.length


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), bound=st.floats(0.01, 5.0), scale=st.floats(0.1, 1e4))
def test_one_patient_moves_the_sums_by_at_most_the_bound(seed: int, bound: float, scale: float) -> None:
    layout = dataclasses.replace(LAYOUT, bound=bound)
    x = scans(seed, 9) * scale
    whole = StyleMoments.of(x, list("aabbccddd"), layout, [0, 1, 0, 0, 1, 1, 0, 1, 1])
    without = StyleMoments.of(x[:6], list("aabbcc"), layout, [0, 1, 0, 0, 1, 1])
    moved = whole.to_vector() - without.to_vector()
    assert float(moved[layout.parts :].norm()) <= bound * (1 + 1e-9)


def test_a_patient_with_many_scans_counts_as_one() -> None:
    once = StyleMoments.of(scans(0, 2), ["a", "b"], LAYOUT)
    often = StyleMoments.of(scans(0, 2)[[0, 1, 1, 1]], ["a", "b", "b", "b"], LAYOUT)
    torch.testing.assert_close(once.to_vector(), often.to_vector(), rtol=1e-12, atol=1e-12)
    assert often.sums["count"].tolist() == [2.0, 0.0]


def test_an_entry_is_what_the_latents_say() -> None:
    layout = StyleLayout(channels=2, latent_grid=GRID, map_grid=None, bound=1e6)
    x = scans(1, 5)
    entry = StyleMoments.of(x, list("abcde"), layout).entry()
    torch.testing.assert_close(entry.mean, x.mean((0, 2, 3, 4)))
    torch.testing.assert_close(entry.deviation, x.std((0, 2, 3, 4), unbiased=False))
    with_map = StyleMoments.of(x, list("abcde"), dataclasses.replace(layout, map_grid=(2, 3, 2))).entry()
    assert with_map.map is not None
    cells = with_map.map
    for axis, factor in ((1, 2), (2, 2), (3, 2)):
        cells = cells.repeat_interleave(factor, axis)
    torch.testing.assert_close(with_map.map, coarse_map(x, (2, 3, 2)).mean(0))
    torch.testing.assert_close(with_map.deviation, (x - cells).square().mean((0, 2, 3, 4)).sqrt())


def test_the_latent_scale_standardises_the_pooled_latents() -> None:
    layout = StyleLayout(channels=2, latent_grid=GRID, map_grid=(2, 3, 2), bound=1e6, centre=True)
    x = scans(2, 8) * torch.tensor([3.0, 0.5])[:, None, None, None] + scans(12, 1)
    sites = [StyleMoments.of(x[:3], list("abc"), layout), StyleMoments.of(x[3:], list("defgh"), layout)]
    centre, deviation = (sites[0] + sites[1]).latent_scale()
    torch.testing.assert_close(centre, x.mean(0))
    standard = (x - centre) / deviation[:, None, None, None]
    torch.testing.assert_close(standard.square().mean((0, 2, 3, 4)), torch.ones(2))
    unregistered = StyleMoments.of(x, list("abcdefgh"), dataclasses.replace(layout, map_grid=None))
    centre, deviation = unregistered.latent_scale()
    torch.testing.assert_close(centre, x.mean((0, 2, 3, 4))[:, None, None, None].expand(2, *GRID))
    torch.testing.assert_close(deviation, x.std((0, 2, 3, 4), unbiased=False))


def test_the_coarse_centre_standardises_smooth_latents_without_the_mean_of_every_voxel() -> None:
    grid = (8, 12, 8)
    layout = StyleLayout(channels=2, latent_grid=grid, map_grid=(2, 3, 2), bound=1e6)
    assert "centre" not in layout.shapes() and layout.length < 2 * 2 * 12 * 2 + 10
    generator = torch.Generator().manual_seed(3)
    smooth = upsample(3 * torch.randn(2, 2, 3, 2, generator=generator), grid)
    x = (
        smooth
        + torch.randn(40, 2, *grid, generator=generator) * torch.tensor([1.0, 2.0])[:, None, None, None]
    )
    centre, deviation = StyleMoments.of(x, [str(n) for n in range(40)], layout).latent_scale()
    standard = (x - centre) / deviation[:, None, None, None]
    torch.testing.assert_close(standard.square().mean((0, 2, 3, 4)), torch.ones(2), rtol=0.03, atol=0.0)
    assert float((centre - smooth).square().mean()) < 0.05
    cells = coarse_map(centre[None].double(), (2, 3, 2))
    torch.testing.assert_close(cells[0], coarse_map(x, (2, 3, 2)).mean(0).double(), rtol=1e-5, atol=1e-5)


def test_restyled_scans_have_the_statistics_of_the_target() -> None:
    layout = StyleLayout(channels=2, latent_grid=GRID, map_grid=None, bound=1e6)
    x, y = scans(3, 6), scans(4, 6) * 2 - 1
    own, target = (StyleMoments.of(z, list("abcdef"), layout).entry() for z in (x, y))
    restyled = StyleMoments.of(restyle(x, own, target), list("abcdef"), layout).entry()
    torch.testing.assert_close(restyled.mean, target.mean)
    torch.testing.assert_close(restyled.deviation, target.deviation)


def test_restyling_there_and_back_gives_the_scan_again() -> None:
    layout = dataclasses.replace(LAYOUT, parts=1, amplitude=False)
    x = scans(5, 4)
    own, target = (StyleMoments.of(z, list("abcd"), layout).entry() for z in (x, scans(6, 4) * 3))
    torch.testing.assert_close(restyle(restyle(x, own, target), target, own), x, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(restyle(x, own, target), x, atol=0.1)


def test_one_entry_per_scan_restyles_as_entries_one_by_one() -> None:
    layout = dataclasses.replace(LAYOUT, parts=1, amplitude=False)
    x = scans(7, 3)
    entries = [StyleMoments.of(scans(8 + i, 3) * (i + 1), list("abc"), layout).entry() for i in range(4)]
    stacked = StyleEntry(
        torch.stack([e.mean for e in entries[1:]]),
        torch.stack([e.deviation for e in entries[1:]]),
        torch.stack([e.map for e in entries[1:] if e.map is not None]),
        torch.stack([e.map_deviation for e in entries[1:] if e.map_deviation is not None]),
    )
    together = restyle(x, entries[0].each(lambda t: t.expand(3, *t.shape)), stacked)
    alone = [restyle(x[i : i + 1], entries[0], entries[i + 1]) for i in range(3)]
    torch.testing.assert_close(together, torch.cat(alone))


def test_noise_in_one_half_is_restyled_there_alone() -> None:
    layout = dataclasses.replace(LAYOUT, parts=1, amplitude=False, map_grid=(2, 1, 1))
    clean = scans(3, 12) * 0.2
    half = GRID[0] // 2
    noisy = clean.clone()
    noisy[:, :, half:] += 2.0 * torch.randn(
        noisy[:, :, half:].shape, generator=torch.Generator().manual_seed(4)
    )
    names = [str(i) for i in range(12)]
    own, target = (StyleMoments.of(x, names, layout).entry() for x in (clean, noisy))
    restyled = restyle(clean, own, target)
    spread = restyled.var((0, 1, 3, 4)) / clean.var((0, 1, 3, 4))
    assert own.map_deviation is not None and target.map_deviation is not None
    assert float(spread[0]) == pytest.approx(1, abs=0.1)  # where no noise was added
    assert float(spread[-1]) > 20


def test_a_coarse_map_is_upsampled_between_the_centres_of_its_cells() -> None:
    ramp = torch.arange(4.0)[:, None, None].expand(1, 1, 4, 4, 4)
    fine = upsample(ramp, (8, 4, 4))[0, 0, :, 0, 0]
    torch.testing.assert_close(fine, torch.tensor([0.0, 0.25, 0.75, 1.25, 1.75, 2.25, 2.75, 3.0]))


def test_a_channel_that_is_constant_at_a_site_is_moved_and_not_blown_up() -> None:
    layout = dataclasses.replace(LAYOUT, parts=1, amplitude=False)
    flat = torch.full((3, 2, *GRID), 0.7)
    own, target = (StyleMoments.of(z, list("abc"), layout).entry() for z in (flat, scans(9, 3)))
    assert target.map is not None
    restyled = restyle(flat, own, target)
    torch.testing.assert_close(restyled, upsample(target.map, GRID).expand_as(restyled), atol=1e-3, rtol=1e-3)


def test_what_travels_comes_back_and_other_shapes_are_refused() -> None:
    moments = StyleMoments.of(scans(10, 3), list("abc"), LAYOUT)
    tensors = moments.to_tensors()
    back = StyleMoments.from_tensors(tensors, LAYOUT)
    torch.testing.assert_close(back.to_vector(), moments.to_vector(), rtol=1e-6, atol=1e-6)
    for wrong in (
        {k: v for k, v in tensors.items() if k != "map"},
        tensors | {"scan": tensors["mean"]},
        tensors | {"mean": tensors["mean"][:, :1]},
    ):
        with pytest.raises(ValueError, match="Expected style sum"):
            StyleMoments.from_tensors(wrong, LAYOUT)
    with pytest.raises(ValueError, match="Plan and site disagree"):
        StyleMoments.from_vector(moments.to_vector()[:-1], LAYOUT)


def test_sums_of_nobody_have_no_style_and_latents_that_are_not_numbers_no_sums() -> None:
    with pytest.raises(CohortTooSmall):
        StyleMoments.none(LAYOUT).entry()
    with pytest.raises(CohortTooSmall):
        StyleMoments.none(LAYOUT).latent_scale()
    with pytest.raises(ValueError, match="finite latents"):
        StyleMoments.of_patient(torch.full((1, 2, *GRID), torch.nan), LAYOUT)
    with pytest.raises(ValueError, match="Expected latents of"):
        StyleMoments.of_patient(torch.zeros(1, 3, *GRID), LAYOUT)


# What an exchange is worth: hippocampus crops, four simulated scanners (one hospital: a simulation).


def _crop(volume: np.ndarray, shape: tuple[int, int, int] = (32, 48, 32)) -> np.ndarray:
    pad = [(max(0, s - n) // 2, (max(0, s - n) + 1) // 2) for n, s in zip(volume.shape, shape, strict=True)]
    volume = np.pad(volume, pad)
    start = [(n - s) // 2 for n, s in zip(volume.shape, shape, strict=True)]
    return volume[tuple(slice(a, a + s) for a, s in zip(start, shape, strict=True))]


def _rendered(volume: np.ndarray, random: np.random.Generator) -> list[np.ndarray]:
    """Identity; gamma and contrast; coil bias and blur; Rician noise and contrast."""
    x, y, z = np.meshgrid(*[np.linspace(-1, 1, n) for n in volume.shape], indexing="ij")
    noise = random.normal(0, 0.06, (2, *volume.shape))
    return [
        volume,
        0.1 + 0.85 * volume**1.7,
        0.9 * gaussian_filter(volume, 0.7) * (1 + 0.45 * x - 0.3 * y + 0.25 * z),
        np.hypot(0.75 * volume + 0.05 + noise[0], noise[1]),
    ]


def _patches(volumes: Tensor) -> Tensor:  # m D H W -> m 64 d h w
    m, depth, height, width = volumes.shape
    grid = volumes.reshape(m, depth // 4, 4, height // 4, 4, width // 4, 4)
    return grid.permute(0, 2, 4, 6, 1, 3, 5).reshape(m, 64, depth // 4, height // 4, width // 4)


@pytest.fixture(scope="module")
def rendered_latents(data_root: Path) -> Tensor:
    """Latents of patients on four scanners, s m c d h w: PCA of 4³ patches, fitted on the first half."""
    files = sorted((data_root / "msd_hippocampus" / "images").glob("hippocampus_*.nii.gz"))[::3]
    if not files:
        pytest.skip("needs msd_hippocampus among the real scans")
    random = np.random.default_rng(0)
    volumes = []
    for file in files:
        volume = np.asarray(nib.load(file).dataobj, dtype=np.float32)
        low, high = np.percentile(volume, (0.5, 99.5))
        volumes.append(_rendered(_crop(np.clip((volume - low) / (high - low), 0, 1)), random))
    scanners = [_patches(torch.from_numpy(np.stack(v)).float()) for v in zip(*volumes, strict=True)]
    fitted = scanners[0][: len(files) // 2].transpose(0, 1).flatten(1)  # 64 x patches
    mean = fitted.mean(1)
    values, vectors = torch.linalg.eigh(torch.cov(fitted))
    basis = vectors[:, -4:] / values[-1].sqrt()
    return torch.stack(
        [torch.einsum("mpdhw,pc->mcdhw", s - mean[:, None, None, None], basis) for s in scanners]
    )


def _error_ratio(latents: Tensor, layout: StyleLayout) -> float:
    """Mean over ordered pairs of scanners; styles of the first half of the patients, errors of the rest."""
    half = latents.shape[1] // 2
    entries = [StyleMoments.of(s[:half], [str(i) for i in range(half)], layout).entry() for s in latents]
    ratios = [
        counterfactual_ratio(
            restyle(latents[a, half:], entries[a], entries[b]), latents[a, half:], latents[b, half:]
        )
        for a, b in itertools.permutations(range(4), 2)
    ]
    return sum(ratios) / len(ratios)


def test_a_coarse_map_restyles_better_than_channel_statistics_and_those_better_than_nothing(
    rendered_latents: Tensor,
) -> None:
    grid = (8, 12, 8)
    channel = StyleLayout(channels=4, latent_grid=grid, map_grid=None, bound=50.0)
    coarse = dataclasses.replace(channel, map_grid=(2, 3, 2))
    assert _error_ratio(rendered_latents, channel) < 0.6
    assert _error_ratio(rendered_latents, coarse) < 0.35
    here, there = rendered_latents[0], rendered_latents[1]
    assert counterfactual_ratio(here, here, there) == 1.0


def test_swapping_amplitude_spectra_is_worse_than_the_worst_of_the_statistics(
    rendered_latents: Tensor,
) -> None:
    amplitude = StyleLayout(channels=4, latent_grid=(8, 12, 8), map_grid=None, bound=50.0, amplitude=True)
    assert _error_ratio(rendered_latents, amplitude) > 0.8
