"""Latents with noise, into the bank: what the central diffusion model learns from, of a plan with privacy.

After the pretraining every site is asked once, for samples or for moments, as the policy says, and the bank
is filled with what came or was drawn, under the policy's name. Everything after the answers is a function of
them and of what is public, so it costs no patient anything.
What this file does not do: ask by itself (`synthetic_latents.py`, `latent_moments.py`), or train
(`central_diffusion.py`).
"""

import logging
from collections.abc import Callable
from typing import Any

from flwr.serverapp import Grid
from torch import Tensor

from federation.exchanges.private_rounds import run_epsilon
from federation.plan.plan import RunPlan
from federation.reply_book import ReplyBook
from federation.wire.messages import Tensors
from meduet_models.diffusion.conditioner import Conditioner
from meduet_models.style.bank import StyleBank
from meduet_models.style.common_style import CommonStyle
from server.exchanges.latent_moments import ask_moments
from server.exchanges.synthetic_latents import ask_synthetic, check_worth_at_home
from server.home_start import home_start
from server.latent_bank.bank import LatentBank
from server.latent_bank.records import Codes
from strategies.quorum import Roster

_log = logging.getLogger(__name__)


class NoisedLatents:
    """What sites let out with noise under one plan; `public` gives the plan's public scans."""

    def __init__(
        self, grid: Grid, roster: Roster, plan: RunPlan, book: ReplyBook, public: Callable[[], Tensor]
    ) -> None:
        self._grid, self._roster, self._plan, self._book, self._public = grid, roster, plan, book, public

    def fill(
        self,
        latent_bank: LatentBank,
        style_bank: Tensors,
        conditioner: Conditioner,
        encode: Callable[[Tensor], Codes],
    ) -> dict[str, Any]:
        """Ask the sites that are not in the bank, fill it, and say what it holds; the same whenever it is
        said. Raises `ValueError` where noise drowns models at home and the plan does not want them."""
        plan, styles = self._plan, StyleBank.from_tensors(style_bank, self._plan.sites)
        shown: dict[str, Any] = {}
        if plan.diffusion is not None and plan.diffusion.synthetic is not None:
            shown["signal_to_noise"] = check_worth_at_home(plan, styles)

            def start() -> Tensors:
                return home_start(plan, self._public(), CommonStyle.of(styles), conditioner).state_dict()

            told, refused = ask_synthetic(
                self._grid, self._roster, plan, start, style_bank, latent_bank, self._book
            )
        else:
            told, refused = ask_moments(
                self._grid, self._roster, plan, self._public(), styles, latent_bank, self._book
            )
        for site, why in refused.items():
            _log.warning("%s: no %s latents: %s", site, plan.latent_policy.name, why)
        for one in told.values():
            latent_bank.add(one, plan, encode(one.examples.latents))
        epsilon = run_epsilon(plan)
        counts = {site: latent_bank.tables.count("kept", site) for site in plan.participants}
        return {
            "round": plan.training.rounds,
            "policy": plan.latent_policy.name,
            "items": {site: count for site, count in counts.items() if count},
            "epsilon": [epsilon.lower, epsilon.upper],
            **shown,
            **({"refused": refused} if refused else {}),
        }
