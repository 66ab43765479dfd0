"""Synthetic latents: asked once of each site, after the pretraining, and taken into the bank so labelled.

Sites whose samples the bank has are not asked again. What a site's own model is worth is said first, as far
as noise lets tell, and a plan in which noise drowns it is refused unless it wants that (`privacy/worth.py`).
What this file does not do: train where models at home begin (`server/home_start.py`), or train on what came.
"""

import logging
from collections.abc import Callable

import torch
from flwr.serverapp import Grid

from federation.exchanges.latents import (
    LatentsReply,
    ToldLatents,
    latent_bound,
    to_tensors,
    told_shapes,
)
from federation.exchanges.synthetic_latents import (
    SYNTHETIC_LATENTS,
    SyntheticAsk,
    is_synthetic,
    synthetic_items,
    synthetic_of,
    worth_at_home,
)
from federation.plan.plan import RunPlan
from federation.reply_book import ReplyBook
from federation.wire.messages import Tensors
from federation.wire.sealing import SealBroken
from meduet_models.style.bank import StyleBank
from privacy.worth import DROWNED, LITTLE
from server.exchanges.queries import ask_sites
from server.latent_bank.bank import LatentBank
from strategies.aggregation import ReplyRefused
from strategies.quorum import Roster

_ROUNDING = 1 + 1e-6
_log = logging.getLogger(__name__)


def check_worth_at_home(plan: RunPlan, style_bank: StyleBank) -> float:
    """What a step at home is worth at most, at a site of as many patients as the sites told on average, noise
    included. Raises `ValueError` for one that noise drowns, unless the plan wants it all the same."""
    told = [float(count) for count in style_bank.count.sum(1) if count]
    patients = sum(told) / len(told)
    worth = worth_at_home(plan, patients)
    said = f"Signal to noise of a step at home: at most {worth:.3f} ({patients:.0f} patients a site)"
    if worth < DROWNED and not synthetic_of(plan).although_noise_wins:
        raise ValueError(
            f"{said}; expected {DROWNED:g} or more. No site was asked for samples. Set diffusion=aggregate, "
            "or diffusion.synthetic.although_noise_wins=true."
        )
    if worth < LITTLE:
        _log.warning("%s; below %g models at home learn little.", said, LITTLE)
    return worth


def ask_synthetic(
    grid: Grid,
    roster: Roster,
    plan: RunPlan,
    start: Callable[[], Tensors],
    style_bank: Tensors,
    latent_bank: LatentBank,
    book: ReplyBook,
) -> tuple[dict[str, ToldLatents], dict[str, str]]:
    """The samples of each site whose the bank has not, and who was put aside why. `start` gives the network
    from which they begin, where somebody is asked."""
    round_number = plan.training.rounds
    missing = [s for s in plan.participants if latent_bank.dealt_with(plan, s, round_number) is None]
    if not missing:
        return {}, {}
    told: dict[str, ToldLatents] = {}

    def check(reply: LatentsReply) -> ToldLatents:
        try:
            told[reply.site] = latent_bank.opened(reply)
        except SealBroken as error:
            raise ReplyRefused(str(error)) from None
        check_samples(told[reply.site], plan)
        return told[reply.site]

    ask = SyntheticAsk(plan_json=plan.to_json(), round=round_number, start=start(), bank=style_bank)
    replies, refused = ask_sites(
        grid, roster, plan, SYNTHETIC_LATENTS, ask, check, book, stops=False, only=missing
    )
    return {site: told[site] for site in replies}, refused


def check_samples(reply: ToldLatents, plan: RunPlan) -> None:
    """Raise `ReplyRefused` unless the answer holds as many samples as the plan says, and nothing else."""
    count = synthetic_of(plan).samples
    shapes = {name: tuple(tensor.shape) for name, tensor in to_tensors(reply.examples).items()}
    if shapes != told_shapes(plan, count) or reply.round != plan.training.rounds:
        raise ReplyRefused(f"Expected {count} samples of the plan's; got {shapes}.")
    if reply.items != synthetic_items(plan, reply.site, count) or (reply.first, reply.total) != (0, count):
        raise ReplyRefused("Expected samples under the names that the plan gives them; got others.")
    if reply.wire_dtype != plan.release.latent_dtype:
        raise ReplyRefused(f"Expected values as {plan.release.latent_dtype}; got {reply.wire_dtype}.")
    own = bool((reply.examples.site == plan.sites.index(reply.site)).all())
    if not own or not is_synthetic(reply.examples):
        raise ReplyRefused("Expected samples of which nothing is told but whose they are; got more.")
    lengths = reply.examples.latents.double().flatten(1).norm(dim=1)
    if not bool((lengths <= latent_bound(plan) * _ROUNDING).all()) or not bool(torch.isfinite(lengths).all()):
        raise ReplyRefused(f"Expected finite samples of at most {latent_bound(plan):g}; got longer ones.")
