"""What canaries show of a mechanism that is as it says, and of ones that are not: scores, made of numbers.

A canary has a direction of its own, so all that reaches an attacker of her is one number: how often she was
drawn, where her coin came up, in units of the bound, and the noise of all steps. From many such audits
follows what one can be expected to show where the promise holds, and how often it contradicts one that does
not.

What this file does not do: read a release.

Axes: m = canaries.
"""

import numpy as np

from audit.statistics.one_run import DELTA, LEVEL, Guesses
from privacy.accounting import Mechanism

_AUDITS = 20


def told(
    mechanism: Mechanism, coins: np.ndarray, generator: np.random.Generator, length: float = 1.0
) -> np.ndarray:
    """What the noisy sums of all steps, added up, tell of each canary. `length`: of a canary's share, in
    units of the bound."""
    drawn = generator.binomial(mechanism.steps, mechanism.sampling_rate, len(coins))
    noise = mechanism.noise_multiplier * np.sqrt(mechanism.steps) * generator.normal(size=len(coins))
    scores: np.ndarray = length * drawn * coins + noise
    return scores


def told_with_known_draws(
    mechanism: Mechanism, coins: np.ndarray, generator: np.random.Generator
) -> np.ndarray:
    """The same where who is drawn is no secret: an attacker adds up the steps in which a canary would be."""
    drawn = generator.binomial(mechanism.steps, mechanism.sampling_rate, len(coins))
    noise = mechanism.noise_multiplier * np.sqrt(drawn) * generator.normal(size=len(coins))
    likelihood: np.ndarray = drawn * coins + noise - drawn / 2
    return likelihood


def told_with_noise_twice(
    mechanism: Mechanism, coins: np.ndarray, generator: np.random.Generator
) -> np.ndarray:
    """The same of two rounds that share their noise: one less the other has none."""
    draws = [generator.binomial(mechanism.steps, mechanism.sampling_rate, len(coins)) for _ in range(2)]
    apart: np.ndarray = np.abs((draws[0] - draws[1]) * coins)
    return apart


def expected_lower(
    mechanism: Mechanism, canaries: int, delta: float = DELTA, level: float = LEVEL, gaussian: bool = False
) -> float:
    """The bound that so many canaries show on average where the promise holds, to whoever reads the noisy
    sums themselves."""
    generator, bounds = np.random.default_rng(0), []
    for _ in range(_AUDITS):
        coins = generator.random(canaries) < 0.5
        bounds.append(Guesses.of(told(mechanism, coins, generator), coins).lower(delta, level, gaussian))
    return float(np.mean(bounds))
