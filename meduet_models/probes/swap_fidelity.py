"""Swap fidelity: does a scan in another hospital's style look like that hospital's, and like the truth?

Three measures: share of the gap between two sites' style statistics that is closed; error against the same
anatomy on the other scanner, relative to doing nothing; and the same error in decibels, beside histogram
matching, which knows intensities and nothing else. What this file does not do: it swaps nothing.

Axes: b = scans, v = style statistics, D H W = voxels, q = quantiles.
"""

import torch
from jaxtyping import Float
from torch import Tensor

_QUANTILES = 1024


def style_gap_closed(
    swapped: Float[Tensor, " v"], source: Float[Tensor, " v"], target: Float[Tensor, " v"]
) -> float:
    """Share of the distance between two sites' style statistics that a swap has covered.

    1 - ||swapped - target|| / ||source - target||: 1 is perfect, 0 did nothing, below 0 made it worse. The
    vectors are `StyleEntry.to_vector()` of the swapped scans, of the site they come from and of the site they
    go to.
    """
    return 1 - float((swapped - target).norm() / (source - target).norm().clamp(min=1e-12))


def counterfactual_ratio(
    swapped: Float[Tensor, " *axes"], source: Float[Tensor, " *axes"], truth: Float[Tensor, " *axes"]
) -> float:
    """Squared error of swapped scans against the same anatomy on the target's scanner, relative to doing
    nothing.

    ||swapped - truth||² / ||source - truth||²: 0 is perfect, 1 did nothing. Needs simulated scanners, or
    patients scanned at both sites.
    """
    return float((swapped - truth).square().sum() / (source - truth).square().sum().clamp(min=1e-12))


def psnr_db(volumes: Float[Tensor, "b 1 D H W"], truth: Float[Tensor, "b 1 D H W"]) -> float:
    """Peak signal-to-noise ratio of volumes in [0, 1], decibels, averaged over volumes; values outside are
    clipped first. An error of zero counts as 1e-10.
    """
    error = (volumes.clamp(0, 1) - truth.clamp(0, 1)).double().square().flatten(1).mean(1)
    return float((-10 * error.clamp(min=1e-10).log10()).mean())


def quantiles(volumes: Float[Tensor, "b 1 D H W"]) -> Float[Tensor, " q"]:
    """Evenly spaced quantiles of all voxels of these volumes together, from the least to the greatest."""
    ordered = volumes.flatten().sort().values
    places = torch.linspace(0, len(ordered) - 1, min(_QUANTILES, len(ordered)), dtype=torch.float64)
    return ordered[places.round().long()]


def match_histogram(
    volumes: Float[Tensor, "b 1 D H W"], target: Float[Tensor, " q"]
) -> Float[Tensor, "b 1 D H W"]:
    """Histogram matching: each voxel takes the target's quantile at its own rank in its volume.

    The baseline of a swap: it moves every intensity to the target's distribution, whatever the anatomy.
    Equal voxels stay equal (they share their mean rank).
    """
    flat = volumes.flatten(1)
    matched = torch.empty_like(flat)
    for row, values in enumerate(flat):
        _, group, count = torch.unique(values, return_inverse=True, return_counts=True)
        rank = count.cumsum(0).double() - (count + 1) / 2
        place = (rank / max(1, len(values) - 1) * (len(target) - 1))[group]
        low = place.floor().long().clamp(max=len(target) - 1)
        high = (low + 1).clamp(max=len(target) - 1)
        share = (place - low).to(target)
        matched[row] = target[low] * (1 - share) + target[high] * share
    return matched.reshape(volumes.shape)
