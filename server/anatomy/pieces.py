"""Pieces of public anatomy with their answers: what a voxel of a random picture of the template is.

A piece is a random, deformed part of the ICBM 152 template (inside nilearn; no scan of a patient), rendered
once in a random contrast, and for each cube of two voxels per edge its answers: where in the template it
lies, what the template shows there, and whether a border runs through it. Left and right have the same
answer. Random shapes without any template have a border and the intensity that they would have without bias,
blur, texture and noise; they are a part of every start, and all of the control that shows what anatomy adds.

Does not do: train (`training.py`), or pretend to be patients at hospitals (`simulations/`). The rendering is
that of the tokenizer's phantoms (`server/tokenizer/random_phantoms.py`), orientations are those of scans that
were laid into RAS.

Axes: b = pieces, a = answers, D H W = voxels, d h w = cubes of two voxels per edge.
Source: SynthSeg (doi:10.1016/j.media.2023.102789) for renderings; Brain-ID (arXiv:2311.16914) for predicting
the template from them.
"""

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from meduet_models.anatomy_start import AnatomyKind
from meduet_models.seeds import generator_of
from server.tokenizer.random_phantoms import (
    Recipe,
    brain_of,
    draw_recipe,
    draw_shapes,
    imaged,
    intensities_of,
    largest,
    sample_template,
    template,
    template_points,
    with_brain,
)

ANSWERS = ("x_distance", "y", "z", "t1", "grey", "white", "clean", "border")
"""`x_distance`, `y`, `z`: in `UNIT_MM` from the middle of the template, the first from its midplane. `t1`,
`grey`, `white`: of the template. `clean`: a shape's own intensity. `border`: share of the cube's voxels at
one.
"""
UNIT_MM = 50.0
PIECE_SHAPE = (32, 40, 32)
SHAPES_SHARE = 0.2
"""Of pieces that are shapes alone, in a start from anatomy."""
_CUBE = 2
_NOISE = (0.003, 0.08)  # deviation, log-uniform
_TILT = np.deg2rad(20.0)
_SPACING_MM = (0.7, 2.6)


@dataclass(frozen=True)
class Pieces:
    """Renderings and their answers."""

    volumes: Tensor
    """Float32 [b 1 D H W] in [0, 1]."""
    answers: Tensor
    """Float32 [b a d h w], in the order of `ANSWERS`."""
    known: Tensor
    """Bool [b a d h w]: where there is an answer."""


def draw_pieces(
    kind: AnatomyKind,
    count: int,
    *words: object,
    shape: tuple[int, int, int] = PIECE_SHAPE,
) -> Pieces:
    """`count` pieces that follow from `kind` and `words` (a seed, a step) alone."""
    generator = generator_of("fedmeduet anatomy", *words)
    made = [make_piece(draw_piece(kind, generator), shape) for _ in range(count)]
    volumes, answers, known = (torch.stack(parts) for parts in zip(*made, strict=True))
    low, high = _NOISE
    deviation = low * (high / low) ** torch.rand(count, 1, 1, 1, 1, generator=generator)
    noisy = volumes + deviation * torch.randn(volumes.shape, generator=generator)
    return Pieces(noisy.clamp(0.0, 1.0), answers, known)


def draw_piece(kind: AnatomyKind, generator: torch.Generator) -> Recipe:
    """A recipe of the tokenizer's phantoms, lying about as a scan in RAS does."""
    recipe = draw_recipe(generator)
    uniform = torch.rand(8, generator=generator, dtype=torch.float64).tolist()
    tilt = (2 * torch.rand(3, generator=generator, dtype=torch.float64) - 1) * _TILT
    low, high = _SPACING_MM
    spacing = low * (high / low) ** uniform[0]
    return replace(
        recipe,
        anatomy=kind == "canonical" and uniform[1] >= SHAPES_SHARE,
        centre=tuple(-0.55 + 1.1 * place for place in uniform[2:5]),
        rotation=_turn(tilt.tolist(), mirrored=uniform[5] < 0.5),
        spacing_mm=tuple(spacing * (0.85 + 0.3 * stretch) for stretch in (uniform[6], uniform[7], 0.5)),
    )


def make_piece(recipe: Recipe, shape: tuple[int, int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """Rendering without noise [1 D H W], answers and where they are known [a d h w]."""
    generator = torch.Generator().manual_seed(recipe.seed)
    labels = draw_shapes(recipe, shape, generator)
    volume = intensities_of(recipe, labels)
    clean, anatomy, inside = volume, torch.zeros(6, *shape), torch.zeros(shape)
    if recipe.anatomy:
        points = template_points(recipe, shape, generator)
        maps = sample_template(points)
        volume = with_brain(recipe, volume, maps)
        inside = (brain_of(maps[0]) > 0.5).float()
        outside = (1.0 - inside)[None]
        labels = largest(torch.cat([outside, inside * maps[1:], inside * (1 - maps[1:].sum(0))[None]]))
        half = torch.tensor(template().shape[1:]) / 2 / UNIT_MM
        x, y, z = (points * half).unbind(-1)
        anatomy = torch.stack([x.abs(), y, z, *maps])
    answers = functional.avg_pool3d(torch.cat([anatomy, clean[None]]), _CUBE)
    border = functional.avg_pool3d(_borders(labels)[None].float(), _CUBE)
    whole, brain = torch.ones_like(border[0]), functional.avg_pool3d(inside[None], _CUBE)[0] > 0.5
    seen = torch.stack([brain] * 3 + [whole * recipe.anatomy] * 3 + [whole * (not recipe.anatomy), whole])
    return imaged(recipe, volume, generator), torch.cat([answers, border]), seen.bool()


def _borders(labels: Tensor) -> Tensor:
    """Voxels whose next one along some axis has another label, [D H W]."""
    found = torch.zeros(labels.shape, dtype=torch.bool)
    for axis in range(3):
        differs = labels.narrow(axis, 1, labels.shape[axis] - 1) != labels.narrow(
            axis, 0, labels.shape[axis] - 1
        )
        found.narrow(axis, 0, labels.shape[axis] - 1).logical_or_(differs)
    return found


def _turn(angles: list[float], *, mirrored: bool) -> tuple[tuple[float, ...], ...]:
    """Small turns about the three axes, left and right exchanged or not: 3 x 3."""
    turn = np.diag([-1.0 if mirrored else 1.0, 1.0, 1.0])
    for axis, angle in enumerate(angles):
        i, j = (axis + 1) % 3, (axis + 2) % 3
        step = np.eye(3)
        step[i, i] = step[j, j] = np.cos(angle)
        step[i, j], step[j, i] = -np.sin(angle), np.sin(angle)
        turn = turn @ step
    return tuple(tuple(row) for row in turn.tolist())
