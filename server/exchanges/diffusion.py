"""The diffusion model of a run: none, central or federated, and the file it ends in.

The run asks the same three things of each kind: before a round, after a round, at the end. What this file
does not do: it trains nothing (`diffusion_training.py`, `diffusion_rounds.py`).
"""

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from flwr.serverapp import Grid

from federation.exchanges.diffusion import encoder_of
from federation.plan.plan import RunPlan
from federation.plan.release_policy import release_policy
from federation.reply_book import ReplyBook
from federation.wire.messages import Tensors
from meduet_models.diffusion.artefact import GenerativeModel, save_generative_model
from meduet_models.style.bank import StyleBank
from meduet_models.weights import sha256_of_tensors
from server.exchanges.central_diffusion import CentralDiffusion
from server.exchanges.federated_diffusion import FinishedDiffusion, run_diffusion_rounds
from server.exchanges.noised_latents import NoisedLatents
from server.latent_bank.bank import LatentBank
from strategies.quorum import Roster

OnDiffusion = Callable[[int, int, float], None]
"""Called while the diffusion model is trained after the last round: steps or rounds done, in all, loss."""


class DiffusionPhase(Protocol):
    """What the run needs of a diffusion model."""

    def before_round(self, round_number: int, shared: Tensors, style_bank: Tensors) -> dict[str, Any]:
        """A round is about to begin."""

    def after_round(self, round_number: int) -> dict[str, Any]:
        """A round is over."""

    def finish(self, shared: Tensors, style_bank: Tensors) -> FinishedDiffusion | None:
        """The pretraining is over: the model and its reports, or None where there is none."""

    def saved(self, path: Path) -> None:
        """The model is in this file."""


class NoDiffusion:
    """No diffusion model."""

    def before_round(self, round_number: int, shared: Tensors, style_bank: Tensors) -> dict[str, Any]:
        """Nothing."""
        return {}

    def after_round(self, round_number: int) -> dict[str, Any]:
        """Nothing."""
        return {}

    def finish(self, shared: Tensors, style_bank: Tensors) -> FinishedDiffusion | None:
        """None."""
        return None

    def saved(self, path: Path) -> None:
        """Nothing."""


class FederatedDiffusion(NoDiffusion):
    """A diffusion model that is trained at the sites, after the pretraining."""

    def __init__(
        self,
        grid: Grid,
        roster: Roster,
        plan: RunPlan,
        folder: Path,
        book: ReplyBook,
        on_diffusion: OnDiffusion,
    ) -> None:
        self._run = (grid, roster, plan)
        self._folder, self._book, self._on_diffusion = folder, book, on_diffusion

    def finish(self, shared: Tensors, style_bank: Tensors) -> FinishedDiffusion:
        """Its rounds."""
        diffusion = self._run[2].diffusion
        assert diffusion is not None

        def on_round(round_number: int, report: Mapping[str, Any]) -> None:
            self._on_diffusion(round_number, diffusion.rounds, report["loss"]["total"])

        return run_diffusion_rounds(*self._run, shared, style_bank, self._folder, self._book, on_round)


def diffusion_of(
    grid: Grid,
    roster: Roster,
    plan: RunPlan,
    folder: Path,
    device: torch.device,
    bank_key: Path,
    book: ReplyBook,
    on_diffusion: OnDiffusion,
    public: Callable[[], torch.Tensor],
) -> DiffusionPhase:
    """The kind that the plan asks for; `public` gives the public scans of a plan with privacy. Raises
    `ValueError` when a latent bank that is there cannot be opened."""
    match plan.latent_policy.trained_at:
        case "nowhere":
            return NoDiffusion()
        case "sites":
            return FederatedDiffusion(grid, roster, plan, folder, book, on_diffusion)
        case "centre":
            latent_bank = LatentBank(folder / "latents", bank_key)
            noised = NoisedLatents(grid, roster, plan, book, public) if plan.latent_policy.noised else None
            return CentralDiffusion(
                grid, roster, plan, folder, latent_bank, device, book, on_diffusion, noised
            )


def save_diffusion(
    path: Path,
    plan: RunPlan,
    finished: FinishedDiffusion,
    shared: Tensors,
    style_bank: Tensors,
    directions: Mapping[str, torch.Tensor],
) -> None:
    """Everything that sampling needs, in one file."""
    diffusion = plan.diffusion
    assert diffusion is not None
    save_generative_model(
        path,
        GenerativeModel(
            transformer=finished.transformer,
            encoder=encoder_of(plan, shared),
            bank=StyleBank.from_tensors(style_bank, plan.sites) if style_bank else None,
            sites=plan.sites,
            directions=dict(directions),
            tokenizer_sha256=plan.tokenizer_sha256,
            volumes=dataclasses.asdict(plan.volumes),
            body_parts=plan.style.body_parts,
            categories=diffusion.categories,
            policy=finished.policy,
            patient_data=release_policy(finished.policy).is_patient_data,
            expires=plan.release.expires,
            provenance={
                "plan_sha256": plan.sha256,
                "plan": plan.to_json(),
                "encoder_sha256": sha256_of_tensors(shared),
                "reports": json.dumps(finished.reports, sort_keys=True),
            },
        ),
    )
