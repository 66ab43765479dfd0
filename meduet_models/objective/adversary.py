"""Which site is this from? A classifier on pooled factors, and the gradient reversal that makes content
forget it.

The classifier on style learns the site; the one on content learns it too, while the network below receives
its gradient with the sign turned. An adversary at chance is not invariance (a fresh linear probe read the
site at 95% from such content): `probes.py` measures, this only trains. Both classifiers see one pooled vector
per scan, which their gradient gives away exactly, so they never leave the site (`sharing.py`).

Axes: b = volumes, k = channels of the pooled factor.
Source: DANN (arXiv:1505.07818); MeDUET (arXiv:2602.17901), domain classification.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F


class _Reversal(torch.autograd.Function):
    generate_vmap_rule = True  # per-group gradients are taken under vmap

    @staticmethod
    def forward(x: Tensor, strength: float) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, float], output: Tensor) -> None:
        ctx.strength = inputs[1]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient * -ctx.strength, None


def reverse_gradient(x: Float[Tensor, "*any"], strength: float) -> Float[Tensor, "*any"]:
    """Return `x`; send its gradient back times -`strength`."""
    out: Tensor = _Reversal.apply(x, strength)  # type: ignore[no-untyped-call]
    return out


class SiteClassifier(nn.Module):
    """A three-layer perceptron from one pooled factor to site logits; hidden layers twice as wide."""

    def __init__(self, width: int, num_sites: int) -> None:
        super().__init__()
        self.first = nn.Linear(width, 2 * width)
        self.second = nn.Linear(2 * width, 2 * width)
        self.logits = nn.Linear(2 * width, num_sites)

    def forward(self, pooled: Float[Tensor, "b k"]) -> Float[Tensor, "b num_sites"]:
        """Site logits."""
        out: Tensor = self.logits(F.gelu(self.second(F.gelu(self.first(pooled)))))
        return out
