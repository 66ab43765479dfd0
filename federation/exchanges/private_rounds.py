"""A round of noisy steps: train from these shared weights on your patients, with noise in each step.

With privacy of level `adapters` or `full`, after the rounds at the centre. The answer is an update like any
round's (`federation/exchanges/pretraining.py`), with `adapters` of the output layer alone, and says of itself
only what everybody could tell before: the steps, and as examples the number of patients that the site's style
code told, noise included.
What this file does not do: it trains nothing (`client/training/private.py`), averages nothing
(`strategies/content_share.py`).
"""

import dataclasses
from dataclasses import dataclass
from typing import Annotated

from torch import nn

from federation.exchanges.exchange import Exchange
from federation.exchanges.latent_moments import moments_promise
from federation.exchanges.pretraining import TrainReply
from federation.exchanges.style_code import code_promise, privacy_of
from federation.exchanges.synthetic_latents import synthetic_promise
from federation.plan.plan import RunPlan
from federation.plan.privacy_plan import NoisySteps
from federation.wire.limits import largest_reply
from federation.wire.messages import Arrays, Ask, Tensors, WireDtype
from meduet_models.meduet import MeDUET
from meduet_models.sharing import output_keys, shared_keys
from privacy.accounting import Epsilon, Mechanism, check_multiplier, epsilon_of, step_multiplier
from privacy.group_gradients import parameters_of_layers
from privacy.promise import Promise


@dataclass(frozen=True, kw_only=True)
class PrivateAsk(Ask, kind="private_ask"):
    """One round: take noisy steps from these shared weights, with this bank of protected styles.

    `home` are the weights that stay at the sites, as the centre trained them (with `adapters` all but the
    output layer), and `public` the plan's public
    scans; both come with the first such round, or later to a site that missed them, and the site keeps them.
    """

    round: int
    shared: Annotated[Tensors, Arrays(rounded=True, view=True)]
    bank: Tensors
    home: Tensors | None = None
    public: Tensors | None = None
    wire_dtype: WireDtype = "float32"

    def sha256(self) -> str:
        """As `Ask`; what a site keeps is no part of the question, whether it comes again or not."""
        return Ask.sha256(dataclasses.replace(self, home=None, public=None))


def noisy_of(plan: RunPlan) -> NoisySteps:
    """The plan's noisy steps; raises `ValueError` where it has none."""
    if (noisy := privacy_of(plan).noisy) is None:
        raise ValueError("Expected privacy.level=adapters or full; got a plan without noisy steps.")
    return noisy


def trained_keys(plan: RunPlan, network: MeDUET) -> tuple[str, ...]:
    """Parameters that noisy steps train: the output layer's, or at level `full` all that have a gradient per
    group. All others rest."""
    if privacy_of(plan).level == "adapters":
        return output_keys(network)
    return parameters_of_layers(network)


def resting_others(plan: RunPlan, student: MeDUET) -> dict[str, nn.Parameter]:
    """The parameters that noisy steps train, by name; from now on all others of `student` rest."""
    trained, parameters = trained_keys(plan, student), dict(student.named_parameters())
    for name, parameter in parameters.items():
        parameter.requires_grad_(name in trained)
    return {name: parameters[name] for name in trained}


def travelling_keys(plan: RunPlan, network: MeDUET) -> tuple[str, ...]:
    """Tensors that travel with a round at the sites: at level `adapters` the output layer's, else what the
    plan's method shares."""
    if plan.privacy is not None and plan.privacy.level == "adapters":
        return output_keys(network)
    return shared_keys(network, plan.style.head, plan.aggregation.method)


def mechanisms(plan: RunPlan) -> list[Mechanism]:
    """What all that leaves a site under a plan with privacy costs a patient."""
    code = code_promise(plan).mechanism
    assert code is not None
    if plan.latent_policy.noised:
        latents = latents_promise(plan).mechanism
        assert latents is not None
        return [code, latents]
    if (noisy := privacy_of(plan).noisy) is None:
        return [code]
    return [code, dataclasses.replace(_of_a_round(plan), steps=noisy.steps)]


def latents_promise(plan: RunPlan) -> Promise:
    """Of what leaves for a diffusion model under a policy with noise; raises `ValueError` under another."""
    home = plan.diffusion is not None and plan.diffusion.synthetic is not None
    return synthetic_promise(plan) if home else moments_promise(plan)


def run_epsilon(plan: RunPlan) -> Epsilon:
    """The same as epsilon, at the plan's delta."""
    return epsilon_of(mechanisms(plan), privacy_of(plan).delta)


def with_noise(plan: RunPlan) -> RunPlan:
    """The plan with the noise multiplier of its steps that its epsilon asks for, where it has none yet."""
    privacy = plan.privacy
    if privacy is None or privacy.noisy is None or privacy.noisy.noise_multiplier:
        return plan
    noisy, code = privacy.noisy, code_promise(plan).mechanism
    assert code is not None
    found = step_multiplier(privacy.epsilon, privacy.delta, noisy.sampling_rate, noisy.steps, (code,))
    noisy = dataclasses.replace(noisy, noise_multiplier=found)
    return dataclasses.replace(plan, privacy=dataclasses.replace(privacy, noisy=noisy))


def _of_a_round(plan: RunPlan) -> Mechanism:
    """Raises `ValueError` for noise at which style code and all steps cost more than the plan's epsilon, or
    much less."""
    privacy, noisy, code = privacy_of(plan), noisy_of(plan), code_promise(plan).mechanism
    assert code is not None
    noise, rate = noisy.noise_multiplier, noisy.sampling_rate
    check_multiplier(noise, privacy.epsilon, privacy.delta, rate, noisy.steps, (code,))
    return Mechanism(
        noise_multiplier=noise, sampling_rate=rate, steps=noisy.steps_per_round, relation=noisy.relation
    )


def steps_promise(plan: RunPlan) -> Promise:
    """Each patient's share of a step is cut, and noise added, where the step is taken; the same in every
    round."""
    return Promise(
        kind="private_round",
        bound=noisy_of(plan).clip_norm,
        unit="patient",
        enforcement="steps",
        relation=noisy_of(plan).relation,
        mechanism=_of_a_round(plan),
        delta=privacy_of(plan).delta,
    )


def noisy_rounds(plan: RunPlan) -> range:
    """The rounds after those at the centre; none without noisy steps."""
    return range(plan.training.rounds + 1, plan.num_rounds + 1)


def rounds_of_updates(plan: RunPlan) -> range:
    """The same, where an update leaves by itself: none where they leave in secure sums."""
    return range(0) if plan.aggregation.secure_sum else noisy_rounds(plan)


PRIVATE_ROUNDS = Exchange(
    route="train.private",
    ask=PrivateAsk,
    reply=TrainReply,
    rounds=rounds_of_updates,
    largest=lambda plan, ask: largest_reply(ask.shared, ask.wire_dtype),
    promise=lambda plan, ask: steps_promise(plan),
)
