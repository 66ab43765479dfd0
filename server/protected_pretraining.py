"""Pretraining with privacy: the sites tell one protected style each, and all the rest happens at the centre.

What the run does in place of survey, rounds and site erasure when the plan has privacy (`level: sums`): ask
the style codes, train on public scans in these styles, erase the sites by public scans. Everything after the
codes is a function of them and of what is public, so it costs no patient anything.

What this file does not do: any of these by itself; see `server/exchanges/style_code.py`,
`server/protected_styles.py`, `server/phantom_training.py`, `server/model.py`.
"""

from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from flwr.serverapp import Grid
from torch import Tensor

from federation.exchanges.style_code import code_promise
from federation.messages import Tensors
from federation.plan import RunPlan
from federation.reply_book import ReplyBook
from meduet_models.style.bank import StyleBank
from server.checkpoints import Checkpoint
from server.exchanges.style_code import ask_style_code
from server.model import SharedModel
from server.phantom_training import PhantomTraining
from server.protected_styles import ProtectedStyles
from strategies.quorum import Roster


class ProtectedPretraining:
    """The pretraining of one run whose plan has privacy."""

    def __init__(
        self,
        grid: Grid,
        roster: Roster,
        plan: RunPlan,
        folder: Path,
        model: SharedModel,
        device: torch.device,
        book: ReplyBook,
    ) -> None:
        self._grid, self._roster, self._plan, self._folder = grid, roster, plan, folder
        self._model, self._device, self._book = model, device, book

    @cached_property
    def _public(self) -> Tensor:
        return self._model.public_scans(self._folder)

    def survey(self) -> tuple[Tensors, dict[str, Any]]:
        """The bank of protected styles, and what there is to say of it. Raises as `ask_sites`."""
        styles = ProtectedStyles(self._plan, self._public)
        replies, refused = ask_style_code(
            self._grid, self._roster, self._plan, self._public, styles.check, self._book
        )
        style_bank = styles.bank(replies)
        promise = code_promise(self._plan)
        return style_bank.to_tensors(), {
            "sites": {site: {"patients": round(styles.patients(r))} for site, r in replies.items()},
            "latent_deviation": style_bank.scale.tolist(),
            "privacy": {
                "epsilon": [promise.epsilon.lower, promise.epsilon.upper],
                "delta": promise.delta,
                "promise": promise.sentence(),
            },
            "refused": refused,
        }

    def rounds(self, last: Checkpoint) -> Iterator[tuple[dict[str, Any], Tensors, Tensors]]:
        """The rounds after `last`: what to say of each, all weights, and the state to go on from."""
        style_bank = StyleBank.from_tensors(last.bank, self._plan.sites)
        training = PhantomTraining(self._plan, self._public, style_bank, last.optimiser, self._device)
        for number in range(last.round + 1, self._plan.training.rounds + 1):
            report = training.round(number)
            yield report, training.weights(), training.state()

    def erased(self, last: Checkpoint) -> tuple[Tensors, dict[str, Any]]:
        """The final weights and what to say of the site erasure."""
        return self._model.erased_by_public(last.shared, last.bank, self._public)
