"""Harmonisation: a scan's latents as another site's scanner would have made them.

Three ways. `sample`: new noise, the scan's content, the site's style; anatomy is what content tells.
`invert`: the scan's own noise, found by running the same equation backwards with its own content and style,
then forward with the site's style: what neither tells stays. `restyle`: the bank's statistics alone, no
network; the cheap baseline.

The scan's own style is that of its site's bank entry where the site is named, else its own statistics. Only
style changes: whatever else the model is told (body part, spacing) stays the scan's. What this file does not
do: read, encode or decode a scan.

Axes: b = scans, c d h w = raw latents.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from meduet_models.diffusion.artefact import GenerativeModel
from meduet_models.diffusion.conditioner import entries_of_scans
from meduet_models.diffusion.conditions import UNKNOWN, Conditions, Examples
from meduet_models.diffusion.sampling import SamplingSettings, invert, sample
from meduet_models.diffusion.whole_scans import invert_whole, sample_whole
from meduet_models.style.bank import StyleBank
from meduet_models.style.moments import StyleEntry, restyle
from meduet_models.windows import Windows

Method = Literal["sample", "invert", "restyle"]


@dataclass(frozen=True, kw_only=True)
class HarmonisationSettings:
    """How scans are moved to a site's style."""

    style: str
    """Site of the target style."""
    own_style: str = ""
    """Site that made the scans; empty: each scan's own statistics say how it looks (`invert`, `restyle`)."""
    method: Method = "sample"
    """Way to it."""
    body_part: str = ""
    """Body part of the scans, where the model's bank tells them apart or the model is told it."""
    sampling: SamplingSettings = dataclasses.field(default_factory=SamplingSettings)
    """Steps, solver, guidance (`sample`, `invert`)."""
    seed: int = 0
    """Of the noise (`sample`); the same for every scan, so that none depends on who else is asked for."""


def check(model: GenerativeModel, settings: HarmonisationSettings) -> None:
    """Raise `ValueError`, in one line, when the model cannot do what is asked."""
    site_style(model, settings.style, settings.body_part)
    if settings.own_style:
        if settings.method == "sample":
            raise ValueError("--own-style has no effect with --method sample: content carries no style.")
        site_style(model, settings.own_style, settings.body_part)
    names = model.transformer.config.sizes.names
    for name in settings.sampling.guidance:
        if (
            name not in names
            or name not in ("content", "style", "body_part")[: 3 if settings.body_part else 2]
        ):
            raise ValueError(
                f"--guidance {name} has no effect: harmonisation does not tell this model {name}."
            )
    if settings.method != "restyle":
        for name in ("content", "style"):
            if name not in names:
                raise ValueError(
                    f"Expected a model that is told {name}; this one is told "
                    f"{', '.join(names) or 'nothing'}. --method restyle needs neither."
                )


def site_style(model: GenerativeModel, site: str, body_part: str = "") -> StyleEntry:
    """The bank's style of a site (and body part), without leading axes.

    Raises `ValueError` listing the styles there are, or the body parts.
    """
    style_bank = _bank(model)
    if site not in style_bank.present:
        raise ValueError(
            f"Expected a site whose style the model holds ({', '.join(style_bank.present)}); got {site!r}."
        )
    part = body_part_index(model, body_part)
    if style_bank.count.shape[1] > 1 and part == UNKNOWN:
        raise ValueError(f"Expected --body-part, one of {', '.join(model.body_parts)}: styles differ by it.")
    entry = style_bank.entry(torch.tensor([style_bank.sites.index(site)]), torch.tensor([max(part, 0)]))
    return entry.each(lambda values: values[0])


def body_part_index(model: GenerativeModel, body_part: str) -> int:
    """Place of a body part among the model's; -1 where none is named; `ValueError` for an unknown one."""
    if not body_part:
        return UNKNOWN
    if body_part not in model.body_parts:
        known = ", ".join(model.body_parts) or "none"
        raise ValueError(f"Expected a body part that the model knows ({known}); got {body_part!r}.")
    return model.body_parts.index(body_part)


def harmonise(
    model: GenerativeModel,
    latents: Float[Tensor, "b c d h w"],
    settings: HarmonisationSettings,
    spacing_mm: Float[Tensor, "b 3"] | None = None,
    on_step: Callable[[int, int], None] = lambda done, total: None,
) -> Float[Tensor, "b c d h w"]:
    """These scans in the style of `settings.style`, raw latents on the CPU.

    `spacing_mm`: of the scans before resampling, where it is known. `on_step(done, total)` counts steps, back
    and forth. Raises `ValueError` as `check` does.
    """
    check(model, settings)
    target = site_style(model, settings.style, settings.body_part)
    if settings.method == "restyle":
        return restyle(latents, _own(model, latents, settings), target)
    conditioner, steps = model.conditioner, settings.sampling.steps
    target_codes = conditioner.style_of(target).expand(len(latents), -1)
    seen = _told(model, latents, settings, spacing_mm, target_codes)
    if settings.method == "sample":
        return sample(
            model.transformer, seen, len(latents), settings.sampling, seed=settings.seed,
            on_step=lambda done, total: on_step(done, steps),
        ).cpu()  # fmt: skip
    own = conditioner.style_of(_own(model, latents, settings))
    mine = _told(model, latents, settings, spacing_mm, own)
    noise = invert(
        model.transformer, latents, mine, settings.sampling,
        on_step=lambda done, total: on_step(done, 2 * steps),
    )  # fmt: skip
    return sample(
        model.transformer, seen, len(latents), settings.sampling, seed=settings.seed, noise=noise,
        on_step=lambda done, total: on_step(steps + done, 2 * steps),
    ).cpu()  # fmt: skip


def harmonise_whole(
    model: GenerativeModel,
    latents: Float[Tensor, "c d h w"],
    foreground: Bool[Tensor, "d h w"],
    settings: HarmonisationSettings,
    spacing_mm: Float[Tensor, "3"] | None = None,
    on_step: Callable[[int, int], None] = lambda done, total: None,
) -> Float[Tensor, "c d h w"]:
    """One whole scan in the style of `settings.style`, as `harmonise` does crops, by windows of the model's
    grid that are blended (`whole_scans.py`). The scan's own style is that of its foreground.

    Raises `ValueError` as `check` does, and for a model of registered crops.
    """
    check(model, settings)
    target = site_style(model, settings.style, settings.body_part)
    seen = latents[:, foreground][None, :, :, None, None]
    if settings.method == "restyle":
        return restyle(latents[None], _own(model, seen, settings), target)[0]
    grid = model.transformer.config.latent_grid
    windows = Windows.over(tuple(latents.shape[1:]), grid)
    parts = windows.cut(latents, range(len(windows)))
    spacing = None if spacing_mm is None else spacing_mm.expand(len(windows), -1)
    conditioner, steps = model.conditioner, settings.sampling.steps
    codes = conditioner.style_of(target).expand(len(windows), -1)
    told = _told(model, parts, settings, spacing, codes)
    if settings.method == "sample":
        return sample_whole(
            model.transformer, told, windows, settings.sampling, seed=settings.seed,
            on_step=lambda done: on_step(done, steps),
        )  # fmt: skip
    own = conditioner.style_of(_own(model, seen, settings)).expand(len(windows), -1)
    noise = invert_whole(
        model.transformer, latents, _told(model, parts, settings, spacing, own), windows, settings.sampling,
        on_step=lambda done: on_step(done, 2 * steps),
    )  # fmt: skip
    return sample_whole(
        model.transformer, told, windows, settings.sampling, seed=settings.seed, noise=noise,
        on_step=lambda done: on_step(steps + done, 2 * steps),
    )  # fmt: skip


def _bank(model: GenerativeModel) -> StyleBank:
    if model.bank is None or not model.bank.present:
        raise ValueError("Expected a model with sites' styles; this one was trained without a style bank.")
    return model.bank


def _own(model: GenerativeModel, latents: Tensor, settings: HarmonisationSettings) -> StyleEntry:
    """How the scans look before: their site's entry, or each scan's own; one per scan."""
    if settings.own_style:
        entry = site_style(model, settings.own_style, settings.body_part)
        return entry.each(lambda values: values.expand(len(latents), *values.shape))
    coarse = _bank(model).entries.map
    grid = None if coarse is None else (coarse.shape[-3], coarse.shape[-2], coarse.shape[-1])
    return entries_of_scans(latents, grid)


def _told(
    model: GenerativeModel,
    latents: Tensor,
    settings: HarmonisationSettings,
    spacing_mm: Tensor | None,
    style_codes: Tensor,
) -> Conditions:
    count = len(latents)
    part = body_part_index(model, settings.body_part)
    examples = Examples(
        latents=latents,
        site=torch.full((count,), model.sites.index(settings.style)),
        body_part=torch.full((count,), part),
        spacing=torch.full((count, 3), torch.nan) if spacing_mm is None else spacing_mm,
        category=torch.full((count,), UNKNOWN),
    )
    return model.conditioner.conditions(examples, model.transformer.config.sizes.names, style_codes)
