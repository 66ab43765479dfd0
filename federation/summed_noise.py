"""What a secure sum of noisy steps promises, beyond what each site's own noise does.

A site adds the noise of its own promise, so that holds against everybody, whatever becomes of the masks.
Beyond that a sum holds the noise of all: whoever reads it, and knows what `colluding` sites put in, finds the
noise of at least `hiding` sites in each number. That is so because what is summed is linear: a step's clipped
sum with its noise, times a public factor. An update of several steps, or of an optimiser at the site, is not,
and of such no more could be told than the site's own promise.

Each site rounds to the grid after its noise, and a grid far finer than that noise (`check_summed`) takes
nothing away that an accountant's own rounding would show. The style code is not summed: it counts as it is.
What this file does not do: mask (`privacy/secure_sum/`), or change what a ledger is charged: that is the
site's own promise.
"""

import dataclasses
import math

from federation.exchanges.private_rounds import mechanisms, noisy_of, steps_promise
from federation.exchanges.style_code import privacy_of
from federation.plan.plan import RunPlan
from federation.wire.sum_layout import SumLayout
from privacy.accounting import Epsilon, Mechanism, epsilon_of
from privacy.secure_sum.transcript import threshold

FINEST = 16
"""Steps of the grid in a deviation of a site's noise, at least."""


def colluding(plan: RunPlan) -> int:
    """Other sites that may work with the centre: up to a third of all, as secure sums allow."""
    return len(plan.sites) // 3


def hiding(plan: RunPlan) -> int:
    """Sites whose noise is in a sum at the least and unknown to these; a site's own is among them."""
    return threshold(len(plan.sites)) - colluding(plan)


def summed_mechanisms(plan: RunPlan) -> list[Mechanism]:
    """What all that leaves a site tells whoever reads sums only, and works with `colluding` other sites: its
    style code, and its steps with the noise of those who hide it."""
    code, steps = mechanisms(plan)
    noise = steps.noise_multiplier * math.sqrt(hiding(plan))
    return [code, dataclasses.replace(steps, noise_multiplier=noise)]


def summed_epsilon(plan: RunPlan) -> Epsilon:
    """The same as epsilon, at the plan's delta."""
    return epsilon_of(summed_mechanisms(plan), privacy_of(plan).delta)


def summed_factor(plan: RunPlan) -> float:
    """By what a step's sum is multiplied before it is masked: public, the same at every site."""
    return plan.training.final_learning_rate / noisy_of(plan).sampling_rate


def summed_deviation(plan: RunPlan) -> float:
    """Of the noise that one site adds to each number of the sum."""
    return summed_factor(plan) * steps_promise(plan).deviation


def check_summed(plan: RunPlan, layout: SumLayout) -> None:
    """Raise `ValueError` for a sum of noisy steps whose noise the grid or the gate's bound would spoil."""
    noise, step = summed_deviation(plan), 2.0**-layout.bits
    if noise < FINEST * step:
        raise ValueError(
            f"Expected noise of at least {FINEST} steps of the grid in each number of a sum; got "
            f"{noise / step:.2g}. Lower aggregation.weight_cap or release.update_clip_norm."
        )
    length = noise * math.sqrt(layout.num_values) + summed_factor(plan) * noisy_of(plan).clip_norm
    if length > layout.clip_norm / 2:
        raise ValueError(
            f"Expected release.update_clip_norm of at least twice the length of a step's noise, "
            f"{length:.3g}, which it would cut; got {layout.clip_norm:g}. Raise it."
        )
