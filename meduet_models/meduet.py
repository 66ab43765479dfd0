"""The MeDUET network: latents -> (content, style) tokens -> latents.

`FactorNetwork` is what student and teacher have in common; `MeDUET` adds the two site classifiers. The
network is never told which site a scan comes from. What is trained on it is `objective.py`; which of its
parts travel is declared here and spelled out in `sharing.py`.

Axes: b = volumes, c = latent channels, d h w = latent voxels, n = tokens, p = values in a token, k = content
channels, s = style channels.
Source: MeDUET (arXiv:2602.17901), sizes of MeDUET_vit_base; split paths, latent scale and erasure are ours.
"""

import math
from dataclasses import dataclass, fields
from typing import Annotated, ClassVar, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from forms.form import check
from forms.ranges import Range
from meduet_models.content_code import ContentCode, code_of
from meduet_models.factors import (
    ContentHead,
    Factors,
    Fuse,
    StatisticsStyleHead,
    StyleMeter,
    StyleStatistics,
    TokenStyleHead,
    normalise,
)
from meduet_models.objective.adversary import SiteClassifier
from meduet_models.tokens import patchify, unpatchify
from meduet_models.vit import NORM_EPS, Block, Decoder, Encoder
from meduet_models.volume_embedding import LATENTS_PER_CELL, VolumeEmbedding, embedding_activations

MOST_WEIGHTS = 2_000_000_000
"""Of a network: about twenty times the published one; 8 GB as float32."""
CODE_AXES = 32
"""Axes over places, and over channels, that the content code is made of, at most (docs/log.md)."""
MOST_ACTIVATIONS = 2**32
"""Numbers that the blocks of a network hand on in a step, about six times those of the published network and
batch: at ten or more numbers kept for each, no machine holds more."""


@dataclass(frozen=True, kw_only=True)
class NetworkConfig:
    """Size and shape of the MeDUET network. Presets live in conf/network/*.yaml."""

    latent_channels: Annotated[int, Range(at_least=1, at_most=256)]
    """Channels of the tokenizer's latents."""
    latent_grid: Annotated[tuple[int, int, int], Range(at_least=1, at_most=512)]
    """Latent voxels per axis; each must be a multiple of `patch_size`."""
    patch_size: Annotated[int, Range(at_least=1, at_most=64)]
    """Edge of a token in latent voxels."""
    width: Annotated[int, Range(at_least=6, at_most=4096)]
    """Encoder width."""
    depth: Annotated[int, Range(at_least=1, at_most=64)]
    """Encoder blocks."""
    heads: Annotated[int, Range(at_least=1, at_most=64)]
    """Encoder attention heads."""
    decoder_width: Annotated[int, Range(at_least=6, at_most=4096)]
    """Decoder width."""
    decoder_depth: Annotated[int, Range(at_least=1, at_most=64)]
    """Decoder blocks."""
    decoder_heads: Annotated[int, Range(at_least=1, at_most=64)]
    """Decoder attention heads."""
    attention: Literal["global", "neighbours"] = "global"
    """`global`: as published. `neighbours`: the first six heads of every block begin with the six tokens next
    to each, by a fixed bias."""
    positions: Literal["published", "grid"] = "published"
    """Wavelengths of the fixed positions: to 10000 tokens, as published, or no longer than `grid` needs."""
    blocks_start: Literal["xavier", "identity"] = "xavier"
    """What a block does at the start: as MAE's, or (`identity`) it adds nothing, and the decoder predicts the
    centre."""
    encoder: Literal["vit", "volume_unet"] = "vit"
    """What blocks are given: `vit`, a linear map of each token's latents, as published; `volume_unet`, beside
    it a U-Net on the volume that the latents tell of, which may start from public anatomy."""
    style_ratio: Annotated[float, Range(above=0, at_most=4)] = 0.25
    """Style channels over content channels."""
    factor_paths: Literal["split", "joint"] = "split"
    """`joint`: both factors from one encoder, as published. `split`: content from normalised latents,
    style from the statistics that the normalisation removed."""
    code_size: Annotated[int, Range(at_least=1, at_most=1024)] = 64
    """Numbers in the content code of a scan."""
    style_map_grid: Annotated[tuple[int, int, int], Range(at_least=1, at_most=64)] = (2, 3, 2)
    """Coarse mean map that the split style path reads (and that sites exchange)."""

    def __post_init__(self) -> None:
        """Refuse a network that cannot be built, or that no machine holds."""
        check(self, "network")
        if any(size % self.patch_size or size < self.patch_size for size in self.latent_grid):
            raise ValueError(
                f"Expected network.latent_grid {self.latent_grid} to be multiples of network.patch_size "
                f"{self.patch_size}; change the volume shape or the patch."
            )
        for name, width, heads in (
            ("width", self.width, self.heads),
            ("decoder_width", self.decoder_width, self.decoder_heads),
        ):
            if width % heads:
                raise ValueError(
                    f"Expected network.{name} to be a multiple of its {heads} heads; got {width}."
                )
        values = 12 * (self.width**2 * self.depth + self.decoder_width**2 * self.decoder_depth)
        if values > MOST_WEIGHTS:
            raise ValueError(
                f"Expected network.width and network.depth (and those of the decoder) of at most "
                f"{MOST_WEIGHTS:,} weights; got about {values:,}."
            )
        if self.activations > MOST_ACTIVATIONS:
            raise ValueError(
                "Expected tokens times network.width and network.depth (and those of the decoder) to be at "
                f"most {MOST_ACTIVATIONS:,} numbers; got {self.activations:,}."
            )
        if self.encoder == "volume_unet" and (self.patch_size % LATENTS_PER_CELL or self.num_tokens < 2):
            raise ValueError(
                f"network.encoder=volume_unet has a cell for each {LATENTS_PER_CELL} latent voxels along an "
                f"axis, and needs two tokens at least: set network.patch_size to a multiple of "
                f"{LATENTS_PER_CELL}, or network.encoder=vit."
            )
        if self.style_width < 1:
            raise ValueError(
                f"Expected network.style_ratio to leave at least one style channel; got {self.style_ratio}."
            )
        if self.code_size > (most := self.code_places * self.code_channels):
            raise ValueError(
                f"Expected network.code_size of at most {most} numbers, of tokens and network.width as they "
                f"are; got {self.code_size}."
            )
        if any(
            not 1 <= cells <= size for cells, size in zip(self.style_map_grid, self.token_grid, strict=True)
        ):
            raise ValueError(
                f"Expected network.style_map_grid between 1 and the {self.token_grid} tokens per axis; "
                f"got {self.style_map_grid}."
            )

    @property
    def token_grid(self) -> tuple[int, int, int]:
        """Tokens per axis."""
        d, h, w = (size // self.patch_size for size in self.latent_grid)
        return d, h, w

    @property
    def num_tokens(self) -> int:
        """Tokens per volume."""
        return math.prod(self.token_grid)

    @property
    def activations(self) -> int:
        """Numbers that the blocks hand on for one volume: memory and time of a step follow from it."""
        wide = self.width * self.depth + self.decoder_width * self.decoder_depth
        of_volume = embedding_activations(self.latent_grid) if self.encoder == "volume_unet" else 0
        return self.num_tokens * wide + of_volume

    @property
    def style_width(self) -> int:
        """Style channels per token."""
        return round(self.width * self.style_ratio)

    @property
    def code_places(self) -> int:
        """Axes over the places of tokens that the content code is made of."""
        return min(self.num_tokens, CODE_AXES)

    @property
    def code_channels(self) -> int:
        """Axes over content channels that it is made of."""
        return min(self.width, CODE_AXES)


class FactorNetwork(nn.Module):
    """Encoder, heads, fusing and decoder."""

    CONTENT_PARTS: ClassVar[tuple[str, ...]] = (
        "embed",
        "embed_volume",
        "encoder",
        "content_head",
        "fuse",
        "decoder",
    )
    """Submodules of the content branch: the federation's."""
    STYLE_PARTS: ClassVar[tuple[str, ...]] = ("style_head",)
    """Submodules of the style branch: at home, unless the plan shares them."""
    SITE_PARTS: ClassVar[tuple[str, ...]] = ()
    """Submodules fed by one pooled vector per scan: always at home."""
    CONSTANTS: ClassVar[tuple[str, ...]] = (
        "latent_mean",
        "latent_deviation",
        "erasure_mean",
        "erasure_matrix",
        "code_places",
        "code_channels",
        "code_mean",
        "code_matrix",
    )
    """Buffers: agreed on once, never trained."""
    OUTPUT_LAYER: ClassVar[str] = "decoder.predict"
    """The last linear map, from decoded tokens to latents: content, code and style are read before it."""

    latent_mean: Tensor
    latent_deviation: Tensor
    erasure_mean: Tensor
    erasure_matrix: Tensor
    code_places: Tensor
    code_channels: Tensor
    code_mean: Tensor
    code_matrix: Tensor

    def __init__(self, config: NetworkConfig, *, seed: int = 0) -> None:
        super().__init__()
        self.config = config
        patch_values = config.latent_channels * config.patch_size**3
        grid, width, style_width = config.token_grid, config.width, config.style_width
        self.embed = nn.Linear(patch_values, width)
        self.embed_volume: VolumeEmbedding | None = None
        if config.encoder == "volume_unet":
            self.embed_volume = VolumeEmbedding(config.latent_channels, config.patch_size, width, seed)
        neighbours, within_grid = config.attention == "neighbours", config.positions == "grid"
        self.encoder = Encoder(width, config.depth, config.heads, grid, neighbours, within_grid)
        self.content_head = ContentHead(width)
        self.style_meter = StyleMeter(config.latent_grid, config.style_map_grid)
        self.style_head: nn.Module
        match config.factor_paths:
            case "split":
                self.style_head = StatisticsStyleHead(
                    config.latent_channels, style_width, grid, config.style_map_grid
                )
            case "joint":
                self.style_head = TokenStyleHead(width, style_width)
        self.fuse = Fuse(width, style_width)
        self.decoder = Decoder(
            width,
            config.decoder_width,
            config.decoder_depth,
            config.decoder_heads,
            grid,
            patch_values,
            neighbours,
            within_grid,
        )
        self.register_buffer("latent_mean", torch.zeros(config.latent_channels, *config.latent_grid))
        self.register_buffer("latent_deviation", torch.ones(config.latent_channels))
        self.register_buffer("erasure_mean", torch.zeros(width))
        self.register_buffer("erasure_matrix", torch.eye(width))
        seen = config.code_places * config.code_channels
        self.register_buffer("code_places", torch.zeros(config.code_places, config.num_tokens))
        self.register_buffer("code_channels", torch.zeros(config.code_channels, width))
        self.register_buffer("code_mean", torch.zeros(seen))
        self.register_buffer("code_matrix", torch.zeros(config.code_size, seen))  # zero: not fitted
        self._initialise(seed)

    def _initialise(self, seed: int) -> None:
        """MAE's start: Xavier weights, no biases, a small mask token; blocks that add nothing, where that is
        the setting. From its own seed: no global draw matters."""
        generator = torch.Generator().manual_seed(seed)
        for module in self.modules():
            if isinstance(module, nn.Linear) and not module.weight.is_meta:
                nn.init.xavier_uniform_(module.weight, generator=generator)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        if self.config.blocks_start == "identity":
            last = [layer for module in self.modules() if isinstance(module, Block) for layer in module.added]
            for layer in [*last, self.decoder.predict]:
                nn.init.zeros_(layer.weight)
        if not self.decoder.mask_token.is_meta:
            nn.init.normal_(self.decoder.mask_token, std=0.02, generator=generator)

    # Constants that the federation agrees on

    @torch.no_grad()
    def set_latent_scale(self, mean_map: Float[Tensor, "c d h w"], deviation: Float[Tensor, " c"]) -> None:
        """Set the federated centre (mean latent per position) and scale (deviation per channel).

        The decoder predicts latents minus the centre, over the scale. Scans that are not registered to each
        other give a `mean_map` that is constant per channel. Raises `ValueError` unless every deviation is
        positive.
        """
        if not bool((deviation > 0).all()):
            raise ValueError(f"Expected positive latent deviations; got {deviation.tolist()}.")
        self.latent_mean.copy_(mean_map)
        self.latent_deviation.copy_(deviation)

    @torch.no_grad()
    def set_erasure(self, mean: Float[Tensor, " k"], matrix: Float[Tensor, "k k"]) -> None:
        """Set the last, linear layer of the content head: x -> mean + matrix (x - mean) (LEACE,
        arXiv:2306.03819)."""
        self.erasure_mean.copy_(mean)
        self.erasure_matrix.copy_(matrix)

    @torch.no_grad()
    def set_content_code(self, code: ContentCode | None) -> None:
        """Set the map from content tokens to the content code; None: there is none, as at the start."""
        mine = code_of(dict(self.named_buffers()))
        for part in fields(ContentCode):
            buffer = getattr(mine, part.name)
            buffer.zero_() if code is None else buffer.copy_(getattr(code, part.name))

    # Latents and tokens

    def standardise(self, latents: Float[Tensor, "b c d h w"]) -> Float[Tensor, "b c d h w"]:
        """Latents minus the federated centre, over the federated scale: what the decoder predicts."""
        return (latents - self.latent_mean) / self.latent_deviation.reshape(-1, 1, 1, 1)

    def target_tokens(self, latents: Float[Tensor, "b c d h w"]) -> Float[Tensor, "b n p"]:
        """Tokens of the standardised latents."""
        return patchify(self.standardise(latents), self.config.patch_size)

    def tokens_to_latents(self, predicted: Float[Tensor, "b n p"]) -> Float[Tensor, "b c d h w"]:
        """The decoder's tokens as raw latents, float32."""
        volume = unpatchify(predicted.float(), self.config.token_grid, self.config.patch_size)
        return volume * self.latent_deviation.reshape(-1, 1, 1, 1) + self.latent_mean

    def seen_tokens(self, latents: Float[Tensor, "b c d h w"]) -> Float[Tensor, "b n p"]:
        """Tokens of what the encoder may see; to be mixed and hidden before anything looks at neighbours.

        `split`: each scan normalised per channel, minus the centre normalised in the same way; so content
        does not change when a channel of the scan is scaled or shifted. `joint`: standardised latents.
        """
        if self.config.factor_paths == "split":
            seen = normalise(latents) - normalise(self.latent_mean.unsqueeze(0))
        else:
            seen = self.standardise(latents)
        return patchify(seen, self.config.patch_size)

    def embed_tokens(self, seen: Float[Tensor, "b n p"]) -> Float[Tensor, "b n k"]:
        """Embeddings of such tokens: of each by itself, or, with a U-Net, of a neighbourhood of this very
        grid as well."""
        tokens: Tensor = self.embed(seen)
        if self.embed_volume is not None:
            tokens = tokens + self.embed_volume(self._common_latents(seen))
        return tokens

    def embed_latents(
        self, latents: Float[Tensor, "b c d h w"], visible: Bool[Tensor, "b n"] | None = None
    ) -> Float[Tensor, "b n k"]:
        """Token embeddings of what the encoder may see of whole scans; of hidden places where `visible` is
        given, the federated centre."""
        seen = self.seen_tokens(latents)
        return self.embed_tokens(seen if visible is None else seen * visible.unsqueeze(-1))

    def _common_latents(self, seen: Float[Tensor, "b n p"]) -> Float[Tensor, "b c d h w"]:
        """Raw latents again; with split paths every scan in one common style, the federated centre's."""
        shown = unpatchify(seen.float(), self.config.token_grid, self.config.patch_size)
        scale = self.latent_deviation.reshape(-1, 1, 1, 1)
        if self.config.factor_paths == "joint":
            return shown * scale + self.latent_mean
        variance, mean = torch.var_mean(self.latent_mean, dim=(1, 2, 3), correction=0, keepdim=True)
        return (shown + normalise(self.latent_mean.unsqueeze(0))) * (scale.square() + variance).sqrt() + mean

    # Factors

    def standard_statistics(self, statistics: StyleStatistics) -> StyleStatistics:
        """What differs from the federated centre, over the federated scale: what the style head reads."""
        centre = self.style_meter(self.latent_mean.unsqueeze(0))
        scale = self.latent_deviation
        return StyleStatistics(
            (statistics.mean - centre.mean) / scale,
            statistics.deviation / scale,
            (statistics.coarse_map - centre.coarse_map) / scale.reshape(-1, 1, 1, 1),
            statistics.coarse_deviation / scale.reshape(-1, 1, 1, 1),
        )

    def style_statistics(self, latents: Float[Tensor, "b c d h w"]) -> Float[Tensor, "b v"]:
        """The statistics of raw latents, on the common scale, as one vector per scan (split paths)."""
        return self.standard_statistics(self.style_meter(latents)).to_vector()

    def style_of_statistics(self, statistics: StyleStatistics) -> Float[Tensor, "b n s"]:
        """Style tokens of a scan's, or a bank entry's, statistics (split paths)."""
        style: Tensor = self.style_head(self.standard_statistics(statistics))
        return style

    def factors(self, latents: Float[Tensor, "b c d h w"], features: Float[Tensor, "b n k"]) -> Factors:
        """Part encoder features into factors; `split` reads style from the latents instead."""
        content: Tensor = self.content_head(features)
        style: Tensor
        if self.config.factor_paths == "split":
            style = self.style_of_statistics(self.style_meter(latents))
        else:
            style = self.style_head(features)
        return Factors(content, style)

    def encode(self, latents: Float[Tensor, "b c d h w"]) -> Factors:
        """Factors of whole scans, every token visible."""
        return self.factors(latents, self.encoder(self.embed_latents(latents)))

    def predict_tokens(
        self, factors: Factors, visible: Bool[Tensor, "b n"] | None = None
    ) -> Float[Tensor, "b n p"]:
        """Decode standardised latent tokens from the factors of the `visible` positions (all when None)."""
        predicted: Tensor = self.decoder(self.fuse(factors), visible)
        return predicted

    def decode(self, factors: Factors) -> Float[Tensor, "b c d h w"]:
        """Latents of whole grids of factors."""
        return self.tokens_to_latents(self.predict_tokens(factors))

    # What analysis reads

    def content_tokens(self, latents: Float[Tensor, "b c d h w"]) -> Float[Tensor, "b n k"]:
        """Content for use outside training: layer-normed per token, then the erasure (identity until
        fitted)."""
        return self.erased(self.encode(latents).content)

    def erased(self, content: Float[Tensor, "b n k"]) -> Float[Tensor, "b n k"]:
        """Content of the head, layer-normed per token and without the site's directions."""
        content = layer_normed(content)
        return self.erasure_mean + (content - self.erasure_mean) @ self.erasure_matrix.T

    def pooled_content(self, latents: Float[Tensor, "b c d h w"]) -> Float[Tensor, "b k"]:
        """The mean of `content_tokens`: a baseline that knows little of where things are; `content_code` is
        what analysis reads."""
        return self.content_tokens(latents).mean(dim=1)

    @property
    def has_content_code(self) -> bool:
        """Whether a content code was fitted; at the end of a run that takes at least two sites."""
        return bool(self.code_matrix.any())

    @property
    def code(self) -> ContentCode:
        """The map from content tokens to the content code. Raises `ValueError` when none was fitted."""
        if not self.has_content_code:
            raise ValueError(
                "Expected a network with a content code; none was fitted, which takes a run of two sites or "
                "more. Use pooled_content."
            )
        return code_of(dict(self.named_buffers()))

    def content_code(self, latents: Float[Tensor, "b c d h w"]) -> Float[Tensor, "b q"]:
        """The content code of each scan: what is where in it, and not which site it is from.

        Raises `ValueError` when none was fitted.
        """
        return self.coded(self.encode(latents).content)

    def coded(self, content: Float[Tensor, "b n k"]) -> Float[Tensor, "b q"]:
        """The content code from content of the head, before any erasure of tokens."""
        return self.code.read(layer_normed(content))

    def pooled_style(self, latents: Float[Tensor, "b c d h w"]) -> Float[Tensor, "b s"]:
        """One style vector per scan: the mean of its layer-normed style tokens."""
        return layer_normed(self.encode(latents).style).mean(dim=1)


class MeDUET(FactorNetwork):
    """The student: the factor network and the two classifiers that ask which site a scan is from."""

    SITE_PARTS: ClassVar[tuple[str, ...]] = ("site_from_content", "site_from_style")

    def __init__(self, config: NetworkConfig, num_sites: int, *, seed: int = 0) -> None:
        super().__init__(config, seed=seed)
        if num_sites < 1:
            raise ValueError(f"Expected at least one site; got {num_sites}.")
        self.num_sites = num_sites
        self.site_from_content = SiteClassifier(config.width, num_sites)
        self.site_from_style = SiteClassifier(config.style_width, num_sites)
        self._initialise(seed)


def layer_normed(tokens: Float[Tensor, "b n k"]) -> Float[Tensor, "b n k"]:
    """Mean 0 and deviation 1 per token, float32, nothing learned."""
    return F.layer_norm(tokens.float(), tokens.shape[-1:], eps=NORM_EPS)
