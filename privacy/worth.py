"""What a noisy step is worth: how long its expected signal is beside its noise, told before anybody is asked.

The signal of a step is the sum of the cut gradients of those who happen to be in it; it grows with patients
and with how far their gradients point one way (coherence, from 0 to 1, measured on public scans). The noise
of a step has the same deviation in every weight, so its length grows with the square root of their number.
Below about .6 steps help little, below .1 they are noise: measured (docs/privacy.md).

What this file does not do: measure coherence (`server/coherence.py`), or stop a run.
"""

import math
from collections.abc import Sequence

from privacy.accounting import Mechanism

LITTLE, DROWNED = 0.6, 0.1
"""Below the first a plan's steps are warned of, below the second they are refused."""


def signal_to_noise(
    mechanism: Mechanism, shares: Sequence[float], dimensions: int, coherence: float = 1.0
) -> float:
    """Expected length of the sum over all sites' steps, over the length of their noise. `shares`: patients of
    each site, as far as noise lets tell, or groups of them that are cut together; `dimensions`: weights that
    are trained. With a coherence of 1 it is the most that it can be."""
    signal = mechanism.sampling_rate * sum(max(0.0, count) for count in shares) * coherence
    return signal / (mechanism.noise_multiplier * math.sqrt(dimensions * len(shares)))
