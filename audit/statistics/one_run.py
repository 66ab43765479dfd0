"""Lower bounds of epsilon from guesses in one run, and the ceiling of such an audit.

A coin was thrown for each of m canaries (is it in?), the run was made once, and an attacker who sees what
came of it guesses r of the coins, v of them rightly. `p_value` is the chance of so many under (epsilon,
delta); the bound is the largest epsilon at which that is below the level. How many are guessed is said
beforehand: taking the best of all numbers of guesses claims too much (23 to 38% false alarms where 5% is
claimed, measured on published tools), so at most five are tried, each at a fifth of the level.

What this file does not do: make canaries.

Source: Steinke, Nasr, Jagielski 2023 (arXiv:2305.08846, appendix D); for the Gaussian family: Mahloujifar,
Melis, Chaudhuri 2025 (arXiv:2410.22235).
"""

import math
from collections.abc import Callable

import numpy as np
from scipy.special import expit
from scipy.stats import binom, norm

from audit.statistics.guarantee import gaussian_sigma

LEVEL = 0.05
DELTA = 1e-5
MOST = 60.0
"""Epsilon beyond which no bound is sought."""
_SHARES = (0.05, 0.11, 0.22, 0.47, 1.0)
"""Share of the pairs that is guessed: said here, before anything is seen."""


def p_value(m: int, r: int, v: int, epsilon: float, delta: float) -> float:
    """Chance of at least v right among r guesses about m canaries, at most, under (epsilon, delta)."""
    right = float(expit(epsilon))
    tail = float(binom.sf(v - 1, r, right))
    if delta == 0:
        return tail
    i = np.arange(1, v + 1)
    slack = float(np.max((binom.sf(v - i - 1, r, right) - tail) / i, initial=0.0))
    return min(1.0, tail + 2 * m * delta * slack)


def epsilon_lower(m: int, r: int, v: int, delta: float = DELTA, level: float = LEVEL) -> float:
    """The largest epsilon that so many right guesses refuse; 0 where they refuse none."""
    return _largest_refused(lambda epsilon: p_value(m, r, v, epsilon, delta) < level)


def epsilon_lower_gaussian(m: int, r: int, v: int, delta: float = DELTA, level: float = LEVEL) -> float:
    """The same within the family of Gaussian mechanisms: sharper, and only as right as that assumption."""
    return _largest_refused(lambda epsilon: _refuses(m, r, v, gaussian_sigma(epsilon, delta), level))


def ceiling(m: int, delta: float = DELTA, level: float = LEVEL) -> float:
    """What m canaries could show at most: all guessed, all rightly."""
    return epsilon_lower(m, m, m, delta, level)


def epsilon_of_pairs(
    scores: np.ndarray, member: np.ndarray, site: np.ndarray, seed: int = 0, delta: float = DELTA
) -> float:
    """A lower bound of epsilon (add or remove one) from scores of members and others.

    Each member is paired with another of its site, at random; which of the two was in is a fair coin where
    splits were dealt by a hash, and the guess is whose score is larger, for the pairs that lie farthest
    apart. Exchanging the two replaces one patient by another, so the bound on that is halved.
    """
    generator = np.random.default_rng(seed)
    gaps = []
    for one in np.unique(site):
        inside = generator.permutation(scores[(site == one) & member])
        outside = generator.permutation(scores[(site == one) & ~member])
        pairs = min(len(inside), len(outside))
        gaps.append(inside[:pairs] - outside[:pairs])
    gap = np.concatenate(gaps) if gaps else np.zeros(0)
    gap = gap[np.argsort(-np.abs(gap), kind="stable")]
    best = 0.0
    for guesses in sorted({max(1, round(share * len(gap))) for share in _SHARES}) if len(gap) else ():
        right = int((gap[:guesses] > 0).sum())
        best = max(best, epsilon_lower(len(gap), guesses, right, delta, LEVEL / len(_SHARES)))
    return best / 2


def _largest_refused(refused: Callable[[float], bool]) -> float:
    if not refused(0.0):
        return 0.0
    low, high = 0.0, MOST
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if refused(middle) else (low, middle)
    return low


def _refuses(m: int, r: int, v: int, sigma: float, level: float) -> bool:
    """Whether v of r right guesses about m canaries refuse the Gaussian mechanism of this sigma."""

    def blown(x: float) -> float:
        return float(norm.cdf(norm.ppf(min(1.0, x)) - 1 / sigma))

    right, wrong = level * v / m, level * (r - v) / m
    for i in range(v - 1, -1, -1):
        grown = max(wrong, blown(right))
        if grown == wrong:
            break
        right = min(1.0, right + i / (r - i) * (grown - wrong))
        wrong = grown
    return right + wrong > r / m and not math.isnan(right)
