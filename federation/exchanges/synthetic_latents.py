"""Synthetic latents: samples of a small diffusion model that a site trains at home, with noise in each step.

Asked once, after the pretraining. The question brings the network as it was trained on public scans, and the
bank of protected styles; the site takes its patients' latents into the common style
(`meduet_models/style/common_style.py`), takes the plan's noisy steps from there, and answers with the plan's
number of samples, in its own style again, sealed to the bank's key as released latents are
(`federation/exchanges/latents.py`). All but the steps follows from the plan and the question: normalisation
and styles are public or protected, items have names that anybody can compute, and no condition, loss or count
travels beside them.
What this file does not do: it trains nothing (`client/training/private_diffusion.py`) and stores nothing.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from federation.exchanges.exchange import Exchange
from federation.exchanges.latents import BOUNDED, LatentsReply, largest_sealed
from federation.exchanges.style_code import code_promise, privacy_of
from federation.plan.latent_privacy import SyntheticPlan
from federation.plan.plan import RunPlan
from federation.wire.messages import Ask, Tensors
from forms.json_text import canonical, sha256_of
from meduet_models.diffusion.conditions import UNKNOWN, ConditionSizes, Examples
from meduet_models.diffusion.transformer import DiffusionConfig, DiffusionTransformer
from privacy.accounting import Mechanism, step_multiplier
from privacy.promise import Promise
from privacy.worth import signal_to_noise


@dataclass(frozen=True, kw_only=True)
class SyntheticAsk(Ask, kind="synthetic_ask"):
    """Train this network on your patients, with noise, and tell its samples."""

    round: int
    start: Tensors
    """The network at home, trained on public scans."""
    bank: Tensors
    """Protected styles."""


def synthetic_of(plan: RunPlan) -> SyntheticPlan:
    """The plan's models at home; raises `ValueError` where it has none."""
    if plan.diffusion is None or plan.diffusion.synthetic is None:
        raise ValueError(f"Expected diffusion.policy=synthetic; got {plan.latent_policy.name}.")
    return plan.diffusion.synthetic


def home_transformer(plan: RunPlan) -> DiffusionTransformer:
    """The network at home as it begins: told nothing, so that it has no null, and each weight stands in a
    layer that has a gradient per sample."""
    assert plan.diffusion is not None, "there are models at home"
    config = DiffusionConfig(
        latent_channels=plan.network.latent_channels,
        latent_grid=plan.network.latent_grid,
        shape=synthetic_of(plan).transformer,
        sizes=ConditionSizes(),
        path=plan.diffusion.training.path,
    )
    return DiffusionTransformer(config, seed=plan.seed)


def synthetic_shapes(plan: RunPlan) -> dict[str, tuple[int, ...]]:
    """Names and shapes of what passes the gate."""
    network = plan.network
    return {BOUNDED: (synthetic_of(plan).samples, network.latent_channels, *network.latent_grid)}


def synthetic_promise(plan: RunPlan) -> Promise:
    """Each patient's share of a step is cut, and noise added, where the step is taken; what leaves is drawn
    from what the steps made. With the least noise at which the style code and all steps cost the plan's
    epsilon."""
    synthetic, privacy, code = synthetic_of(plan), privacy_of(plan), code_promise(plan).mechanism
    assert code is not None
    multiplier = step_multiplier(
        privacy.epsilon, privacy.delta, synthetic.sampling_rate, synthetic.steps, (code,)
    )
    return Promise(
        kind="synthetic_latents",
        bound=synthetic.clip_norm,
        unit="patient",
        enforcement="samples",
        mechanism=Mechanism(
            noise_multiplier=multiplier, sampling_rate=synthetic.sampling_rate, steps=synthetic.steps
        ),
        delta=privacy.delta,
    )


def worth_at_home(plan: RunPlan, patients: float) -> float:
    """What a step at a site of so many patients is worth at most: its signal over its noise, were all
    gradients to point one way."""
    mechanism, network = synthetic_promise(plan).mechanism, home_transformer(plan)
    assert mechanism is not None
    weights = sum(parameter.numel() for parameter in network.parameters())
    return signal_to_noise(mechanism, [patients], weights)


def synthetic_examples(plan: RunPlan, site: str, latents: Float[Tensor, "b c d h w"]) -> Examples:
    """Samples with what is known of them: nothing but whose they are."""
    count = len(latents)
    unknown = torch.full((count,), UNKNOWN)
    return Examples(
        latents=latents,
        site=torch.full((count,), plan.sites.index(site)),
        body_part=unknown,
        spacing=torch.full((count, 3), torch.nan),
        category=unknown,
    )


def synthetic_items(plan: RunPlan, site: str, count: int) -> tuple[str, ...]:
    """Names of the items: anybody can compute them."""
    words = [canonical({"plan": plan.sha256, "site": site, "sample": number}) for number in range(count)]
    return tuple(sha256_of(word)[:32] for word in words)


def is_synthetic(examples: Examples) -> bool:
    """Whether nothing is told of these but whose they are."""
    return (
        examples.label_map is None
        and bool(examples.spacing.isnan().all())
        and bool((examples.body_part == UNKNOWN).all() and (examples.category == UNKNOWN).all())
    )


def synthetic_rounds(plan: RunPlan) -> range:
    """With the last round of the pretraining, once."""
    rounds = plan.training.rounds
    return range(rounds, rounds + (plan.diffusion is not None and plan.diffusion.synthetic is not None))


SYNTHETIC_LATENTS = Exchange(
    route="query.synthetic_latents",
    ask=SyntheticAsk,
    reply=LatentsReply,
    rounds=synthetic_rounds,
    largest=lambda plan, ask: largest_sealed(plan, synthetic_of(plan).samples),
    promise=lambda plan, ask: synthetic_promise(plan),
)
