"""A round of pretraining as the strategy asks it."""

from collections.abc import Mapping

from flwr.app import RecordDict
from torch import Tensor

from federation.exchanges.pretraining import PRETRAINING, TrainAsk
from federation.plan.plan import RunPlan
from strategies.content_share import Task


def pretraining(plan: RunPlan, style_bank: Mapping[str, Tensor], home: Mapping[str, Tensor]) -> Task:
    """The task of the run itself; `home` is the common start of what stays at the sites."""
    plan_json, style_bank, home, wire_dtype = (
        plan.to_json(),
        dict(style_bank),
        dict(home),
        plan.release.wire_dtype,
    )

    def question(round_number: int, start: bool) -> RecordDict:
        begun = home if start or round_number == 1 else None
        ask = TrainAsk(
            plan_json=plan_json,
            round=round_number,
            shared={},
            bank=style_bank,
            home=begun,
            wire_dtype=wire_dtype,
        )
        return ask.to_record()

    return Task(
        message_type=PRETRAINING.route,
        sha256=plan.sha256,
        rounds=plan.training.rounds,
        max_norm=plan.release.update_clip_norm,
        question=question,
        wire_dtype=wire_dtype,
    )
