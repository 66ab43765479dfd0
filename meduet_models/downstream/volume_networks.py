"""Segmenters that see the volume: a U-Net on it, alone or with content tokens joined at its deepest level.

The U-Net's features, at half the resolution, and the voxels themselves, moved into channels, are read out to
full resolution by a sub-voxel shuffle: what is drawn at a border comes from the voxels at that border. Joined
tokens are brought to the grid of the deepest level and added there through a map that starts at zero, so that
the joined network begins as the U-Net alone. A network starts from public anatomy or from its seed.

Does not do: train (`client/training/finetuning.py`), or augment (`augmentation.py`).

Axes: b = scans, c = latent channels, d h w = latent voxels, D H W = voxels, n = tokens, k = content channels.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from meduet_models.downstream.networks import ContentEncoder
from meduet_models.meduet import FactorNetwork
from meduet_models.seeds import seed_of
from meduet_models.volume_unet import (
    STEM,
    WIDTHS,
    ConvolutionBlock,
    VolumeUNet,
    deepest_grid,
    depth_to_space,
    padded,
    space_to_depth,
    standardised,
    start_weights,
)


class VolumeEncoder(nn.Module):
    """What a volume segmenter starts from: the U-Net's body and, joined, the pretrained content branch."""

    def __init__(self, body: VolumeUNet, content: ContentEncoder | None) -> None:
        super().__init__()
        self.body = body
        self.content = content


class VolumeSegmenter(nn.Module):
    """Volumes (and latents, where content is joined) to a class per voxel."""

    def __init__(
        self,
        body: VolumeUNet,
        classes: int,
        *,
        content: FactorNetwork | None = None,
        trainable: bool = True,
        seed: int = 0,
    ) -> None:
        """Around `body` itself and a copy of `content`; heads start from `seed`, whatever was drawn
        before."""
        super().__init__()
        joined = None if content is None else ContentEncoder(content, trainable=trainable)
        self.encoder = VolumeEncoder(body.requires_grad_(trainable), joined)
        fine, _, deep = WIDTHS
        with torch.device("meta"):  # no global random numbers for weights that are replaced at once
            parts: dict[str, nn.Module] = {
                "mix": ConvolutionBlock(fine + STEM**3, fine),
                "predict": nn.Conv3d(fine, classes * STEM**3, 1),
            }
            if content is not None:
                parts["join"] = nn.Linear(content.config.width, deep)
            self.head = nn.ModuleDict(parts)
        start_weights(self.head, seed_of("fedmeduet volume head", seed))
        if content is not None:
            self.token_grid = content.config.token_grid
            nn.init.zeros_(self.head["join"].weight)  # type: ignore[arg-type]

    @property
    def reads_latents(self) -> bool:
        """Whether content tokens are joined."""
        return self.encoder.content is not None

    def forward(
        self, volumes: Float[Tensor, "b 1 D H W"], latents: Float[Tensor, "b c d h w"] | None = None
    ) -> Float[Tensor, "b classes D H W"]:
        """Logits on the grid of the volumes; `latents` of the same scans where content is joined."""
        sides = volumes.shape[2:]
        volumes = padded(volumes)
        features = self.encoder.body(volumes, self._tokens(latents, tuple(volumes.shape[2:])))
        voxels = space_to_depth(standardised(volumes))
        mixed = self.head["mix"](torch.cat([features, voxels], dim=1))
        logits = depth_to_space(self.head["predict"](mixed), STEM)
        return logits[:, :, : sides[0], : sides[1], : sides[2]]

    def _tokens(self, latents: Tensor | None, sides: tuple[int, ...]) -> Tensor | None:
        """Content on the grid of the deepest level; None where none is joined."""
        if self.encoder.content is None:
            return None
        assert latents is not None, "a joined network is shown latents, too"
        tokens = self.head["join"](self.encoder.content(latents)[0])  # b n deepest width
        grid = tokens.transpose(1, 2).unflatten(2, self.token_grid)
        return F.interpolate(grid, size=deepest_grid(sides), mode="trilinear", align_corners=False)
