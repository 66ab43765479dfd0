"""A noised release, audited by itself: two neighbouring inputs, many draws, what tells them apart.

The worst neighbours of a clipped sum: nobody, and one patient whose share is as long as it can be. Outputs
are projected on their difference. Half of the draws choose a threshold, the other half bound its error rates
(Clopper-Pearson), and the Gaussian mechanism that could have made these gives the lower bound. No training is
needed: a wrong sigma, a wrong clip or a seed that is used twice shows in seconds. What no projection shows,
that one patient moves the shares of others, is looked for by leaving out each (`moved_most`).

What this file does not do: know the product's mechanisms; it is given functions.

Source: Nasr et al. 2023 (arXiv:2302.07956), the bound in the Gaussian family; design notes on privacy, 1.4.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy.stats import norm

from audit.statistics.guarantee import gaussian_epsilon
from audit.statistics.intervals import clopper_pearson

DRAWS = 100_000
DELTA = 1e-5
_THRESHOLDS = 200
_LEVEL = 0.95

Mechanism = Callable[[np.ndarray, int, np.random.Generator], np.ndarray]
"""So many releases (rows) of a clipped, noised sum of rows (patients), each with noise of its own."""


@dataclass(frozen=True)
class Bound:
    """What draws of a mechanism show."""

    epsilon: float
    """Lower bound at `DELTA`; infinite where the outputs do not overlap."""
    promised: float
    """The upper bound that was claimed."""

    @property
    def contradicts(self) -> bool:
        """Whether the promise does not hold."""
        return self.epsilon > self.promised


def audit_mechanism(
    mechanism: Mechanism, longest: np.ndarray, promised: float, draws: int = DRAWS, seed: int = 0
) -> Bound:
    """Draw releases of nobody and of one patient, `longest`, and bound epsilon from below.

    `longest` is far beyond any clip: what of it passes is what one patient moves.
    """
    generator = np.random.default_rng(seed)
    way = longest / np.linalg.norm(longest)
    without = mechanism(np.zeros((0, len(longest))), draws, generator) @ way
    within = mechanism(longest[None], draws, generator) @ way
    return Bound(epsilon_between(without, within), promised)


def moved_most(of: Callable[[np.ndarray], np.ndarray], rows: np.ndarray) -> float:
    """The most that leaving out one patient moves what is summed of all, in L2: at most the clip, or the
    noise is too little whatever its sigma."""
    whole = of(rows)
    without = [of(np.delete(rows, row, axis=0)) for row in range(len(rows))]
    return max(float(np.linalg.norm(whole - one)) for one in without)


def epsilon_between(without: np.ndarray, within: np.ndarray, delta: float = DELTA) -> float:
    """A lower bound of epsilon from outputs on two neighbours, larger ones where the patient is in."""
    half = len(without) // 2
    if without.max() < within.min():
        return float("inf")
    candidates = np.quantile(np.concatenate([without[:half], within[:half]]), np.linspace(0, 1, _THRESHOLDS))
    chosen = max(candidates, key=lambda threshold: _separation(without[:half], within[:half], threshold))
    separation = _separation(without[half:], within[half:], chosen)
    return 0.0 if separation <= 0 else gaussian_epsilon(1 / separation, delta)


def noise_repeats(first: np.ndarray, second: np.ndarray) -> bool:
    """Whether the noise of two releases is the same: of inputs that are known, what is left over."""
    together = float(np.corrcoef(first, second)[0, 1])
    return together > 5 / float(np.sqrt(len(first)))


def _separation(without: np.ndarray, within: np.ndarray, threshold: float) -> float:
    """Least distance of two unit Gaussians with error rates that these could have."""
    level = 1 - (1 - _LEVEL) / 2
    false = clopper_pearson(int((without > threshold).sum()), len(without), level)[1]
    missed = clopper_pearson(int((within <= threshold).sum()), len(within), level)[1]
    if false >= 1 or missed >= 1:
        return 0.0
    return float(norm.ppf(1 - false) - norm.ppf(missed))
