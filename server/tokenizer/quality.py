"""How well a tokenizer keeps a scan: PSNR and SSIM of volumes decoded from their own latents, beside the
scans' noise (`noise.py`), which it cannot keep and should not.

Measured on phantoms that training never drew, or on a folder of NIfTI files. What it does not do: train, or
prepare scans as a hospital does (`scans/volumes.py`): files are taken on their own grid, windowed by
percentiles, and cropped or padded about their centre to sides the tokenizer can take.

Axes: D H W = voxels.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import nibabel
import numpy as np
import torch
from nibabel.filebasedimages import ImageFileError
from torch import Tensor
from torch.nn import functional

from meduet_models.tokenizer.tokenizer import STRIDE, Tokenizer
from server.tokenizer.noise import NoiseShare, noise_deviation, noise_floor_db

PERCENTILES = (0.5, 99.5)  # that become 0 and 1
SSIM_WINDOW = 11  # voxels; MONAI's default


@dataclass(frozen=True)
class Quality:
    """Means over volumes, intensities in [0, 1] (reconstructions clipped to it)."""

    psnr_db: float
    """Peak signal-to-noise ratio; the peak is 1."""
    ssim: float
    """Structural similarity, 3-D, Gaussian window of 11 voxels."""
    num_volumes: int
    """Volumes measured."""
    noise_floor_db: float
    """PSNR of a codec that loses nothing but the noise; of the volumes with noise, infinite if none."""
    noise_share: float
    """Of noise in the variance of the latents, of the volumes with noise; 0 if none."""
    largest_noise_share: float
    """The same, of the channel that holds most."""


def measure(
    tokenizer: Tokenizer, volumes: Iterable[Tensor], report: Callable[[int], None] = lambda count: None
) -> Quality:
    """Quality over `volumes`, each float32 [1 D H W] in [0, 1], one by one; `report` is called after each.

    Raises `ValueError` when there are none.
    """
    # Imported here: MONAI takes a second, and the command line should answer --help without it.
    from monai.metrics.regression import PSNRMetric, SSIMMetric

    psnr, ssim = PSNRMetric(max_val=1.0), SSIMMetric(spatial_dims=3, data_range=1.0, win_size=SSIM_WINDOW)
    values: list[tuple[float, float]] = []
    floors: list[float] = []
    share = NoiseShare()
    for volume in volumes:
        decoded = tokenizer.decode(tokenizer.encode(volume[None])).clamp(0.0, 1.0)
        values.append((float(psnr(decoded, volume[None])), float(ssim(decoded, volume[None]))))
        if deviation := noise_deviation(volume):
            floors.append(noise_floor_db(deviation))
            share.add(volume, deviation, tokenizer)
        report(len(values))
    if not values:
        raise ValueError("Expected at least one volume to measure; got none.")
    psnr_db, similarity = np.mean(values, axis=0)
    overall, largest = share.shares() if floors else (0.0, 0.0)
    return Quality(
        float(psnr_db),
        float(similarity),
        len(values),
        noise_floor_db=float(np.mean(floors)) if floors else math.inf,
        noise_share=overall,
        largest_noise_share=largest,
    )


def list_scans(folder: Path, pattern: str) -> list[Path]:
    """Files under `folder` that match `pattern`, sorted; none raises `ValueError`."""
    if not folder.is_dir():
        raise ValueError(f"Expected a folder of NIfTI files at {folder}; there is none. Check --data.")
    if not (paths := sorted(path for path in folder.glob(pattern) if path.is_file())):
        raise ValueError(f"Expected files that match {pattern} under {folder}; found none. Check --pattern.")
    return paths


def read_volumes(paths: Iterable[Path], shape: tuple[int, int, int] | None) -> Iterator[Tensor]:
    """Read scans as float32 [1 D H W] in [0, 1], RAS, at `shape`, or at their own size cut to multiples of 4.

    Sides too short for the similarity's window are padded by zeros. Raises `ValueError` on a file that is
    not a 3-D NIfTI image of finite, varying numbers.
    """
    for path in paths:
        try:
            image = nibabel.as_closest_canonical(nibabel.load(path))
            values = np.asarray(image.dataobj, dtype=np.float32)
        except (ImageFileError, OSError, EOFError, ValueError) as error:
            raise ValueError(f"Expected {path} to be a readable NIfTI image; {error}") from None
        if values.ndim != 3 or not np.isfinite(values).all() or values.max() == values.min():
            raise ValueError(
                f"Expected {path} to be 3-D, finite and not constant; got shape {values.shape}. Leave it out."
            )
        low, high = np.percentile(values, PERCENTILES)
        scaled = np.clip((values - low) / max(high - low, 1e-6), 0.0, 1.0).astype(np.float32)
        smallest = -(-SSIM_WINDOW // STRIDE) * STRIDE
        sides = shape or tuple(max(smallest, side // STRIDE * STRIDE) for side in values.shape)
        yield _centred(torch.from_numpy(scaled), sides)[None]


def _centred(volume: Tensor, sides: tuple[int, ...]) -> Tensor:
    """Crop or zero-pad about the centre."""
    padding: list[int] = []
    for side, wanted in zip(reversed(volume.shape), reversed(sides), strict=True):
        before = (wanted - side) // 2
        padding += [before, wanted - side - before]
    return functional.pad(volume, padding)
