"""A round of noisy steps as the strategy asks it, and which weights travel with it.

What this file does not do: average (`strategies/content_share.py`), or say what a step is worth
(`server/protected_pretraining.py`).
"""

from collections.abc import Mapping

from flwr.app import RecordDict
from torch import Tensor

from federation.exchanges.private_rounds import PRIVATE_ROUNDS, PrivateAsk, noisy_rounds, travelling_keys
from federation.exchanges.style_code import LATENTS
from federation.plan.plan import RunPlan
from federation.wire.messages import Tensors
from meduet_models.meduet import MeDUET
from strategies.content_share import Task


def parted(plan: RunPlan, whole: Mapping[str, Tensor]) -> tuple[Tensors, Tensors]:
    """Of all weights those that travel with noisy steps, and those that stay at the sites meanwhile."""
    travels = travelling_keys(plan, MeDUET(plan.network, len(plan.sites), seed=plan.seed))
    return {n: whole[n] for n in travels}, {n: t for n, t in whole.items() if n not in travels}


def private_rounds(
    plan: RunPlan, style_bank: Mapping[str, Tensor], home: Mapping[str, Tensor], public: Tensor
) -> Task:
    """The task of the rounds after those at the centre; `home`: the weights that are to stay at the sites,
    and `public` the public scans, sent with the first of them."""
    plan_json, wire_dtype, first = plan.to_json(), plan.release.wire_dtype, noisy_rounds(plan)[0]
    bank, kept = dict(style_bank), dict(home)

    def question(round_number: int, start: bool) -> RecordDict:
        begins = start or round_number == first
        ask = PrivateAsk(
            plan_json=plan_json,
            round=round_number,
            shared={},
            bank=bank,
            home=kept if begins else None,
            public={LATENTS: public} if begins else None,
            wire_dtype=wire_dtype,
        )
        return ask.to_record()

    return Task(
        message_type=PRIVATE_ROUNDS.route,
        sha256=plan.sha256,
        rounds=plan.num_rounds,
        max_norm=plan.release.update_clip_norm,
        question=question,
        wire_dtype=wire_dtype,
    )
