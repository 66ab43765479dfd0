"""Amplitude exchange: the low-frequency amplitude spectrum of latents as a site's style. A baseline, not the
method.

What sites exchange here is the mean amplitude over their patients, never one image's spectrum (as in
FedDG-ELCFS, CVPR 2021, which shares spectra of individual images). It is offered because the literature uses
it: amplitude carries anatomy too, and swapping it is measurably worse than doing nothing (error ratio about
1, against .2 for the coarse mean map). What this file does not do: anything about banks, sites or sums
(`style.py` adds these amplitudes like every other statistic).

Axes: b = scans, c = channels, d h w = latent voxels; k j i = frequencies (0, 1, -1), (0, 1, -1), (0, 1) in
cycles per volume along d, h, w. The remaining half follows from the latents being real.
"""

import torch
from jaxtyping import Float
from torch import Tensor

_LOW = (0, 1, -1)


def low_amplitude(latents: Float[Tensor, "b c d h w"]) -> Float[Tensor, "b c k j i"]:
    """Amplitudes of the lowest frequencies, divided by the number of voxels (latent units).

    Raises `ValueError` when an axis has fewer than 3 voxels: it has no frequency 1 apart from -1.
    """
    return _low(_spectrum(latents)).abs()


def swap_amplitude(
    latents: Float[Tensor, "b c d h w"], amplitude: Float[Tensor, "*s c k j i"]
) -> Float[Tensor, "b c d h w"]:
    """Give latents these low-frequency amplitudes and leave their phase (FedDG-ELCFS, eq. 2, ratio 1)."""
    spectrum = _spectrum(latents)
    low = _low(spectrum)
    swapped = torch.polar(amplitude.to(low.real.dtype).expand_as(low.real).contiguous(), low.angle())
    spectrum = spectrum.clone()
    for k, along_d in enumerate(_LOW):
        for j, along_h in enumerate(_LOW):
            spectrum[:, :, along_d, along_h, :2] = swapped[:, :, k, j]
    back: Tensor = torch.fft.irfftn(spectrum, s=latents.shape[2:], norm="forward")
    return back


def _spectrum(latents: Tensor) -> Tensor:
    if min(latents.shape[2:]) < 3:
        raise ValueError(
            f"Expected latents of at least 3 voxels per axis; got {tuple(latents.shape[2:])}; use the bank."
        )
    spectrum: Tensor = torch.fft.rfftn(latents, dim=(2, 3, 4), norm="forward")
    return spectrum


def _low(spectrum: Tensor) -> Tensor:
    low = torch.tensor(_LOW, device=spectrum.device)
    return spectrum[:, :, low][:, :, :, low][..., :2]
