"""Collecting latents: before a round is trained on, every site is asked for what it releases in that round.

Part by part until a site has told all, from where the bank stands: cut off anywhere and begun again, the bank
ends the same. How much that can be is bounded (`federation/wire/limits.py`), and so is the time: a collection
takes what a round may take, and one question. A site that refuses, is silent, or answers with something else
is put aside with its reason until the next round; a site that withdrew is not asked. What this file does not
do: store (`server/latent_bank/bank.py`), or decide what a site releases (`client/exchanges/latents.py`).
"""

import logging
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from flwr.serverapp import Grid
from torch import Tensor

from federation.exchanges.latents import (
    LATENTS,
    LatentsAsk,
    LatentsReply,
    ToldLatents,
    items_per_chunk,
    latent_bound,
    releases_of,
    releasing,
    to_tensors,
    told_shapes,
)
from federation.plan.plan import RunPlan
from federation.reply_book import ReplyBook
from federation.wire.limits import MOST_SCANS
from federation.wire.sealing import SealBroken
from meduet_models.diffusion.conditions import UNKNOWN
from server.exchanges.queries import ask_sites
from server.latent_bank.bank import LatentBank
from server.latent_bank.records import Codes
from strategies.aggregation import ReplyRefused
from strategies.quorum import Roster

_ROUNDING = 1 + 1e-6
_SHARE_ROUNDING = 0.02
"""Shares of labels sum to one but for rounding, bfloat16's at most."""

_log = logging.getLogger(__name__)


def collect(
    grid: Grid,
    roster: Roster,
    plan: RunPlan,
    round_number: int,
    latent_bank: LatentBank,
    book: ReplyBook,
    *,
    encode: Callable[[Tensor], Codes] | None = None,
    count: int | None = None,
) -> dict[str, Any]:
    """Fill the bank with what the sites release in a round; a report with one entry per site.

    `encode` makes the codes that are kept with the latents. `count`: items per question, by default what fits
    32 MiB. Raises `ValueError` for a plan without release, `RoundFailed` when no site is connected.
    """
    began = time.monotonic()
    releases_of(plan, round_number, 0)
    count = count or items_per_chunk(plan)
    counts: dict[str, Counter[str]] = {}
    refused: dict[str, str] = {}
    while waiting := {
        site: first
        for site, first in _standing(latent_bank, plan, round_number).items()
        if site not in refused
    }:
        if counts and time.monotonic() - began > plan.aggregation.deadline_s:
            refused |= {s: f"not all told within {plan.aggregation.deadline_s:g} s" for s in waiting}
            break
        first = min(waiting.values())
        asked = {site for site, stands in waiting.items() if stands == first}
        ask = LatentsAsk(plan_json=plan.to_json(), round=round_number, first=first, count=count)

        told: dict[str, ToldLatents] = {}

        def check(
            reply: LatentsReply, ask: LatentsAsk = ask, told: dict[str, ToldLatents] = told
        ) -> ToldLatents:
            try:
                told[reply.site] = latent_bank.opened(reply)
            except SealBroken as error:
                raise ReplyRefused(str(error)) from None
            check_reply(told[reply.site], ask, plan, latent_bank)
            return told[reply.site]

        replies, put_aside = ask_sites(
            grid,
            roster,
            plan,
            LATENTS,
            ask,
            check,
            book,
            stops=False,
            only=asked,
        )
        for site in replies:  # in the plan's order: which of two twins is kept is no chance
            codes = None if encode is None else encode(told[site].examples.latents)
            added = vars(latent_bank.add(told[site], plan, codes))
            counts[site] = counts.get(site, Counter()) + Counter(added)
        refused |= put_aside
        refused |= {s: "no answer" for s in asked - set(replies) - set(refused)}
    return {
        "round": round_number,
        "sites": {site: {name: counts[site][name] for name in sorted(counts[site])} for site in counts},
        "refused": refused,
        "items": len(latent_bank),
        "seconds": time.monotonic() - began,
    }


def _standing(latent_bank: LatentBank, plan: RunPlan, round_number: int) -> dict[str, int]:
    """Sites that have more to tell, and how many of their items were dealt with."""
    stands = {site: latent_bank.dealt_with(plan, site, round_number) for site in plan.participants}
    return {
        site: 0 if known is None else known[0]
        for site, known in stands.items()
        if known is None or known[0] < known[1]
    }


def check_reply(reply: ToldLatents, ask: LatentsAsk, plan: RunPlan, latent_bank: LatentBank) -> None:
    """Raise `ReplyRefused` unless the answer is one to this question and holds what the plan allows."""
    if (reply.round, reply.first) != (ask.round, ask.first):
        raise ReplyRefused(f"Expected items from {ask.first} of round {ask.round}; got others.")
    diffusion = releasing(plan)
    limits = (diffusion.items_per_site, diffusion.items_per_round, MOST_SCANS)
    most = min(limit for limit in limits if limit)
    if not 0 <= reply.total <= most:
        raise ReplyRefused(f"Expected at most {most} items in a round; got {reply.total}.")
    known = latent_bank.dealt_with(plan, reply.site, ask.round)
    if known is not None and known[1] != reply.total:
        raise ReplyRefused(f"Expected {known[1]} items of this round as before; it now says {reply.total}.")
    expected = max(0, min(ask.count, reply.total - ask.first))
    if len(reply.items) != expected:
        raise ReplyRefused(f"Expected {expected} items; got {len(reply.items)}.")
    examples = reply.examples
    shapes = {name: tuple(tensor.shape) for name, tensor in to_tensors(examples).items()}
    if shapes != told_shapes(plan, expected):
        raise ReplyRefused(f"Expected latents of {told_shapes(plan, expected)}; got {shapes}.")
    if reply.wire_dtype != plan.release.latent_dtype:
        raise ReplyRefused(f"Expected values as {plan.release.latent_dtype}; got {reply.wire_dtype}.")
    lengths = examples.latents.double().flatten(1).norm(dim=1)
    if not bool((lengths <= latent_bound(plan) * _ROUNDING).all()):  # NaN is not, either
        raise ReplyRefused(f"Expected finite latents of at most {latent_bound(plan):g}; got longer ones.")
    sites = plan.sites if reply.site not in plan.sites else (reply.site,)
    if any(label not in [plan.sites.index(site) for site in sites] for label in examples.site.tolist()):
        raise ReplyRefused(f"Expected items of {', '.join(sites)}; got another's.")
    for name, values in (("body_part", plan.style.body_parts), ("category", diffusion.categories)):
        places = getattr(examples, name)
        if not bool(((places >= UNKNOWN) & (places < len(values))).all()):
            raise ReplyRefused(f"Expected {name} from {UNKNOWN} to {len(values) - 1}; got others.")
    if bool((examples.spacing <= 0).any()) or bool(examples.spacing.isinf().any()):
        raise ReplyRefused("Expected spacings above 0, or none at all; got others.")
    if examples.label_map is not None:
        known_maps = examples.label_map[~examples.label_map.isnan().flatten(1).any(1)]
        off = (known_maps.sum(1) - 1).abs() > _SHARE_ROUNDING
        if bool(off.any()) or bool((known_maps < 0).any()) or not bool(torch.isfinite(known_maps).all()):
            raise ReplyRefused("Expected shares of labels that sum to one; got others.")
