"""What a plan says of latents with noise: the policies `synthetic` and `aggregate`, under its `privacy`.

`synthetic`: each site trains a small diffusion model of its own with noise in each step, and its samples
leave. `aggregate`: mean and spread of latents along a few public axes leave, with noise. Either is asked
once, after the pretraining; it and the style code cost `privacy.epsilon` together, of which the style code
may take `epsilon_style`.
What this file does not do: account (`privacy/accounting.py`), or say what travels
(`federation/exchanges/synthetic_latents.py`, `latent_moments.py`).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from forms.ranges import Range
from meduet_models.diffusion.settings import TransformerShape

if TYPE_CHECKING:
    from federation.plan.plan import RunPlan

FEWEST_PATIENTS = 500
"""Patients of a site below whom noise drowns what its own model could learn."""


@dataclass(frozen=True, kw_only=True)
class SyntheticPlan:
    """A small diffusion model that a site trains at home with noise in each step, and its samples."""

    epsilon_style: Annotated[float, Range(above=0, at_most=20)]
    """What the style code may cost by itself; the steps cost what is left."""
    samples: Annotated[int, Range(at_least=1, at_most=100_000)]
    """Latents that leave each site."""
    transformer: TransformerShape
    """The network at home; it is told nothing."""
    public_steps: Annotated[int, Range(at_least=0, at_most=1_000_000)]
    """Steps on public scans at the centre, from which every site begins."""
    steps: Annotated[int, Range(at_least=1, at_most=100_000)]
    """Steps on a site's patients."""
    sampling_rate: Annotated[float, Range(above=0, at_most=1)]
    """Chance of each patient to be in a step; drawn from a secret of the site."""
    clip_norm: Annotated[float, Range(above=0, at_most=10_000)]
    """L2 norm to which the gradient of a patient is cut, over all weights together."""
    expected_patients: Annotated[int, Range(at_least=1, at_most=1_000_000)]
    """Training patients that a site is thought to have; a guess will do, and no site tells its own."""
    draws: Annotated[int, Range(at_least=1, at_most=64)] = 4
    """Times and noises at which a patient's scan is seen in a step; her gradient is their mean."""
    learning_rate: Annotated[float, Range(above=0, at_most=10)] = 1e-3
    """Of AdamW, at home."""
    average: Annotated[float, Range(at_least=0, below=1)] = 0.99
    """Momentum of the moving average of the weights, which is what is sampled from."""
    sampling_steps: Annotated[int, Range(at_least=1, at_most=1000)] = 25
    """Solver steps of a sample."""
    although_noise_wins: bool = False
    """Whether sites are asked although they are expected to have fewer than 500 patients, or noise drowns
    the steps (`privacy/worth.py`)."""


@dataclass(frozen=True, kw_only=True)
class AggregatePlan:
    """Mean and spread of latents along a few public axes, with noise."""

    epsilon_style: Annotated[float, Range(above=0, at_most=20)]
    """What the style code may cost by itself; the moments cost what is left."""
    dimensions: Annotated[int, Range(at_least=1, at_most=256)]
    """Axes: the principal ones of the plan's public scans."""
    samples: Annotated[int, Range(at_least=1, at_most=4096)]
    """Latents that the centre makes for each site: so many public scans, moved."""


def contradictions(plan: "RunPlan") -> Iterator[str]:
    """Say what in a plan with a noised policy, or with its settings, cannot be; one line each."""
    diffusion, privacy = plan.diffusion, plan.privacy
    if diffusion is None:
        return
    policy = diffusion.release
    for name in ("synthetic", "aggregate"):
        if (getattr(diffusion, name) is not None) != (policy.name == name):
            yield (
                f"Expected diffusion.{name} with diffusion.policy={name} and only with it "
                f"(conf/diffusion/{name}.yaml)."
            )
            return
    if not policy.noised:
        if privacy is not None:
            yield (
                f"diffusion.policy={policy.name} has no place in a plan with privacy: {policy.warning} leave "
                "without noise, so the promise to each patient would be void. Set diffusion=synthetic, "
                "aggregate or none."
            )
        return
    if privacy is None:
        yield (
            f"diffusion.policy={policy.name} has its noise from privacy, and there is none: set privacy=sums."
        )
        return
    if privacy.level != "sums":
        yield (
            f"diffusion.policy={policy.name} shares epsilon with the style code alone: set privacy.level="
            f"sums; got {privacy.level}."
        )
    noised, own = diffusion.noised, diffusion.epsilon_style
    assert noised is not None and own is not None, "a noised policy has its settings"
    if own >= privacy.epsilon:
        yield (
            f"Expected diffusion.{policy.name}.epsilon_style below privacy.epsilon={privacy.epsilon:g}, of "
            f"which the latents take what is left; got {own:g}."
        )
    if odd := sorted(set(diffusion.conditions) - {"content", "style"}):
        yield (
            f"diffusion.policy={policy.name} tells nothing of a scan beside its site: with it leave the "
            f"condition {odd[0]} out."
        )
    if isinstance(noised, SyntheticPlan):
        yield from _synthetic_contradictions(plan, noised)
        return
    if noised.samples > privacy.public_scans:
        yield (
            f"Expected diffusion.aggregate.samples of at most privacy.public_scans={privacy.public_scans}, "
            f"each of which is moved once; got {noised.samples}."
        )
    if noised.dimensions >= privacy.public_scans:
        yield (
            f"Expected diffusion.aggregate.dimensions below privacy.public_scans={privacy.public_scans}, "
            f"which give the axes; got {noised.dimensions}."
        )


def _synthetic_contradictions(plan: "RunPlan", synthetic: SyntheticPlan) -> Iterator[str]:
    from federation.exchanges.latents import items_per_chunk  # it knows plans

    if synthetic.samples > (most := items_per_chunk(plan)):
        yield (
            f"Expected diffusion.synthetic.samples of at most {most}, which one answer holds; got "
            f"{synthetic.samples}."
        )
    if synthetic.expected_patients < FEWEST_PATIENTS and not synthetic.although_noise_wins:
        yield (
            f"Expected diffusion.synthetic.expected_patients of {FEWEST_PATIENTS} or more: with "
            f"{synthetic.expected_patients} a site's own model learns little beside the noise "
            "(docs/generation.md). Set diffusion=aggregate, or diffusion.synthetic.although_noise_wins=true."
        )
    shape = synthetic.transformer
    if any(size % shape.patch_size for size in plan.network.latent_grid):
        yield (
            f"Expected the latent grid {plan.network.latent_grid} to divide by "
            f"diffusion.synthetic.transformer.patch_size={shape.patch_size}."
        )
    if shape.width % shape.heads or shape.width < 6:
        yield (
            f"Expected diffusion.synthetic.transformer.width to be a multiple of its {shape.heads} heads, 6 "
            "or more."
        )
