"""Pretraining with privacy: the sites tell one protected style each, and the rounds happen at the centre.

What the run does in place of survey, rounds and site erasure when the plan has privacy: ask the style codes,
train on public scans in these styles, erase the sites by public scans. Everything after the codes is a
function of them and of what is public, so it costs no patient anything. Where noisy steps at the sites are to
follow, it says what these will be worth, and refuses those that noise drowns: after the codes, by the most
that it can be, and after the last round here as measured.

What this file does not do: any of these by itself; see `server/exchanges/style_code.py`,
`server/protected_styles.py`, `server/phantom_training.py`, `server/model.py`, `server/coherence.py`; nor ask
for noisy steps (`server/exchanges/private_rounds.py`).
"""

import logging
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from flwr.serverapp import Grid
from torch import Tensor

from federation.exchanges.private_rounds import mechanisms, run_epsilon, trained_keys
from federation.exchanges.style_code import privacy_of
from federation.plan.canary_plan import pull_on_steps, pull_on_style
from federation.plan.plan import RunPlan
from federation.reply_book import ReplyBook
from federation.summed_noise import check_summed, summed_epsilon
from federation.wire.messages import Tensors
from federation.wire.sum_layout import SumLayout
from meduet_models.meduet import MeDUET
from meduet_models.style.bank import StyleBank
from privacy.worth import DROWNED, LITTLE, signal_to_noise
from server.checkpoints import Checkpoint
from server.coherence import coherence_of
from server.exchanges.private_rounds import parted
from server.exchanges.style_code import ask_style_code
from server.model import SharedModel
from server.phantom_training import PhantomTraining
from server.promises import promises_of
from server.protected_styles import ProtectedStyles
from strategies.quorum import Roster

_MOST_PULL = 0.1
_log = logging.getLogger(__name__)


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
    def public(self) -> Tensor:
        """The plan's public scans."""
        return self._model.public_scans(self._folder)

    def survey(self) -> tuple[Tensors, dict[str, Any]]:
        """The bank of protected styles, and what there is to say of it. Raises as `ask_sites`."""
        epsilon, of_sums = run_epsilon(self._plan), self._epsilon_of_sums()
        styles = ProtectedStyles(self._plan, self.public)
        replies, refused = ask_style_code(
            self._grid, self._roster, self._plan, self.public, styles.check, self._book
        )
        style_bank = styles.bank(replies)
        self._say_canaries(style_bank)
        return style_bank.to_tensors(), {
            "sites": {site: {"patients": round(styles.patients(r))} for site, r in replies.items()},
            "latent_deviation": style_bank.scale.tolist(),
            "privacy": {
                "epsilon": [epsilon.lower, epsilon.upper],
                **of_sums,
                "delta": privacy_of(self._plan).delta,
                "promise": " ".join(promise.sentence() for promise in promises_of(self._plan)),
                **self._worth(style_bank, self._network(), 1.0),
            },
            "refused": refused,
        }

    def rounds(self, last: Checkpoint) -> Iterator[tuple[dict[str, Any], Tensors, Tensors]]:
        """The rounds after `last`: what to say of each, all weights, and the state to go on from."""
        style_bank = StyleBank.from_tensors(last.bank, self._plan.sites)
        shared, home = self._model.start()
        training = PhantomTraining(
            self._plan, self.public, style_bank, {**shared, **home}, last.optimiser, self._device
        )
        for number in range(last.round + 1, self._plan.training.rounds + 1):
            report = training.round(number)
            if number == self._plan.training.rounds and privacy_of(self._plan).noisy is not None:
                network = self._network()
                network.load_state_dict(training.weights())
                coherence = coherence_of(network, self._plan, self.public, style_bank)
                report |= self._worth(style_bank, network, coherence) | {"coherence": coherence}
            yield report, training.weights(), training.state()

    def _epsilon_of_sums(self) -> dict[str, list[float]]:
        """Against whoever reads sums only, and works with a third of the sites; nothing without secure sums.
        Raises `ValueError` for sums that would spoil their noise."""
        if not self._plan.aggregation.secure_sum:
            return {}
        travels = parted(self._plan, self._network().state_dict())[0]
        check_summed(self._plan, SumLayout.of(self._plan, {n: t.shape for n, t in travels.items()}))
        epsilon = summed_epsilon(self._plan)
        return {"epsilon_of_sums": [epsilon.lower, epsilon.upper]}

    def _say_canaries(self, style_bank: StyleBank) -> None:
        """Warn of canaries that pull as a good part of some site's patients do."""
        if (canaries := self._plan.audit_canaries) is None:
            return
        fewest = min(float(count) for count in style_bank.count.sum(1) if count)
        if (pull := max(pull_on_steps(canaries), pull_on_style(canaries))) > _MOST_PULL * fewest:
            _log.warning(
                "Canaries pull as %.0f patients do who all pull one way; a site has %.0f. The weights of "
                "this run are for its audit alone.",
                pull, fewest,
            )  # fmt: skip

    def _network(self) -> MeDUET:
        return MeDUET(self._plan.network, len(self._plan.sites), seed=self._plan.seed)

    def _worth(self, style_bank: StyleBank, network: MeDUET, coherence: float) -> dict[str, float]:
        """What a noisy step is worth, as far as known now; nothing where there is none. Raises `ValueError`
        for one that noise drowns, unless the plan wants it all the same."""
        if (noisy := privacy_of(self._plan).noisy) is None:
            return {}
        dimensions = sum(network.get_parameter(name).numel() for name in trained_keys(self._plan, network))
        patients = [float(count) for count in style_bank.count.sum(1) if count]
        groups = [count / noisy.patients_in_group for count in patients]
        worth = signal_to_noise(mechanisms(self._plan)[1], groups, dimensions, coherence)
        said = (
            f"Signal to noise of a step: {'at most ' if coherence == 1.0 else ''}{worth:.3f} "
            f"({sum(patients):.0f} patients, {dimensions:,} weights)"
        )
        if worth < DROWNED and not noisy.although_noise_wins:
            raise ValueError(
                f"{said}; expected {DROWNED:g} or more. No step was asked for. Set privacy=sums, or "
                "privacy.noisy.although_noise_wins=true."
            )
        if worth < LITTLE:
            _log.warning("%s; below %g steps at the sites help little.", said, LITTLE)
        return {"signal_to_noise": worth}

    def erased(self, last: Checkpoint) -> tuple[Tensors, dict[str, Any]]:
        """The final weights and what to say of the site erasure."""
        return self._model.erased_by_public(last.shared, last.bank, self.public)
