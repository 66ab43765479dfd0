import pytest
import torch

from meduet_models.style.amplitude import low_amplitude, swap_amplitude


def test_a_swapped_scan_has_the_amplitudes_of_the_target_and_its_own_phase() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 2, 5, 6, 4, generator=generator)
    target = low_amplitude(torch.randn(8, 2, 5, 6, 4, generator=generator) * 3).mean(0)
    swapped = swap_amplitude(x, target)
    torch.testing.assert_close(low_amplitude(swapped), target.expand(3, -1, -1, -1, -1), rtol=1e-4, atol=1e-5)
    before, after = (torch.fft.fftn(z, dim=(2, 3, 4)) for z in (x, swapped))
    torch.testing.assert_close(before / before.abs(), after / after.abs(), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(after[:, :, 2, 3], before[:, :, 2, 3], rtol=1e-4, atol=1e-4)


def test_a_scan_with_its_own_amplitudes_is_unchanged() -> None:
    x = torch.randn(2, 3, 3, 8, 5, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(swap_amplitude(x, low_amplitude(x)), x)


def test_latents_too_small_to_have_a_lowest_frequency_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 3 voxels"):
        low_amplitude(torch.zeros(1, 1, 2, 8, 8))
