"""Accounting: what releases with noise cost a patient together, as epsilon at a delta.

The privacy loss distribution (PLD) of `dp-accounting` is the only truth: its pessimistic and its optimistic
estimate bound epsilon from both sides. Rényi accounting is a cross-check in the tests; the central limit
accountant of Opacus, which says too little, is not used. The unit is that of the promise, a patient. The
relation is the weakest of all that is composed: a patient added or removed, or, where steps take several
patients at once, replaced by another: then a sum moves by twice the bound of a share, and the number of
patients is nobody's secret.

Does not do: amplification by the choice of sites (sites are chosen once a round, their steps are not
independent); Rényi accounting of replaced patients, where the library's accountants disagree.
Source: Sommer et al., arXiv:1812.11804 (PLD); Balle and Wang, arXiv:1805.06530 (the exact Gaussian); Lebeda
et al., arXiv:2405.20769 (Poisson samples, a patient replaced).
"""

import dataclasses
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any, Literal, get_args

Relation = Literal["add or remove one", "replace one"]
"""Which two cohorts count as neighbours."""
LARGEST_DELTA = 1e-5
"""A delta beyond it protects nobody: with some hundred patients, one of them may simply be told."""
_COARSE, _FINE = 1e-3, 1e-4  # grids of privacy losses; the first is quick, and says a little too much
_GRAIN = 1e-4  # noise multipliers are multiples of it, so that sites and centre agree on them to the bit
_NEEDLESS = 0.02  # share of an epsilon that steps may leave unused


@dataclass(frozen=True, kw_only=True)
class Mechanism:
    """A Gaussian mechanism, on Poisson samples of the patients, taken so many times."""

    noise_multiplier: float
    """Deviation of the noise over the bound of one patient's share."""
    sampling_rate: float = 1.0
    """Chance of each patient to be in a step; 1: everybody is."""
    steps: int = 1
    """How often it is taken."""
    relation: Relation = "add or remove one"
    """What a share is bounded for; with `replace one` a patient's share moves a sum by twice its bound."""

    def __post_init__(self) -> None:
        """Refuse what adds no noise, and samples that are none."""
        if not (math.isfinite(self.noise_multiplier) and self.noise_multiplier > 0):
            raise ValueError(f"Expected a finite noise_multiplier > 0; got {self.noise_multiplier}.")
        if not 0 < self.sampling_rate <= 1:
            raise ValueError(f"Expected sampling_rate in (0, 1]; got {self.sampling_rate}.")
        if self.steps < 1:
            raise ValueError(f"Expected steps >= 1; got {self.steps}.")

    def record(self) -> dict[str, Any]:
        """As it stands in the books; the relation where it is not the usual one."""
        record = asdict(self)
        return (
            record if self.relation == "replace one" else {n: v for n, v in record.items() if n != "relation"}
        )

    @staticmethod
    def from_record(record: object) -> "Mechanism":
        """Back from `record`; raises `ValueError` for anything else."""
        match record:
            case {
                "noise_multiplier": int() | float() as noise,
                "sampling_rate": int() | float() as rate,
                "steps": int(steps),
                **others,
            } if not any(isinstance(value, bool) for value in (noise, rate, steps)):
                relation: Any = others.pop("relation", "add or remove one")
                if not others and relation in get_args(Relation):
                    noise, rate = float(noise), float(rate)
                    return Mechanism(
                        noise_multiplier=noise, sampling_rate=rate, steps=steps, relation=relation
                    )
        raise ValueError("Expected a mechanism (noise_multiplier, sampling_rate, steps); got another record.")


@dataclass(frozen=True)
class Epsilon:
    """Epsilon at some delta, between its optimistic and its pessimistic estimate."""

    lower: float
    upper: float
    """What is charged."""

    def __str__(self) -> str:
        """For people; rounded outwards."""
        if math.isinf(self.upper):
            return "infinite"
        return f"{math.floor(self.lower * 1e3) / 1e3:.3f} to {math.ceil(self.upper * 1e3) / 1e3:.3f}"


INFINITE = Epsilon(math.inf, math.inf)
"""Of a release without noise."""


def epsilon_of(mechanisms: Sequence[Mechanism | None], delta: float) -> Epsilon:
    """What all of these cost together, under the weakest relation among them; `None` is a release without
    noise, and makes it infinite."""
    if not 0 < delta < 1:
        raise ValueError(f"Expected delta in (0, 1); got {delta}.")
    if not mechanisms:
        return Epsilon(0.0, 0.0)
    noised = [mechanism for mechanism in mechanisms if mechanism is not None]
    if len(noised) < len(mechanisms):
        return INFINITE
    return _composed(tuple(sorted(_counted(noised).items(), key=str)), delta)


def _counted(mechanisms: Sequence[Mechanism]) -> Counter[Mechanism]:
    """A step is a step: the same one of several mechanisms is composed by its count. Where one bounds what
    replacing a patient moves, so do all."""
    replaced = any(mechanism.relation == "replace one" for mechanism in mechanisms)
    relation: Relation = "replace one" if replaced else "add or remove one"
    counts: Counter[Mechanism] = Counter()
    for mechanism in mechanisms:
        counts[dataclasses.replace(mechanism, steps=1, relation=relation)] += mechanism.steps
    return counts


@lru_cache(maxsize=64)
def _composed(counts: tuple[tuple[Mechanism, int], ...], delta: float) -> Epsilon:
    lower, upper = (_estimate(dict(counts), delta, pessimistic) for pessimistic in (False, True))
    return Epsilon(lower, max(lower, upper))


def _estimate(
    counts: Mapping[Mechanism, int], delta: float, pessimistic: bool, interval: float = _FINE
) -> float:
    whole: Any = None
    for mechanism, steps in counts.items():
        one = _of_one_step(mechanism, pessimistic, interval)
        taken = one.self_compose(steps) if steps > 1 else one
        whole = taken if whole is None else whole.compose(taken)
    return float(whole.get_epsilon_for_delta(delta))


@lru_cache(maxsize=16)
def _of_one_step(mechanism: Mechanism, pessimistic: bool, interval: float) -> Any:
    """The privacy losses of a mechanism taken once: what takes the time of an estimate."""
    # Imported here: it takes a second or two, which only what is noised needs.
    from dp_accounting.pld.privacy_loss_distribution import from_gaussian_mechanism
    from dp_accounting.privacy_accountant import NeighboringRelation

    replaced = mechanism.relation == "replace one"  # from one side of the bound to the other
    return from_gaussian_mechanism(
        mechanism.noise_multiplier,
        sampling_prob=mechanism.sampling_rate,
        value_discretization_interval=interval,
        pessimistic_estimate=pessimistic,
        use_connect_dots=pessimistic,  # the dots are connected from above only
        neighboring_relation=(
            NeighboringRelation.REPLACE_ONE if replaced else NeighboringRelation.ADD_OR_REMOVE_ONE
        ),
    )


def is_within(mechanisms: Sequence[Mechanism], epsilon: float, delta: float) -> bool:
    """Whether all of these cost at most `epsilon` together, by a pessimistic estimate: the quick one, and
    what is charged where that says no."""
    counts = _counted(mechanisms)
    return any(_estimate(counts, delta, True, interval) <= epsilon for interval in (_COARSE, _FINE))


@lru_cache(maxsize=64)
def step_multiplier(
    epsilon: float, delta: float, sampling_rate: float, steps: int, beside: tuple[Mechanism, ...] = ()
) -> float:
    """The least noise multiplier (to four decimals) at which so many steps on Poisson samples, and what is
    released `beside` them, cost at most `epsilon` together, by the quick pessimistic estimate; under the
    relation of what is `beside` them.

    Searched where a plan is made; who reads a plan checks the number in it (`check_multiplier`). Raises
    `ValueError` where `beside` alone leaves nothing of `epsilon`.
    """
    from scipy.optimize import brentq  # here: a question that is not noised need not load it

    if beside and epsilon_of(beside, delta).upper >= epsilon:
        raise ValueError(f"Expected releases beside the steps to cost less than {epsilon:g}; they cost more.")

    def over(logarithm: float) -> float:
        return _with_steps(math.exp(logarithm), delta, sampling_rate, steps, beside) - epsilon

    high = 0.0
    while over(high) > 0:
        high += 0.7
    low = high - 0.7
    while over(low) <= 0:
        low -= 0.7
    grains = math.ceil(math.exp(float(brentq(over, low, high, xtol=_GRAIN))) / _GRAIN)
    while _with_steps(_grained(grains), delta, sampling_rate, steps, beside) > epsilon:
        grains += 1
    return _grained(grains)


@lru_cache(maxsize=64)
def check_multiplier(
    noise_multiplier: float,
    epsilon: float,
    delta: float,
    sampling_rate: float,
    steps: int,
    beside: tuple[Mechanism, ...] = (),
) -> None:
    """Raise `ValueError` unless so many steps with this noise, and what is released `beside` them, cost at
    most `epsilon` together, and not much less. One composition, where finding the multiplier takes many."""
    if not noise_multiplier > 0:
        raise ValueError("Expected the noise multiplier of the steps; the plan holds none. Make it again.")
    taken = Mechanism(noise_multiplier=noise_multiplier, sampling_rate=sampling_rate, steps=steps)
    if not is_within([*beside, taken], epsilon, delta):
        cost = epsilon_of([*beside, taken], delta).upper
        raise ValueError(
            f"Expected noise at which the steps cost at most epsilon {epsilon:g}; with noise_multiplier="
            f"{noise_multiplier:g} they cost {cost:.4g}. Make the plan again."
        )
    if (cost := _with_steps(noise_multiplier, delta, sampling_rate, steps, beside)) < epsilon * (
        1 - _NEEDLESS
    ):
        raise ValueError(
            f"Expected noise no larger than epsilon {epsilon:g} asks for; with noise_multiplier="
            f"{noise_multiplier:g} the steps cost {cost:.4g}. Make the plan again, or lower epsilon."
        )


def _with_steps(
    noise_multiplier: float, delta: float, sampling_rate: float, steps: int, beside: tuple[Mechanism, ...]
) -> float:
    """What steps and `beside` cost together, by the quick pessimistic estimate."""
    taken = Mechanism(noise_multiplier=noise_multiplier, sampling_rate=sampling_rate, steps=steps)
    return _estimate(_counted([*beside, taken]), delta, True, _COARSE)


@lru_cache(maxsize=64)
def gaussian_multiplier(epsilon: float, delta: float, relation: Relation = "add or remove one") -> float:
    """The least noise multiplier (to four decimals) at which one Gaussian release costs at most `epsilon`, by
    the pessimistic estimate."""
    if not (math.isfinite(epsilon) and epsilon > 0 and 0 < delta < 1):
        raise ValueError(f"Expected a finite epsilon > 0 and delta in (0, 1); got {epsilon} and {delta}.")
    low, high = _GRAIN, 1.0
    while gaussian_delta(high, epsilon) > delta:
        high *= 2
    while high - low > _GRAIN / 4:
        middle = (low + high) / 2
        low, high = (middle, high) if gaussian_delta(middle, epsilon) > delta else (low, middle)
    moves = 2 if relation == "replace one" else 1  # bounds by which a patient moves the sum
    grains = math.ceil(moves * high / _GRAIN)
    while (
        epsilon_of([Mechanism(noise_multiplier=_grained(grains), relation=relation)], delta).upper > epsilon
    ):
        grains += 1 + grains // 10_000
    return _grained(grains)


def _grained(grains: int) -> float:
    return round(grains * _GRAIN, 4)


def gaussian_delta(noise_multiplier: float, epsilon: float) -> float:
    """The exact delta of one Gaussian release at an epsilon (arXiv:1805.06530, Theorem 8)."""
    from scipy.special import log_ndtr  # here: a question that is not noised need not load it

    half, whole = 1 / (2 * noise_multiplier), epsilon * noise_multiplier
    return math.exp(log_ndtr(half - whole)) - math.exp(epsilon + log_ndtr(-half - whole))
