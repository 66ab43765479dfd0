"""The style code: asked once, before the first step. What is made of it says `server/protected_styles.py`."""

from collections.abc import Callable

from flwr.serverapp import Grid
from torch import Tensor

from federation.exchanges.style_code import LATENTS, STYLE_CODE, StyleCodeAsk, StyleCodeReply
from federation.plan.plan import RunPlan
from federation.reply_book import ReplyBook
from server.exchanges.queries import ask_sites
from strategies.quorum import Roster


def ask_style_code(
    grid: Grid,
    roster: Roster,
    plan: RunPlan,
    public: Tensor,
    check: Callable[[StyleCodeReply], None],
    book: ReplyBook,
) -> tuple[dict[str, StyleCodeReply], dict[str, str]]:
    """Valid replies by site, and who was put aside why. Raises as `ask_sites`."""
    ask = StyleCodeAsk(plan_json=plan.to_json(), public={LATENTS: public})
    return ask_sites(grid, roster, plan, STYLE_CODE, ask, check, book)
