"""A gradient turned back into scans: what a step of few scans would tell whoever sees it by itself.

The product lets no single step out; a round is many, from draws that a site's own secret makes. So this is
the strongest reader that there could be: he holds the gradient of one pair of training scans, taken at the
weights that everybody was sent, and looks for scans with the same gradient, by cosine distance, from noise.
He knows every draw of the step, as who had the site's secret would, or (`blind_inversion`) guesses them. Of
several starts the best is kept, by his own distance. Terms of the loss that need another site's style are
left out, and the teacher is the network itself.

What counts is how high a scan that was found ranks its patient among candidates: found is what guessing has
in one of forty cases at most; the error in decibels says little (reconstructions below the average scan's
name their patients). Three readers must lose: one with the average scan, one with another patient's scan, one
with a gradient of noise. Where the distance stayed large the search failed, which is no evidence of safety.

What this file does not do: attack a whole round (`update.py`).

Source: Geiping et al. 2020 (arXiv:2003.14053); identification: Hatamizadeh et al. 2023 (arXiv:2202.06924).

Axes: n = scans of the group, m = candidates' scans, c d h w = latents.
"""

import copy
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from audit.attacks.linkage import found_again, psnr
from audit.cohort import Cohort
from audit.evidence import Evidence, Release
from audit.findings import Finding, Picture
from audit.gallery import picture
from audit.statistics.intervals import ONE_SIDE, clopper_pearson
from federation.plan.plan import RunPlan
from meduet_models.meduet import MeDUET
from meduet_models.objective.objective import MeduetObjective, StepBatch, StepDraws, draw_step
from meduet_models.objective.teacher import Teacher
from meduet_models.tokenizer.tokenizer import Tokenizer

GROUP = 2
"""Scans behind the gradient: a pair, the least that the loss has."""
CONVERGED = 0.2
"""Cosine distance above which the search failed, and says nothing; so it did where it did not halve it."""
_RATE = 0.1
_WINDOW = 7
_GUESSED, _NOISE = 1_000, 2_000  # seeds apart from those of the known draws


@dataclass(frozen=True)
class Step:
    """A step of training as the reader repeats it: everything but the scans."""

    network: MeDUET
    objective: MeduetObjective
    teacher: Teacher
    site: int
    progress: float
    moved: tuple[str, ...]
    """Parameters whose gradient is told: those that travel."""

    @staticmethod
    def of(plan: RunPlan, network: MeDUET, site: int, round_number: int, moved: Sequence[str]) -> "Step":
        """The first step of a round at these weights."""
        weights = replace(plan.objective.weights, invariance=0.0, restyled_reconstruction=0.0)
        own = copy.deepcopy(network).requires_grad_(True)
        progress = (round_number - 1) / plan.training.rounds
        objective = MeduetObjective(replace(plan.objective, weights=weights))
        return Step(own, objective, Teacher(own), site, progress, tuple(moved))

    def draws(self, seed: int) -> StepDraws:
        """The choices of a step of this group."""
        generator = torch.Generator().manual_seed(seed)
        return draw_step(generator, GROUP, self.network.config.num_tokens, self.objective.config)

    def gradient(self, latents: Float[Tensor, "n c d h w"], draws: StepDraws, graph: bool = False) -> Tensor:
        """Of the loss by every parameter that travels, as one vector; `graph`: to go on from."""
        named = dict(self.network.named_parameters())
        batch = StepBatch(latents, torch.full((len(latents),), self.site))
        with sdpa_kernel(SDPBackend.MATH):  # the fused kernels have no second derivative
            loss = self.objective(self.network, self.teacher, batch, draws, self.progress).total
            slopes = torch.autograd.grad(
                loss, [named[name] for name in self.moved], create_graph=graph, materialize_grads=True
            )
        return torch.cat([slope.flatten() for slope in slopes])


@dataclass(frozen=True)
class Inverted:
    """What a search came to."""

    latents: Float[Tensor, "n c d h w"]
    distance: float
    """Cosine distance of its gradient to the one that was told."""
    began: float
    """The same where the search began."""

    @property
    def converged(self) -> bool:
        """Whether the search found what has nearly this gradient."""
        return self.distance <= min(CONVERGED, self.began / 2)


def invert(step: Step, told: Tensor, draws: StepDraws, iterations: int, seed: int) -> Inverted:
    """Search once, from noise on the latents' scale."""
    network = step.network
    shape = (GROUP, network.config.latent_channels, *network.config.latent_grid)
    z = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).requires_grad_(True)
    optimiser = torch.optim.Adam([z], lr=_RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, iterations, _RATE / 20)
    best = Inverted(_latents(network, z.detach()), 2.0, 2.0)
    for step_number in range(iterations):
        latents = _latents(network, z)
        own = step.gradient(latents, draws, graph=True)
        distance = 1 - torch.nn.functional.cosine_similarity(own, told, dim=0)
        if (reached := float(distance.detach())) < best.distance:
            began = reached if step_number == 0 else best.began
            best = Inverted(latents.detach().clone(), reached, began)
        (z.grad,) = torch.autograd.grad(distance, [z])
        optimiser.step()
        schedule.step()
    return best


def best_of(step: Step, told: Tensor, draws: Sequence[StepDraws], iterations: int, seed: int = 0) -> Inverted:
    """The best of as many starts as there are draws to try, by the reader's own distance."""
    tried = [invert(step, told, one, iterations, seed + start) for start, one in enumerate(draws)]
    return min(tried, key=lambda one: one.distance)


@dataclass(frozen=True)
class Named:
    """Reconstructions held against the candidates."""

    ranks: tuple[int, ...]
    """Place of each true scan's patient among candidates, by similarity to its reconstruction; 1: named."""
    decibels: float
    """Of the latents, to the truth; the peak is the spread of all candidates' values."""

    @property
    def hits(self) -> int:
        """How many are named."""
        return sum(rank == 1 for rank in self.ranks)

    @property
    def said(self) -> str:
        """The ranks."""
        return ", ".join(map(str, self.ranks))

    def by_guessing(self, others: int) -> float:
        """How often guesses among so many rank as well: a sum of ranks as small, for the best matching."""
        sums = np.ones(1)
        for _ in self.ranks:
            sums = np.convolve(sums, np.full(others, 1 / others))  # sums[k]: of ranks that add up to k more
        at_most = float(sums[: sum(self.ranks) - len(self.ranks) + 1].sum())
        return min(1.0, math.factorial(len(self.ranks)) * at_most)


def named(made: Float[Tensor, "n c d h w"], rows: Sequence[int], cohort: Cohort) -> Named:
    """Match reconstructions to the group's scans, and rank each one's patient among all candidates."""
    similar = found_again(made, cohort.latents).numpy()  # n m
    mine, theirs = linear_sum_assignment(-similar[:, list(rows)])
    people, ranks = np.array(cohort.patients), []
    for one, place in zip(mine, theirs, strict=True):
        person = people[rows[place]]
        best = {name: similar[one][people == name].max() for name in cohort.people}
        ranks.append(1 + sum(bool(value > best[person]) for value in best.values()))
    truth = cohort.latents[[rows[place] for place in theirs]]
    return Named(tuple(ranks), _decibels(made[torch.from_numpy(mine)], truth, cohort))


def attack_gradient(
    evidence: Evidence, release: Release, iterations: int, restarts: int
) -> Iterator[Finding]:
    """The gradient of one pair of a site's training scans, at the weights that this round was sent with."""
    networks, cohort = evidence.before_after(release), evidence.cohorts.get(release.site)
    if networks is None or cohort is None or not isinstance(networks[0], MeDUET):
        return
    if release.site not in evidence.plan.sites:  # the pooled baseline: no site's label is everybody's
        return
    rows = [cohort.rows(name)[0] for name, took in zip(cohort.people, cohort.member, strict=True) if took]
    if len(rows) < GROUP:
        return
    rows = [rows[int(n)] for n in np.random.default_rng(0).permutation(len(rows))[:GROUP]]
    then, now = (dict(network.named_parameters()) for network in networks)
    moved = [name for name in then if not torch.equal(then[name], now[name])]
    site = evidence.plan.sites.index(release.site)
    step = Step.of(evidence.plan, networks[0], site, release.round, moved)
    known = step.draws(seed=release.round)
    told = step.gradient(cohort.latents[rows], known).detach()
    noise = torch.randn(told.shape, generator=torch.Generator().manual_seed(_NOISE))
    lost = named(best_of(step, noise, [known], iterations).latents, rows, cohort)
    guesses = [step.draws(_GUESSED + start) for start in range(restarts)]
    for attack, draws in (("inversion", [known] * restarts), ("blind_inversion", guesses)):
        began = time.process_time()
        found = best_of(step, told, draws, iterations)
        yield _finding(release, attack, found, rows, cohort, lost, evidence.tokenizer, began)


def _finding(
    release: Release,
    attack: str,
    found: Inverted,
    rows: Sequence[int],
    cohort: Cohort,
    by_noise: Named,
    tokenizer: Tokenizer | None,
    began: float,
) -> Finding:
    own = named(found.latents, rows, cohort)
    others = len(cohort.people)
    low, high = clopper_pearson(own.hits, GROUP)
    luck = own.by_guessing(others)
    truth = cohort.latents[list(rows)]
    average = _decibels(cohort.latents.mean(0, keepdim=True).expand_as(truth), truth, cohort)
    nearest = _decibels(_nearest_other(rows, cohort), truth, cohort)
    who = "who knows every draw of the step" if attack == "inversion" else "who guesses the draws"
    seen, pictures = "", tuple[Picture, ...]()
    if tokenizer is not None:
        seen, shown = _seen(found, rows, cohort, tokenizer)
        pictures = (shown,)
    sentence = (
        f"Round {release.round}: a reader {who} turns the gradient of {GROUP} training scans of "
        f"{release.site} back: distance {found.distance:.2f}, {own.hits} of {GROUP} patients named among "
        f"{others} (ranks {own.said}, which guessing has in {luck:.1%} of cases; from a gradient of noise "
        f"ranks {by_noise.said}). Latents to {own.decibels:.1f} dB; the average scan {average:.1f}, the most "
        f"similar other patient {nearest:.1f}.{seen}"
    )
    works = luck < ONE_SIDE and luck < by_noise.by_guessing(others)
    if not works and not found.converged:
        sentence += " Inconclusive: the search did not converge, which is no evidence of safety."
    return Finding(
        artefact=release.artefact,
        attack=attack,
        measure="share named",
        n_in=GROUP,
        n_out=others - GROUP,
        value=own.hits / GROUP,
        low=low,
        high=high,
        baseline=by_noise.hits / GROUP,
        verdict="found" if works else "not found" if found.converged else "under-powered",
        sentence=sentence,
        pictures=pictures,
        seconds=time.process_time() - began,
    )


def _seen(found: Inverted, rows: Sequence[int], cohort: Cohort, tokenizer: Tokenizer) -> tuple[str, Picture]:
    """How alike the decoded volumes are, and what they look like."""
    from monai.metrics.regression import SSIMMetric  # takes seconds to import

    shown = (cohort.latents[list(rows)], found.latents, _nearest_other(rows, cohort))
    truth, made, other = (tokenizer.decode(one).clamp(0, 1) for one in shown)
    alike = SSIMMetric(spatial_dims=3, data_range=1.0, win_size=_WINDOW)(made, truth).mean()
    said = f" Decoded: {float(psnr(made, truth).mean()):.1f} dB, SSIM {float(alike):.2f}."
    caption = f"{GROUP} training scans; what was made of their gradient; the most similar other patient's."
    return said, picture(caption, [truth, made, other])


def _nearest_other(rows: Sequence[int], cohort: Cohort) -> Tensor:
    """Of each scan the nearest scan of another patient."""
    flat, chosen = cohort.latents.flatten(1), []
    for row in rows:
        far = (flat - flat[row]).norm(dim=1)
        far[[n for n, name in enumerate(cohort.patients) if name == cohort.patients[row]]] = torch.inf
        chosen.append(int(far.argmin()))
    return cohort.latents[chosen]


def _decibels(made: Tensor, truth: Tensor, cohort: Cohort) -> float:
    """Peak signal to noise of latents; the peak is the spread of four deviations of each channel."""
    peak = 4 * cohort.latents.std((0, 2, 3, 4)).reshape(1, -1, 1, 1, 1)
    error = ((made - truth) / peak).square().flatten(1).mean(1)
    return float((-10 * error.clamp(min=1e-12).log10()).mean())


def _latents(network: MeDUET, z: Tensor) -> Tensor:
    return z * network.latent_deviation.reshape(-1, 1, 1, 1) + network.latent_mean
