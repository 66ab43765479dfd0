"""A U-Net that sees the volume itself: voxels in, features at half the resolution out.

The stem moves each cube of two voxels per edge into channels (space to depth), so that no convolution runs at
full resolution, which is what costs time on a CPU; three levels, at a half, a quarter and an eighth of the
resolution, and back up. Each volume is standardised before anything looks at it. At its deepest level it can
be told something else about the place (content tokens, say), which is added to what it sees there.

Does not do: read files, train, or predict classes (`downstream/volume_networks.py`). Its start from public
anatomy is `anatomy_start.py`.

Axes: b = volumes, k = features, D H W = voxels, d h w = a level's grid.
Source: U-Net (arXiv:1505.04597); instance norm and leaky units as in nnU-Net (arXiv:1809.10486); space to
depth is the inverse of sub-pixel convolution (arXiv:1609.05158).
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

WIDTHS = (16, 48, 96)
"""Features at a half, a quarter and an eighth of the resolution."""
STEM = 2
"""Voxels per edge that the stem moves into channels."""
REDUCTION = STEM * 2 ** (len(WIDTHS) - 1)
"""Voxels per edge of a cell of the deepest level."""
_SLOPE = 0.01
_EPS = 1e-5


class ConvolutionBlock(nn.Module):
    """A 3 x 3 x 3 convolution, instance norm, leaky rectifier."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.convolution = nn.Conv3d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        self.norm = nn.InstanceNorm3d(outputs, eps=_EPS, affine=True)

    def forward(self, x: Float[Tensor, "b j d h w"]) -> Float[Tensor, "b k e f g"]:
        """Features of a neighbourhood."""
        out: Tensor = F.leaky_relu(self.norm(self.convolution(x)), _SLOPE)
        return out


class VolumeLevels(nn.Module):
    """The way down: volumes to features at a half, a quarter and an eighth of their resolution."""

    def __init__(self) -> None:
        """On the meta device: `start_weights` makes the weights."""
        super().__init__()
        fine, middle, deep = WIDTHS
        with torch.device("meta"):  # no global random numbers for weights that are replaced at once
            self.stem = nn.Sequential(ConvolutionBlock(STEM**3, fine), ConvolutionBlock(fine, fine))
            self.down_middle = nn.Sequential(
                ConvolutionBlock(fine, middle, stride=2), ConvolutionBlock(middle, middle)
            )
            self.down_deep = nn.Sequential(
                ConvolutionBlock(middle, deep, stride=2),
                ConvolutionBlock(deep, deep),
                ConvolutionBlock(deep, deep),
            )

    def levels(
        self, volumes: Float[Tensor, "b 1 D H W"]
    ) -> tuple[Float[Tensor, "b 16 e f g"], Float[Tensor, "b 48 i j k"], Float[Tensor, "b 96 d h w"]]:
        """Features of each level, finest first.

        Raises `ValueError` when a side is not a multiple of `REDUCTION`: `padded` makes it one.
        """
        check_sides(tuple(volumes.shape[2:]))
        fine = self.stem(space_to_depth(standardised(volumes)))
        middle = self.down_middle(fine)
        return fine, middle, self.down_deep(middle)

    def deepest(self, volumes: Float[Tensor, "b 1 D H W"]) -> Float[Tensor, "b 96 d h w"]:
        """Features of the deepest level, one cell per `REDUCTION` voxels along each axis."""
        return self.levels(volumes)[2]


class VolumeUNet(VolumeLevels):
    """Volumes to features at half their resolution; .94 million weights."""

    def __init__(self, *, seed: int = 0) -> None:
        """He's start, from `seed` alone, whatever was drawn before."""
        super().__init__()
        fine, middle, deep = WIDTHS
        with torch.device("meta"):
            self.up_middle = ConvolutionBlock(deep + middle, middle)
            self.up_fine = nn.Sequential(ConvolutionBlock(middle + fine, fine), ConvolutionBlock(fine, fine))
        start_weights(self, seed)

    def forward(
        self, volumes: Float[Tensor, "b 1 D H W"], beside: Float[Tensor, "b k d h w"] | None = None
    ) -> Float[Tensor, "b 16 e f g"]:
        """Features at half the resolution; `beside` (of `deepest_grid`, as wide as the deepest level) is
        added there. Raises as `levels`."""
        fine, middle, deep = self.levels(volumes)
        if beside is not None:
            deep = deep + beside
        middle = self.up_middle(torch.cat([_doubled(deep), middle], dim=1))
        out: Tensor = self.up_fine(torch.cat([_doubled(middle), fine], dim=1))
        return out


def deepest_grid(sides: tuple[int, ...]) -> tuple[int, int, int]:
    """Cells of the deepest level for volumes of these sides (padded up)."""
    d, h, w = (-(-side // REDUCTION) for side in sides)
    return d, h, w


def check_sides(sides: tuple[int, ...]) -> None:
    """Raise `ValueError` unless the levels divide these sides."""
    if any(side % REDUCTION for side in sides):
        raise ValueError(f"Expected volume sides that are multiples of {REDUCTION}; got {sides}.")


def padded(volumes: Float[Tensor, "b c D H W"]) -> Float[Tensor, "b c E F G"]:
    """Edges repeated behind until the levels divide every side; as it was where they do."""
    behind = [-side % REDUCTION for side in volumes.shape[2:]]
    if not any(behind):
        return volumes
    return F.pad(volumes, (0, behind[2], 0, behind[1], 0, behind[0]), mode="replicate")


def standardised(volumes: Float[Tensor, "b 1 D H W"]) -> Float[Tensor, "b 1 D H W"]:
    """Mean 0 and deviation 1 of every volume: gain and offset of a scanner are gone."""
    deviation, mean = torch.std_mean(volumes.float(), dim=(1, 2, 3, 4), keepdim=True, correction=0)
    return (volumes - mean) / deviation.clamp_min(1e-3)


def space_to_depth(volumes: Float[Tensor, "b 1 D H W"]) -> Float[Tensor, "b 8 d h w"]:
    """Each cube of two voxels per edge as channels: nothing is lost, no voxel is left at full resolution."""
    b, _, *sides = volumes.shape
    d, h, w = (side // STEM for side in sides)
    x = volumes.reshape(b, d, STEM, h, STEM, w, STEM).permute(0, 2, 4, 6, 1, 3, 5)
    return x.reshape(b, STEM**3, d, h, w)


def depth_to_space(x: Float[Tensor, "b k d h w"], edge: int) -> Float[Tensor, "b j D H W"]:
    """The inverse, for cubes of `edge` voxels and any number of channels: sub-voxel shuffle."""
    b, _, *grid = x.shape
    cubes = x.reshape(b, -1, edge, edge, edge, *grid).permute(0, 1, 5, 2, 6, 3, 7, 4)
    return cubes.reshape(b, -1, *(edge * cells for cells in grid))


def start_weights(module: nn.Module, seed: int) -> None:
    """Give modules made on the meta device He's weights, norms of 1, and biases of 0, from `seed` alone."""
    module.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(seed)
    for part in module.modules():
        match part:
            case nn.Conv3d() | nn.Linear():
                nn.init.kaiming_normal_(part.weight, a=_SLOPE, generator=generator)
            case nn.InstanceNorm3d():
                nn.init.ones_(part.weight)
            case _:
                continue
        if part.bias is not None:
            nn.init.zeros_(part.bias)


def _doubled(x: Float[Tensor, "b k d h w"]) -> Float[Tensor, "b k e f g"]:
    return F.interpolate(x, scale_factor=2, mode="trilinear", align_corners=False)
