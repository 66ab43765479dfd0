"""Windows of one size that overlap and cover a larger grid, and the whole that they blend to.

Blending is by a Gaussian around each window's centre, as MONAI's sliding window has it; what is asked of a
window may be a step of a longer computation. What this file does not do: know what is asked of a window.

Axes: n = windows, c = channels, d h w = the whole, p q r = a window.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import product

import torch
from jaxtyping import Float
from torch import Tensor

OVERLAP = 0.5
"""Of neighbouring windows, along each axis."""
WINDOWS_AT_ONCE = 16
_DEVIATION = 0.125  # of the Gaussian, in edges of a window: MONAI's


def window_starts(side: int, window: int, step: int) -> list[int]:
    """Where windows begin along one side: every `step`, and the last one ends where the side does."""
    return [*range(0, side - window, step), max(0, side - window)]


@dataclass(frozen=True)
class Windows:
    """Overlapping windows that cover a scan."""

    sides: tuple[int, ...]
    """Of the scan."""
    edges: tuple[int, ...]
    """Of a window."""
    starts: tuple[tuple[int, ...], ...]
    """Where each begins."""

    @staticmethod
    def over(sides: tuple[int, ...], edges: tuple[int, ...]) -> "Windows":
        """Windows of these edges, of which the scan holds at least one along each axis."""
        if any(side < edge for side, edge in zip(sides, edges, strict=True)):
            raise ValueError(f"Expected latents of at least {edges}; got {sides}.")
        along = [
            window_starts(side, edge, max(1, round(edge * (1 - OVERLAP))))
            for side, edge in zip(sides, edges, strict=True)
        ]
        return Windows(sides, edges, tuple(product(*along)))

    def __len__(self) -> int:
        """Windows."""
        return len(self.starts)

    def cut(self, x: Float[Tensor, "c d h w"], numbers: range) -> Float[Tensor, "n c p q r"]:
        """Some of the windows."""
        return torch.stack([x[:, *self._inside(number)] for number in numbers])

    def blend(
        self, part: Callable[[range], Float[Tensor, "n c p q r"]], like: Float[Tensor, "c d h w"]
    ) -> Float[Tensor, "c d h w"]:
        """The whole of which `part` gives windows, asked for a few at a time."""
        total, weights = torch.zeros_like(like), torch.zeros(like.shape[1:], device=like.device)
        weight = self._weight().to(like.device)
        for numbers in self.chunks():
            for number, window in zip(numbers, part(numbers), strict=True):
                total[:, *self._inside(number)] += weight * window
                weights[self._inside(number)] += weight
        return total / weights

    def chunks(self) -> list[range]:
        """The windows' numbers, a few at a time."""
        return [
            range(first, min(first + WINDOWS_AT_ONCE, len(self)))
            for first in range(0, len(self), WINDOWS_AT_ONCE)
        ]

    def _inside(self, number: int) -> tuple[slice, ...]:
        return tuple(slice(a, a + n) for a, n in zip(self.starts[number], self.edges, strict=True))

    def _weight(self) -> Float[Tensor, "p q r"]:
        d, h, w = (
            torch.exp(-(((torch.arange(n) - (n - 1) / 2) / (_DEVIATION * n)) ** 2) / 2) for n in self.edges
        )
        return d[:, None, None] * h[:, None] * w
