"""The federated diffusion model at the centre: rounds over the sites' own latents, resumable anywhere.

Begins when the pretraining is done, so that every site conditions on the same final encoder. The rounds are
those of `strategies/content_share.py` with another task; what is averaged are the transformer's parameters. A
moving average of the aggregated weights is kept here, round by round, and is the model that is saved. What
this file does not do: it trains nothing and sees no latent.
"""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flwr.app import RecordDict
from flwr.serverapp import Grid

from federation.exchanges.diffusion import DIFFUSION, DiffusionAsk, encoder_of, transformer_of
from federation.plan.plan import RunPlan
from federation.reply_book import ReplyBook
from federation.wire.messages import Tensors
from meduet_models.diffusion.transformer import DiffusionTransformer
from meduet_models.objective.teacher import early_momentum
from meduet_models.sharing import encoder_keys
from server.checkpoints import Checkpoint, Checkpoints
from strategies.content_share import ContentShare, Task
from strategies.quorum import Roster

OnRound = Callable[[int, Mapping[str, Any]], None]
"""Called after each round with its number and report."""


@dataclass(frozen=True)
class FinishedDiffusion:
    """A diffusion model after its last step."""

    transformer: DiffusionTransformer
    """Averaged weights, for evaluation, on the CPU."""
    policy: str
    """What left the sites for it."""
    steps: int
    """Optimiser steps; of each site where it was trained there."""
    reports: list[dict[str, Any]]
    """What happened, part by part; JSON values."""


def run_diffusion_rounds(
    grid: Grid,
    roster: Roster,
    plan: RunPlan,
    shared: Tensors,
    style_bank: Tensors,
    folder: Path,
    book: ReplyBook,
    on_round: OnRound = lambda round_number, report: None,
) -> FinishedDiffusion:
    """The averaged model after the plan's rounds, and a report per round.

    `shared` are the final weights of the pretraining. Raises `RoundFailed` below the quorum (the last
    checkpoint stays) and `ValueError` when `shared` is not a whole encoder.
    """
    diffusion = plan.diffusion
    if diffusion is None or diffusion.release.trained_at != "sites":
        raise ValueError("Expected a plan with diffusion.policy=federated.")
    encoder = encoder_of(plan, shared)
    transformer = transformer_of(plan, encoder)
    fixed = {name: shared[name] for name in encoder_keys(encoder)}
    plan_json = plan.to_json()

    def question(round_number: int, start: bool) -> RecordDict:
        ask = DiffusionAsk(
            plan_json=plan_json,
            round=round_number,
            shared={},
            encoder=fixed,
            bank=style_bank,
            wire_dtype=plan.release.wire_dtype,
        )
        return ask.to_record()

    task = Task(
        message_type=DIFFUSION.route,
        sha256=plan.sha256,
        rounds=diffusion.rounds,
        max_norm=diffusion.update_clip_norm,
        question=question,
        wire_dtype=plan.release.wire_dtype,
    )
    checkpoints = Checkpoints(folder / "checkpoints", plan.sha256)
    start = {name: p.detach().clone() for name, p in transformer.named_parameters()}
    last = checkpoints.latest() or Checkpoint(
        plan_sha256=plan.sha256, round=0, shared=start, optimiser={}, average=start, metrics={"rounds": []}
    )
    strategy = ContentShare(plan, last.shared, task, roster=roster, folder=folder, book=book)
    strategy.optimiser.load(last.optimiser)
    rounds = strategy.rounds(grid, done=last.round)
    for round_number in range(last.round + 1, diffusion.rounds + 1):
        report = dataclasses.asdict(next(rounds))
        momentum = round_momentum(diffusion.training.ema, round_number, diffusion.steps_per_round)
        average = {n: last.average[n].lerp(after, 1 - momentum) for n, after in strategy.shared.items()}
        last = Checkpoint(
            plan_sha256=plan.sha256,
            round=round_number,
            shared=dict(strategy.shared),
            optimiser=strategy.optimiser.state(),
            average=average,
            metrics={"rounds": [*last.metrics["rounds"], report]},
        )
        checkpoints.save(last)
        on_round(round_number, report)
    transformer.load_state_dict({**transformer.state_dict(), **last.average})
    steps = diffusion.rounds * diffusion.steps_per_round
    return FinishedDiffusion(transformer.eval(), "federated", steps, last.metrics["rounds"])


def round_momentum(ema: float, round_number: int, steps: int) -> float:
    """Momentum of the moving average over a round of `steps` steps: that of the steps, taken together."""
    first = (round_number - 1) * steps
    product = 1.0
    for step in range(first, first + steps):
        product *= early_momentum(ema, step)
    return product
