"""Counts of patients in whole cohorts: each rounded down to a multiple of the fewest that may be told.

What this file does not do: count, or say which cohort is large enough.
"""

from torch import Tensor


def in_whole_cohorts(counts: Tensor, least: int) -> Tensor:
    """Each count rounded down to a multiple of `least`.

    Guarantee: a count of fewer than `least` patients is told as none, and one patient more or less changes a
    count for one in `least` sizes of it. Not covered: those sizes; it is not differential privacy.
    """
    return (counts / least).floor() * least
