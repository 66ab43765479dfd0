"""A hospital whose process may end after any step, and two hospitals compared to the bit."""

from dataclasses import dataclass, field
from typing import Any

import torch

from client.exchanges.pretraining import ANSWER
from client.release import Released
from client.training.site_state import StateFolder
from federation.exchanges.pretraining import TrainAsk
from federation.plan.plan import RunPlan
from tests.worlds import Hospital

PATIENTS = [f"p{n // 2}" for n in range(12)]
STEPS = 3
Tensors = dict[str, torch.Tensor]


class Killed(BaseException):
    """As if the process had ended."""


@dataclass
class ToySite(Hospital):
    """A hospital whose `steps` are those that it was seen to take."""

    progress_every_s: float = 0.0
    secret: bytes = bytes(32)
    steps: list[int] = field(default_factory=list)

    def answer(self, question: TrainAsk, plan: RunPlan, kill_after: int = 0) -> Released:
        def on_step(step: int, loss: float) -> None:
            self.steps.append(step)
            if step == kill_after:
                raise Killed

        return ANSWER.once(self, question, plan, on_step)

    def left(self) -> list[str]:
        return sorted(path.name for path in (self.state_dir / "state").rglob("*") if path.is_file())


def same(one: Any, other: Any) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def alike(
    one: ToySite, other: ToySite, plan: RunPlan, released: tuple[Released, Released], round_number: int
) -> bool:
    """Update, metrics (but seconds) and what the site keeps: the same bits."""
    first, second = ({k: v for k, v in r.metrics.items() if k != "seconds"} for r in released)
    kept = [StateFolder(s.state_dir / "state", plan.sha256).before(round_number + 1) for s in (one, other)]
    return (
        same(released[0].tensors, released[1].tensors)
        and first == second
        and kept[0].sha256 == kept[1].sha256 != ""
        and kept[0].round == kept[1].round == round_number
    )
