"""What a plan says of privacy: how much may be learned of a patient, and by which way that is kept.

Unit and relation are always the same: a patient with all her scans, added or removed.
What this file does not do: account (`privacy/accounting.py`), add noise (`client/release.py`), or decide for
a site, whose own ceiling is in its site.yaml.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

from forms.names import Sha256
from forms.ranges import Range
from meduet_models.style.code import style_length
from privacy.accounting import LARGEST_DELTA

if TYPE_CHECKING:
    from federation.plan import RunPlan


@dataclass(frozen=True, kw_only=True)
class PrivacyPlan:
    """Differential privacy for each patient."""

    level: Literal["sums"] = "sums"
    """What leaves a site. `sums`: one style code, with noise, before the first step, and nothing else; the
    network is trained at the centre on public scans in the sites' styles."""
    epsilon: Annotated[float, Range(above=0, at_most=20)]
    """What the whole run may cost a patient."""
    delta: Annotated[float, Range(above=0, at_most=LARGEST_DELTA)] = LARGEST_DELTA
    """At which epsilon is meant."""
    style_dimensions: Annotated[int, Range(at_least=1, at_most=256)] = 8
    """Numbers in a style code: more say more of a style, and each gets the same noise (docs/privacy.md)."""
    public_scans: Annotated[int, Range(at_least=32, at_most=4096)] = 256
    """Public scans: phantoms that the plan's seed draws, encoded by its tokenizer. They are trained on, and
    give the axes of the style code."""
    public_sha256: Sha256
    """Hash of their latents."""


def contradictions(plan: "RunPlan") -> Iterator[str]:
    """Say what in a plan with privacy would leave without noise, or would have no effect; one line each."""
    privacy = plan.privacy
    assert privacy is not None
    if plan.probes.every_rounds:
        yield "privacy does not cover probes, whose sums and hits are exact: set probes.every_rounds=0."
    if plan.diffusion is not None:
        yield "privacy does not cover a diffusion model: set diffusion=none."
    if plan.aggregation.method not in ("content_share", "fedavg"):
        yield (
            "Expected aggregation.method content_share or fedavg with privacy; got "
            f"{plan.aggregation.method}."
        )
    if plan.style.exchange != "bank":
        yield f"privacy needs style.exchange=bank; got {plan.style.exchange}."
    if plan.style.head != "shared":
        yield "With privacy the style head is trained at the centre: set style.head=shared, style.anchor=0."
    if plan.style.body_parts:
        yield "With privacy a site tells one style: leave style.body_parts out."
    if plan.style.centre != "coarse":
        yield "privacy does not cover the mean of every voxel: set style.centre=coarse."
    if plan.volumes.extent == "scan":
        yield "Public scans are crops: with privacy set volumes.extent=crop."
    grid = plan.style.map_grid if plan.volumes.registered else None
    numbers = style_length(plan.network.latent_channels, grid)
    if privacy.style_dimensions > (most := min(numbers, privacy.public_scans - 1)):
        yield (
            f"Expected privacy.style_dimensions of at most {most} (a style has {numbers} numbers, and there "
            f"are {privacy.public_scans} public scans); got {privacy.style_dimensions}."
        )
    if privacy.public_scans <= plan.network.code_size:
        yield (
            f"Expected privacy.public_scans above network.code_size={plan.network.code_size}, whose axes "
            f"they give; got {privacy.public_scans}."
        )
    for name, part, settings in (
        ("aggregation", plan.aggregation, ("rule", "optimiser", "norm_tolerance")),
        ("release", plan.release, ("update_clip_norm", "style_clip", "wire_dtype")),
        ("training", plan.training, ("proximal",)),
    ):
        for setting in settings:
            if getattr(part, setting) != type(part).__dataclass_fields__[setting].default:
                yield f"{name}.{setting} has no effect with privacy.level=sums: no update leaves a site."
