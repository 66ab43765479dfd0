"""The whole MeDUET loss on one page: named terms, named weights."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class LossWeights:
    """One weight per term of the loss, named after the term; zero switches the term off."""

    reconstruction: float = 1.0
    """Dual reconstruction of both volumes of a mixture (masked positions)."""
    site_adversary: float = 0.2
    """Cross-entropy of the site read from content, through gradient reversal."""
    site_from_style: float = 0.2
    """Cross-entropy of the site read from style."""
    mftd: float = 0.5
    """Mixed-factor token distillation."""
    siqc: float = 0.3
    """Swap-invariance quadruplet contrast."""
    invariance: float = 1.0
    """Content of a scan against content of its restyling; 0 in the published method."""


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    """Everything about the loss that is not the network."""

    weights: LossWeights = LossWeights()
    """Weights of the terms."""
    mask_ratio: float = 0.5
    """Share of tokens taken from the partner."""
    temperature_content: float = 0.07
    """SiQC temperature of content."""
    temperature_style: float = 0.07
    """SiQC temperature of style."""
    temperature_invariance: float = 0.1
    """InfoNCE temperature of the invariance term."""
    mftd_warmup: float = 0.2
    """Share of all steps before MFTD starts (published: the first 20% are off)."""
    reversal_warmup: float = 0.0
    """Share of all steps over which gradient reversal ramps to 1 (published: none)."""
    estimator: Literal["full", "one_stream", "alternate"] = "full"
    """`full`: both re-encoded streams each step. `one_stream`: one of them, drawn at random (unbiased for
    MFTD). `alternate`: MFTD and SiQC in turn."""
