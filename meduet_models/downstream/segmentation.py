"""Segmentation: a class of every voxel.

The head: content tokens and hidden states of the encoder, brought from the token grid to the latent grid,
joined with the latents, read out to voxels by a sub-voxel shuffle; as UNETR, but without convolutions at full
resolution, which take the time on a CPU, and with MONAI's residual units, whose shortcuts are not normalised
(UNETR's blocks, norms affine, reached a Dice of .35 in 100 steps on 20 scans where these reach .66). Loss:
Dice with cross-entropy, as nnU-Net. Overlap and distances are MONAI's, brought to one number per scan.

Axes: b = scans, c = latent channels, d h w = latent voxels, D H W = voxels, n = tokens, k = content channels.
Source: UNETR (arXiv:2103.10504) for skips of hidden states; sub-pixel convolution (arXiv:1609.05158).
"""

import warnings
from collections.abc import Callable, Mapping, Sequence

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from meduet_models.downstream.frozen import fit_voxels, frozen_tokens
from meduet_models.downstream.networks import WIDTH, ContentEncoder, PretrainedNetwork, initialise
from meduet_models.downstream.task import (
    Floats,
    Grid,
    KnownScans,
    Metric,
    Reading,
    Statistic,
    Target,
    Task,
    check_classes,
    mean_of_finite,
)
from meduet_models.factors import normalise
from meduet_models.meduet import FactorNetwork, NetworkConfig
from meduet_models.tokenizer.tokenizer import STRIDE
from meduet_models.volume_unet import depth_to_space


class SegmentationNetwork(PretrainedNetwork):
    """Latents to a class per voxel."""

    def __init__(self, network: FactorNetwork, classes: int, *, trainable: bool, seed: int = 0) -> None:
        """Around a copy of `network`; the head starts from `seed`, whatever was drawn before."""
        from monai.networks.blocks import Convolution, ResidualUnit  # MONAI takes seconds to import

        super().__init__()
        config = network.config
        self.encoder = ContentEncoder(network, trainable=trainable)
        self.token_grid = config.token_grid
        with torch.device("meta"):  # no global random numbers for weights that are replaced at once
            self.head = nn.ModuleDict(
                {
                    "narrow": nn.Linear(config.width * (1 + len(self.encoder.tapped)), 2 * WIDTH),
                    "mix": ResidualUnit(3, 2 * WIDTH, 2 * WIDTH),
                    "up": Convolution(3, 2 * WIDTH, WIDTH, config.patch_size, is_transposed=True),
                    "latents": ResidualUnit(3, 2 * config.latent_channels, WIDTH),
                    "join": ResidualUnit(3, 2 * WIDTH, WIDTH, last_conv_only=True),
                    "predict": nn.Conv3d(WIDTH, classes * STRIDE**3, 1),
                }
            )
        initialise(self.head, seed)

    def forward(self, latents: Float[Tensor, "b c d h w"]) -> Float[Tensor, "b classes D H W"]:
        """Logits on the grid of the volumes that were encoded."""
        content, states = self.encoder(latents)
        tokens = self.head["narrow"](torch.cat([content, *states], dim=2))  # b n, two widths
        grid = tokens.transpose(1, 2).unflatten(2, self.token_grid)
        up = self.head["up"](self.head["mix"](grid))  # b width d h w
        both = torch.cat([normalise(latents), self.encoder.branch.standardise(latents)], dim=1)
        joined = self.head["join"](torch.cat([up, self.head["latents"](both)], dim=1))
        return depth_to_space(self.head["predict"](joined), STRIDE)


class Segmentation(Task):
    """A class of every voxel, the background included."""

    name = "segmentation"
    per_voxel = True
    metrics = (
        Metric("dice", "Dice", main=True),
        Metric("surface_dice", "surface Dice"),
        Metric("hd95", "HD95 (mm)", digits=2),
    )

    def check(self, classes: int, target: Target) -> None:
        """No target: the answer is the label volume."""
        if target.name or target.values:
            raise ValueError(
                "target and target_values have no effect with task=segmentation: leave them out."
            )

    def classes(self, target: Target) -> int:
        """Counted from the labels."""
        return 0

    def words(self, target: Target) -> str:
        """A class of every voxel."""
        return "a class of every voxel"

    def known(self, scans: KnownScans, row: int, target: Target) -> bool:
        """Where there is a label volume."""
        return scans.has_label[row]

    def answers(self, scans: KnownScans, rows: Sequence[int], target: Target) -> Int64[Tensor, "b 1 D H W"]:
        """Label volumes."""
        labels = scans.labels(rows)
        assert labels is not None, "only scans with labels are asked for"
        return labels

    def check_answers(self, answers: Tensor, classes: int) -> None:
        """Classes from 0."""
        check_classes(answers, classes)

    def network(
        self, network: FactorNetwork, classes: int, *, trainable: bool, seed: int = 0
    ) -> SegmentationNetwork:
        """As above."""
        return SegmentationNetwork(network, classes, trainable=trainable, seed=seed)

    def seen(self, network: FactorNetwork, reading: Reading, latents: Tensor) -> Tensor:
        """Content tokens, whatever the `reading`."""
        return frozen_tokens(network, latents)

    def fit(
        self,
        seen: Tensor,
        answers: Tensor,
        patients: Sequence[str],
        classes: int,
        config: NetworkConfig,
        seed: int,
    ) -> Callable[[Tensor], Tensor]:
        """Ridge regressions position by position."""
        return fit_voxels(seen, answers, classes, patients, config, seed)

    def loss(
        self, outputs: Float[Tensor, "b classes D H W"], answers: Int64[Tensor, "b 1 D H W"]
    ) -> Float[Tensor, ""]:
        """Dice with cross-entropy."""
        from monai.losses import DiceCELoss

        loss: Tensor = DiceCELoss(to_onehot_y=True, softmax=True)(outputs, answers)
        return loss

    def score(self, outputs: Tensor, answers: Tensor) -> float:
        """Mean foreground Dice."""
        from monai.metrics import compute_dice

        predicted = likeliest(outputs)
        dice = compute_dice(predicted, answers, include_background=False, num_classes=outputs.shape[1])
        return float(dice.nanmean()) if bool(dice.isfinite().any()) else 0.0

    def measure(
        self, outputs: Tensor, answers: Tensor, target: Target, grid: Grid
    ) -> Mapping[str, Floats | Statistic]:
        """Overlap and distances of each scan."""
        return segmentation_values(
            likeliest(outputs),
            answers,
            classes=outputs.shape[1],
            spacing_mm=grid.spacing_mm,
            tolerance_mm=grid.tolerance_mm,
        )

    def measure_main(
        self, outputs: Tensor, answers: Tensor, target: Target, grid: Grid
    ) -> Mapping[str, Floats | Statistic]:
        """Dice of each scan, without the distances, which take the time."""
        return {"dice": dice_values(likeliest(outputs)[:, 0], answers[:, 0], outputs.shape[1])}


def likeliest(outputs: Float[Tensor, "b classes D H W"]) -> Int64[Tensor, "b 1 D H W"]:
    """The class of each voxel, the first of equals. As `argmax`, which takes eight to eleven times as long
    over an axis that is not the last (torch 2.13, CPU)."""
    return outputs.max(dim=1, keepdim=True).indices


def dice_values(predicted: Int64[Tensor, "b D H W"], truth: Int64[Tensor, "b D H W"], classes: int) -> Floats:
    """`dice` of `segmentation_values`, from counts of voxels."""
    pairs = (truth * classes + predicted).flatten(1)  # b voxels
    counted = torch.zeros(len(pairs), classes * classes, dtype=torch.float64)
    counted.scatter_add_(1, pairs, torch.ones(pairs.shape, dtype=torch.float64))
    table = counted.reshape(-1, classes, classes)  # b truth predicted
    both, true = table.diagonal(dim1=1, dim2=2)[:, 1:], table.sum(2)[:, 1:]
    total = true + table.sum(1)[:, 1:]
    dice = torch.where(true > 0, 2 * both / total.clamp(min=1), torch.nan)
    return mean_of_finite(dice.numpy())


def segmentation_values(
    predicted: Int64[Tensor, "b 1 D H W"],
    truth: Int64[Tensor, "b 1 D H W"],
    *,
    classes: int,
    spacing_mm: tuple[float, float, float],
    tolerance_mm: float,
) -> dict[str, Floats]:
    """`dice`, `surface_dice` (within `tolerance_mm`) and `hd95` (mm) of each scan: mean over the foreground
    classes that have a value, NaN where none has.

    A class that is in truth but not predicted has Dice 0, surface Dice 0, and no distance.
    """
    from monai.metrics import compute_dice, compute_hausdorff_distance, compute_surface_dice
    from monai.networks.utils import one_hot

    p, t = one_hot(predicted, classes), one_hot(truth, classes)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # MONAI's, of empty classes: they are counted here
        warnings.filterwarnings("ignore", "monai.*always_return_as_numpy", FutureWarning)  # MONAI's own call
        dice = compute_dice(p, t, include_background=False)
        surface = compute_surface_dice(p, t, [tolerance_mm] * (classes - 1), spacing=spacing_mm)
        hd95 = compute_hausdorff_distance(p, t, percentile=95, spacing=spacing_mm)
    absent = t[:, 1:].flatten(2).sum(2) == 0  # b class
    surface = torch.where(absent, torch.nan, surface.nan_to_num(nan=0.0))
    return {
        name: mean_of_finite(values.double().numpy())
        for name, values in {"dice": dice, "surface_dice": surface, "hd95": hd95}.items()
    }
