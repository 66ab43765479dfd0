"""Moments of latents: mean and spread along a few public axes, with noise; asked once, after the pretraining.

The question brings the plan's public scans and the bank of protected styles. From them follow, at both ends,
the axes: the principal ones of the public scans in the common style of the bank, in which a site's patients
are measured, too (`privacy/latent_moments.py`, `meduet_models/style/common_style.py`).
What this file does not do: it computes no moments (`client/exchanges/latent_moments.py`) and draws no latent
(`server/exchanges/latent_moments.py`).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from federation.exchanges.exchange import Exchange
from federation.exchanges.style_code import check_public, code_promise, privacy_of
from federation.exchanges.survey import survey_layout
from federation.plan.latent_privacy import AggregatePlan
from federation.plan.plan import RunPlan
from federation.wire.limits import Largest, largest_reply, promised
from federation.wire.messages import Ask, Reply, Tensors
from meduet_models.style.common_style import CommonStyle
from meduet_models.threads import fixed_threads
from privacy.accounting import Mechanism, step_multiplier
from privacy.latent_moments import SHARE_BOUND, LatentMoments
from privacy.promise import Promise

MOMENTS = "moments"
"""Name of the tensor: the sum of shares."""


@dataclass(frozen=True, kw_only=True)
class MomentsAsk(Ask, kind="moments_ask"):
    """Tell mean and spread of your patients along the axes of these public scans."""

    round: int
    public: Tensors
    bank: Tensors
    """Protected styles."""


@dataclass(frozen=True, kw_only=True)
class MomentsReply(Reply, kind="moments_reply"):
    """A site's moments with noise, and with them about how many patients it has."""

    moments: Tensors


def aggregate_of(plan: RunPlan) -> AggregatePlan:
    """The plan's moments; raises `ValueError` where it has none."""
    if plan.diffusion is None or plan.diffusion.aggregate is None:
        raise ValueError(f"Expected diffusion.policy=aggregate; got {plan.latent_policy.name}.")
    return plan.diffusion.aggregate


def public_moments(plan: RunPlan, common: CommonStyle, public: Tensor) -> LatentMoments:
    """The axes of these public scans in the common style; the same bits whatever the number of threads."""
    with fixed_threads(1):
        dressed = common.dressed(public, survey_layout(plan))
        return LatentMoments.of(dressed.flatten(1), aggregate_of(plan).dimensions)


def moments_shapes(plan: RunPlan) -> dict[str, tuple[int, ...]]:
    """Names and shapes of what travels: coefficients, their squares, a count."""
    return {MOMENTS: (2 * aggregate_of(plan).dimensions + 1,)}


def largest_moments(plan: RunPlan, ask: MomentsAsk) -> Largest:
    """Size of a site's answer, at most."""
    return largest_reply(promised(moments_shapes(plan), torch.float32))


def asked_promise(plan: RunPlan, ask: MomentsAsk) -> Promise:
    """The promise of a question that comes with the plan's public scans; raises `ValueError` for any others,
    before anything is reserved for them."""
    check_public(plan, ask.public)
    return moments_promise(plan)


def moments_promise(plan: RunPlan) -> Promise:
    """Each patient's share is bounded where it is made; the gate adds the least noise at which the style code
    and the moments cost the plan's epsilon together."""
    aggregate_of(plan)
    privacy, code = privacy_of(plan), code_promise(plan).mechanism
    assert code is not None
    multiplier = step_multiplier(privacy.epsilon, privacy.delta, 1.0, 1, (code,))
    return Promise(
        kind="latent_moments",
        bound=SHARE_BOUND,
        unit="patient",
        enforcement="check",
        mechanism=Mechanism(noise_multiplier=multiplier),
        delta=privacy.delta,
    )


def moments_rounds(plan: RunPlan) -> range:
    """With the last round of the pretraining, once."""
    rounds = plan.training.rounds
    return range(rounds, rounds + (plan.diffusion is not None and plan.diffusion.aggregate is not None))


LATENT_MOMENTS = Exchange(
    route="query.latent_moments",
    ask=MomentsAsk,
    reply=MomentsReply,
    rounds=moments_rounds,
    largest=largest_moments,
    promise=asked_promise,
)
