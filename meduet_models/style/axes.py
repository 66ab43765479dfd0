"""Style axes: the directions in which sites differ, read so that what patients differ in moves them least.

The statistics of one scan know its patient: age, sex and volumes can be read from them better than from
content. Along the axes they say where a scan lies between the sites' styles, and nothing else. A site sees
its own scans in every style of the bank: what changes with the style spans the axes, what changes with the
scan is what their reading is weighted against (generalised least squares, the weights of Fisher's
discriminant). So every style is read exactly, and scans of one style are read as alike as they can be.
Nothing is told for it: the axes are part of the style branch, and stay where that stays.

What this file does not do: it changes no entry of the bank, no restyling and nothing that leaves a site.
Where the ages of sites differ, their styles differ in what age does, and the axes keep it (docs/log.md). A
style that is not in the bank is seen by its part along the axes.

Source: Fisher's discriminant for several groups (Rao 1948, doi:10.1111/j.2517-6161.1948.tb00008.x).

Axes: s = styles of the bank, m = scans, v = statistics of a scan, a = style axes.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Float64
from torch import Tensor

MOST_AXES = 8
"""Style axes of a network, at most."""
MOST_SCANS = 256
"""Scans that axes are fitted on, at most: more change little."""
LEAST_RATIO = 1.0
"""Variance of styles along an axis over that of scans of one style, at least."""
SHRINKAGE = 0.3
"""Share by which correlations between statistics are shrunk: scans are few, statistics many."""
_SMALLEST = 1e-4  # of latents of about unit variance


@dataclass(frozen=True)
class StyleAxes:
    """Statistics x of a scan become centre + back (read (x - centre))."""

    centre: Float64[Tensor, " v"]
    """The mean style."""
    read: Float64[Tensor, "a v"]
    """From statistics to where they lie along each axis."""
    back: Float64[Tensor, "v a"]
    """The axes themselves."""

    @staticmethod
    def of(seen: Float[Tensor, "s m v"]) -> "StyleAxes":
        """The axes of these styles, from the statistics of the same scans in each of them; there are none
        where styles differ less than scans do. Raises `ValueError` for fewer than two styles or scans."""
        styles, scans, statistics = seen.shape
        if min(styles, scans) < 2:
            raise ValueError(f"Expected at least two scans in two styles; got {scans} in {styles}.")
        seen = seen.double()
        entries = seen.mean(1)
        apart = (seen - entries[:, None]).flatten(0, 1)
        deviation = (apart.square().sum(0) / (styles * (scans - 1))).sqrt().clamp(min=_SMALLEST)
        standard = apart / deviation
        within = (1 - SHRINKAGE) * standard.T @ standard / (styles * (scans - 1))
        within += SHRINKAGE * torch.eye(statistics, dtype=torch.float64)
        root = torch.linalg.cholesky(within)
        centre = entries.mean(0)
        white = torch.linalg.solve_triangular(root, ((entries - centre) / deviation).T, upper=False)
        axes, lengths, _ = torch.linalg.svd(white, full_matrices=False)  # scans vary by 1 along each
        told = lengths[:MOST_AXES].square() / (styles - 1) > LEAST_RATIO
        axes = axes[:, :MOST_AXES][:, told]
        read = torch.linalg.solve_triangular(root.T, axes, upper=True).T / deviation
        return StyleAxes(centre=centre, read=read, back=deviation[:, None] * (root @ axes))
