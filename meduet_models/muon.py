"""Muon: matrices move along their momentum with all singular values made equal, everything else by AdamW.

A few hundred steps of a small transformer go further with it than with AdamW alone: error at hidden tokens of
real heads after 300 masked steps .625 against .811 (docs/log.md). It keeps one moment of a matrix where AdamW
keeps two. Singular values come out near 1, not at 1: a fixed number of steps of an iteration.

Does not do: schedules (`client/training/pretraining.py` sets the learning rate).
Source: Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon), coefficients of its
Newton-Schulz iteration; queries, keys and values are matrices of their own.

Axes: i = outputs, j = inputs of a matrix.
"""

from collections.abc import Iterable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from meduet_models.adamw import AdamW, decay_groups

MATRIX_RATE = 10.0
"""Learning rate of the matrices over that of everything else. Their steps have singular values of 1, AdamW's
numbers are of size 1 each: measured, docs/log.md."""
MOMENTUM = 0.95
_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_ITERATIONS = 5
_MATRICES = ("encoder.blocks.", "decoder.blocks.", "decoder.narrow.", "content_head.", "fuse.")


def equalised(momentum: Float[Tensor, "*b i j"]) -> Float[Tensor, "*b i j"]:
    """The nearest matrix with all singular values 1, about (they come out between .7 and 1.2)."""
    a, b, c = _COEFFICIENTS
    tall = momentum.shape[-2] > momentum.shape[-1]
    x = momentum.mT if tall else momentum
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(_ITERATIONS):
        square = x @ x.mT
        x = a * x + (b * square + c * square @ square) @ x
    nearest: Tensor = x.mT if tall else x
    return nearest


class Muon(AdamW):
    """Muon for `matrices`, AdamW for `others`: one optimiser to whoever takes steps.

    The learning rate is that of `others`; `state` holds `exp_avg` alone of a matrix.
    """

    def __init__(
        self,
        matrices: Iterable[nn.Parameter],
        others: Iterable[nn.Parameter],
        *,
        lr: float,
        betas: tuple[float, float],
        weight_decay: float,
    ) -> None:
        super().__init__(decay_groups(others, weight_decay), lr=lr, betas=betas, fused=True)
        self.matrices = tuple(matrices)
        self._weight_decay = weight_decay

    @staticmethod
    def of(network: nn.Module, **settings: Any) -> "Muon":
        """For a MeDUET network: the matrices between tokens of one width and another are Muon's; embedding,
        prediction, style head and classifiers are AdamW's."""
        named = dict(network.named_parameters())
        matrices = [n for n, p in named.items() if p.ndim == 2 and n.startswith(_MATRICES)]
        return Muon(
            [named[n] for n in matrices], [p for n, p in named.items() if n not in matrices], **settings
        )

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        """Change the parameters by their gradients."""
        super().step()
        rate = self.param_groups[0]["lr"] * MATRIX_RATE
        by_shape: dict[torch.Size, list[tuple[nn.Parameter, Tensor]]] = {}
        for matrix in self.matrices:
            if matrix.grad is not None:
                ahead = self._ahead(matrix, matrix.grad)
                by_shape.setdefault(ahead.shape[1:], []).append((matrix, ahead))
        for (outputs, inputs), group in by_shape.items():  # those of one shape in one call
            steps = equalised(torch.cat([ahead for _, ahead in group]))
            scale = max(1.0, outputs / inputs) ** 0.5
            for (matrix, _), step in zip(group, torch.split(steps, [len(a) for _, a in group]), strict=True):
                matrix.mul_(1 - rate * self._weight_decay)
                matrix.add_(step.reshape(matrix.shape), alpha=-rate * scale)

    def _ahead(self, matrix: nn.Parameter, gradient: Tensor) -> Float[Tensor, "b i j"]:
        """The momentum after this gradient, one step ahead (Nesterov); queries, keys and values apart."""
        kept = self.state[matrix]
        if "exp_avg" not in kept:
            kept["exp_avg"] = torch.zeros_like(matrix)
        kept["exp_avg"].lerp_(gradient, 1 - MOMENTUM)
        outputs, inputs = matrix.shape
        parts = 3 if outputs == 3 * inputs else 1
        return torch.lerp(gradient, kept["exp_avg"], MOMENTUM).reshape(parts, -1, inputs)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients."""
        super().zero_grad()
        for matrix in self.matrices:
            matrix.grad = None
