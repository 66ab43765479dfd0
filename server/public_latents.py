"""Latents of nobody, for the axes of the content code: phantoms of the centre, in the sites' styles.

Phantoms are deformed pieces of the public brain template about the middle of the field of view, on the plan's
grid, imaged in random ways (`server/tokenizer/random_phantoms.py`), and encoded with the plan's tokenizer
where that is a shipped one. The centre needs no other tokenizer: then, smooth random fields with the latents'
own centre and deviation stand in for them (what that costs: docs/log.md). Which it is, and each draw, follows
from the plan, so that a run that is resumed gets the same axes.

What this file does not do: read a scan, or fit the axes (`meduet_models/content_code.py`).

Axes: m = phantoms, c d h w = latents.
"""

import dataclasses
import functools
import logging
import operator
from collections.abc import Callable
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from federation.exchanges.survey import survey_layout
from federation.plan.plan import RunPlan
from meduet_models.seeds import generator_of
from meduet_models.style.bank import StyleBank
from meduet_models.style.moments import StyleMoments, restyle
from meduet_models.threads import fixed_threads
from meduet_models.tokenizer.linear_decoder import NeighbourMoments
from meduet_models.tokenizer.patch_pca import to_patches
from meduet_models.tokenizer.tokenizer import Tokenizer, load_tokenizer_file, shipped_tokenizer
from server.tokenizer.random_phantoms import Recipe, draw_recipe, make_phantom

PER_NUMBER = 2
"""Phantoms for each number of the code."""
_AT_ONCE, _IN_PICTURE = 8, 32
_log = logging.getLogger(__name__)
_SHIFT, _TURN, _ZOOM, _WARP_MM = 0.08, 0.1, 0.07, 6.0
"""Deviations of a phantom's place (share of half the template), turn (radians) and size (its logarithm)."""
_FIELDS = ((3, 1.0), (5, 0.7), (9, 0.5))
"""Cells per axis and weight of the noises that a random field is the sum of."""
_UNBOUNDED = 1e9


def public_latents(
    plan: RunPlan,
    centre: Float[Tensor, "c d h w"],
    deviation: Float[Tensor, " c"],
    path: Path | None = None,
) -> Float[Tensor, "m c d h w"]:
    """Latents of phantoms, or random fields about `centre` with `deviation` per channel. `path`: of the
    plan's tokenizer, which an application that travels does not carry; none: the package's."""
    draws = generator_of("public latents", plan.seed)
    tokenizer = plans_tokenizer(plan, path)
    if tokenizer is None:
        _log.warning("The plan's tokenizer is not at hand: random fields stand in for phantoms.")
        return centre + deviation[:, None, None, None] * _random_fields(plan, draws)
    return phantom_latents(plan, tokenizer, PER_NUMBER * plan.network.code_size, draws)


def phantom_latents(
    plan: RunPlan,
    tokenizer: Tokenizer,
    number: int,
    draws: torch.Generator,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Float[Tensor, "m c d h w"]:
    """So many phantoms, and up to seven more: whole batches of eight are drawn. `progress`: phantoms done,
    phantoms in all."""
    encoded = []
    for done in range(0, number, _AT_ONCE):
        progress(done, number)
        encoded.append(tokenizer.encode(_phantoms(plan, draws)))
    return torch.cat(encoded)


@torch.no_grad()
def picture_moments(plan: RunPlan, tokenizer: Tokenizer) -> NeighbourMoments:
    """What the picture that a U-Net sees in latents is fitted to: phantoms of the plan's seed and their
    latents; the same bits whatever the number of threads."""
    draws, moments = generator_of("picture", plan.seed), []
    with fixed_threads(1):
        for _ in range(0, _IN_PICTURE, _AT_ONCE):
            volumes = _phantoms(plan, draws)
            moments.append(NeighbourMoments.of(tokenizer.encode(volumes), to_patches(volumes)))
    return functools.reduce(operator.add, moments)


def _phantoms(plan: RunPlan, draws: torch.Generator) -> Float[Tensor, "8 1 D H W"]:
    recipes = [_posed(draw_recipe(draws), plan, draws) for _ in range(_AT_ONCE)]
    return torch.stack([make_phantom(recipe, plan.volumes.shape) for recipe in recipes])


def restyled(
    latents: Float[Tensor, "m c d h w"], plan: RunPlan, style_bank: StyleBank | None
) -> Float[Tensor, "m c d h w"]:
    """Public latents in the styles that the bank holds, by turns; as they are where it holds none."""
    present = None if style_bank is None else (style_bank.count > 0).nonzero()  # site and body part
    if style_bank is None or present is None or not len(present):
        return latents
    layout = dataclasses.replace(survey_layout(plan), parts=1, centre=False, bound=_UNBOUNDED)
    own = StyleMoments.of(latents, [str(i) for i in range(len(latents))], layout).entry()
    chosen = present[torch.arange(len(latents)) % len(present)]
    return restyle(latents, own, style_bank.entry(chosen[:, 0], chosen[:, 1]))


def plans_tokenizer(plan: RunPlan, path: Path | None) -> Tokenizer | None:
    """The plan's tokenizer, if it is the one in the file, or one of those in the package."""
    path = path or shipped_tokenizer(plan.network.latent_channels)
    tokenizer = load_tokenizer_file(path) if path.exists() else None
    return None if tokenizer is None or tokenizer.sha256 != plan.tokenizer_sha256 else tokenizer


def _posed(recipe: Recipe, plan: RunPlan, draws: torch.Generator) -> Recipe:
    """The recipe with anatomy about the middle of the field of view, upright, at the plan's voxel size."""
    turn = _TURN * torch.randn(3, 3, generator=draws)
    zoom = float(torch.exp(_ZOOM * torch.randn((), generator=draws)))
    rotation = torch.matrix_exp(turn - turn.T)
    return dataclasses.replace(
        recipe,
        anatomy=True,
        centre=tuple((_SHIFT * torch.randn(3, generator=draws)).tolist()),
        rotation=tuple(tuple(row) for row in rotation.tolist()),
        spacing_mm=tuple(zoom * mm for mm in plan.volumes.spacing_mm),
        warp_mm=_WARP_MM,
        slice_factor=(1, 1, 1),
    )


def _random_fields(plan: RunPlan, draws: torch.Generator) -> Float[Tensor, "m c d h w"]:
    """Smooth random fields of about unit deviation."""
    network = plan.network
    shape = (PER_NUMBER * network.code_size, network.latent_channels, *network.latent_grid)
    fields = torch.zeros(shape)
    for cells, weight in _FIELDS:
        noise = torch.randn(*shape[:2], cells, cells, cells, generator=draws)
        fields += weight * F.interpolate(noise, network.latent_grid, mode="trilinear", align_corners=True)
    return fields
