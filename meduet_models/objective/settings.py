"""What an objective is told: the weight of each term, and when and how terms act. It computes nothing."""

from dataclasses import dataclass, fields
from typing import Annotated, Literal

from forms.form import check
from forms.ranges import Range, Share

WEIGHT = Range(at_least=0, at_most=10_000)
TEMPERATURE = Range(at_least=0.001, at_most=100)


@dataclass(frozen=True, kw_only=True)
class LossWeights:
    """One weight per term of the loss, named after the term; zero switches the term off."""

    reconstruction: Annotated[float, WEIGHT] = 1.0
    """Dual reconstruction of both volumes of a mixture (masked positions)."""
    visible_reconstruction: Annotated[float, WEIGHT] = 1.0
    """The same at visible positions, without which nothing teaches the decoder to write them; 0 in the
    published method."""
    site_adversary: Annotated[float, WEIGHT] = 0.2
    """Cross-entropy of the site read from content, through gradient reversal."""
    site_from_style: Annotated[float, WEIGHT] = 0.2
    """Cross-entropy of the site read from style."""
    mftd: Annotated[float, WEIGHT] = 0.5
    """Mixed-factor token distillation."""
    siqc: Annotated[float, WEIGHT] = 0.3
    """Swap-invariance quadruplet contrast."""
    invariance: Annotated[float, WEIGHT] = 1.0
    """Content of a scan against content of its restyling; 0 in the published method."""
    restyled_reconstruction: Annotated[float, WEIGHT] = 1.0
    """A scan's content with its restyling's style, decoded, against the restyling: the swap with its known
    answer; 0 in the published method."""

    def __post_init__(self) -> None:
        """Refuse weights that cannot be meant."""
        check(self, "objective.weights")


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    """Everything about the loss that is not the network."""

    weights: LossWeights = LossWeights()
    """Weights of the terms."""
    masking: Literal["demixing", "masked"] = "demixing"
    """`demixing`: partners exchange tokens, as published. `masked`: tokens are hidden and predicted, scan by
    scan (masked autoencoding, a baseline): no partner, no swap, reconstruction terms only."""
    mask_ratio: Annotated[float, Range(above=0, below=1)] = 0.5
    """Share of tokens taken from the partner, or hidden."""
    masked_share: Annotated[float, Range(at_least=0, below=1)] = 0.0
    """Share of all steps, the first ones, that hide and predict tokens as `masked` does, whatever `masking`
    says of the others; 0 in the published method."""
    temperature_content: Annotated[float, TEMPERATURE] = 0.07
    """SiQC temperature of content."""
    temperature_style: Annotated[float, TEMPERATURE] = 0.07
    """SiQC temperature of style."""
    temperature_invariance: Annotated[float, TEMPERATURE] = 0.1
    """InfoNCE temperature of the invariance term."""
    mftd_warmup: Annotated[float, Share] = 0.2
    """Share of the steps after the masked ones before MFTD starts (published: the first 20% are off)."""
    reversal_warmup: Annotated[float, Share] = 0.0
    """Share of the steps after the masked ones over which gradient reversal ramps to 1 (published: none)."""
    estimator: Literal["full", "one_stream", "alternate"] = "full"
    """`full`: both re-encoded streams each step. `one_stream`: one of them per scan, drawn at random
    (unbiased for MFTD). `alternate`: after MFTD's warm-up, either MFTD or SiQC at twice its weight, drawn at
    random."""

    def __post_init__(self) -> None:
        """Refuse settings that cannot act."""
        check(self, "objective")
        own = ("reconstruction", "visible_reconstruction")
        others = [f.name for f in fields(self.weights) if f.name not in own]
        if self.masking == "masked" and (on := [n for n in others if getattr(self.weights, n)]):
            raise ValueError(
                f"objective.weights.{on[0]} needs a partner or a restyling, and objective.masking=masked has "
                "none: set it to 0."
            )
        if self.masked_share and self.masking == "masked":
            raise ValueError(
                "objective.masked_share has no effect with objective.masking=masked, where every step is "
                "masked: set it to 0."
            )
        if self.masked_share and not any(getattr(self.weights, name) for name in own):
            raise ValueError(
                "objective.masked_share trains on reconstruction alone: set objective.weights.reconstruction "
                "or visible_reconstruction above 0, or masked_share to 0."
            )

    def masked_at(self, progress: float) -> bool:
        """Whether the step at a share `progress` of all steps hides and predicts tokens, and nothing else."""
        return self.masking == "masked" or progress < self.masked_share
