"""What the diffusion model is and how it is trained: settings that travel with the plan."""

from dataclasses import dataclass
from typing import Annotated, Literal

from forms.form import check
from forms.ranges import Range, Share

MOST_WEIGHTS = 2_000_000_000
"""Of a network: about twice the largest preset; 8 GB as float32."""


@dataclass(frozen=True, kw_only=True)
class TransformerShape:
    """Size of the diffusion transformer. Presets live in conf/diffusion/transformer/*.yaml."""

    patch_size: Annotated[int, Range(at_least=1, at_most=64)]
    """Edge of a token in latent voxels."""
    width: Annotated[int, Range(at_least=6, at_most=4096)]
    """Channels of a token."""
    depth: Annotated[int, Range(at_least=1, at_most=64)]
    """Blocks."""
    heads: Annotated[int, Range(at_least=1, at_most=64)]
    """Attention heads."""

    def __post_init__(self) -> None:
        """Refuse a transformer that no machine holds."""
        check(self, "diffusion.transformer")
        if (values := 18 * self.width**2 * self.depth) > MOST_WEIGHTS:
            raise ValueError(
                "Expected diffusion.transformer.width and diffusion.transformer.depth of at most "
                f"{MOST_WEIGHTS:,} weights; got about {values:,}."
            )


@dataclass(frozen=True, kw_only=True)
class DiffusionTraining:
    """How the diffusion model is trained, at the centre and at a site alike."""

    path: Literal["linear", "variance_preserving"] = "linear"
    """From noise to latents: `linear` interpolation, whose velocity is learned (SiT, rectified flow), or
    `variance_preserving` (DDPM's linear schedule in continuous time), whose velocity is learned too."""
    times: Literal["uniform", "logit_normal"] = "uniform"
    """How training draws times in [0, 1]."""
    batch_size: Annotated[int, Range(at_least=1, at_most=4096)] = 16
    """Scans per step."""
    learning_rate: Annotated[float, Range(above=0, at_most=10)] = 1e-3
    """Peak learning rate; it rises over the first steps, then stays."""
    warmup: Annotated[float, Share] = 0.05
    """Share of all steps over which the learning rate rises."""
    weight_decay: Annotated[float, Range(at_least=0, at_most=10)] = 0.0
    """AdamW weight decay."""
    gradient_clip_norm: Annotated[float, Range(above=0, at_most=1_000_000)] = 1.0
    """L2 norm to which the batch gradient is clipped (no privacy meaning)."""
    ema: Annotated[float, Share] = 0.9999
    """Momentum of the weights' moving average at most; early it is (1 + step) / (10 + step)."""
    drop: Annotated[float, Share] = 0.1
    """Probability that a sample is not told a condition, for each condition by itself."""
    site_style: Annotated[float, Share] = 0.5
    """Share of samples that are told their site's style instead of their own."""
    restyled_content: Annotated[float, Share] = 0.0
    """Share of samples that are told the content of their scan restyled to another site's style (style bank),
    while they stay what they are: style is then learned from the style code, not from traces in content."""
    restyled_scans: Annotated[float, Share] = 0.0
    """Share of samples that are learned as their scan restyled to another site's style (style bank), and told
    that style: a site that trains alone holds one style, and could not learn what a style does."""
    start: Literal["scratch", "encoder"] = "scratch"
    """Whether the transformer starts from the pretrained encoder's blocks."""
    alignment: Annotated[float, Range(at_least=0, at_most=10_000)] = 0.0
    """Weight of the alignment of a middle layer to the frozen encoder's content tokens (REPA); 0: none."""
    precision: Literal["float32", "bf16"] = "float32"
    """Autocast of the transformer."""
    checkpoint_blocks: bool = False
    """Whether activations are computed again in the backward pass instead of kept."""

    def __post_init__(self) -> None:
        """Refuse settings that cannot be meant."""
        check(self, "diffusion.training")
