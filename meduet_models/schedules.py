"""Schedules: a straight rise over the first steps, and a cosine from one value to another.

Learning rates and the teacher's momentum are put together from these two; each is a function of the step
alone, so that a run that was resumed never notices. Does not do: count steps, or set anything.
Source: cosine annealing (arXiv:1608.03983); warm-up (arXiv:1706.02677).
"""

import math


def rise(step: int, rising: int, peak: float = 1.0) -> float:
    """`peak` from step `rising` on (steps count from 0); before, straight up to it, never 0."""
    return peak * (step + 1) / (rising + 1) if step < rising else peak


def cosine(first: float, last: float, done: int | float, of: int | float = 1) -> float:
    """Between `first` and `last`, with `done` of `of` behind: half a turn, level at both ends."""
    return last + (first - last) * (1.0 + math.cos(math.pi * done / of)) / 2.0
