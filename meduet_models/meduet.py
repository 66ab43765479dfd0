"""The MeDUET network: latents -> (content, style) tokens -> latents."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class NetworkConfig:
    """Size and shape of the MeDUET network. Presets live in conf/network/*.yaml."""

    latent_channels: int
    """Channels of the tokenizer's latents."""
    latent_grid: tuple[int, int, int]
    """Latent voxels per axis; each must be a multiple of `patch_size`."""
    patch_size: int
    """Edge of a token in latent voxels."""
    width: int
    """Encoder width."""
    depth: int
    """Encoder blocks."""
    heads: int
    """Encoder attention heads."""
    decoder_width: int
    """Decoder width."""
    decoder_depth: int
    """Decoder blocks."""
    decoder_heads: int
    """Decoder attention heads."""
    style_ratio: float = 0.25
    """Style channels over content channels."""
    factor_paths: Literal["split", "joint"] = "split"
    """`joint`: both factors from one encoder, as published. `split`: content from normalised latents,
    style from the statistics that the normalisation removed."""
    style_map_grid: tuple[int, int, int] = (2, 3, 2)
    """Coarse mean map that the split style path reads (and that sites exchange)."""
