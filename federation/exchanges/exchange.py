"""An exchange: one thing that the centre asks of a site, and what the site promises of its answer.

Each of the other files of this folder describes one, in its last lines: the route, the two messages, in which
rounds of a plan it may be asked (each time once), and the promise under which its answer leaves. A site
answers it in the file of the same name under `client/exchanges/`, the centre asks it in the one under
`server/exchanges/`.
What this file does not do: it knows no exchange.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from federation.plan.plan import RunPlan
from federation.wire.limits import Largest
from federation.wire.messages import Ask, Reply
from privacy.ledger import Place
from privacy.promise import Promise

AskKind = TypeVar("AskKind", bound=Ask)
ReplyKind = TypeVar("ReplyKind", bound=Reply)


def _whole(plan: RunPlan, ask: Ask) -> str:
    return ""


def _said(rounds: Sequence[int]) -> str:
    return f"rounds {rounds[0]} to {rounds[-1]}" if rounds else "no round"


@dataclass(frozen=True, kw_only=True)
class Exchange(Generic[AskKind, ReplyKind]):
    """One thing that is asked."""

    route: str
    """Flower's message type, `query.NAME` or `train.NAME`."""
    ask: type[AskKind]
    """The question."""
    reply: type[ReplyKind]
    """The answer."""
    rounds: Callable[[RunPlan], Sequence[int]]
    """The rounds of a plan in which it may be asked, once in each (0: before the first); empty where the plan
    has none."""
    largest: Callable[[RunPlan, AskKind], Largest]
    """The size of the largest answer: more is not pulled."""
    promise: Callable[[RunPlan, AskKind], Promise]
    """The promise under which the answer leaves."""
    agreement: Callable[[RunPlan, AskKind], tuple[str, Sequence[int]]] | None = None
    """Hash of the agreement of its own under which it is asked, and the rounds of that; None: the plan's."""
    part: Callable[[RunPlan, AskKind], str] = _whole
    """Which part of a round's answer is asked for, where it comes in parts; may raise `ValueError`."""

    def place(self, plan: RunPlan, ask: AskKind) -> Place:
        """Where the answer to this question may leave, once. Raises `ValueError` when the plan has no such
        question."""
        agreed, rounds = (
            (ask.plan_sha256, self.rounds(plan)) if self.agreement is None else self.agreement(plan, ask)
        )
        round_number = getattr(ask, "round", rounds[0] if rounds else 0)
        if round_number not in rounds:
            raise ValueError(
                f"Expected a question that the plan has ({self.name}: {_said(rounds)}); got round "
                f"{round_number}."
            )
        part, kind = self.part(plan, ask), self.promise(plan, ask).kind
        return Place(plan_sha256=agreed, kind=kind, round=round_number, part=part)

    @property
    def name(self) -> str:
        """What people call it."""
        return self.route.partition(".")[2]
