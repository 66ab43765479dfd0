"""What a fine-tuning says of privacy: how much may be learned of a patient from all of its rounds.

A step is DP-SGD: each patient is in it with the same chance, with one labelled scan of hers; the gradient of
her scan's own loss is cut, over all trained weights together, and noise is added to the sum. That is divided
by `sampling_rate` times `expected_patients`, a number of the plan: it only sets the size of a step, which
AdamW takes out again, so a count that is told with noise would cost epsilon and buy nothing. The same number
is what every site tells as its examples, so that sites count alike.
What this file does not do: take steps (`client/training/private_finetuning.py`), or decide for a site, whose
own ceiling is in its site.yaml.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated

from forms.ranges import Range
from privacy.accounting import (
    LARGEST_DELTA,
    Epsilon,
    Mechanism,
    check_multiplier,
    epsilon_of,
    step_multiplier,
)
from privacy.promise import Promise
from privacy.worth import DROWNED, signal_to_noise

if TYPE_CHECKING:
    from federation.exchanges.finetuning import FinetunePlan


@dataclass(frozen=True, kw_only=True)
class FinetunePrivacy:
    """Differential privacy for each patient, over all rounds of a fine-tuning."""

    epsilon: Annotated[float, Range(above=0, at_most=20)]
    """What the whole fine-tuning may cost a patient."""
    delta: Annotated[float, Range(above=0, at_most=LARGEST_DELTA)] = LARGEST_DELTA
    """At which epsilon is meant."""
    clip_norm: Annotated[float, Range(above=0, at_most=10_000)]
    """L2 norm to which the gradient of a patient's scan is cut, over all trained weights together."""
    sampling_rate: Annotated[float, Range(above=0, at_most=1)]
    """Chance of each patient to be in a step; drawn from a secret of the site."""
    expected_patients: Annotated[int, Range(at_least=1, at_most=1_000_000)]
    """Patients with labels that a site is thought to have; a guess will do, and no site tells its own."""
    although_noise_wins: bool = False
    """Whether sites are asked although noise drowns the steps (`privacy/worth.py`)."""
    noise_multiplier: Annotated[float, Range(at_least=0, at_most=10_000)] = 0.0
    """Deviation of a step's noise over `clip_norm`: found when the fine-tuning is made, as the least at which
    all rounds cost `epsilon`, and checked by whoever reads it; 0: not found yet."""


def with_noise(finetuning: "FinetunePlan") -> "FinetunePlan":
    """The fine-tuning with the noise multiplier that its epsilon asks for, where it has none yet."""
    privacy = finetuning.privacy
    if privacy is None or privacy.noise_multiplier:
        return finetuning
    total = finetuning.rounds * finetuning.local.steps
    found = step_multiplier(privacy.epsilon, privacy.delta, privacy.sampling_rate, total)
    return replace(finetuning, privacy=replace(privacy, noise_multiplier=found))


def round_mechanism(finetuning: "FinetunePlan") -> Mechanism:
    """The noisy steps of one round. Raises `ValueError` for noise at which all rounds together cost more than
    the fine-tuning's epsilon, or much less."""
    privacy, steps = protection_of(finetuning), finetuning.local.steps
    noise, rate = privacy.noise_multiplier, privacy.sampling_rate
    check_multiplier(noise, privacy.epsilon, privacy.delta, rate, finetuning.rounds * steps)
    return Mechanism(noise_multiplier=noise, sampling_rate=rate, steps=steps)


def round_promise(finetuning: "FinetunePlan") -> Promise:
    """Each patient's share of a step is cut, and noise added, where the step is taken."""
    return Promise(
        kind="finetuning",
        bound=protection_of(finetuning).clip_norm,
        unit="patient",
        enforcement="steps",
        mechanism=round_mechanism(finetuning),
        delta=protection_of(finetuning).delta,
    )


def all_rounds(finetuning: "FinetunePlan") -> Epsilon:
    """What all rounds together cost a patient, at the plan's delta."""
    return epsilon_of([round_mechanism(finetuning)] * finetuning.rounds, protection_of(finetuning).delta)


def worth_of(finetuning: "FinetunePlan", num_sites: int, num_weights: int) -> float:
    """What a noisy step is worth at most: its signal over its noise, were all gradients to point one way."""
    patients = [float(protection_of(finetuning).expected_patients)] * num_sites
    return signal_to_noise(round_mechanism(finetuning), patients, num_weights)


def check_worth(finetuning: "FinetunePlan", worth: float) -> None:
    """Raise `ValueError` where noise drowns the steps, unless the plan wants them all the same."""
    if worth < DROWNED and not protection_of(finetuning).although_noise_wins:
        raise ValueError(
            f"Expected a signal to noise of a step of {DROWNED:g} or more; it is at most {worth:.3f}. No "
            "step was asked for. Set local.encoder=frozen (fewer weights), a larger epsilon, or "
            "privacy.although_noise_wins=true."
        )


def protection_of(finetuning: "FinetunePlan") -> FinetunePrivacy:
    """The fine-tuning's privacy; raises `ValueError` where it has none."""
    if finetuning.privacy is None:
        raise ValueError("Expected a fine-tuning with privacy; got one without.")
    return finetuning.privacy


def contradictions(finetuning: "FinetunePlan") -> Iterator[str]:
    """Say what in a fine-tuning with privacy would protect nobody, or would have no effect; one line each."""
    from meduet_models.downstream.tasks import task_of  # MONAI takes seconds to import

    local = finetuning.local
    if task_of(local.task).mixes:
        yield f"The loss of task={local.task} mixes scans, so no cut bounds a patient: leave privacy out."
    if local.network != "tokens":
        yield (
            f"privacy with network={local.network} is not built, where volumes are augmented by the batch: "
            "set local.network=tokens."
        )
    if finetuning.label_share != 1:
        yield (
            "label_share draws among a site's patients by their number, so that one decides who else is "
            "there: with privacy leave it out."
        )
    if local.gradient_clip_norm != type(local).__dataclass_fields__["gradient_clip_norm"].default:
        yield (
            "local.gradient_clip_norm has no effect with privacy, which cuts each patient's gradient to "
            "privacy.clip_norm: leave it out."
        )
