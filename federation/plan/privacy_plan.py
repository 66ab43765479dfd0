"""What a plan says of privacy: how much may be learned of a patient, and by which way that is kept.

The unit is always the same, a patient with all her scans. She is added or removed, or, where groups of
several patients take the steps, replaced by another (`partners: private`).
What this file does not do: account (`privacy/accounting.py`), add noise (`client/release.py`), or decide for
a site, whose own ceiling is in its site.yaml.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

from forms.names import Sha256
from forms.ranges import Range
from meduet_models.style.code import style_length
from privacy.accounting import LARGEST_DELTA, Relation

if TYPE_CHECKING:
    from federation.plan.plan import RunPlan


@dataclass(frozen=True, kw_only=True)
class NoisySteps:
    """Steps of training at the sites, on groups of one patient and public scans, with noise in each."""

    steps: Annotated[int, Range(at_least=1, at_most=100_000)]
    """Steps of each site in all, after the rounds at the centre."""
    steps_per_round: Annotated[int, Range(at_least=1, at_most=100_000)]
    """Of them, in a round; a divisor of `steps`."""
    sampling_rate: Annotated[float, Range(above=0, at_most=1)]
    """Chance of each patient to be in a step; drawn from a secret of the site."""
    clip_norm: Annotated[float, Range(above=0, at_most=10_000)]
    """L2 norm to which the gradient of a patient's group is cut, over all weights together."""
    group_size: Annotated[int, Range(at_least=2, at_most=64)] = 2
    """Scans of a group, which meet each other in the loss and nobody else; even."""
    partners: Literal["public", "private"] = "public"
    """Whose scans meet in a group. `public`: a patient's and public ones. `private`: as many patients', who
    stay together; the promise is then about replacing a patient, not about adding or removing one, and costs
    more noise."""
    epsilon_style: Annotated[float, Range(above=0, at_most=20)]
    """What the style code may cost by itself; the steps cost what is left."""
    although_noise_wins: bool = False
    """Whether sites are asked although noise drowns the steps (`privacy/worth.py`)."""
    noise_multiplier: Annotated[float, Range(at_least=0, at_most=10_000)] = 0.0
    """Deviation of a step's noise over `clip_norm`: found when the plan is made, as the least at which style
    code and steps cost the plan's epsilon, and checked by whoever reads it; 0: not found yet."""

    @property
    def patients_in_group(self) -> int:
        """Patients whose scans meet."""
        return self.group_size if self.partners == "private" else 1

    @property
    def relation(self) -> Relation:
        """Which two cohorts the promise tells apart as little as it says."""
        return "replace one" if self.partners == "private" else "add or remove one"

    @property
    def rounds(self) -> int:
        """Rounds of noisy steps."""
        return self.steps // self.steps_per_round


@dataclass(frozen=True, kw_only=True)
class PrivacyPlan:
    """Differential privacy for each patient."""

    level: Literal["sums", "adapters", "full"] = "sums"
    """What leaves a site. `sums`: one style code, with noise, before the first step, and nothing else; the
    network is trained at the centre on public scans in the sites' styles. `full`: then, from there, the sites
    train all weights on their patients, with noise in each step (`noisy`). `adapters`: the same of the output
    layer alone, so that there is less noise: reconstructions and swaps get better, content stays as it
    was."""
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
    noisy: NoisySteps | None = None
    """The steps of `adapters` and `full`; none with `sums`."""


def contradictions(plan: "RunPlan") -> Iterator[str]:
    """Say what in a plan with privacy would leave without noise, or would have no effect; one line each."""
    privacy = plan.privacy
    assert privacy is not None
    yield from _noisy_contradictions(plan, privacy)
    if plan.probes.every_rounds:
        yield "privacy does not cover probes, whose sums and hits are exact: set probes.every_rounds=0."
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
    unused = {"aggregation": [], "release": ["style_clip"], "training": ["proximal"]}
    if privacy.noisy is None:  # no update leaves a site
        unused["aggregation"] += ["rule", "optimiser", "norm_tolerance"]
        unused["release"] += ["update_clip_norm", "wire_dtype"]
    for name, settings in unused.items():
        part = getattr(plan, name)
        for setting in settings:
            if getattr(part, setting) != type(part).__dataclass_fields__[setting].default:
                yield f"{name}.{setting} has no effect with privacy.level={privacy.level}: leave it out."


def _noisy_contradictions(plan: "RunPlan", privacy: PrivacyPlan) -> Iterator[str]:
    """What level and noisy steps rule out between them."""
    noisy = privacy.noisy
    if noisy is None:
        if privacy.level != "sums":
            yield (
                f"privacy.level={privacy.level} needs privacy.noisy, the steps to take "
                f"(conf/privacy/{privacy.level}.yaml)."
            )
        return
    if privacy.level == "sums":
        yield "privacy.noisy has no effect with privacy.level=sums, where no site trains: leave it out."
        return
    if noisy.epsilon_style >= privacy.epsilon:
        yield (
            f"Expected privacy.noisy.epsilon_style below privacy.epsilon={privacy.epsilon:g}, of which the "
            f"steps take what is left; got {noisy.epsilon_style:g}."
        )
    if noisy.steps % noisy.steps_per_round:
        yield (
            f"Expected privacy.noisy.steps to divide by steps_per_round={noisy.steps_per_round}; got "
            f"{noisy.steps}."
        )
    if plan.aggregation.secure_sum and noisy.steps_per_round != 1:
        yield (
            "Expected privacy.noisy.steps_per_round=1 with aggregation.secure_sum=true: noise adds up over "
            f"sites in what is summed, not in steps before it; got {noisy.steps_per_round}."
        )
    if noisy.group_size % 2:
        yield f"Expected privacy.noisy.group_size to be even, since scans are paired; got {noisy.group_size}."
    if noisy.group_size > plan.training.batch_size:
        yield (
            f"Expected privacy.noisy.group_size of at most training.batch_size={plan.training.batch_size}, "
            f"the scans that a site holds at once; got {noisy.group_size}."
        )
    if privacy.level == "full" and plan.network.encoder == "volume_unet":
        yield (
            "privacy.level=full cuts gradients of linear layers and norms, and network.encoder=volume_unet "
            "has convolutions: set network.encoder=vit, or privacy.level=adapters or sums."
        )
    if plan.training.precision != "float32":
        yield f"privacy.level={privacy.level} cuts gradients in float32: set training.precision=float32."
    terms = plan.objective.weights
    if privacy.level == "adapters" and not (
        terms.reconstruction or terms.visible_reconstruction or terms.restyled_reconstruction
    ):
        yield (
            "privacy.level=adapters trains the output layer, which learns from reconstructions alone: set "
            "objective.weights.reconstruction above 0."
        )
