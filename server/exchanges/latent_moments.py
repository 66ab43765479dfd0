"""Moments of latents: asked once of each site, after the pretraining; from each, latents of nobody are drawn.

A draw is a public scan in the common style, moved along the public axes so that all of them have the site's
mean and spread there, and put into the site's protected style: what lies along no axis stays the phantom's. A
count that says fewer than twice the plan's smallest cohort, noise included, is put aside, as with styles.
What this file does not do: train on what is drawn (`server/exchanges/central_diffusion.py`).

Axes: c d h w = latents.
"""

import torch
from flwr.serverapp import Grid
from jaxtyping import Float
from torch import Tensor

from federation.exchanges.latent_moments import (
    LATENT_MOMENTS,
    MOMENTS,
    MomentsAsk,
    MomentsReply,
    aggregate_of,
    moments_promise,
    moments_shapes,
    public_moments,
)
from federation.exchanges.latents import ToldLatents
from federation.exchanges.style_code import LATENTS
from federation.exchanges.survey import smallest_cohort, survey_layout
from federation.exchanges.synthetic_latents import synthetic_examples, synthetic_items
from federation.plan.plan import RunPlan
from federation.reply_book import ReplyBook
from federation.wire.limits import MOST_PATIENTS
from meduet_models.seeds import generator_of
from meduet_models.style.bank import StyleBank
from meduet_models.style.common_style import CommonStyle
from server.exchanges.queries import ask_sites
from server.latent_bank.bank import LatentBank
from strategies.aggregation import ReplyRefused
from strategies.quorum import Roster


class DrawnLatents:
    """Latents drawn from sites' moments, along the axes of `public`, the plan's public latents."""

    def __init__(self, plan: RunPlan, public: Float[Tensor, "m c d h w"], style_bank: StyleBank) -> None:
        self._plan, self._common = plan, CommonStyle.of(style_bank)
        self._axes = public_moments(plan, self._common, public)
        self._dressed = self._common.dressed(public, survey_layout(plan))

    def check(self, reply: MomentsReply) -> None:
        """Raise `ReplyRefused` for moments that no cohort of a useful size can have told."""
        came = {name: tuple(tensor.shape) for name, tensor in reply.moments.items()}
        if came != moments_shapes(self._plan) or not bool(torch.isfinite(reply.moments[MOMENTS]).all()):
            raise ReplyRefused(f"Expected finite moments of {moments_shapes(self._plan)}; got {came}.")
        least, count = 2 * smallest_cohort(self._plan), self._axes.count(reply.moments[MOMENTS])
        if not least <= count <= MOST_PATIENTS:
            raise ReplyRefused(
                f"Expected moments of {least} to {MOST_PATIENTS} patients, as far as noise lets tell; got "
                f"{count:.0f}. Lower style.minimum_cohort, or leave the site out of the plan."
            )

    def of_site(self, reply: MomentsReply) -> ToldLatents:
        """The plan's number of latents of a site; the same for the same moments."""
        plan, site = self._plan, reply.site
        number = aggregate_of(plan).samples
        draws = generator_of("latents of moments", plan.seed, site)
        spread = self._axes.read(reply.moments[MOMENTS], moments_promise(plan).deviation)
        rows = torch.randperm(len(self._dressed), generator=draws)[:number]
        moved = self._axes.moved(self._dressed[rows].flatten(1), spread)
        latents = self._common.back(moved.reshape(number, *self._dressed.shape[1:]).float(), site)
        return ToldLatents(
            plan_sha256=plan.sha256,
            site=site,
            round=plan.training.rounds,
            first=0,
            total=number,
            items=synthetic_items(plan, site, number),
            examples=synthetic_examples(plan, site, latents),
            wire_dtype=plan.release.latent_dtype,
        )


def ask_moments(
    grid: Grid,
    roster: Roster,
    plan: RunPlan,
    public: Tensor,
    style_bank: StyleBank,
    latent_bank: LatentBank,
    book: ReplyBook,
) -> tuple[dict[str, ToldLatents], dict[str, str]]:
    """What is drawn of each site whose draws the bank has not, and who was put aside why."""
    round_number = plan.training.rounds
    missing = [s for s in plan.participants if latent_bank.dealt_with(plan, s, round_number) is None]
    if not missing:
        return {}, {}
    drawn = DrawnLatents(plan, public, style_bank)
    ask = MomentsAsk(
        plan_json=plan.to_json(), round=round_number, public={LATENTS: public}, bank=style_bank.to_tensors()
    )
    replies, refused = ask_sites(
        grid, roster, plan, LATENT_MOMENTS, ask, drawn.check, book, stops=False, only=missing
    )
    return {site: drawn.of_site(reply) for site, reply in replies.items()}, refused
