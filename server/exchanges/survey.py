"""The survey: asked once, before round 1. What is made of it says `server/model.py`."""

from collections.abc import Callable

from flwr.serverapp import Grid

from federation.exchanges.survey import SURVEY, SurveyAsk, SurveyReply
from federation.plan.plan import RunPlan
from federation.reply_book import ReplyBook
from server.exchanges.queries import ask_sites
from strategies.quorum import Roster


def ask_survey(
    grid: Grid, roster: Roster, plan: RunPlan, check: Callable[[SurveyReply], None], book: ReplyBook
) -> tuple[dict[str, SurveyReply], dict[str, str]]:
    """Valid replies by site, and who was put aside why. Raises as `ask_sites`."""
    return ask_sites(grid, roster, plan, SURVEY, SurveyAsk(plan_json=plan.to_json()), check, book)
