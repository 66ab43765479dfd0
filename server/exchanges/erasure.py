"""The site erasure: asked once, after the last round. What is made of it says `server/model.py`.

A site whose mean would be of too few patients to leave is left out; that ends nobody's run.
"""

from collections.abc import Callable

from flwr.serverapp import Grid

from federation.exchanges.erasure import ERASURE, ErasureAsk, ErasureReply
from federation.plan.plan import RunPlan
from federation.reply_book import ReplyBook
from federation.wire.messages import RefusalKind, Tensors
from server.exchanges.queries import ask_sites
from strategies.quorum import Roster


def ask_erasure(
    grid: Grid,
    roster: Roster,
    plan: RunPlan,
    shared: Tensors,
    check: Callable[[ErasureReply], None],
    book: ReplyBook,
) -> tuple[dict[str, ErasureReply], dict[str, str]]:
    """Valid replies by site, and who was put aside why; `shared` holds the axes of the code. Raises as
    `ask_sites`."""
    ask = ErasureAsk(plan_json=plan.to_json(), shared=shared)
    at_least = min(2, len(plan.participants))  # of one site there is nothing to erase
    few = (RefusalKind.TOO_FEW_FOR_SUMS,)
    return ask_sites(grid, roster, plan, ERASURE, ask, check, book, at_least=at_least, excused=few)
