"""Which small set of parameters can hold what patients' scans still give, with and without noise?

    OMP_NUM_THREADS=1 python bench/small_parameters.py root=DATA/msd_hippocampus [folder=RUN] [plans=true]

The first experiment of a level `adapters`: a network trained on phantoms in the sites' exact styles goes on,
60 steps of 8, on the patients' scans of three sites pooled, with all of its parameters (the distance to
close) or with a few. Learning rates are chosen on validation scans, errors are those of test scans; one seed.
A set that does not close half of the distance without noise is not asked with noise. Reconstruction is the
decoder's matter, too; so content is read as well, on test scans: R² of the volumes of labelled structures
from all content tokens, out of fold, and Dice of the frozen network with the labels of `LABELLED` training
patients, mean of `DRAWS` draws of them.

A step's noise is scaled to its own gradient, so that the signal (the gradient's share that all patients agree
on) over the noise is what is said: in favour of a small set, since real noise stays when gradients shrink.
What a plan's ratio is follows from groups of a patient and a public partner, clipped at their median length,
sampling rate .1, 60 steps, delta 1e-5, noise on the sum over sites; `plans=true` trains at these ratios, too.
The teacher stays as it was. Some minutes of a CPU; `folder` keeps the phantoms.
"""

import math
import sys
import tempfile
import time
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path

import torch
from torch import Tensor, nn

from client.latents.style_moments import own_moments
from federation.exchanges.finetuning import LocalFinetuning
from federation.exchanges.survey import survey_layout
from meduet_models.adamw import AdamW, decay_groups
from meduet_models.meduet import MeDUET
from meduet_models.objective.objective import MeduetObjective, StepBatch, StepDraws, draw_step
from meduet_models.objective.teacher import Teacher
from meduet_models.probes.anatomy import anatomy_probe
from meduet_models.seeds import generator_of
from meduet_models.style.bank import StyleBank
from meduet_models.style.restyling import own_entries, restyle_each
from meduet_models.weights import load_weights
from privacy.accounting import Mechanism, epsilon_of
from privacy.clipping import joint_norm
from privacy.group_gradients import GroupGradients
from server.config import compose_config, plain
from server.phantom_training import PhantomTraining
from server.public_scans import PUBLIC_SCANS
from simulations.downstream.evaluate import evaluate_downstream
from simulations.downstream.settings import DownstreamSettings
from simulations.evaluation import encode_all, mean_style, swap
from simulations.hospitals.held_out import join, own_scans
from simulations.hospitals.labelled import known_answers, num_classes
from simulations.progress import Live
from simulations.run import prepare

STEPS, BATCH, GROUPS, RANK = 60, 8, 24, 4
LABELLED, DRAWS = 5, 10
RATE, DELTA = 0.1, 1e-5
RATES = (2e-3, 8e-3)
PATIENTS, EPSILONS = (60, 350), (3.0, 8.0)
RATIO = 0.6
"""Signal over noise of a step at which a set has to close half of the distance."""


class LowRank(nn.Module):
    """A frozen linear layer and a map of rank `RANK` beside it, zero at first (LoRA, arXiv:2106.09685)."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.layer = layer
        self.down = nn.Linear(layer.in_features, RANK, bias=False)
        self.up = nn.Linear(RANK, layer.out_features, bias=False)
        nn.init.normal_(
            self.down.weight, std=layer.in_features**-0.5, generator=torch.Generator().manual_seed(0)
        )
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        """The layer's output, moved."""
        out: Tensor = self.layer(x) + self.up(self.down(x))
        return out


def low_rank(student: MeDUET) -> None:
    """Put a map beside every linear layer of the last blocks."""
    for block in (student.encoder.blocks[-1], student.decoder.blocks[-1]):
        for name, layer in list(block.named_children()):
            if isinstance(layer, nn.Linear):
                setattr(block, name, LowRank(layer))


SETS: dict[str, Callable[[str], bool]] = {
    "everything": lambda name: name != "decoder.mask_token",
    "biases and norms": lambda name: name.endswith(".bias") or "norm" in name,
    "output layer": lambda name: name.startswith("decoder.predict."),
    "low-rank maps of the last blocks": lambda name: ".up." in name or ".down." in name,
    "last blocks": lambda name: name.startswith(("encoder.blocks.2.", "decoder.blocks.1.")),
    "content head": lambda name: name.startswith("content_head."),
}
"""Which parameters are trained, by name; the network has three blocks and two."""


class Study:
    """The scans, the start, and what a set makes of it."""

    def __init__(self, folder: str, overrides: list[str]) -> None:
        wanted = ["experiment=hippocampus", "privacy=sums", "engine.workers=1", "hospitals.by=random"]
        wanted += ["hospitals.styles_on_top=true", "site.split_fractions=[0.7,0.1,0.2]"]
        wanted += ["training.rounds=15", "training.steps_per_round=10", f"folder={folder}", *overrides]
        with Live() as live:
            made = prepare(plain(compose_config(wanted)), live)
        plan = self.plan = made.plan
        sets = [made.consortium.site(site).scans(plan) for site in plan.sites]
        own = [scans.latents(scans.indices("train")) for scans in sets]
        self.scans, self.site = (
            torch.cat(own),
            torch.arange(len(own)).repeat_interleave(torch.tensor([*map(len, own)])),
        )
        self.shown = [latents[:32] for latents in own]
        self.held = {
            split: join([own_scans(plan, scans, i, [split]) for i, scans in enumerate(sets)])
            for split in ("validation", "test")
        }
        named = list(zip(plan.sites, sets, strict=True))
        local = LocalFinetuning(task="segmentation", classes=num_classes(sets))
        learn, test = (
            known_answers([(name, scans, scans.indices(split)) for name, scans in named], local)
            for split in ("train", "test")
        )
        assert learn is not None and test is not None, "the scans have labels"
        self.labelled = learn, test
        self.downstream = DownstreamSettings(
            task="segmentation", classes=local.classes, spacing_mm=plan.volumes.spacing_mm, draws=DRAWS,
            label_counts=(LABELLED,), label_shares=(), modes=("frozen",), bootstrap=10,
        )  # fmt: skip
        moments = {site: own_moments(scans, plan) for site, scans in zip(plan.sites, sets, strict=True)}
        self.bank = StyleBank.of(plan.sites, moments)
        self.public = load_weights(Path(folder) / PUBLIC_SCANS)[0]["latents"]
        self.public_own = own_entries(self.public, survey_layout(plan))
        begun = MeDUET(plan.network, len(plan.sites), seed=plan.seed).state_dict()
        centre = PhantomTraining(plan, self.public, self.bank, begun, {}, torch.device("cpu"))
        for number in range(1, plan.training.rounds + 1):
            centre.round(number)
        self.start = MeDUET(plan.network, len(plan.sites))
        self.start.load_state_dict(centre.weights())
        self.objective = MeduetObjective(plan.objective)

    def student(self, which: str) -> tuple[MeDUET, dict[str, nn.Parameter]]:
        """The start with all but a set frozen; the set."""
        student = deepcopy(self.start)
        if which.startswith("low-rank"):
            low_rank(student)
        for name, parameter in student.named_parameters():
            parameter.requires_grad_(SETS[which](name))
        return student, {name: p for name, p in student.named_parameters() if p.requires_grad}

    def batch(self, step: int) -> tuple[StepBatch, StepDraws]:
        """Patients' scans in the styles of the sites, as a site trains on them."""
        random = generator_of("small parameters", self.plan.seed, step)
        rows = torch.randperm(len(self.scans), generator=random)[:BATCH]
        draws = draw_step(random, BATCH, self.plan.network.num_tokens, self.plan.objective, (0, 1, 2))
        assert draws.target_site is not None
        target, swapped = draws.target_site, draws.target_site[draws.partner]
        latents, restyled = (
            self.bank.restyle(self.scans[rows], self.site[rows], to) for to in (target, swapped)
        )
        return StepBatch(latents, target, restyled, swapped, rows), draws

    def groups(self) -> tuple[StepBatch, StepDraws]:
        """`GROUPS` patients, each with a public partner."""
        random = generator_of("small parameters", self.plan.seed, "groups")
        rows = torch.randperm(len(self.scans), generator=random)[:GROUPS]
        beside = torch.randperm(len(self.public), generator=random)[:GROUPS]
        tokens = self.plan.network.num_tokens
        draws = draw_step(random, 2 * GROUPS, tokens, self.plan.objective, (0, 1, 2), 2)
        assert draws.target_site is not None

        def seen(target: Tensor) -> Tensor:
            mine = self.bank.restyle(self.scans[rows], self.site[rows], target[::2])
            public_own = self.public_own.each(lambda values: values[beside])
            theirs = restyle_each(self.public[beside], public_own, self.bank, target[1::2])
            return torch.stack([mine, theirs], dim=1).flatten(0, 1)

        target, swapped = draws.target_site, draws.target_site[draws.partner]
        return StepBatch(seen(target), target, seen(swapped), swapped), draws

    def trained(self, which: str, rate: float, noise: float = 0.0) -> MeDUET:
        """After `STEPS` steps; `noise`: of a step, over its gradient."""
        student, parameters = self.student(which)
        teacher, random = Teacher(self.start), generator_of("noise", self.plan.seed, which, rate)
        optimiser = AdamW(decay_groups(parameters.values(), 0.01), lr=rate, betas=(0.9, 0.95))
        size = sum(p.numel() for p in parameters.values())
        for step in range(STEPS):
            loss = self.objective(student, teacher, *self.batch(step), 1.0).total
            gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
            known = {n: g for n, g in zip(parameters, gradients, strict=True) if g is not None}
            deviation = noise * joint_norm(known) / math.sqrt(size)
            for name, gradient in known.items():
                drawn = torch.randn(gradient.shape, generator=random) if noise else 0.0
                parameters[name].grad = gradient + deviation * drawn
            nn.utils.clip_grad_norm_(parameters.values(), 1.0)
            for group in optimiser.param_groups:
                group["lr"] = rate * (0.1 + 0.9 * (1 - step / STEPS))
            optimiser.step()
            optimiser.zero_grad()
        return student.eval()

    def agreed(self, which: str) -> float:
        """The share of a step's gradient, in length, that is the mean of all patients' (unbiased)."""
        student, parameters = self.student(which)
        teacher, each = Teacher(self.start), []
        for step in range(1000, 1008):
            loss = self.objective(student, teacher, *self.batch(step), 1.0).total
            gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
            each.append(torch.cat([g.flatten() for g in gradients if g is not None]))
        return _mean_length(torch.stack(each)) / float(torch.stack(each).square().sum(1).mean().sqrt())

    def signal(self, which: str) -> float:
        """Length of the mean of clipped gradients of groups over the bound, and over √parameters."""
        student, parameters = self.student(which)
        batch, draws = self.groups()
        with GroupGradients(student, list(parameters), GROUPS, 2) as watched:
            self.objective(student, Teacher(self.start), batch, draws, 1.0, 2).total.backward()
        each = torch.cat([g.flatten(1) for g in watched.gradients().values()], dim=1)
        lengths = each.norm(dim=1)
        clipped = each * (lengths.median() / lengths).clamp(max=1.0)[:, None]
        return _mean_length(clipped) / float(lengths.median()) / math.sqrt(each.shape[1])

    def error(self, model: MeDUET, split: str) -> float:
        """Reconstruction error of a split's scans, as `simulations/evaluation.py` has it."""
        held, errors = self.held[split], []
        for site, shown in enumerate(self.shown):
            source = held.latents[held.rows(site)]
            rebuilt = swap(model, source, mean_style(model, shown))
            errors.append(float((rebuilt - source).square().mean() / source.var()))
        return sum(errors) / len(errors)

    def content(self, model: MeDUET) -> str:
        """What is read of anatomy from content, of test scans."""
        held, (learn, test) = self.held["test"], self.labelled
        tokens = model.erased(encode_all(model, held.latents).content).flatten(1)
        volumes = [i for i, name in enumerate(held.anatomy_names) if name.startswith("volume_")]
        read = anatomy_probe(tokens, held.anatomy[:, volumes], held.patient, self.plan.seed)
        rows = evaluate_downstream(model, learn, learn.rows([]), {"test": test}, self.downstream, 0).rows
        (dice,) = [row.value for row in rows if row.metric == "dice"]
        return f"anatomy {float(read.nanmean()):.3f}, Dice {dice:.4f}"

    def best(self, which: str, rates: tuple[float, ...], noise: float = 0.0) -> tuple[float, MeDUET]:
        """The rate that validation scans like best, and its network."""
        tried = [(rate, self.trained(which, rate, noise)) for rate in rates]
        return min(tried, key=lambda each: self.error(each[1], "validation"))


def _mean_length(rows: Tensor) -> float:
    """Length of the mean that these vectors are drawn around, without what chance adds to it."""
    products = float(rows.sum(0).square().sum() - rows.square().sum())
    return math.sqrt(max(0.0, products) / (len(rows) * (len(rows) - 1)))


def multiplier(epsilon: float) -> float:
    """The noise multiplier of the plan, to one percent."""
    low, high = 0.3, 8.0
    while high / low > 1.01:
        middle = round(math.sqrt(low * high), 4)
        steps = Mechanism(noise_multiplier=middle, sampling_rate=RATE, steps=STEPS)
        low, high = (middle, high) if epsilon_of([steps], DELTA).upper > epsilon else (low, middle)
    return high


def main() -> None:
    """Print the tables."""
    torch.set_num_threads(1)
    began = time.process_time()
    given = [word for word in sys.argv[1:] if word.startswith("folder=") or word == "plans=true"]
    folders = [word.removeprefix("folder=") for word in given if word.startswith("folder=")]
    with tempfile.TemporaryDirectory() as temporary:
        folder = folders[0] if folders else temporary
        study = Study(folder, [word for word in sys.argv[1:] if word not in given])
        start, noise = study.error(study.start.eval(), "test"), {e: multiplier(e) for e in EPSILONS}
        print(f"{len(study.scans)} patients; test scans {len(study.held['test'].site)}; start {start:.4f}")
        print(f"noise multipliers {noise}; start: {study.content(study.start)}", flush=True)
        distance = math.nan
        for which in SETS:
            rate, model = study.best(which, RATES)
            error = study.error(model, "test")
            distance = start - error if which == "everything" else distance
            closed = (start - error) / distance
            numbers = sum(p.numel() for p in study.student(which)[1].values())
            print(
                f"{which}: {numbers} numbers, rate {rate:g}, error {error:.4f}, closes {closed:.2f}; "
                f"{study.content(model)}",
                flush=True,
            )
            signal = study.signal(which) * RATE * len(study.bank.sites)
            ratios = {f"{RATIO}": RATIO}
            for patients in PATIENTS:
                for epsilon, deviation in noise.items():
                    name = f"{patients} patients a site, epsilon {epsilon:g}"
                    ratios[name] = signal * patients / deviation
            holds = which != "everything" and closed >= 0.5
            for name, ratio in ratios.items():
                said = "not asked"
                if holds and (ratio == RATIO or "plans=true" in given):
                    slower, model = study.best(which, (rate / 4, rate), study.agreed(which) / ratio)
                    closed = (start - study.error(model, "test")) / distance
                    said = f"rate {slower:g}, closes {closed:.2f}; {study.content(model)}"
                print(f"  {name}: signal over noise {ratio:.3f}, {said}", flush=True)
        print(f"{time.process_time() - began:.0f} CPU s")


if __name__ == "__main__":
    main()
