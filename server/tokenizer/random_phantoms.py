"""Phantoms for training the tokenizer: real brain anatomy and random shapes, imaged in ways no scanner would.

Contrast, voxel size, orientation, bias, blur and texture are drawn far more widely than any hospital varies
them, so that a tokenizer trained on phantoms alone carries over to scans it never saw (the idea of
SynthSeg, Billot et al. 2023, doi:10.1016/j.media.2023.102789, and of its random shapes in SynthMorph,
doi:10.1109/TMI.2021.3116879). The anatomy is the ICBM 152 template inside nilearn (no network). What it
does not do: pretend to be patients at hospitals; those phantoms are in `simulations/`.

A phantom is drawn (a small recipe with a seed), then made (deterministic). Axes: m = maps, D H W = voxels.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

NUM_LABELS = 6  # of a shapes map
NUM_TISSUES = 3  # grey, white, the rest of the brain


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One phantom. Intensities are in [0, 1] before windowing; lengths of filters in voxels."""

    seed: int
    """Of the fields that are too large to draw ahead: shapes, warp, bias, texture."""
    anatomy: bool
    """A piece of brain with shapes around it, or shapes alone."""
    centre: tuple[float, ...]
    """Of the field of view, in the template's own [-1, 1] coordinates."""
    rotation: tuple[tuple[float, ...], ...]
    """Of the field of view, 3 x 3."""
    spacing_mm: tuple[float, ...]
    """Voxel size per axis."""
    warp_mm: float
    """Deviation of the smooth deformation."""
    template_share: float
    """Of the template's own T1 contrast; the rest is the tissues' drawn intensities."""
    tissue_intensities: tuple[float, ...]
    """Grey, white, rest."""
    shape_intensities: tuple[float, ...]
    """Of the shapes, or of what is around the brain."""
    shape_grid: int
    """Cells per axis of the noise whose largest channel is the shape: small is smooth."""
    texture: float
    """Deviation of a random field with a power-law spectrum."""
    texture_exponent: float
    """Of that spectrum's amplitude."""
    bias: float
    """Deviation of the log of the smooth multiplicative field."""
    blur: tuple[float, ...]
    """Deviation of a Gaussian filter per axis, voxels."""
    slice_factor: tuple[int, ...]
    """Per axis: slices averaged into one and interpolated back."""
    gamma: float
    """Exponent of the final intensities."""
    window: tuple[float, float]
    """Percentiles that become 0 and 1."""


def draw_recipe(generator: torch.Generator) -> Recipe:
    """Draw one phantom's recipe."""
    uniform = torch.rand(40, generator=generator, dtype=torch.float64).tolist()
    normal = torch.randn(3, 3, generator=generator, dtype=torch.float64)
    seed = int(torch.randint(2**62, (1,), generator=generator))

    def between(index: int, low: float, high: float) -> float:
        return low + (high - low) * float(uniform[index])

    rotation = torch.linalg.qr(normal).Q if uniform[0] < 0.5 else torch.eye(3, dtype=torch.float64)
    zoom = 0.6 * (4.0 / 0.6) ** uniform[1]  # log-uniform, 0.6 to 4 mm
    spacing = [zoom] * 3
    thick = int(between(2, 0, 3))
    if uniform[3] < 0.3:
        spacing[thick] *= between(4, 1.5, 4.0)
    factor = [1, 1, 1]
    if uniform[5] < 0.15:
        factor[thick] = 2 + int(between(6, 0, 2))
    shapes = [between(20 + i, 0, 1) for i in range(NUM_LABELS)]
    if uniform[7] < 0.5:
        shapes = [0.05 * level for level in shapes]  # air around the brain
        if uniform[34] > 0.6:
            shapes[0] = 1.0  # and one bright thing in it
    return Recipe(
        seed=seed,
        anatomy=uniform[8] < 0.65,
        centre=tuple(between(9 + i, -0.6, 0.6) for i in range(3)),
        rotation=tuple(tuple(row) for row in rotation.tolist()),
        spacing_mm=tuple(spacing),
        warp_mm=between(12, 0, 6),
        template_share=between(13, -0.5, 1.5) if uniform[14] < 0.7 else 1.0,
        tissue_intensities=tuple(between(15 + i, 0, 1) for i in range(NUM_TISSUES)),
        shape_intensities=tuple(shapes),
        shape_grid=3 + int(between(18, 0, 10)),
        texture=0.002 * 100.0 ** uniform[19],
        texture_exponent=between(26, 0.5, 3.0),
        bias=between(27, 0, 0.4),
        blur=tuple(max(0.0, between(28 + i, -0.5, 1.0)) for i in range(3)),
        slice_factor=tuple(factor),
        gamma=2.0 ** between(31, -0.7, 0.7),
        window=(between(32, 0.0, 2.0), between(33, 97.0, 100.0)),
    )


def make_phantom(recipe: Recipe, shape: tuple[int, int, int]) -> Tensor:
    """Make the phantom: float32 [1 D H W] in [0, 1], without noise (that is drawn afresh at each use)."""
    generator = torch.Generator().manual_seed(recipe.seed)
    volume = intensities_of(recipe, draw_shapes(recipe, shape, generator))
    if recipe.anatomy:
        volume = with_brain(recipe, volume, sample_template(template_points(recipe, shape, generator)))
    return imaged(recipe, volume, generator)


def with_brain(recipe: Recipe, volume: Tensor, template: Tensor) -> Tensor:
    """`volume` [D H W] with a brain in it, in the recipe's contrast; `template` as `sample_template` gives
    it."""
    t1, grey, white = template
    rest = (1.0 - grey - white).clamp_min(0.0)
    drawn = sum(
        level * map_ for level, map_ in zip(recipe.tissue_intensities, (grey, white, rest), strict=True)
    )
    inside = recipe.template_share * t1 + (1.0 - abs(recipe.template_share)) * drawn
    return torch.lerp(volume, inside, brain_of(t1))


def brain_of(t1: Tensor) -> Tensor:
    """Share of brain in each voxel: the template is 0 outside of it."""
    return (t1 * 10.0).clamp(0.0, 1.0)


def imaged(recipe: Recipe, volume: Tensor, generator: torch.Generator) -> Tensor:
    """Texture, bias, blur, slices and window of the recipe: float32 [1 D H W] in [0, 1]."""
    shape = (volume.shape[0], volume.shape[1], volume.shape[2])
    volume = volume + recipe.texture * _power_law(shape, recipe.texture_exponent, generator)
    volume = volume * torch.exp(recipe.bias * _smooth_field(shape, 3, generator))
    volume = _thick_slices(_blurred(volume, recipe.blur), recipe.slice_factor)
    low, high = np.percentile(volume.numpy(), recipe.window)
    return ((volume - float(low)) / max(float(high - low), 1e-3)).clamp(0.0, 1.0)[None] ** recipe.gamma


@lru_cache(maxsize=1)
def template() -> Tensor:
    """T1 in [0, 1], grey and white matter maps at 1 mm: float32 [m x y z], RAS."""
    # Imported here: nilearn takes seconds, and the command line should answer --help without it.
    from nilearn.datasets import load_mni152_gm_template, load_mni152_template, load_mni152_wm_template

    images = (load_mni152_template, load_mni152_gm_template, load_mni152_wm_template)
    maps = [np.asarray(load(resolution=1).dataobj, dtype=np.float32) for load in images]
    return torch.from_numpy(np.stack(maps))


def template_points(recipe: Recipe, shape: tuple[int, int, int], generator: torch.Generator) -> Tensor:
    """Where each voxel of the phantom lies in the template: [D H W 3], x y z in the template's [-1, 1]."""
    sides = torch.tensor(template().shape[1:], dtype=torch.float32)
    axes = [
        (torch.arange(n) - (n - 1) / 2) * spacing for n, spacing in zip(shape, recipe.spacing_mm, strict=True)
    ]
    points = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1)  # D H W 3, millimetres
    points = points @ torch.tensor(recipe.rotation, dtype=torch.float32).T
    warp = torch.stack([_smooth_field(shape, 4, generator) for _ in range(3)], dim=-1)
    return (points + recipe.warp_mm * warp) * 2 / sides + torch.tensor(recipe.centre)


def sample_template(points: Tensor) -> Tensor:
    """T1, grey and white matter at these points, 0 beyond the template: [3 D H W]."""
    return functional.grid_sample(template()[None], points.flip(-1)[None], align_corners=False)[0]


def draw_shapes(recipe: Recipe, shape: tuple[int, int, int], generator: torch.Generator) -> Tensor:
    """Random blobs with sharp borders: the label of the largest of several smooth noises, [D H W]."""
    cells = [recipe.shape_grid] * 3
    noise = torch.randn(1, NUM_LABELS, *cells, generator=generator)
    smooth = functional.interpolate(noise, size=shape, mode="trilinear", align_corners=True)[0]
    return largest(smooth)


def largest(maps: Tensor) -> Tensor:
    """Which of the first axis is largest, the first of equals: [m D H W] to [D H W]. PyTorch's argmax over
    the first axis takes eight times as long on a CPU."""
    highest, labels = maps[0], torch.zeros(maps.shape[1:], dtype=torch.long)
    for label in range(1, len(maps)):
        labels = torch.where(maps[label] > highest, label, labels)
        highest = torch.maximum(highest, maps[label])
    return labels


def intensities_of(recipe: Recipe, labels: Tensor) -> Tensor:
    """Each shape in its intensity."""
    return torch.tensor(recipe.shape_intensities, dtype=torch.float32)[labels]


def _smooth_field(shape: tuple[int, int, int], cells: int, generator: torch.Generator) -> Tensor:
    noise = torch.randn(1, 1, cells, cells, cells, generator=generator)
    return functional.interpolate(noise, size=shape, mode="trilinear", align_corners=True)[0, 0]


def _power_law(shape: tuple[int, int, int], exponent: float, generator: torch.Generator) -> Tensor:
    """A random field whose amplitude falls with frequency as f to the minus `exponent`; deviation 1."""
    spectrum = torch.fft.rfftn(torch.randn(shape, generator=generator))
    x, y, z = torch.fft.fftfreq(shape[0]), torch.fft.fftfreq(shape[1]), torch.fft.rfftfreq(shape[2])
    frequency = (x[:, None, None] ** 2 + y[None, :, None] ** 2 + z[None, None, :] ** 2).sqrt()
    frequency[0, 0, 0] = torch.inf  # no mean
    field = torch.fft.irfftn(spectrum * frequency**-exponent, s=shape)
    standard: Tensor = field / field.std().clamp_min(1e-6)
    return standard


def _blurred(volume: Tensor, deviations: tuple[float, ...]) -> Tensor:
    """Gaussian filter per axis, edges repeated."""
    x = volume[None, None]
    offsets = torch.arange(-3, 4, dtype=torch.float32)
    for axis, deviation in enumerate(deviations):
        if deviation > 0.1:
            kernel = torch.exp(-0.5 * (offsets / deviation) ** 2)
            sides = [1, 1, 1]
            sides[axis] = len(offsets)
            padding = [0] * 6
            padding[4 - 2 * axis] = padding[5 - 2 * axis] = 3
            padded = functional.pad(x, padding, mode="replicate")
            x = functional.conv3d(padded, (kernel / kernel.sum()).reshape(1, 1, *sides))
    return x[0, 0]


def _thick_slices(volume: Tensor, factors: tuple[int, ...]) -> Tensor:
    """Average neighbouring slices and interpolate back: what a thick-slice scan looks like when resampled."""
    if max(factors) == 1:
        return volume
    coarse = functional.avg_pool3d(volume[None, None], list(factors), ceil_mode=True)
    return functional.interpolate(coarse, size=list(volume.shape), mode="trilinear", align_corners=False)[
        0, 0
    ]
