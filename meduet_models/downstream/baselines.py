"""Baselines that learn from labels without pretraining: what a pretrained encoder has to be above.

- the mean label: of every voxel (or scan) the mean over the training patients; reads no scan;
- ridge per position: the labels of a token's cube from the raw latents of the token at that place, or of it
  and its neighbours; no encoder (a class or number per scan is read from them as from content, `frozen.py`);
- a U-Net over the prepared volume at full resolution, which is all of MONAI and nothing of ours.

All but the last are closed forms whose penalty is chosen by leaving out training patients (`ridge.py`). What
this file does not do: it pretrains nothing, draws no patient, and measures nothing.

Axes: b = scans, n = tokens, p = values in a token, q = classes (1 for a number), D H W = voxels, v = voxels
in the cube of a token.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn

from meduet_models.downstream.networks import initialise
from meduet_models.probes.hidden import Grid
from meduet_models.probes.ridge import fit_ridge
from meduet_models.tokens import patchify, unpatchify

Fitted = Callable[[Float[Tensor, "b n p"]], Float[Tensor, "b ..."]]
"""Tokens of scans to the outputs of a task."""

_VOLUME_CHANNELS, _VOLUME_STRIDES = (16, 32, 64), (2, 2)


def mean_label(answers: Tensor, classes: int) -> Float[Tensor, "..."]:
    """The mean answer: shares of the classes [q D H W] of label maps [b 1 D H W], [q] of classes [b]; [1] of
    numbers [b]."""
    if answers.is_floating_point():
        return answers.mean(0, keepdim=True)
    shares = F.one_hot(answers, classes).float().mean(0)  # ... q
    return shares[0].movedim(-1, 0) if answers.ndim == 5 else shares


def fit_per_position(
    tokens: Float[Tensor, "b n p"],
    labels: Int64[Tensor, "b 1 D H W"],
    classes: int,
    grid: Grid,
    patients: Sequence[str],
    seed: int,
) -> Fitted:
    """A ridge for each token of the grid, to the classes of the voxels in its cube; one alpha for all.

    Voxels of a token's cube that are of one class in every training scan keep it. Outputs are scores of the
    classes, [b q D H W]. Raises `ValueError` for labels whose grid is no multiple of the token grid.
    """
    cube = {size // axis for size, axis in zip(labels.shape[2:], grid, strict=True)}
    if len(cube) > 1 or any(size % axis for size, axis in zip(labels.shape[2:], grid, strict=True)):
        raise ValueError(f"Expected labels on whole cubes of tokens {grid}; got {tuple(labels.shape[2:])}.")
    (edge,) = cube
    shares = F.one_hot(labels[:, 0], classes).movedim(-1, 1).float()  # b q D H W
    targets = patchify(shares[:, 1:], edge).transpose(0, 1)  # n b (q-1)·v; the background is what is left
    fitted = fit_ridge(tokens.transpose(0, 1), targets, patients, seed=seed)

    def scores(unseen: Float[Tensor, "b n p"]) -> Float[Tensor, "b q D H W"]:
        foreground = unpatchify(fitted(unseen.transpose(0, 1)).transpose(0, 1).float(), grid, edge)
        return torch.cat([1 - foreground.sum(1, keepdim=True), foreground], dim=1)

    return scores


class PlainVolumeUNet(nn.Module):
    """MONAI's U-Net on the volume: three resolutions, residual units, instance norm."""

    def __init__(self, outputs: int, *, per_voxel: bool, seed: int = 0) -> None:
        """`per_voxel`: so many outputs per voxel, or per scan (the mean over its voxels)."""
        from monai.networks.nets import UNet  # MONAI takes seconds to import

        super().__init__()
        self.per_voxel = per_voxel
        with torch.device("meta"):  # no global random numbers for weights that are replaced at once
            self.unet = UNet(3, 1, outputs, _VOLUME_CHANNELS, _VOLUME_STRIDES, num_res_units=2)
        initialise(self.unet, seed)

    def forward(
        self, volumes: Float[Tensor, "b 1 D H W"]
    ) -> Float[Tensor, "b q D H W"] | Float[Tensor, "b q"]:
        """Outputs per voxel, or per scan. Every axis is a multiple of 4."""
        outputs: Tensor = self.unet(volumes)
        return outputs if self.per_voxel else outputs.mean((2, 3, 4))
