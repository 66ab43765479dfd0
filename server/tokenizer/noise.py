"""How noisy a scan is, measured on the scan alone: what no tokenizer of few numbers can give back.

White noise has as much of itself in the highest frequencies as anywhere, and anatomy little: the median size
of a scan's finest details is its noise's (Donoho and Johnstone 1994, doi:10.1093/biomet/81.3.425; for MRI:
Coupe et al. 2010, doi:10.1016/j.media.2010.03.001). Where a scan was interpolated its noise is smooth and
more of it than is seen here; anatomy with detail at the size of a voxel is taken for noise. What it does not
do: take noise out.

Axes: c = latent channels, D H W = voxels.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from meduet_models.tokenizer.tokenizer import Tokenizer

FEWEST_CELLS = 100
DEVIATIONS_OF_MEDIAN = 1 / 0.6745  # of a normal variable, in medians of its absolute value


def noise_deviation(volume: Float[Tensor, "1 D H W"]) -> float:
    """Deviation of white noise in `volume`, from the cells of 2 x 2 x 2 voxels none of which windowing put at
    a limit of [0, 1]. 0 where there are too few of them to tell: a mask has no noise.
    """
    details, inside = volume[0], (volume[0] > 0.0) & (volume[0] < 1.0)
    for axis in range(3):  # Haar's details along all three axes, of every cell
        cells = details.shape[axis] - 1
        details = details.narrow(axis, 1, cells) - details.narrow(axis, 0, cells)
        inside = inside.narrow(axis, 1, cells) & inside.narrow(axis, 0, cells)
    seen = details[inside].abs() / math.sqrt(8.0)
    return float(seen.median()) * DEVIATIONS_OF_MEDIAN if len(seen) >= FEWEST_CELLS else 0.0


def noise_floor_db(deviation: float) -> float:
    """PSNR (the peak is 1) of what differs from a scan by its noise alone; infinite without noise."""
    return -20.0 * math.log10(deviation) if deviation > 0.0 else math.inf


class NoiseShare:
    """Share of a scan's noise in the variance of its latents, over the scans added.

    As much noise again as was measured is put on a scan, and its latents change by as much as its own noise
    made them: exact for linear encoders, and white noise.
    """

    def __init__(self) -> None:
        self._count, self._sums = 0, torch.zeros(3, 1, dtype=torch.float64)  # of change², latent, latent²; c

    def add(self, volume: Float[Tensor, "1 D H W"], deviation: float, tokenizer: Tokenizer) -> None:
        """Count a scan whose noise has this deviation; what is drawn depends on how many came before."""
        draws = torch.Generator().manual_seed(self._count)
        noisier = volume + deviation * torch.randn(volume.shape, generator=draws)
        latents, moved = tokenizer.encode(torch.stack([volume, noisier])).flatten(2).double()  # c, positions
        self._count += latents.shape[1]
        sums = torch.stack([(moved - latents).square().sum(1), latents.sum(1), latents.square().sum(1)])
        self._sums = self._sums + sums

    def shares(self) -> tuple[float, float]:
        """Of all channels together, and of the channel that holds most of it."""
        change, total, squares = self._sums / self._count
        variance = squares - total.square()
        return float(change.sum() / variance.sum()), float((change / variance).max())
