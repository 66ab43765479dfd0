"""AdamW, as PyTorch has it, without loading PyTorch's compiler; and which weights it decays.

A process that answers one question takes a few steps and ends. Of its processor time 1.5 s went into
importing `torch._dynamo` and sympy: PyTorch 2.13 wraps an optimiser's methods for `torch.compile`, and each
wrapper imports the compiler at its first call, although nothing is compiled. Here the same methods are called
below their wrappers. Networks that a site compiles (site.yaml: compile) do not care: an optimiser is never in
what is compiled.

Does not do: any arithmetic of its own; steps are PyTorch's, to the last bit. Were PyTorch to wrap its methods
in another way, nothing would change but the seconds.
Source: torch 2.13, `torch/_compile.py` and `_use_grad_for_differentiable` of `torch/optim/optimizer.py`.
"""

from collections.abc import Iterable
from inspect import unwrap
from typing import Any

import torch
from torch import Tensor


class AdamW(torch.optim.AdamW):
    """`torch.optim.AdamW`, for steps without a closure that nobody differentiates or compiles."""

    add_param_group = unwrap(torch.optim.AdamW.add_param_group)
    zero_grad = unwrap(torch.optim.AdamW.zero_grad)

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        """Change the parameters by their gradients."""
        unwrap(torch.optim.AdamW.step)(self)


def decay_groups(parameters: Iterable[Tensor], weight_decay: float) -> list[dict[str, Any]]:
    """The parameters in an optimiser's two groups: matrices and convolutions, which are decayed, then those
    of fewer than two axes (norms, biases, the mask token), which are not."""
    every = list(parameters)
    return [
        {"params": [p for p in every if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in every if p.ndim < 2], "weight_decay": 0.0},
    ]
