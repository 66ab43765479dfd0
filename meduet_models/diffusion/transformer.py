"""The diffusion transformer: DiT in 3-D on latents, told time and conditions, gives a velocity.

Pre-norm blocks without affine norms; six modulations a block from time and conditions, zero at the start
(adaLN-zero). Fixed 3-D sine and cosine positions. Content tokens and label maps are laid over the patch
tokens by linear maps that start at zero; style, body part, class and spacing are added to the time. Every
condition has a learned null, for samples that are not told it. GELU is exact, as in the encoder, so that the
transformer can start from it (`initialisation.py`); DiT's is the tanh approximation.

What this file does not do: noise, losses, steps (`path.py`, `training.py`, `sampling.py`).

Axes: b = samples, n = tokens, k = width, m = content tokens, s = numbers in a style code, c d h w = latents,
p = values in a token.
Source: DiT (arXiv:2212.09748), SiT (arXiv:2401.08740).
"""

import dataclasses
import math
from dataclasses import dataclass
from typing import Annotated

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from forms.form import build, check
from forms.json_text import canonical, read_json
from forms.ranges import Range
from meduet_models.diffusion.conditions import CONDITIONS, Condition, Conditions, ConditionSizes
from meduet_models.diffusion.path import PathName
from meduet_models.diffusion.settings import TransformerShape
from meduet_models.tokens import patchify, sincos_positions, unpatchify
from meduet_models.vit import NORM_EPS

_FREQUENCIES = 128  # sines and cosines of a time, each
_TIME_SCALE = 1000.0  # DiT's times are steps of 1000


@dataclass(frozen=True, kw_only=True)
class DiffusionConfig:
    """What a diffusion transformer is: enough to build it again."""

    latent_channels: Annotated[int, Range(at_least=1, at_most=256)]
    """Channels of the tokenizer's latents."""
    latent_grid: Annotated[tuple[int, int, int], Range(at_least=1, at_most=512)]
    """Latent voxels per axis; multiples of the patch size."""
    shape: TransformerShape
    """Size of the network."""
    sizes: ConditionSizes
    """What it can be told."""
    path: PathName
    """Path whose velocity it gives."""

    def __post_init__(self) -> None:
        """Refuse a network that cannot be built."""
        check(self, "transformer")
        if any(size % self.shape.patch_size for size in self.latent_grid):
            raise ValueError(
                f"Expected latents of {self.latent_grid} to be multiples of the patch, "
                f"{self.shape.patch_size}."
            )
        if self.shape.width % self.shape.heads or self.shape.width < 6:
            raise ValueError(
                f"Expected a width that is a multiple of its {self.shape.heads} heads, 6 or more; "
                f"got {self.shape.width}."
            )

    @property
    def token_grid(self) -> tuple[int, int, int]:
        """Tokens per axis."""
        d, h, w = (size // self.shape.patch_size for size in self.latent_grid)
        return d, h, w

    def to_json(self) -> str:
        """Canonical JSON."""
        return canonical(dataclasses.asdict(self))

    @staticmethod
    def from_json(text: str) -> "DiffusionConfig":
        """Back from `to_json`; raises `ValueError` for other fields, and for what is out of range."""
        what = "the description of a diffusion transformer of this version"
        values = read_json(text, what)
        try:
            return build(DiffusionConfig, values, "transformer")
        except ValueError as error:
            raise ValueError(f"Expected {what}; {error}") from None


class DiffusionBlock(nn.Module):
    """Attention, then an MLP four times as wide, each shifted, scaled and gated by what is told."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.expand = nn.Linear(width, 4 * width)
        self.contract = nn.Linear(4 * width, width)
        self.modulation = nn.Linear(width, 6 * width)

    def forward(self, x: Float[Tensor, "b n k"], condition: Float[Tensor, "b k"]) -> Float[Tensor, "b n k"]:
        """Attend, then transform each token; `told` is time and conditions after their activation."""
        b, n, k = x.shape
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(condition).unsqueeze(1).chunk(6, dim=2)
        qkv = self.qkv(_modulated(x, shift1, scale1)).reshape(b, n, 3, self.heads, k // self.heads)
        q, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # each b heads n k/heads
        attended = F.scaled_dot_product_attention(q, key, value)
        x = x + gate1 * self.proj(attended.transpose(1, 2).reshape(b, n, k))
        out: Tensor = x + gate2 * self.contract(F.gelu(self.expand(_modulated(x, shift2, scale2))))
        return out


class VectorEmbedding(nn.Module):
    """A small MLP from a few numbers per sample to the width of the network."""

    def __init__(self, numbers: int, width: int) -> None:
        super().__init__()
        self.expand = nn.Linear(numbers, width)
        self.contract = nn.Linear(width, width)

    def forward(self, x: Float[Tensor, "b s"]) -> Float[Tensor, "b k"]:
        """Embed each sample's numbers."""
        out: Tensor = self.contract(F.silu(self.expand(x)))
        return out


class DiffusionTransformer(nn.Module):
    """Noisy standardised latents, a time and conditions -> velocity, in the standardised space."""

    positions: Tensor
    latent_mean: Tensor
    latent_deviation: Tensor

    def __init__(self, config: DiffusionConfig, *, seed: int = 0) -> None:
        super().__init__()
        self.config = config
        self.checkpoint_blocks = False
        """Whether a backward pass computes the blocks' activations again instead of keeping them."""
        shape, sizes = config.shape, config.sizes
        width, volume = shape.width, shape.patch_size**3
        self.register_buffer("positions", sincos_positions(config.token_grid, width), persistent=False)
        self.register_buffer("latent_mean", torch.zeros(config.latent_channels, *config.latent_grid))
        self.register_buffer("latent_deviation", torch.ones(config.latent_channels))
        self.embed = nn.Linear(config.latent_channels * volume, width)
        self.embed_time = VectorEmbedding(2 * _FREQUENCIES, width)
        embeddings: dict[Condition, nn.Module] = {}
        if sizes.content:
            embeddings["content"] = nn.Linear(sizes.content, width)
        if sizes.style:
            embeddings["style"] = VectorEmbedding(sizes.style, width)
        if sizes.body_part:
            embeddings["body_part"] = nn.Embedding(sizes.body_part, width)
        if sizes.spacing:
            embeddings["spacing"] = VectorEmbedding(3, width)
        if sizes.category:
            embeddings["category"] = nn.Embedding(sizes.category, width)
        if sizes.label_map:
            embeddings["label_map"] = nn.Linear(sizes.label_map * volume, width)
        self.embed_condition = nn.ModuleDict({str(name): module for name, module in embeddings.items()})
        self.null = nn.ParameterDict({str(name): nn.Parameter(torch.zeros(width)) for name in embeddings})
        self.blocks = nn.ModuleList(DiffusionBlock(width, shape.heads) for _ in range(shape.depth))
        self.last_modulation = nn.Linear(width, 2 * width)
        self.predict = nn.Linear(width, config.latent_channels * volume)
        self._initialise(seed)

    def _initialise(self, seed: int) -> None:
        """DiT's start, from its own seed: Xavier weights and no biases; small embeddings; modulations, the
        prediction and whatever is laid over the tokens at zero, so that each block begins as the identity."""
        generator = torch.Generator().manual_seed(seed)
        if self.embed.weight.is_meta:
            return
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight, generator=generator)
                nn.init.zeros_(module.bias)
        for part in (self.embed_time, *self.embed_condition.values()):
            for module in part.modules():
                if isinstance(module, nn.Linear | nn.Embedding):
                    nn.init.normal_(module.weight, std=0.02, generator=generator)
        silent: list[nn.Module] = [
            block.modulation for block in self.blocks if isinstance(block, DiffusionBlock)
        ]
        silent += [self.last_modulation, self.predict]
        silent += [part for name, part in self.embed_condition.items() if name in ("content", "label_map")]
        for module in silent:
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.weight)

    # The latents' scale

    @torch.no_grad()
    def set_latent_scale(self, mean: Float[Tensor, "c d h w"], deviation: Float[Tensor, " c"]) -> None:
        """Set the centre and scale of the standardised space: those of the pretrained encoder.

        Raises `ValueError` unless every deviation is positive.
        """
        if not bool((deviation > 0).all()):
            raise ValueError(f"Expected positive latent deviations; got {deviation.tolist()}.")
        self.latent_mean.copy_(mean)
        self.latent_deviation.copy_(deviation)

    def standardise(self, latents: Float[Tensor, "b c d h w"]) -> Float[Tensor, "b c d h w"]:
        """Raw latents minus the centre, over the scale."""
        return (latents - self.latent_mean) / self.latent_deviation.reshape(-1, 1, 1, 1)

    def to_latents(self, standardised: Float[Tensor, "b c d h w"]) -> Float[Tensor, "b c d h w"]:
        """Back to raw latents."""
        return standardised * self.latent_deviation.reshape(-1, 1, 1, 1) + self.latent_mean

    # Velocity

    def forward(
        self, noisy: Float[Tensor, "b c d h w"], time: Float[Tensor, " b"], conditions: Conditions
    ) -> Float[Tensor, "b c d h w"]:
        """The velocity at each sample's time, float32.

        Raises `ValueError` when something is told that this model has no place for, or in other sizes.
        """
        return self.velocity_and_hidden(noisy, time, conditions)[0]

    def velocity_and_hidden(
        self, noisy: Float[Tensor, "b c d h w"], time: Float[Tensor, " b"], conditions: Conditions
    ) -> tuple[Float[Tensor, "b c d h w"], Float[Tensor, "b n k"]]:
        """The velocity, and the tokens after the first half of the blocks."""
        self._check(conditions, len(noisy))
        patch, depth = self.config.shape.patch_size, self.config.shape.depth
        x = self.embed(patchify(noisy, patch)) + self.positions  # b n k
        condition = self.embed_time(_waves(time))  # b k
        for name in self.config.sizes.names:
            embedded = self._embedded(name, conditions, len(noisy))
            if name in ("content", "label_map"):
                x = x + embedded  # b n k
            else:
                condition = condition + embedded  # b k
        condition = F.silu(condition)
        hidden = x
        for number, block in enumerate(self.blocks, start=1):
            if self.checkpoint_blocks and torch.is_grad_enabled():
                x = checkpoint(block, x, condition, use_reentrant=False)
            else:
                x = block(x, condition)
            hidden = x if number <= max(1, depth // 2) else hidden
        shift, scale = self.last_modulation(condition).unsqueeze(1).chunk(2, dim=2)
        predicted = self.predict(_modulated(x, shift, scale))  # b n p
        return unpatchify(predicted.float(), self.config.token_grid, patch), hidden

    def _embedded(self, name: Condition, conditions: Conditions, count: int) -> Tensor:
        """A condition's embedding per sample, b k or (on the grid) b n k; its null where it is not told."""
        null: Tensor = self.null[name]
        on_grid = name in ("content", "label_map")
        value: Tensor | None = getattr(conditions, name)
        if value is None:
            return null.expand(count, 1, -1) if on_grid else null.expand(count, -1)
        untold = conditions.dropped.get(name, torch.zeros(count, dtype=torch.bool, device=value.device))
        match name:
            case "content":
                value = regrid(value, self.config.sizes.content_grid, self.config.token_grid)
            case "body_part" | "category":
                untold, value = untold | (value < 0), value.clamp(min=0)
            case "spacing":
                untold, value = untold | value.isnan().any(1), value.nan_to_num(1.0).log()
            case "label_map":
                untold = untold | value.isnan().flatten(1).any(1)
                value = patchify(value.nan_to_num(0.0), self.config.shape.patch_size)
        embedded: Tensor = self.embed_condition[name](value)
        return torch.where(untold.reshape(-1, 1, 1) if on_grid else untold.unsqueeze(1), null, embedded)

    def _check(self, conditions: Conditions, count: int) -> None:
        """Refuse what this model cannot be told, in one line."""
        sizes, config = self.config.sizes, self.config
        shapes: dict[Condition, tuple[int, ...]] = {
            "content": (count, math.prod(sizes.content_grid), sizes.content),
            "style": (count, sizes.style),
            "body_part": (count,),
            "spacing": (count, 3),
            "category": (count,),
            "label_map": (count, sizes.label_map, *config.latent_grid),
        }
        for name in CONDITIONS:
            value: Tensor | None = getattr(conditions, name)
            if value is None:
                continue
            if name not in sizes.names:
                known = ", ".join(sizes.names) or "none"
                raise ValueError(f"Expected conditions among {known}: this model cannot be told {name}.")
            if tuple(value.shape) != shapes[name]:
                raise ValueError(f"Expected {name} of {shapes[name]}; got {tuple(value.shape)}.")


def regrid(
    tokens: Float[Tensor, "b m k"], own: tuple[int, int, int], target: tuple[int, int, int]
) -> Float[Tensor, "b n k"]:
    """Tokens of one grid at the places of another, trilinear between their centres."""
    if own == target:
        return tokens
    grid = tokens.transpose(1, 2).reshape(len(tokens), -1, *own)
    grid = F.interpolate(grid, size=target, mode="trilinear", align_corners=False)
    return grid.flatten(2).transpose(1, 2)


def _modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    normed = F.layer_norm(x, x.shape[-1:], eps=NORM_EPS)
    return normed * (1 + scale) + shift


def _waves(time: Tensor) -> Tensor:
    """Sines and cosines of a time in [0, 1]."""
    exponent = torch.arange(_FREQUENCIES, device=time.device, dtype=torch.float32) / _FREQUENCIES
    angle = _TIME_SCALE * time.float().unsqueeze(1) * 10000.0**-exponent
    return torch.cat([angle.cos(), angle.sin()], dim=1)
