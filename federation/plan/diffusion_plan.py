"""The diffusion model in the plan: from what it learns, how long, and what sites may release for it.

What leaves is a release policy (`federation/plan/release_policy.py`). `raw`: sites release the latents of
training scans, from which the scans can be decoded; each site must have said so in its own settings.
`federated`: no latent leaves; the diffusion model is trained at the sites and its updates are averaged.
`synthetic` and `aggregate`: what leaves has noise (`federation/plan/latent_privacy.py`). What this file does
not do: it decides nothing for a site (`client/exchanges/latents.py`).
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated

from federation.plan.latent_privacy import AggregatePlan, SyntheticPlan
from federation.plan.release_policy import ReleasePolicy, release_policy
from forms.names import OptionalKey, OptionalPhrase, Phrase
from forms.ranges import Entries, Range
from meduet_models.diffusion.conditions import CONDITIONS, Condition
from meduet_models.diffusion.initialisation import NO_UNET, size_mismatch
from meduet_models.diffusion.settings import DiffusionTraining, TransformerShape
from meduet_models.meduet import MOST_ACTIVATIONS, NetworkConfig

MOST_STEPS = 20_000_000
"""Optimiser steps of a run: years at any speed."""


@dataclass(frozen=True, kw_only=True)
class DiffusionPlan:
    """A diffusion model beside the pretraining."""

    policy: Phrase
    """What leaves a site for it: `raw` latents, (`federated`) model updates only, or, with noise,
    `synthetic` latents or (`aggregate`) moments of them."""
    transformer: TransformerShape
    """The network."""
    training: DiffusionTraining
    """The local loop, at the centre or at a site."""
    conditions: Annotated[tuple[Condition, ...], Entries(len(CONDITIONS))] = ("content", "style")
    """What the model is told."""
    category: OptionalPhrase = ""
    """Covariate of a scan that is its class (condition `category`)."""
    categories: Annotated[tuple[Phrase, ...], Entries(1000)] = ()
    """Its values, in the order of the classes."""
    labels: Annotated[int, Range(at_least=0, at_most=1000)] = 0
    """Label values, background included (condition `label_map`)."""
    begin_round: Annotated[int, Range(at_least=1, at_most=100_000)] = 1
    """`raw`: round of the pretraining during which the centre starts to train."""
    steps_per_round: Annotated[int, Range(at_least=1, at_most=1_000_000)] = 50
    """Optimiser steps while a round runs (`raw`), or of each site in a round (`federated`)."""
    final_steps: Annotated[int, Range(at_least=0, at_most=20_000_000)] = 0
    """At the centre: steps after the last round, with the final encoder."""
    rounds: Annotated[int, Range(at_least=0, at_most=100_000)] = 0
    """`federated`: rounds after the pretraining."""
    items_per_site: Annotated[int, Range(at_least=0, at_most=1_000_000)] = 0
    """`raw`: most latents that the centre keeps of a site; 0: all training scans."""
    items_per_round: Annotated[int, Range(at_least=0, at_most=1_000_000)] = 0
    """`raw`: most latents that a site releases in a round; 0: all with the first."""
    latent_clip: Annotated[float, Range(above=0, at_most=10_000)] = 10.0
    """`raw`, `synthetic`: root mean square to which the latents of one scan, or sample, are clipped at the
    gate."""
    recipient: OptionalKey = ""
    """`raw`, `synthetic`: public key of the centre's latent bank, to which latents are sealed at the site;
    without it no site releases one. `meduet-server plan` fills it in."""
    update_clip_norm: Annotated[float, Range(above=0, at_most=10_000)] = 20.0
    """`federated`: L2 norm to which a site's mean update is clipped at the gate."""
    synthetic: SyntheticPlan | None = None
    """`synthetic`: the model that sites train at home; none with another policy."""
    aggregate: AggregatePlan | None = None
    """`aggregate`: the moments that sites tell; none with another policy."""

    def __post_init__(self) -> None:
        """Refuse a policy that nobody knows: what it lets out would be told in another's words."""
        release_policy(self.policy)

    @property
    def release(self) -> ReleasePolicy:
        """What leaves, with all that is said of it."""
        return release_policy(self.policy)

    @property
    def noised(self) -> SyntheticPlan | AggregatePlan | None:
        """The settings of a policy with noise."""
        return self.synthetic or self.aggregate

    @property
    def epsilon_style(self) -> float | None:
        """What a policy with noise leaves of epsilon to the style code; None: it has no noise."""
        if self.synthetic is not None:
            return self.synthetic.epsilon_style
        return None if self.aggregate is None else self.aggregate.epsilon_style

    def steps(self, pretraining_rounds: int) -> int:
        """Optimiser steps over the whole run; schedules run over these."""
        if self.release.noised:
            return self.final_steps
        if self.release.trained_at == "sites":
            return self.rounds * self.steps_per_round
        return (pretraining_rounds - self.begin_round + 1) * self.steps_per_round + self.final_steps


def contradictions(
    plan: DiffusionPlan, rounds: int, body_parts: tuple[str, ...], network: NetworkConfig
) -> Iterator[str]:
    """Say what in the plan cannot be, or would have no effect; one line each."""
    defaults = {f: DiffusionPlan.__dataclass_fields__[f].default for f in DiffusionPlan.__dataclass_fields__}
    for name in plan.release.without_effect:
        if getattr(plan, name) != defaults[name]:
            yield f"diffusion.{name} has no effect with diffusion.policy={plan.policy}: leave it out."
    if plan.release.trained_at == "centre" and not 1 <= plan.begin_round <= rounds:
        yield f"Expected diffusion.begin_round from 1 to {rounds}; got {plan.begin_round}."
    if not 1 <= plan.steps(rounds) <= MOST_STEPS:
        yield (
            "Expected a diffusion model to be trained for 1 to "
            f"{MOST_STEPS:,} steps: set diffusion.rounds and diffusion.steps_per_round, or "
            "diffusion.final_steps."
        )
    if len(set(plan.conditions)) < len(plan.conditions):
        yield f"Expected each of diffusion.conditions once; got {', '.join(plan.conditions)}."
    if ("category" in plan.conditions) != bool(plan.category and len(plan.categories) > 1):
        yield (
            "Expected diffusion.category and at least two diffusion.categories with the condition category, "
            "and only with it."
        )
    if ("label_map" in plan.conditions) != (plan.labels > 1):
        yield "Expected diffusion.labels of at least 2 with the condition label_map, and 0 without it."
    if "body_part" in plan.conditions and not body_parts:
        yield "The condition body_part needs style.body_parts; there are none."
    shape = plan.transformer
    if any(size % shape.patch_size for size in network.latent_grid):
        yield (
            f"Expected the latent grid {network.latent_grid} to divide by diffusion.transformer.patch_size="
            f"{shape.patch_size}."
        )
    if shape.width % shape.heads or shape.width < 6:
        yield f"Expected diffusion.transformer.width to be a multiple of its {shape.heads} heads, 6 or more."
    tokens = math.prod(size // shape.patch_size for size in network.latent_grid)
    if (values := plan.training.batch_size * tokens * shape.width * shape.depth) > MOST_ACTIVATIONS:
        yield (
            "Expected diffusion.training.batch_size times tokens, diffusion.transformer.width and depth to "
            f"be at most {MOST_ACTIVATIONS:,} numbers; got {values:,}."
        )
    if plan.training.start == "encoder" and network.encoder == "volume_unet":
        yield NO_UNET
    if plan.training.start == "encoder":
        problem = size_mismatch(shape, network.patch_size, network.width, network.depth, network.heads)
        if problem is not None:
            yield problem
