"""Server optimisers: what the centre does with the mean update of a round.

Adaptive federated optimisation, Reddi et al. 2021 (arXiv:2003.00295, algorithm 2): the mean update is a
pseudo-gradient (with its sign turned). `average` adds it; `momentum` (FedAvgM, Hsu et al. 2019), `adam` and
`yogi` keep moments, which go into the checkpoint. As in the paper there is no bias correction and the second
moment starts at τ².
What this file does not do: it weighs and checks nothing (`strategies/aggregation.py`).
"""

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

Kind = Literal["average", "momentum", "adam", "yogi"]

SECOND_MOMENT_DECAY = 0.99  # β2 of the paper
ADAPTIVITY = 1e-3  # τ of the paper


class ServerOptimiser:
    """From the shared weights and a mean update to the next shared weights."""

    def __init__(self, kind: Kind, learning_rate: float, momentum: float) -> None:
        self.kind = kind
        self.learning_rate = learning_rate
        self.momentum = momentum
        self._first: dict[str, Tensor] = {}
        self._second: dict[str, Tensor] = {}

    def step(self, shared: Mapping[str, Tensor], update: dict[str, Tensor]) -> dict[str, Tensor]:
        """The next shared weights. `update` is consumed: its memory becomes the result's.

        Weights whose update is zero in every round (the constants) stay exactly as they are.
        """
        if set(shared) != set(update):
            raise ValueError("Expected an update of the shared weights' names; got others.")
        return {name: self._one(name, weight, update.pop(name)) for name, weight in shared.items()}

    def _one(self, name: str, weight: Tensor, delta: Tensor) -> Tensor:
        match self.kind:
            case "average":
                return delta.mul_(self.learning_rate).add_(weight)
            case "momentum":
                first = self._first.setdefault(name, torch.zeros_like(delta)).mul_(self.momentum).add_(delta)
                return delta.copy_(first).mul_(self.learning_rate).add_(weight)
            case "adam" | "yogi":
                return self._adaptive(name, weight, delta)

    def _adaptive(self, name: str, weight: Tensor, delta: Tensor) -> Tensor:
        first = self._first.setdefault(name, torch.zeros_like(delta))
        second = self._second.setdefault(name, torch.full_like(delta, ADAPTIVITY**2))
        first.mul_(self.momentum).add_(delta, alpha=1 - self.momentum)
        square = delta.mul_(delta)
        if self.kind == "adam":
            second.lerp_(square, 1 - SECOND_MOMENT_DECAY)
        else:
            second.sub_(square * torch.sign(second - square), alpha=1 - SECOND_MOMENT_DECAY)
        return weight + self.learning_rate * first / (second.sqrt() + ADAPTIVITY)

    def state(self) -> dict[str, Tensor]:
        """The moments, for a checkpoint."""
        named = {"first": self._first, "second": self._second}
        return {f"{part}/{name}": t for part, tensors in named.items() for name, t in tensors.items()}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take up the moments of a checkpoint; raises `ValueError` on a name it does not know."""
        parts: dict[str, dict[str, Tensor]] = {"first": {}, "second": {}}
        for key, tensor in state.items():
            part, _, name = key.partition("/")
            if part not in parts:
                raise ValueError(f"Expected moments 'first/…' or 'second/…'; got {key!r}.")
            parts[part][name] = tensor.clone()
        self._first, self._second = parts["first"], parts["second"]
