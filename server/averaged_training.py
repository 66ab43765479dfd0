"""A training run of the centre on public data: network, optimiser, moving average, and the step they are at.

A run is a function of its settings, so one that was stopped and resumed ends with the same weights as one
that was not. What a step draws, and what is kept of the average, is its users' own (`server/tokenizer/`,
`server/anatomy/`).
What this file does not do: it draws nothing and knows no loss.
"""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from meduet_models.objective.teacher import early_momentum
from meduet_models.weights import load_weights, part_of, save_weights

CLIP_NORM = 1.0


class AveragedTraining:
    """`network` under AdamW, with the moving average of its weights; resumable with the same `settings`.

    `named` is what the network is called in a checkpoint.
    """

    def __init__(
        self, network: nn.Module, settings: Any, *, named: str, weight_decay: float, momentum: float
    ) -> None:
        self.network, self.step = network, 0
        self.average = {name: t.detach().clone() for name, t in network.state_dict().items()}
        self._optimiser = torch.optim.AdamW(
            network.parameters(), betas=(0.9, 0.99), weight_decay=weight_decay
        )
        self._named, self._momentum = f"{named}.", momentum
        self._settings = json.dumps(dataclasses.asdict(settings), sort_keys=True)

    def descend(self, loss: Tensor, learning_rate: float) -> None:
        """One optimiser step along the gradient of `loss`, clipped; the average follows."""
        for group in self._optimiser.param_groups:
            group["lr"] = learning_rate
        self._optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(self.network.parameters(), CLIP_NORM)
        self._optimiser.step()
        # An average of few steps forgets the start quickly; of many, it is long.
        momentum = early_momentum(self._momentum, self.step)
        for name, value in self.network.state_dict().items():
            self.average[name].lerp_(value, 1 - momentum)
        self.step += 1

    def go_on(
        self,
        until: int,
        train_step: Callable[[int], float],
        report: Callable[[int, float], None],
        checkpoint: Path,
        every: int,
    ) -> None:
        """Take the steps that are left up to `until`; in between, `checkpoint` is written `every` so many."""
        for step in range(self.step, until):
            report(step + 1, train_step(step))
            if (step + 1) % every == 0 and step + 1 < until:
                self.save(checkpoint)

    def save(self, path: Path) -> None:
        """Write everything a later call needs to go on."""
        tensors = {f"{self._named}{name}": t for name, t in self.network.state_dict().items()}
        tensors |= {f"average.{name}": t for name, t in self.average.items()}
        for index, state in self._optimiser.state_dict()["state"].items():
            tensors |= {f"optimiser.{index}.{key}": value for key, value in state.items()}
        save_weights(path, tensors, {"settings": self._settings, "step": str(self.step)})

    def resume(self, path: Path) -> None:
        """Take over the state that `save` wrote; other settings are refused."""
        tensors, provenance = load_weights(path)
        if provenance.get("settings") != self._settings:
            raise ValueError(
                f"Expected {path} to be of a run with these settings; it is of another. "
                "Use its settings, or delete it to start afresh."
            )
        self.network.load_state_dict(part_of(tensors, self._named))
        self.average = part_of(tensors, "average.")
        states: dict[int, dict[str, Tensor]] = {}
        for name, value in part_of(tensors, "optimiser.").items():
            index, key = name.split(".", maxsplit=1)
            states.setdefault(int(index), {})[key] = value
        self._optimiser.load_state_dict({**self._optimiser.state_dict(), "state": states})
        self.step = int(provenance["step"])


def check_output(out: Path) -> None:
    """Raise `ValueError` unless weights can be written to `out`."""
    if out.suffix != ".safetensors":
        raise ValueError(f"Expected an output file that ends in .safetensors; got {out.name}.")
    if not out.parent.is_dir():
        raise ValueError(f"Expected the folder {out.parent} to exist; create it first.")
