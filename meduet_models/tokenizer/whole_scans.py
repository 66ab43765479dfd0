"""Whole scans through the tokenizer: a window slides over them, in whole cells, and neighbours overlap.

What a window gives near its sides lacks the neighbourhood beyond. How far that reaches is known of our own
codecs: there each window gives only what its sides do not reach, and all together are the whole at once, to
rounding. MAISI normalises over its whole window and has no such reach: there windows are blended by MONAI's
Gaussian, and what a window's place changes stays.

What this file does not do: hold more than the volume, its latents, and one window's work.

Axes: c = latent channels, D H W = voxels, d h w = D/4 H/4 W/4.
"""

from collections.abc import Callable
from itertools import product

import torch
from jaxtyping import Float
from torch import Tensor

from meduet_models.tokenizer.patch_pca import PatchPCA
from meduet_models.tokenizer.patch_vae import PatchVAE
from meduet_models.tokenizer.tokenizer import OVERLAP, STRIDE, Tokenizer
from meduet_models.windows import window_starts

WINDOW = 40
"""Cells per axis of the window of a codec with a known reach: 160 voxels, 4.1 million at once."""
WINDOW_OF_OTHERS = 20
"""Cells per axis for others, where the tokenizer names no window: MAISI's published 80 voxels."""
Map = Callable[[Tensor], Tensor]


def encode_whole(
    tokenizer: Tokenizer, volume: Float[Tensor, "1 D H W"], device: torch.device | str = "cpu"
) -> Float[Tensor, "c d h w"]:
    """Latents of a whole volume, on the CPU; windows are encoded on `device`, where the tokenizer is.

    Raises `ValueError` when a side is not a multiple of the stride.
    """
    if any(side % STRIDE for side in volume.shape[1:]):
        raise ValueError(
            f"Expected volume sides that are multiples of {STRIDE}; got {tuple(volume.shape[1:])}."
        )
    return _slide(volume, tokenizer, encoder=True, device=torch.device(device))


def decode_whole(
    tokenizer: Tokenizer, latents: Float[Tensor, "c d h w"], device: torch.device | str = "cpu"
) -> Float[Tensor, "1 D H W"]:
    """The volume of whole latents, on the CPU, not clipped; windows are decoded on `device`."""
    return _slide(latents, tokenizer, encoder=False, device=torch.device(device))


def reach_of(tokenizer: Tokenizer, *, encoder: bool) -> int | None:
    """Cells beyond which a latent (or, of the decoder, a voxel) depends on nothing; None: on everything."""
    match tokenizer.codec:
        case PatchPCA():
            return 0
        case PatchVAE(encoder=layers) if encoder:
            return 2 * (len(layers) - 2)  # two 3 x 3 x 3 convolutions in each block, between two other layers
        case PatchVAE(decoder=layers):
            return 1 + 2 * (len(layers) - 2)
        case _:
            return None


def _slide(x: Tensor, tokenizer: Tokenizer, *, encoder: bool, device: torch.device) -> Tensor:
    function: Map = tokenizer.encode if encoder else tokenizer.decode
    edge, grain = (STRIDE, 1) if encoder else (1, STRIDE)  # elements of a cell in what goes in, and comes out
    cells = tuple(side // edge for side in x.shape[1:])
    reach, named = reach_of(tokenizer, encoder=encoder), tokenizer.sliding_window
    wanted = (WINDOW if reach is not None else WINDOW_OF_OTHERS,) * 3
    if named is not None:
        wanted = (named[0] // STRIDE, named[1] // STRIDE, named[2] // STRIDE)
    window = tuple(min(want, side) for want, side in zip(wanted, cells, strict=True))
    if reach is None or any(w <= 2 * reach for w, side in zip(window, cells, strict=True) if w < side):
        return _blend(x, window, edge, function, device)
    return _tile(x, cells, window, reach, (edge, grain), function, device)


def _tile(
    x: Tensor,
    cells: tuple[int, ...],
    window: tuple[int, ...],
    reach: int,
    elements: tuple[int, int],
    function: Map,
    device: torch.device,
) -> Tensor:
    """Windows side by side, each without what lies within `reach` of a side that is none of the whole."""
    edge, grain = elements
    made: Tensor | None = None
    sides = [window_starts(n, w, max(1, w - 2 * reach)) for n, w in zip(cells, window, strict=True)]
    for starts in product(*sides):
        spans = list(zip(starts, window, cells, strict=True))
        part = x[:, *(slice(a * edge, (a + w) * edge) for a, w, _ in spans)]
        given = function(part[None].to(device))[0].cpu()
        if made is None:
            made = torch.empty(len(given), *(n * grain for n in cells))
        owned = [(a + reach * (a > 0), a + w - reach * (a + w < n), a) for a, w, n in spans]
        made[:, *(slice(a * grain, b * grain) for a, b, _ in owned)] = given[
            :, *(slice((a - start) * grain, (b - start) * grain) for a, b, start in owned)
        ]
    assert made is not None, "at least one window"
    return made


def _blend(x: Tensor, window: tuple[int, ...], edge: int, function: Map, device: torch.device) -> Tensor:
    # Imported here: MONAI takes a second to import, and crops do not need it.
    from monai.inferers.utils import sliding_window_inference

    steps = [max(1, int(w * (1 - OVERLAP))) for w in window]
    # MONAI steps by int(window * (1 - overlap)); half an element more keeps rounding on our side.
    overlap = [max(0.0, 1 - (s * edge + 0.5) / (w * edge)) for s, w in zip(steps, window, strict=True)]
    blended: Tensor = sliding_window_inference(
        x[None], tuple(w * edge for w in window), 1, function, overlap=overlap, mode="gaussian",
        sw_device=device, device=torch.device("cpu"),
    )  # fmt: skip
    return blended[0]
