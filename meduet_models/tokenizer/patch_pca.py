"""Patches of a volume, their moments as sums that add over sites, and their PCA as a linear tokenizer.

A volume is cut into cubes of 4 voxels a side, 64 numbers each. Sites send how many patches they have, their
sum and their second moment: the sums of two sites are the sums of their union, so the components computed
from them are those of the pooled patches. What it does not do: decide who may see the sums
(`client/release.py`).

Axes: b = volumes, p = voxels of a patch (64), c = latent channels, D H W = voxels, d h w = patches.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

PATCH_EDGE = 4
PATCH_VOXELS = PATCH_EDGE**3


def to_patches(volumes: Float[Tensor, "b 1 D H W"]) -> Float[Tensor, "b p d h w"]:
    """Cut volumes into 4 x 4 x 4 patches, whose voxels become channels. Sides must be multiples of 4."""
    b, _, *sides = volumes.shape
    if any(side % PATCH_EDGE for side in sides):
        raise ValueError(
            f"Expected volume sides that are multiples of {PATCH_EDGE}; got {tuple(sides)}. Crop or pad."
        )
    d, h, w = (side // PATCH_EDGE for side in sides)
    cut = volumes.reshape(b, d, PATCH_EDGE, h, PATCH_EDGE, w, PATCH_EDGE)
    return cut.permute(0, 2, 4, 6, 1, 3, 5).reshape(b, PATCH_VOXELS, d, h, w)


def from_patches(patches: Float[Tensor, "b p d h w"]) -> Float[Tensor, "b 1 D H W"]:
    """Lay patches side by side again: the inverse of `to_patches`."""
    b, _, d, h, w = patches.shape
    e = PATCH_EDGE
    laid = patches.reshape(b, e, e, e, d, h, w).permute(0, 4, 1, 5, 2, 6, 3)
    return laid.reshape(b, 1, d * e, h * e, w * e)


@dataclass(frozen=True, eq=False)
class PatchMoments:
    """Count, sum and second moment of patches, in float64: what a site sends so that all share one PCA."""

    count: float
    """Patches."""
    total: Float[Tensor, " p"]
    """Their sum."""
    products: Float[Tensor, "p p"]
    """Sum of their outer products."""

    @staticmethod
    def of(volumes: Float[Tensor, "b 1 D H W"]) -> "PatchMoments":
        """Moments of all patches of `volumes`."""
        patches = to_patches(volumes).to(torch.float64).movedim(1, -1).reshape(-1, PATCH_VOXELS)  # patches p
        return PatchMoments(float(len(patches)), patches.sum(0), patches.T @ patches)

    def __add__(self, other: "PatchMoments") -> "PatchMoments":
        """Moments of the union."""
        return PatchMoments(
            self.count + other.count, self.total + other.total, self.products + other.products
        )

    def to_vector(self) -> Float[Tensor, " v"]:
        """One float64 vector of 1 + 64 + 64 * 64 sums; vectors of sites may be added."""
        count = self.total.new_tensor([self.count])
        return torch.cat([count, self.total, self.products.reshape(-1)])

    @staticmethod
    def from_vector(vector: Float[Tensor, " v"]) -> "PatchMoments":
        """Rebuild moments from `to_vector`'s vector, or from a sum of several."""
        expected = 1 + PATCH_VOXELS + PATCH_VOXELS**2
        if len(vector) != expected:
            raise ValueError(f"Expected a vector of {expected} patch sums; got {len(vector)}.")
        vector = vector.to(torch.float64)
        total, products = torch.split(vector[1:], [PATCH_VOXELS, PATCH_VOXELS**2])
        return PatchMoments(float(vector[0]), total, products.reshape(PATCH_VOXELS, PATCH_VOXELS))


@dataclass(frozen=True, eq=False)
class PatchComponents:
    """Principal components of patches, largest variance first."""

    mean: Float[Tensor, " p"]
    """Mean patch."""
    basis: Float[Tensor, "c p"]
    """Orthonormal components; the entry of largest magnitude is positive, so that signs are everybody's."""
    variances: Float[Tensor, " c"]
    """Variance along each."""


def principal_components(moments: PatchMoments, channels: int) -> PatchComponents:
    """Components of the patches whose moments are given, in float64.

    Raises `ValueError` unless 1 <= channels <= 64 and there are more patches than channels.
    """
    if not 1 <= channels <= PATCH_VOXELS:
        raise ValueError(f"Expected 1 to {PATCH_VOXELS} latent channels; got {channels}.")
    if moments.count <= channels:
        raise ValueError(f"Expected more than {channels} patches; got {moments.count:g}. Add volumes.")
    mean = moments.total / moments.count
    covariance = moments.products / moments.count - torch.outer(mean, mean)
    variances, vectors = torch.linalg.eigh(covariance)  # ascending
    basis = vectors.T.flip(0)[:channels]
    largest = basis.abs().argmax(dim=1, keepdim=True)
    return PatchComponents(
        mean=mean,
        basis=basis * basis.gather(1, largest).sign(),
        variances=variances.flip(0)[:channels].clamp_min(0.0),
    )


class PatchPCA(nn.Module):
    """The linear tokenizer: each patch becomes its coordinates along the principal components.

    Divided by one number, the root mean square of all coordinates, so that latents have about unit variance
    while the channels keep their relative sizes (whitened, the last channels would be noise made loud).
    """

    mean: Tensor
    basis: Tensor
    scale: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(PATCH_VOXELS))
        self.register_buffer("basis", torch.zeros(channels, PATCH_VOXELS))
        self.register_buffer("scale", torch.ones(()))

    @torch.no_grad()
    def start_from(self, components: PatchComponents) -> None:
        """Take over `components` (cast to this module's dtype)."""
        self.mean.copy_(components.mean)
        self.basis.copy_(components.basis)
        self.scale.copy_(components.variances.mean().sqrt().clamp_min(1e-6))

    def posterior_mean(self, volumes: Float[Tensor, "b 1 D H W"]) -> Float[Tensor, "b c d h w"]:
        """Coordinates of every patch."""
        kernel = (self.basis / self.scale)[:, :, None, None, None]
        patches = to_patches(volumes) - self.mean[:, None, None, None]
        return functional.conv3d(patches, kernel)

    def reconstruct(self, latents: Float[Tensor, "b c d h w"]) -> Float[Tensor, "b 1 D H W"]:
        """The volumes nearest to these coordinates."""
        kernel = (self.basis * self.scale).T[:, :, None, None, None]
        return from_patches(functional.conv3d(latents, kernel) + self.mean[:, None, None, None])
