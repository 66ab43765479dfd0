"""Lower bounds of epsilon from guesses in one run, and the ceiling of such an audit.

A coin was thrown for each of m canaries (is it in?), the run was made once, and an attacker who sees what
came of it guesses r of the coins, v of them rightly. `p_value` is the chance of so many under (epsilon,
delta); the bound is the largest epsilon at which that is below the level. How many are guessed is said
beforehand: taking the best of all numbers of guesses claims too much (23 to 38% false alarms where 5% is
claimed, measured on published tools), so at most five are tried, each at a fifth of the level.

What this file does not do: make canaries (`federation/canaries.py`), or guess (`attacks/canaries.py`).

Source: Steinke, Nasr, Jagielski 2023 (arXiv:2305.08846, appendix D); for the Gaussian family: Mahloujifar,
Melis, Chaudhuri 2025 (arXiv:2410.22235).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import numpy as np
from scipy.special import expit, ndtr, ndtri
from scipy.stats import binom

from audit.statistics.guarantee import gaussian_epsilon

LEVEL = 0.05
DELTA = 1e-5
MOST = 60.0
"""Epsilon beyond which no bound is sought."""
_SHARES = (0.05, 0.11, 0.22, 0.47, 1.0)
"""Share of the coins, or pairs, that is guessed: said here, before anything is seen."""
_WIDEST = 20.0
"""Deviations between two outputs beyond which no bound is sought: an epsilon of 280 at 1e-5."""
_STEPS = 32
"""Of a bisection: to 2e-8 of epsilon."""


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
    return _largest_refused(lambda epsilon: p_value(m, r, v, epsilon, delta) < level, MOST)


def epsilon_lower_gaussian(m: int, r: int, v: int, delta: float = DELTA, level: float = LEVEL) -> float:
    """The same within the family of Gaussian mechanisms: sharper, and only as right as that assumption."""
    separation = _largest_refused(lambda mu: _refuses(m, r, v, mu, level), _WIDEST)
    return gaussian_epsilon(1 / separation, delta) if separation > 0 else 0.0


def ceiling(m: int, delta: float = DELTA, level: float = LEVEL) -> float:
    """What m canaries could show at most: all guessed, all rightly."""
    return epsilon_lower(m, m, m, delta, level)


@dataclass(frozen=True)
class Guesses:
    """Guesses of coins, at each of the numbers of guesses that were fixed beforehand."""

    canaries: int
    tried: tuple[tuple[int, int], ...]
    """How many were guessed, half of them to be in, and how many rightly."""

    @staticmethod
    def of(scores: np.ndarray, coins: np.ndarray) -> "Guesses":
        """The largest scores are guessed to be in, the smallest to be out, all others left open. Raises
        `ValueError` for fewer than two coins, of which nothing is guessed."""
        m = len(coins)
        if m < 2:
            raise ValueError(f"Expected the coins of at least two canaries; got {m}.")
        order = np.argsort(-scores, kind="stable")
        halves = sorted({max(1, min(m // 2, round(share * m / 2))) for share in _SHARES})
        right = [int(coins[order[:k]].sum() + (~coins[order[m - k :]]).sum()) for k in halves]
        return Guesses(m, tuple((2 * k, v) for k, v in zip(halves, right, strict=True)))

    def lower(self, delta: float = DELTA, level: float = LEVEL, gaussian: bool = False) -> float:
        """The largest bound, each number of guesses at its part of the level."""
        bound, part = _bound_gaussian if gaussian else _bound, level / len(self.tried)
        return max(bound(self.canaries, r, v, delta, part) for r, v in self.tried)

    def ceiling(self, delta: float = DELTA, level: float = LEVEL) -> float:
        """The most that so many canaries could show: all guesses right."""
        return Guesses(self.canaries, tuple((r, r) for r, _ in self.tried)).lower(delta, level)


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


_bound, _bound_gaussian = cache(epsilon_lower), cache(epsilon_lower_gaussian)


def _largest_refused(refused: Callable[[float], bool], most: float) -> float:
    if not refused(0.0):
        return 0.0
    low, high = 0.0, most
    for _ in range(_STEPS):
        middle = (low + high) / 2
        low, high = (middle, high) if refused(middle) else (low, middle)
    return low


def _refuses(m: int, r: int, v: int, mu: float, level: float) -> bool:
    """Whether v of r right guesses about m canaries refuse the Gaussian mechanism whose outputs lie `mu`
    deviations apart."""
    right, wrong = level * v / m, level * (r - v) / m
    for i in range(v - 1, -1, -1):
        grown = max(wrong, float(ndtr(ndtri(right) - mu)))
        if grown == wrong:
            break
        right = min(1.0, right + i / (r - i) * (grown - wrong))
        wrong = grown
    return right + wrong > r / m and not math.isnan(right)
