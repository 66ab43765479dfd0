"""An exchange: one thing that the centre asks of a site, and what the site promises of its answer.

Each of the other files of this folder describes one, in its last lines: the route, the two messages, in which
rounds of a plan it may be asked, and the promise under which its answer leaves. A site answers it in the file
of the same name under `client/exchanges/`, the centre asks it in the one under `server/exchanges/`.
What this file does not do: it knows no exchange.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

from federation.limits import Largest
from federation.messages import Ask, Reply
from federation.plan import RunPlan
from privacy.promise import Promise

AskKind = TypeVar("AskKind", bound=Ask)
ReplyKind = TypeVar("ReplyKind", bound=Reply)


@dataclass(frozen=True, kw_only=True)
class Exchange(Generic[AskKind, ReplyKind]):
    """One thing that is asked."""

    route: str
    """Flower's message type, `query.NAME` or `train.NAME`."""
    ask: type[AskKind]
    """The question."""
    reply: type[ReplyKind]
    """The answer."""
    rounds: Callable[[RunPlan], range]
    """The rounds of a plan in which it may be asked (0: before the first); empty where the plan has none."""
    largest: Callable[[RunPlan, AskKind], Largest]
    """The size of the largest answer: more is not pulled."""
    promise: Callable[[RunPlan, AskKind], Promise]
    """The promise under which the answer leaves."""

    @property
    def name(self) -> str:
        """What people call it."""
        return self.route.partition(".")[2]
