"""The central diffusion model: trained on the latent bank while the sites train, and after the last round.

Before a round the sites' next latents are collected; then, in a thread of its own, the plan's number of steps
is taken on what the bank holds, conditioned by the encoder with which the round began, while the round waits
for the sites. Steps are counted and not timed, and every draw depends on the seed and the step, so a run that
was stopped goes on to the same weights. After the last round the final encoder takes over. Of a plan with
privacy all of it happens then, on latents with noise (`server/exchanges/noised_latents.py`).
What this file does not do: it decides nothing about what sites release (`client/exchanges/latents.py`), and
stores no latent (`server/latent_bank/bank.py`).
"""

import threading
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from flwr.serverapp import Grid
from torch import Tensor

from federation.exchanges.diffusion import encoder_of, transformer_of
from federation.plan.plan import RunPlan
from federation.reply_book import ReplyBook
from federation.wire.messages import Tensors
from meduet_models.diffusion.conditioner import Conditioner
from meduet_models.diffusion.training import DiffusionTrainee
from meduet_models.style.bank import StyleBank
from meduet_models.weights import load_weights, sha256_of_tensors
from server.checkpoints import Checkpoint, Checkpoints
from server.exchanges.federated_diffusion import FinishedDiffusion
from server.exchanges.latents import collect
from server.exchanges.noised_latents import NoisedLatents
from server.latent_bank.bank import LatentBank
from server.latent_bank.records import Codes
from strategies.quorum import Roster

OnStep = Callable[[int, int, float], None]
"""Called after the steps that follow the last round: steps done, steps in all, loss."""
STEPS_PER_CHECKPOINT = 100


class CentralDiffusion:
    """The diffusion model of one run at the centre, from wherever it is."""

    def __init__(
        self,
        grid: Grid,
        roster: Roster,
        plan: RunPlan,
        folder: Path,
        latent_bank: LatentBank,
        device: torch.device,
        book: ReplyBook,
        on_step: OnStep = lambda done, total, loss: None,
        noised: NoisedLatents | None = None,
    ) -> None:
        """`noised`: what fills the bank after the pretraining, of a policy with noise; none: the sites'
        latents do while the rounds run."""
        if plan.diffusion is None or plan.diffusion.release.trained_at != "centre":
            raise ValueError("Expected a plan with a diffusion model of the centre (diffusion.policy=raw).")
        if (noised is not None) != plan.diffusion.release.noised:
            raise ValueError(f"Expected latents as diffusion.policy={plan.diffusion.policy} lets them out.")
        if plan.diffusion.release.sealed and plan.diffusion.recipient != latent_bank.recipient:
            raise ValueError(
                "Expected the bank's key to be the one that the plan names (diffusion.recipient: "
                f"{plan.diffusion.recipient[:12] or 'none'}…); its public key is "
                f"{latent_bank.recipient[:12]}…. Name its file: --bank-key. Nothing was asked."
            )
        self.plan, self.diffusion = plan, plan.diffusion
        self.latents = latent_bank
        self._grid, self._roster, self._book = grid, roster, book
        self._device, self._on_step, self._noised = device, on_step, noised
        self._checkpoints = Checkpoints(folder / "checkpoints", plan.sha256)
        self._last = self._checkpoints.latest()
        self._trainee: DiffusionTrainee | None = None
        self._work: _Steps | None = None

    @property
    def num_steps(self) -> int:
        """Optimiser steps over the whole run."""
        return self.diffusion.steps(self.plan.training.rounds)

    def before_round(self, round_number: int, shared: Tensors, style_bank: Tensors) -> dict[str, Any]:
        """Collect the latents of this round and let the training of the round begin; what was collected.

        Raises `ValueError` when the bank is empty then.
        """
        if self._noised is not None or round_number < self.diffusion.begin_round:
            return {}
        collected = collect(
            self._grid,
            self._roster,
            self.plan,
            round_number,
            self.latents,
            self._book,
            encode=self._coder(shared),
        )
        target = (round_number - self.diffusion.begin_round + 1) * self.diffusion.steps_per_round
        if self._done < target:
            self._work = self._start(self._ready(shared, style_bank), round_number, range(self._done, target))
        return collected

    def after_round(self, round_number: int) -> dict[str, Any]:
        """Wait for the steps of this round, write them down, and say how long the round waited for them."""
        if self._work is None:
            return {}
        began = perf_counter()
        losses, seconds = self._work.result()
        waited = perf_counter() - began
        self._work = None
        report = {
            "round": round_number,
            "steps": len(losses),
            "loss": sum(losses) / len(losses),
            "seconds": seconds,
            "waited_s": waited,
            "items": len(self.latents.source(self.plan, round_number)),
        }
        self._save(report)
        return report

    def finish(self, shared: Tensors, style_bank: Tensors) -> FinishedDiffusion:
        """The steps after the last round, with the final encoder, and the model."""
        rounds, total = self.plan.training.rounds, self.num_steps
        filled = []
        if self._noised is not None:
            conditioner, coder = self._conditioner(shared), self._coder(shared)
            filled = [self._noised.fill(self.latents, style_bank, conditioner, coder)]
        trainee = self._ready(shared, style_bank)
        while self._done < total:
            steps = range(self._done, min(self._done + STEPS_PER_CHECKPOINT, total))
            losses, seconds = self._start(trainee, rounds, steps).result()
            mean = sum(losses) / len(losses)
            self._save({"round": rounds, "steps": len(losses), "loss": mean, "seconds": seconds})
            self._on_step(steps.stop, total, mean)
        assert self._last is not None  # at least one step was taken: the plan says so
        return FinishedDiffusion(
            trainee.ema.cpu().eval(),
            self.diffusion.policy,
            total,
            [*filled, *self._last.metrics["reports"]],
        )

    def saved(self, path: Path) -> None:
        """Note in the bank which model learned from it, so that a withdrawal can mark it."""
        tensors, _ = load_weights(path)
        self.latents.learned(path, sha256_of_tensors(tensors), self.plan.training.rounds)

    @property
    def _done(self) -> int:
        """Steps that are written down; checkpoints are numbered by them."""
        return 0 if self._last is None else self._last.round

    def _conditioner(self, shared: Tensors) -> Conditioner:
        encoder = encoder_of(self.plan, shared).to(self._device)
        return Conditioner(encoder, maps=self.plan.volumes.registered)

    def _coder(self, shared: Tensors) -> Callable[[Tensor], Codes]:
        """What makes the codes that are kept with a round's latents."""
        conditioner = self._conditioner(shared)
        sha256 = sha256_of_tensors(shared)

        @torch.no_grad()
        def encode(latents: Tensor) -> Codes:
            if not len(latents):  # a site that has told everything answers with nothing
                numbers = conditioner.style(conditioner.encoder.latent_mean[None]).shape[1]
                return Codes(
                    content=torch.zeros(0, self.plan.network.width),
                    style=torch.zeros(0, numbers),
                    encoder_sha256=sha256,
                )
            on_device = latents.to(self._device)
            content = conditioner.content(on_device).mean(dim=1)
            style = conditioner.style(on_device)
            return Codes(content=content.cpu(), style=style.cpu(), encoder_sha256=sha256)

        return encode

    def _ready(self, shared: Tensors, style_bank: Tensors) -> DiffusionTrainee:
        """The trainee, conditioned by these weights; built from the last checkpoint, or from the encoder."""
        conditioner = self._conditioner(shared)
        if self._trainee is not None:
            self._trainee.replace_conditioner(conditioner)
            return self._trainee
        styles = StyleBank.from_tensors(style_bank, self.plan.sites) if style_bank else None
        self._trainee = DiffusionTrainee(
            transformer_of(self.plan, conditioner.encoder).to(self._device),
            conditioner,
            self.diffusion.training,
            total_steps=self.num_steps,
            seed=self.plan.seed,
            style_bank=styles,
        )
        if self._last is not None:
            self._trainee.load(self._last.shared)
        return self._trainee

    def _start(self, trainee: DiffusionTrainee, round_number: int, steps: range) -> "_Steps":
        source = self.latents.source(self.plan, round_number)
        return _Steps(lambda step: trainee.step(source, step)["loss"], steps)

    def _save(self, report: dict[str, Any]) -> None:
        assert self._trainee is not None
        reports = [] if self._last is None else self._last.metrics["reports"]
        self._last = Checkpoint(
            plan_sha256=self.plan.sha256,
            round=self._done + report["steps"],
            shared=self._trainee.state(),
            optimiser={},
            metrics={"reports": [*reports, report]},
        )
        self._checkpoints.save(self._last)


class _Steps:
    """Steps taken in a thread of their own, with as many CPU threads as the caller has."""

    def __init__(self, step: Callable[[int], float], steps: range) -> None:
        self._losses: list[float] = []
        self._seconds = 0.0
        self._error: BaseException | None = None
        threads = torch.get_num_threads()

        def work() -> None:
            torch.set_num_threads(threads)
            began = perf_counter()
            try:
                for number in steps:
                    self._losses.append(step(number))
            except BaseException as error:  # noqa: BLE001, raised again where the result is asked for
                self._error = error
            self._seconds = perf_counter() - began

        # Not waited for when the run is interrupted: what is not written down is done again.
        self._thread = threading.Thread(target=work, name="diffusion", daemon=True)
        self._thread.start()

    def result(self) -> tuple[list[float], float]:
        """The losses and the seconds that the steps took; raises what a step raised."""
        self._thread.join()
        if self._error is not None:
            raise self._error
        return self._losses, self._seconds
