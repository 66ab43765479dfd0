"""What every answer of a site shares: the site that answers, its no, the row of the table, the deadline.

Every answer goes through `Answer.once`, in this order, always: does the plan have this question, does the
site still answer, is the plan one that it accepts, its turn on this machine (`client/turns.py`), a place in
the ledger for this question, what left for it before, and only then the work, which opens the first scan. The
law of an exchange (one answer for each place, to one question) stands here and in the ledger, in no
exchange's own file: each of the other files of this folder holds the work of one. It returns what passed the
gate, and nothing else can be sent (`client/app.py`).

Does not do: know Flower's messages, or catch anything.
Source: docs/architecture.md, "One round".
"""

import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor

from client.books.answers import ANSWERS, KeptAnswers
from client.books.refusals import is_stopped
from client.jobs.launcher import Launcher
from client.latents.batches import TrainingScans
from client.release import Gate, Masking, Released
from client.turns import turn
from client.watchdog import DEADLINE_SHARE
from federation.exchanges.exchange import Exchange
from federation.journal import Journal
from federation.keys.identity import SiteIdentity
from federation.plan.plan import RunPlan
from federation.wire.messages import Ask, MessageError, Reply
from federation.wire.wire import RefusalKind
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
class SiteAtWork(Protocol):
    """What the work of an answer needs of a site (`client/site_scans.py`): no book, no key."""

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
    def exact_sums(self) -> bool:
        """Whether it lets sums of products over few patients leave (`client/consent/exact_sums.py`)."""

    @property
    def secret(self) -> bytes:
        """What its batches and folds are drawn from; stays here."""

    def scans(self, plan: RunPlan) -> TrainingScans:
        """The site's latents, encoding what is not cached yet."""


@runtime_checkable
class Site(SiteAtWork, Protocol):
    """What the answers need of an open site (`client/site.py`)."""

    @property
    def launcher(self) -> Launcher | None:
        """How its jobs are started; None: work is done in the process of the question."""

    @property
    def ledger(self) -> Ledger:
        """What its patients have been charged."""

    @property
    def journal(self) -> Journal:
        """What left it."""

    def identity(self) -> SiteIdentity:
        """The key with which it signs what other sites must believe. Raises `AskRefused` without one."""

    def accept(self, plan: RunPlan, finetuning_sha256: str = "") -> None:
        """Raise `AskRefused` unless this site takes part in `plan` now, with the plan's tokenizer; when a
        fine-tuning is asked for, in that one. Opens no scan."""


@dataclass(frozen=True)
class Answer(Generic[AskKind, ReplyKind]):
    """A row of the table of exchanges: how this site answers one."""

    exchange: Exchange[AskKind, ReplyKind]
    """What is asked."""
    work: Callable[[Any, AskKind, RunPlan, Gate, OnStep], Released]
    """Reads, computes and releases through the gate that was opened for this question: of a `SiteAtWork`
    where it reads scans, of a `Site` where it does not."""
    mail: Callable[[Released, AskKind, str], ReplyKind]
    """The reply of the site of this name, from what passed the gate and from nothing else."""
    reads_scans: bool = True
    """Whether its work reads scans, and may be a job's (`client/jobs/asking.py`)."""
    masking: Callable[[Any, AskKind, RunPlan], tuple[Masking, Callable[[], None]]] | None = None
    """How the gate masks what it lets out, and what is kept besides; None: it does not."""

    def once(
        self,
        site: Site,
        ask: AskKind,
        plan: RunPlan,
        on_step: OnStep = no_step,
        asked: dict[str, Any] | None = None,
    ) -> Released:
        """What leaves for a question: once for each place in the plan, and that again for the same question.

        `asked` is filled with what the books say of the question. Raises `AskRefused` when the plan has no
        such question, the site has stopped or does not accept the plan, `LedgerRefusal`, `AnsweredBefore`
        when the place was given to another question, and what the work raises.
        """
        asked = {} if asked is None else asked
        question = ask.sha256()
        asked.update(plan=ask.plan_sha256, question=question)
        try:
            place = self.exchange.place(plan, ask)
        except MessageError:
            raise
        except ValueError as error:
            raise AskRefused(str(error), RefusalKind.MALFORMED) from error
        asked.update(place.record())
        if is_stopped(site.journal.entries(), place.plan_sha256):
            raise AskRefused(
                f"Expected a plan whose questions can be answered; too many of {place.plan_sha256[:12]}… "
                f"could not. Read why above, then: meduet-site plan resume {place.plan_sha256[:12]}.",
                RefusalKind.STOPPED,
            )
        own = place.plan_sha256 if place.plan_sha256 != ask.plan_sha256 else ""
        site.accept(plan, own)
        with turn(site.state_dir) if self.reads_scans else nullcontext():
            site.accept(plan, own)  # while it waited, its people may have said no
            reservation = site.ledger.reserve(place, question, self.exchange.promise(plan, ask))
            asked["reserved"] = reservation.entry
            gate = Gate(reservation, site.ledger, site.journal, KeptAnswers(site.state_dir / ANSWERS))
            return gate.again() or self.work(site, ask, plan, gate, on_step)


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
