"""How the diffusion transformer starts: from nothing, or from the blocks of the pretrained MeDUET encoder.

The encoder's blocks have affine norms and no modulation; the transformer's have modulations and no affine
norms. A norm's weight w and bias b become the modulation's constant part, scale w - 1 and shift b, so that
attention and MLP compute exactly what they computed, but for a bias by distance (`network.attention`), which
the transformer has not. The gates stay at zero, as in DiT: each block begins as
the identity, and training opens it where it helps. With gates of 1 the whole stack stands between what is
told and the prediction, and learns slower than from nothing (docs/log.md). The prediction, too, starts at
zero.

The patch embedding is taken over too. The encoder sees each scan over its own spread (split paths), the
transformer deviations from the federated centre over the federated scale; so the embedding is multiplied, per
channel, by that scale over the spread of a typical scan.

What this file does not do: choose sizes; those of encoder and transformer must be equal.

Axes: k = width, c = latent channels.
Source: the fold is ours; zero gates are DiT's (arXiv:2212.09748).
"""

import torch
from torch import Tensor

from meduet_models.diffusion.settings import DiffusionTraining, TransformerShape
from meduet_models.diffusion.transformer import DiffusionBlock, DiffusionConfig, DiffusionTransformer
from meduet_models.meduet import FactorNetwork
from meduet_models.vit import Block


def first_transformer(
    config: DiffusionConfig, encoder: FactorNetwork, settings: DiffusionTraining, *, seed: int
) -> DiffusionTransformer:
    """A transformer as training begins (`settings.start`), with the encoder's latent scale.

    Raises `ValueError` when it is to start from an encoder of another size.
    """
    transformer = DiffusionTransformer(config, seed=seed)
    transformer.set_latent_scale(encoder.latent_mean.cpu(), encoder.latent_deviation.cpu())
    if settings.start == "encoder":
        start_from_encoder(transformer, encoder)
    return transformer


NO_UNET = (
    "A diffusion model has the encoder's blocks and no U-Net before them: with network.encoder=volume_unet "
    "set diffusion.training.start=scratch."
)


@torch.no_grad()
def start_from_encoder(transformer: DiffusionTransformer, encoder: FactorNetwork) -> None:
    """Take over the encoder's blocks and patch embedding; everything else stays as it is.

    Raises `ValueError` unless width, depth, heads, patch and latents are those of the encoder, and for one
    whose blocks read a U-Net's features.
    """
    if encoder.embed_volume is not None:
        raise ValueError(NO_UNET)
    shape, network = transformer.config.shape, encoder.config
    if problem := size_mismatch(shape, network.patch_size, network.width, network.depth, network.heads):
        raise ValueError(problem)
    latents = (network.latent_channels, *network.latent_grid)
    if latents != (transformer.config.latent_channels, *transformer.config.latent_grid):
        raise ValueError(f"Expected an encoder of the transformer's latents; its own are {latents}.")
    for block, theirs in zip(transformer.blocks, encoder.encoder.blocks, strict=True):
        assert isinstance(block, DiffusionBlock) and isinstance(theirs, Block)
        for name in ("qkv", "proj", "expand", "contract"):
            getattr(block, name).load_state_dict(getattr(theirs, name).state_dict())
        gate = torch.zeros_like(theirs.norm1.weight)
        norm1 = [theirs.norm1.bias, theirs.norm1.weight - 1, gate]  # shift, scale, gate
        norm2 = [theirs.norm2.bias, theirs.norm2.weight - 1, gate]
        block.modulation.weight.zero_()
        block.modulation.bias.copy_(torch.cat([*norm1, *norm2]))
    volume = shape.patch_size**3
    transformer.embed.weight.copy_(encoder.embed.weight * _spread(encoder).repeat_interleave(volume))
    transformer.embed.bias.copy_(encoder.embed.bias)


def size_mismatch(shape: TransformerShape, patch_size: int, width: int, depth: int, heads: int) -> str | None:
    """Why a transformer cannot start from an encoder of these sizes, in one line; none if it can."""
    own, theirs = (shape.patch_size, shape.width, shape.depth, shape.heads), (patch_size, width, depth, heads)
    if own == theirs:
        return None
    return (
        "Expected diffusion.transformer to have the encoder's patch_size, width, depth and heads, "
        f"{', '.join(map(str, theirs))}, to start from it; got {', '.join(map(str, own))}. Change one, "
        "or set diffusion.training.start=scratch."
    )


def _spread(encoder: FactorNetwork) -> Tensor:
    """Per channel, what one unit of the standardised space is in what the encoder sees."""
    deviation = encoder.latent_deviation
    if encoder.config.factor_paths == "joint":
        return torch.ones_like(deviation)
    anatomy = encoder.latent_mean.var((1, 2, 3), unbiased=False)  # a scan spreads around its mean by both
    return deviation / (deviation.square() + anatomy).sqrt()
