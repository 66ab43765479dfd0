"""`meduet-simulate --config-name generation`: what the encoder is worth to a diffusion model.

On a finished run: (1) how fast the model learns from scratch, from the federated encoder and from that of a
pooled run, told content, style or both, several seeds, the same steps; read as the loss on test patients,
told by the same encoder whatever the start. (2) How good it is when it learns from latents that all sites
release, at the sites through messages, from one pooled data set, or from the best single site, which is
chosen on validation patients. Each part is a file of its own, and done once.

What this file does not do: pretrain, choose any setting on what it reports.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal, get_args

from jaxtyping import Int
from torch import Tensor

from client.app import make_client_app
from client.latents.examples import examples_of
from federation.exchanges.diffusion import encoder_of, transformer_of
from federation.journal import Journal
from federation.plan.diffusion_plan import DiffusionPlan
from federation.plan.plan import RunPlan
from federation.reply_book import ReplyBook
from meduet_models.diffusion.conditioner import Conditioner
from meduet_models.diffusion.conditions import Condition, Examples
from meduet_models.diffusion.training import DiffusionTrainee, validation_loss
from meduet_models.diffusion.transformer import DiffusionTransformer
from meduet_models.meduet import FactorNetwork
from meduet_models.weights import sha256_of_tensors
from server.exchanges.federated_diffusion import run_diffusion_rounds
from simulations.engines.in_process import FixedThreads, InProcessGrid
from simulations.finished_run import FinishedRun
from simulations.generation.settings import GenerationSettings
from simulations.hospitals.labelled import labels_for_segmenters
from simulations.progress import Live
from strategies.quorum import Roster

Start = Literal["scratch", "encoder", "pooled"]
EncoderName = Literal["encoder", "pooled"]
Source = Literal["raw", "federated", "pooled", "site"]


@dataclass(frozen=True, kw_only=True)
class StudySettings:
    """What conf/generation.yaml says."""

    pretrained: str
    """Folder of the federated run."""
    pooled: str | None
    """Folder of the pooled run; none: nothing that needs it is done."""
    folder: str
    """Where everything goes."""
    seeds: tuple[int, ...]
    """Seeds of the models."""
    steps: int
    """Optimiser steps of each model."""
    validate_every: int
    """Steps between readings of the loss."""
    starts: tuple[Start, ...]
    """From where models start."""
    told: tuple[tuple[Condition, ...], ...]
    """What models are told."""
    sources: tuple[Source, ...]
    """Who may see which latents."""
    rounds: int
    """Rounds of the federated model."""
    generation: GenerationSettings
    """How much is sampled and measured of a source's model."""
    diffusion: DiffusionPlan
    """The model; its start and conditions are those of the study."""

    def __post_init__(self) -> None:
        """Refuse what cannot be done."""
        if self.steps % self.rounds or self.steps % self.validate_every:
            raise ValueError(
                f"Expected steps={self.steps} to be a multiple of rounds={self.rounds} and of "
                f"validate_every={self.validate_every}."
            )
        if self.pooled is None and ("pooled" in self.starts or "pooled" in self.sources):
            raise ValueError("starts and sources name pooled: set pooled to the folder of that run.")


@dataclass(frozen=True)
class Patients:
    """Examples of the run's sites by split, and of each site's training patients."""

    train: Examples
    validation: Examples
    test: Examples
    by_site: dict[str, Examples]

    @staticmethod
    def of(opened: FinishedRun, plan: RunPlan) -> "Patients":
        """Read them from the sites' caches. Raises `ValueError` when a split is empty everywhere."""

        def split(names: Sequence[str], which: str) -> Examples:
            found = [
                examples_of(opened.scans[name], rows, plan)
                for name in names
                if (rows := list(opened.scans[name].indices(which)))
            ]
            if not found:
                raise ValueError(f"Expected {which} patients; the run kept none. Set site.split_fractions.")
            return Examples.join(found)

        names = list(plan.sites)
        return Patients(
            split(names, "train"),
            split(names, "validation"),
            split(names, "test"),
            {name: split([name], "train") for name in names},
        )


class InMemory:
    """Examples as a source."""

    def __init__(self, examples: Examples) -> None:
        self._examples = examples

    def __len__(self) -> int:
        """How many."""
        return len(self._examples)

    def read(self, rows: Int[Tensor, " b"]) -> Examples:
        """These of them."""
        return self._examples.rows(rows)


class Study:
    """The study of one finished run: cells to compute, and what they tell."""

    def __init__(self, asked: StudySettings, opened: FinishedRun, pooled: FinishedRun | None) -> None:
        self.asked, self.opened, self.folder = asked, opened, Path(asked.folder)
        self.bank = opened.bank()
        self.patients = Patients.of(opened, self.plan(("content", "style"), "encoder", 0))
        self._encoders = {"encoder": opened.pretrained}
        if pooled is not None:
            if pooled.plan.tokenizer_sha256 != opened.plan.tokenizer_sha256:
                raise ValueError("Expected the pooled run to have the same tokenizer; it has another.")
            self._encoders["pooled"] = pooled.pretrained
        self.labelled = None
        if asked.generation.use is not None:
            train, test = (
                [(name, opened.scans[name], opened.scans[name].indices(which)) for name in opened.plan.sites]
                for which in ("train", "test")
            )
            self.labelled = labels_for_segmenters(train, test)
            if self.labelled is None:
                raise ValueError(
                    "generation.use needs label maps of training and test patients: set it to null."
                )

    @cached_property
    def encoder_hashes(self) -> dict[str, str]:
        """Hashes of the encoders there are, by name."""
        return {
            name: sha256_of_tensors(self.encoder(name).state_dict())
            for name in get_args(EncoderName)
            if name in self._encoders
        }

    def plan(self, conditions: tuple[Condition, ...], start: Start, seed: int) -> RunPlan:
        """The run's plan with the diffusion model of a cell."""
        training = dataclasses.replace(
            self.asked.diffusion.training, start="scratch" if start == "scratch" else "encoder"
        )
        diffusion = dataclasses.replace(
            self.asked.diffusion, conditions=conditions, training=training, begin_round=1, items_per_site=0
        )
        return dataclasses.replace(self.opened.plan, diffusion=diffusion, seed=seed)

    def encoder(self, which: EncoderName) -> FactorNetwork:
        """The federated run's frozen encoder, or the pooled run's."""
        plan = self.plan(("content", "style"), "encoder", 0)
        return encoder_of(plan, self._encoders[which].state_dict())

    def curve(self, start: Start, conditions: tuple[Condition, ...], seed: int) -> list[tuple[int, float]]:
        """Loss of the averaged model on test patients after so many steps."""
        plan = self.plan(conditions, start, seed)
        conditioner = Conditioner(self.encoder("encoder"), maps=plan.volumes.registered)
        transformer = transformer_of(plan, self.encoder("pooled" if start == "pooled" else "encoder"))
        trainee = self.trainee(plan, transformer, conditioner)
        source, points = InMemory(self.patients.train), []
        for step in range(self.asked.steps + 1):
            if step % self.asked.validate_every == 0:
                loss = validation_loss(
                    trainee.ema, conditioner, self.patients.test, conditions, style_bank=self.bank
                )
                points.append((step, float(loss.mean())))
            if step < self.asked.steps:
                trainee.step(source, step)
        return points

    def trained(self, source: Source, site: str | None, live: Live) -> tuple[DiffusionTransformer, RunPlan]:
        """The model of a source after all steps, told content and style, started from the encoder."""
        plan = self.plan(("content", "style"), "encoder", self.asked.seeds[0])
        if source == "federated":
            return self._federated(plan, live), plan
        encoder = self.encoder("pooled" if source == "pooled" else "encoder")
        conditioner = Conditioner(encoder, maps=plan.volumes.registered)
        trainee = self.trainee(plan, transformer_of(plan, encoder), conditioner)
        examples = self.patients.train if site is None else self.patients.by_site[site]
        with live.counting(f"{source} {site or ''}".strip()) as progress:
            for step in range(self.asked.steps):
                trainee.step(InMemory(examples), step)
                progress(step + 1, self.asked.steps)
        return trainee.ema.eval(), plan

    def trainee(
        self, plan: RunPlan, transformer: DiffusionTransformer, conditioner: Conditioner
    ) -> DiffusionTrainee:
        """A model before its first step."""
        assert plan.diffusion is not None
        return DiffusionTrainee(
            transformer,
            conditioner,
            plan.diffusion.training,
            total_steps=self.asked.steps,
            seed=plan.seed,
            style_bank=self.bank,
        )

    def _federated(self, plan: RunPlan, live: Live) -> DiffusionTransformer:
        assert plan.diffusion is not None
        defaults = DiffusionPlan(
            policy="federated", transformer=plan.diffusion.transformer, training=plan.diffusion.training
        )
        diffusion = dataclasses.replace(
            defaults,
            conditions=plan.diffusion.conditions,
            rounds=self.asked.rounds,
            steps_per_round=self.asked.steps // self.asked.rounds,
        )
        plan = dataclasses.replace(plan, diffusion=diffusion)
        with live.counting("federated rounds") as count:
            client_app = make_client_app(self.opened.consortium.open_by_context)
            threads = self.opened.settings.engine.cpus_per_site
            grid = InProcessGrid(FixedThreads(client_app, threads), len(plan.participants))
            finished = run_diffusion_rounds(
                grid,
                Roster(plan.participants),
                plan,
                self.opened.pretrained.state_dict(),
                self.bank.to_tensors(),
                self.folder / "federated",
                ReplyBook(Journal(self.folder / "federated" / "journal.jsonl")),
                lambda round_number, report: count(round_number, diffusion.rounds),
            )
        return finished.transformer


def cells(asked: StudySettings) -> Iterator[tuple[str, Start, tuple[Condition, ...], int]]:
    """Names of the curves, and what each is."""
    for conditions in asked.told:
        for start in asked.starts:
            for seed in asked.seeds:
                yield f"{start}-{'+'.join(conditions)}-{seed}", start, conditions, seed
