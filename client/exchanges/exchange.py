"""What every answer of a site shares: the site that answers, its no, the row of the table, the deadline.

An answer goes in this order, always: is the plan one that this site accepts, a place in the ledger, and only
then the first scan. It returns what passed the gate, and nothing else can be sent (`client/app.py`); each of
the other files of this folder holds one.

Does not do: know Flower's messages, or catch anything.
Source: docs/architecture.md, "One round".
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor

from client.latents.batches import TrainingScans
from client.release import Released
from client.watchdog import DEADLINE_SHARE
from federation.exchanges.exchange import Exchange
from federation.journal import Journal
from federation.messages import Ask, Reply
from federation.plan import RunPlan
from federation.wire import RefusalKind
from meduet_models.style.bank import StyleBank
from privacy.ledger import Ledger

OnStep = Callable[[int, float], None]
"""Called after each training step with its number in the round and its loss."""

AskKind = TypeVar("AskKind", bound=Ask)
ReplyKind = TypeVar("ReplyKind", bound=Reply)


def no_step(step: int, loss: float) -> None:
    """Nobody watches."""


class AskRefused(ValueError):
    """This site does not do what it is asked; `kind` is what the centre is told."""

    def __init__(self, text: str, kind: RefusalKind) -> None:
        super().__init__(text)
        self.kind = kind


@runtime_checkable
class Site(Protocol):
    """What the answers need of an open site (`client/site.py`)."""

    @property
    def name(self) -> str:
        """The site's name in plans."""

    @property
    def state_dir(self) -> Path:
        """Where the site keeps its ledger, journal and states."""

    @property
    def device(self) -> torch.device:
        """Where it trains."""

    @property
    def compile(self) -> bool:
        """Whether it compiles the network."""

    @property
    def minimum_cohort(self) -> int:
        """The site's own smallest cohort; the stricter of it and the plan's wins."""

    @property
    def progress_every_s(self) -> float:
        """Seconds between two writes of a round under way; 0: after each step."""

    @property
    def ledger(self) -> Ledger:
        """What its patients have been charged."""

    @property
    def journal(self) -> Journal:
        """What left it."""

    def accept(self, plan: RunPlan, finetuning_sha256: str = "") -> None:
        """Raise `AskRefused` unless this site takes part in `plan` now, with the plan's tokenizer; when a
        fine-tuning is asked for, in that one. Opens no scan."""

    def scans(self, plan: RunPlan) -> TrainingScans:
        """The site's latents, encoding what is not cached yet."""


@dataclass(frozen=True)
class Answer(Generic[AskKind, ReplyKind]):
    """A row of the table of exchanges: how this site answers one."""

    exchange: Exchange[AskKind, ReplyKind]
    """What is asked."""
    work: Callable[[Site, AskKind, RunPlan, OnStep], Released]
    """Reserves, reads, computes and releases."""
    mail: Callable[[Released, AskKind, str], ReplyKind]
    """The reply of the site of this name, from what passed the gate and from nothing else."""


def bank_of(plan: RunPlan, tensors: dict[str, Tensor]) -> StyleBank | None:
    """The style bank that came with a question; None where the plan exchanges none. Raises `AskRefused`."""
    if plan.style.exchange == "none" or not tensors:
        return None
    try:
        return StyleBank.from_tensors(tensors, plan.sites)
    except ValueError as error:
        raise AskRefused(str(error), RefusalKind.MALFORMED) from error


def before_deadline(deadline_s: float, on_step: OnStep) -> OnStep:
    """Call `on_step` until `DEADLINE_SHARE` of the deadline has passed from now; then the round is given up,
    in time to say so."""
    end = time.monotonic() + DEADLINE_SHARE * deadline_s

    def checked(step: int, loss: float) -> None:
        if time.monotonic() > end:
            raise AskRefused(
                f"Expected the round to end within {DEADLINE_SHARE:g} of aggregation.deadline_s "
                f"({deadline_s:g} s); it was at step {step}.",
                RefusalKind.DEADLINE,
            )
        on_step(step, loss)

    return checked
