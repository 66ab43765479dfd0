"""Samples for a generative model's evaluation: told content and style, one of them, or nothing.

A request says what is told to each sample; `Sampler` draws it. Contents are those of held-out scans, which
trained nothing; sites' styles are those of the model's bank. What this file does not do: measure
(`generation_quality.py`, `generation_controls.py`), draw (`generation_figures.py`).

Axes: b = samples, s = numbers in a style code, c d h w = latents.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from meduet_models.diffusion.artefact import GenerativeModel
from meduet_models.diffusion.conditions import UNKNOWN, Condition, Conditions, Examples
from meduet_models.diffusion.sampling import SamplingSettings, Solver, sample
from meduet_models.seeds import seed_of
from simulations.hospitals.held_out import Held

Progress = Callable[[str, int, int], None]
"""What is done, how much of it, of how much."""

OWN, OTHER, CONTENT, STYLE, NOTHING = (
    "content, own style",
    "content, other style",
    "content",
    "style",
    "nothing",
)
"""What samples can be told, in words."""


@dataclass(frozen=True)
class Request:
    """What each sample is told."""

    told: str
    """In words: one of the five above."""
    conditions: Conditions
    """The same, as the transformer reads it."""
    rows: tuple[int, ...]
    """Held-out scan whose content each sample has; empty: no content is told."""
    sites: tuple[int, ...]
    """Site whose style each sample is asked to have; empty: none is asked."""
    patient: tuple[str, ...]
    """What intervals resample: the patient of the content, or the sample itself."""

    def __len__(self) -> int:
        """Samples."""
        return len(self.patient)


def usable_rows(model: GenerativeModel, held: Held) -> list[int]:
    """Rows of held-out scans of the model's sites, site after site, other patients first wherever scanners
    share them.

    Raises `ValueError` when there is none.
    """
    sites = sorted(set(held.site) & set(range(len(model.sites))))
    if not sites:
        raise ValueError(
            f"Expected held-out scans of the model's sites ({', '.join(model.sites)}); there is none."
        )
    by_site = []
    for place, site in enumerate(sites):
        own = held.rows(site)
        turn = place * len(own) // len(sites)
        by_site.append(own[turn:] + own[:turn])
    longest = max(len(own) for own in by_site)
    return [own[i] for i in range(longest) for own in by_site if i < len(own)]


def site_codes(model: GenerativeModel, sites: Sequence[int]) -> Float[Tensor, "b s"]:
    """Style codes of these sites, from the bank. Raises `ValueError` where it has none."""
    if model.bank is None:
        raise ValueError("Expected a model with sites' styles; its plan exchanged none.")
    return model.conditioner.style_of(model.bank.entry(torch.tensor(list(sites))))


def styled_sites(model: GenerativeModel) -> list[int]:
    """Sites whose style the bank knows; none without a bank, or with several body parts in it, where a
    site's style is not one."""
    if model.bank is None or model.bank.count.shape[1] > 1:
        return []
    return [model.sites.index(site) for site in model.bank.present if site in model.sites]


def requests(model: GenerativeModel, held: Held, count: int) -> dict[str, Request]:
    """What this model can be told, by name; `count` samples of each, fewer where fewer scans are held out."""
    names = model.transformer.config.sizes.names
    rows = usable_rows(model, held)[:count]
    latents, patient = held.latents[rows], tuple(held.patient[row] for row in rows)
    own, known = [held.site[row] for row in rows], styled_sites(model)
    alone = tuple(f"sample {i}" for i in range(count))
    by_kind: dict[str, Request] = {}
    if "content" in names and "style" in names:
        both = told_of(model, latents, ("content", "style"))
        by_kind[OWN] = Request(OWN, both, tuple(rows), tuple(own), patient)
        if len(known) > 1:
            asked = [_next(site, known) for site in own]
            other = told_of(model, latents, ("content", "style"), site_codes(model, asked))
            by_kind[OTHER] = Request(OTHER, other, tuple(rows), tuple(asked), patient)
    if "content" in names:
        by_kind[CONTENT] = Request(CONTENT, told_of(model, latents, ("content",)), tuple(rows), (), patient)
    if "style" in names and known:
        asked = [known[i % len(known)] for i in range(count)]
        by_kind[STYLE] = Request(STYLE, Conditions(style=site_codes(model, asked)), (), tuple(asked), alone)
    by_kind[NOTHING] = Request(NOTHING, Conditions(), (), (), alone)
    return by_kind


def told_of(
    model: GenerativeModel,
    latents: Float[Tensor, "b c d h w"],
    names: Sequence[Condition],
    codes: Float[Tensor, "b s"] | None = None,
) -> Conditions:
    """The conditions of these scans; nothing but content and style is known of them."""
    count = len(latents)
    unknown = torch.full((count,), UNKNOWN)
    examples = Examples(
        latents=latents,
        site=unknown,
        body_part=unknown,
        spacing=torch.full((count, 3), torch.nan),
        category=unknown,
    )
    return model.conditioner.conditions(examples, names, codes)


class Sampler:
    """Draws requests from one model with one set of settings; keeps how long it took."""

    def __init__(
        self,
        model: GenerativeModel,
        *,
        steps: int,
        solver: Solver,
        guidance: dict[Condition, float],
        seed: int,
        progress: Progress,
    ) -> None:
        self._model, self._seed, self._progress = model, seed, progress
        self._steps, self._solver, self._guidance = steps, solver, guidance
        self.seconds = 0.0
        """Wall time spent sampling."""
        self.drawn = 0
        """Samples drawn."""

    def draw(
        self,
        request: Request,
        what: str,
        *,
        steps: int | None = None,
        noise: Float[Tensor, "b c d h w"] | None = None,
    ) -> Float[Tensor, "b c d h w"]:
        """Raw latents of a request; `what` names the draw: another name, other noise."""
        began = time.perf_counter()
        guided = {name for name in self._guidance if getattr(request.conditions, name) is not None}
        settings = SamplingSettings(
            steps=steps or self._steps,
            solver=self._solver,
            guidance={name: weight for name, weight in self._guidance.items() if name in guided},
        )
        latents = sample(
            self._model.transformer,
            request.conditions,
            len(request),
            settings,
            seed=seed_of("fedmeduet evaluation samples", self._seed, what),
            on_step=lambda done, total: self._progress(f"sampling, {what}", done, total),
            noise=noise,
        )
        self.seconds += time.perf_counter() - began
        self.drawn += len(latents)
        return latents


def _next(site: int, known: Sequence[int]) -> int:
    """The next site after this one that has a style."""
    return next((other for other in known if other > site), known[0])
