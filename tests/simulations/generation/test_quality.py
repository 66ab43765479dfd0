"""Rows of quality and controls, on sets of scans whose fault is planted."""

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from client.latents.labelled import LabelledScans, NoLabels
from meduet_models.diffusion.conditioner import Conditioner
from meduet_models.meduet import FactorNetwork
from meduet_models.style.bank import StyleBank
from meduet_models.style.moments import StyleLayout, StyleMoments
from simulations.generation.controls import content_rows, site_row, style_gap_row
from simulations.generation.quality import (
    ENCODER,
    FIXED,
    QualityRow,
    ScanSet,
    distribution_rows,
    diversity_rows,
    fidelity_rows,
    memory_row,
)
from simulations.generation.use import UseSettings, use_rows
from tests.worlds import small_network

GRID = (4, 4, 4)
NETWORK = small_network(latent_channels=4, latent_grid=GRID, width=24, style_map_grid=(1, 2, 1))
HOW = {"resamples": 20, "seed": 0}


def scans(count: int, seed: int, spread: float = 1.0, name: str = "p") -> ScanSet:
    draws = torch.Generator().manual_seed(seed)
    features = {key: spread * torch.randn(count, 12, generator=draws) for key in (ENCODER, FIXED)}
    latents = spread * torch.randn(count, 4, *GRID, generator=draws)
    coarse = torch.rand(count, 1, 4, 4, 4, generator=draws) * spread
    volumes = torch.nn.functional.interpolate(coarse, size=(16, 16, 16), mode="trilinear").clamp(0, 1)
    return ScanSet(latents, volumes, features, tuple(f"{name}{i}" for i in range(count)))


def by_name(rows: list[QualityRow]) -> dict[tuple[str, str], QualityRow]:
    return {(row.measure, row.features): row for row in rows}


def test_samples_as_good_as_real_scans_stay_at_the_floor_and_others_do_not() -> None:
    real, stand_in, fitted = scans(40, 0), scans(40, 1), scans(60, 2)
    good = by_name(distribution_rows(scans(40, 3), real, stand_in, fitted, "x", neighbours=3, **HOW))
    wide = by_name(distribution_rows(scans(40, 3, 3.0), real, stand_in, fitted, "x", neighbours=3, **HOW))
    for features in (ENCODER, FIXED):
        fine, bad = good["Fréchet distance", features], wide["Fréchet distance", features]
        assert fine.low <= fine.floor_high
        assert bad.low > bad.floor_high
        assert wide["kernel distance", features].value > wide["kernel distance", features].floor_high
        assert wide["precision", features].value < 0.3 < good["precision", features].value
        assert fine.axes <= fine.samples // 2


def test_sets_are_thinned_to_one_size() -> None:
    rows = distribution_rows(scans(9, 0), scans(30, 1), scans(14, 2), scans(30, 3), "x", neighbours=2, **HOW)
    assert {(row.samples, row.real) for row in rows} == {(9, 9)}
    assert all(row.axes <= 4 for row in rows)


def test_every_interval_holds_its_value_and_is_the_same_again() -> None:
    again = [
        distribution_rows(scans(12, 0), scans(12, 1), scans(12, 2), scans(12, 3), "x", neighbours=2, **HOW)
        for _ in range(2)
    ]
    assert again[0] == again[1]
    for row in again[0]:
        assert row.low <= row.value <= row.high
        assert row.floor_low <= row.floor <= row.floor_high


def test_too_few_samples_are_refused() -> None:
    with pytest.raises(ValueError, match="more than 3 samples"):
        distribution_rows(scans(3, 0), scans(9, 1), scans(9, 2), scans(9, 3), "x", neighbours=3, **HOW)


def test_copies_of_training_scans_fall_below_the_floor_of_the_memory_row() -> None:
    training, held = scans(30, 0), scans(30, 1, name="q")
    copied = ScanSet(
        training.latents[:10] + 0.01, training.volumes[:10], {}, tuple(f"s{i}" for i in range(10))
    )
    one = torch.ones(4)
    row = memory_row(copied, training, held, one, "nothing", **HOW)
    assert row.high < row.floor_low
    assert row.high < 0.1
    fresh = scans(10, 5)
    new = memory_row(
        ScanSet(fresh.latents, fresh.volumes, {}, fresh.patient), training, held, one, "x", **HOW
    )
    assert new.value == pytest.approx(1, abs=0.1)


def test_samples_that_are_all_alike_are_less_diverse_than_real_ones() -> None:
    alike = scans(6, 0).rows([0] * 6)
    alike = ScanSet(alike.latents, alike.volumes, alike.features, tuple("abcdef"))
    rows = diversity_rows({"same": alike, "other": scans(6, 4)}, scans(8, 1), most=6, **HOW)
    same, other = rows
    assert same.value == pytest.approx(1, abs=1e-4)
    assert same.low > same.floor_high
    assert other.low < other.floor_high


def test_fidelity_of_a_scan_to_itself_is_perfect_and_to_noise_is_not() -> None:
    truth = scans(5, 0).volumes
    noise = torch.rand(truth.shape, generator=torch.Generator().manual_seed(0))
    rows = by_name(fidelity_rows("again", truth * 0.999, truth, noise, list("abcde"), "x", **HOW))
    assert rows["again: SSIM", "volumes"].value > 0.99
    assert rows["again: SSIM", "volumes"].floor < 0.5
    assert rows["again: PSNR, dB", "volumes"].value > 50
    missing = fidelity_rows("again", truth, truth, None, list("abcde"), "x", **HOW)
    assert all(math.isnan(row.floor) for row in missing)


@pytest.fixture(scope="module")
def conditioner() -> Conditioner:
    return Conditioner(FactorNetwork(NETWORK, seed=0).eval().requires_grad_(False), maps=True)


def bodies(count: int, site: int, seed: int) -> Tensor:
    draws = torch.Generator().manual_seed(seed)
    return torch.randn(count, 4, *GRID, generator=draws) * (1 + site) + 2 * site


def test_the_patient_asked_for_is_found_and_a_shuffled_one_is_not(conditioner: Conditioner) -> None:
    asked = bodies(12, 0, 0)
    names = [f"p{i}" for i in range(12)]
    same = content_rows(conditioner, asked + 0.01, asked, asked.roll(1, 0), names, "x", **HOW)
    assert [row.value for row in same] == pytest.approx([1, 1], abs=0.02)
    assert same[0].floor == 0
    assert same[1].floor < 0.5


def test_the_probe_says_the_site_asked_for(conditioner: Conditioner) -> None:
    training = torch.cat([bodies(15, s, s) for s in range(2)]), [0] * 15 + [1] * 15
    held = (
        torch.cat([bodies(5, s, 10 + s) for s in range(2)]),
        [0] * 5 + [1] * 5,
        [f"h{i}" for i in range(10)],
    )
    samples, names = bodies(6, 1, 20), [f"s{i}" for i in range(6)]
    right = site_row(conditioner, samples, [1] * 6, names, training, held, "x", **HOW)
    wrong = site_row(conditioner, samples, [0] * 6, names, training, held, "x", **HOW)
    assert right is not None
    assert wrong is not None
    assert (right.value, wrong.value, right.floor) == (1, 0, 1)
    assert site_row(conditioner, samples, [0] * 6, names, (samples, [0] * 6), held, "x", **HOW) is None


def bank_of_two() -> StyleBank:
    layout = StyleLayout(channels=4, latent_grid=GRID, map_grid=(1, 2, 1), bound=1e6)
    moments = {
        name: StyleMoments.of(bodies(20, site, 30 + site), [str(i) for i in range(20)], layout)
        for site, name in enumerate(("north", "harbour"))
    }
    return StyleBank.of(("north", "harbour"), moments)


def test_restyled_scans_close_the_style_gap_and_untouched_ones_do_not(conditioner: Conditioner) -> None:
    bank, source = bank_of_two(), bodies(6, 0, 40)
    here, there = torch.zeros(6, dtype=torch.long), torch.ones(6, dtype=torch.long)
    moved = bank.restyle(source, here, there)
    asked = conditioner.style_of(bank.entry(there))
    row = style_gap_row(conditioner, moved, source, asked, source, [f"p{i}" for i in range(6)], "x", **HOW)
    assert row.value > 0.5
    assert row.floor == pytest.approx(0, abs=1e-6)


def labelled(count: int, seed: int) -> LabelledScans:
    draws = torch.Generator().manual_seed(seed)
    labels = torch.zeros(count, 1, 16, 16, 16, dtype=torch.long)
    latents = 0.1 * torch.randn(count, 4, *GRID, generator=draws)
    for row in range(count):
        first = int(torch.randint(0, 3, (), generator=draws))
        labels[row, :, 4 * first : 4 * first + 8, 4:12] = 1
        latents[row, :, first : first + 2, 1:3] += 1
    return LabelledScans(latents, labels, tuple(f"p{seed}-{i}" for i in range(count)), (0,) * count)


def test_use_is_the_dice_beside_that_of_the_few_real_labels_alone() -> None:
    asked_for: list[list[int]] = []

    def render(scans: LabelledScans, asked: object, seed: int) -> Tensor:
        asked_for.append(list(asked))  # type: ignore[call-overload]
        return scans.latents

    settings = UseSettings(patients=2, copies=1, steps=12, seeds=1)
    rows = use_rows(labelled(4, 0), labelled(5, 1), render, bank_of_two(), settings, resamples=20, seed=0)
    found = {row.measure: row for row in rows}
    synthetic = found["Dice, few real, synthetic"]
    assert asked_for == [[1, 1]]
    assert synthetic.samples == 2
    assert 0 <= synthetic.floor <= 1
    gain = found["Dice gained, few real, synthetic"].value
    assert gain == pytest.approx(synthetic.value - synthetic.floor)


def test_use_without_labels_is_refused(tmp_path: Path) -> None:
    bare = LabelledScans(torch.zeros(1, 4, *GRID), torch.zeros(1, dtype=torch.long), ("p",), (0,))
    with pytest.raises(NoLabels):
        use_rows(bare, bare, lambda s, a, n: s.latents, bank_of_two(), UseSettings(), resamples=2, seed=0)
