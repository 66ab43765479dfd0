"""What the diffusion model is and how it is trained: settings that travel with the plan."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class TransformerShape:
    """Size of the diffusion transformer. Presets live in conf/diffusion/transformer/*.yaml."""

    patch_size: int
    """Edge of a token in latent voxels."""
    width: int
    """Channels of a token."""
    depth: int
    """Blocks."""
    heads: int
    """Attention heads."""


@dataclass(frozen=True, kw_only=True)
class DiffusionTraining:
    """How the diffusion model is trained, at the centre and at a site alike."""

    path: Literal["linear", "variance_preserving"] = "linear"
    """From noise to latents: `linear` interpolation, whose velocity is learned (SiT, rectified flow), or
    `variance_preserving` (DDPM's linear schedule in continuous time), whose velocity is learned too."""
    times: Literal["uniform", "logit_normal"] = "uniform"
    """How training draws times in [0, 1]."""
    batch_size: int = 16
    """Scans per step."""
    learning_rate: float = 1e-3
    """Peak learning rate; it rises over the first steps, then stays."""
    warmup: float = 0.05
    """Share of all steps over which the learning rate rises."""
    weight_decay: float = 0.0
    """AdamW weight decay."""
    gradient_clip_norm: float = 1.0
    """L2 norm to which the batch gradient is clipped (no privacy meaning)."""
    ema: float = 0.9999
    """Momentum of the weights' moving average at most; early it is (1 + step) / (10 + step)."""
    drop: float = 0.1
    """Probability that a sample is not told a condition, for each condition by itself."""
    site_style: float = 0.5
    """Share of samples that are told their site's style instead of their own."""
    restyled_content: float = 0.0
    """Share of samples that are told the content of their scan dressed in another site's style (style bank),
    while they stay what they are: style is then learned from the style code, not from traces in content."""
    restyled_scans: float = 0.0
    """Share of samples that are learned as their scan dressed in another site's style (style bank), and told
    that style: a site that trains alone holds one style, and could not learn what a style does."""
    start: Literal["scratch", "encoder"] = "scratch"
    """Whether the transformer starts from the pretrained encoder's blocks."""
    alignment: float = 0.0
    """Weight of the alignment of a middle layer to the frozen encoder's content tokens (REPA); 0: none."""
    precision: Literal["float32", "bf16"] = "float32"
    """Autocast of the transformer."""
    checkpoint_blocks: bool = False
    """Whether activations are computed again in the backward pass instead of kept."""

    def __post_init__(self) -> None:
        """Refuse settings that cannot be meant."""
        for name in ("batch_size", "learning_rate", "gradient_clip_norm"):
            if not getattr(self, name) > 0:
                raise ValueError(f"Expected diffusion.training.{name} above 0; got {getattr(self, name)}.")
        for name in ("warmup", "ema", "drop", "site_style", "restyled_content", "restyled_scans"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(
                    f"Expected diffusion.training.{name} between 0 and 1; got {getattr(self, name)}."
                )
        if self.alignment < 0:
            raise ValueError(f"Expected diffusion.training.alignment of at least 0; got {self.alignment}.")
