"""The anatomy every phantom starts from: the ICBM 152 template inside nilearn, with a plain head around it.

The template (Fonov et al. 2009, doi:10.1016/S1053-8119(09)70884-5) is skull-stripped; we close it with shells
by distance from the brain (fluid, bone, fat), a neck, a face and an airway made of ellipsoids. The brain is
real anatomy; the head around it is scenery and is labelled background. Nothing here is random, nothing here
knows about patients (`patients.py`) or scanners (`scanners.py`).

Axes: c = channels, x y z = right, anterior, superior; points are millimetres in the template's RAS world.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import distance_transform_edt, gaussian_filter

FIELD_OF_VIEW_MM = (192, 224, 192)
"""Sides of the box that holds a head."""
ORIGIN_MM = (-96, -129, -91)
"""Centre of the box's first voxel at every resolution; the brain sits in the middle of the box."""
CHANNELS = ("gm", "wm", "texture", "outside_brain_mm", "outside_soft_mm", "ventricles")
RESOLUTIONS_MM = (1, 2, 4)

Volume = NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Atlas:
    """Template maps on one grid: `channels` float32 [c x y z] in the order of `CHANNELS`.

    `gm`, `wm`, `ventricles`: shares in [0, 1]. `texture`: what the template's T1 shows beyond its tissue
    maps, in units of the grey-white contrast. `outside_brain_mm`, `outside_soft_mm`: signed distances to
    the brain and to the face and neck (negative inside).
    """

    resolution_mm: int
    channels: Volume

    @property
    def affine(self) -> NDArray[np.float64]:
        """Voxel to world, [4 4]."""
        return grid_affine(self.resolution_mm)


def grid_shape(resolution_mm: int) -> tuple[int, int, int]:
    """Voxels of the box at `resolution_mm` (1, 2 or 4; anything else raises `ValueError`)."""
    if resolution_mm not in RESOLUTIONS_MM:
        raise ValueError(
            f"Expected resolution_mm to be one of {', '.join(map(str, RESOLUTIONS_MM))}; got {resolution_mm}."
        )
    x, y, z = (side // resolution_mm for side in FIELD_OF_VIEW_MM)
    return x, y, z


def grid_affine(resolution_mm: int) -> NDArray[np.float64]:
    """Voxel to world of the box at `resolution_mm`, [4 4]."""
    affine = np.diag([float(resolution_mm)] * 3 + [1.0])
    affine[:3, 3] = ORIGIN_MM
    return affine


@lru_cache(maxsize=2)
def load_atlas(resolution_mm: int) -> Atlas:
    """Read the template from nilearn's own files (no network) onto the box; once per process."""
    from nilearn import datasets  # a second to import, and only who makes phantoms needs it

    shape = grid_shape(resolution_mm)
    t1 = _boxed(datasets.load_mni152_template(resolution=1), resolution_mm)
    gm = _boxed(datasets.load_mni152_gm_template(resolution=1), resolution_mm)
    wm = _boxed(datasets.load_mni152_wm_template(resolution=1), resolution_mm)
    mask = _boxed(datasets.load_mni152_brain_mask(resolution=1), resolution_mm)
    overfull = np.maximum(gm + wm, 1.0)  # the two maps are smoothed separately and may exceed one together
    gm, wm = gm / overfull, wm / overfull

    brain = mask > 0.5
    outside = distance_transform_edt(~brain) - distance_transform_edt(brain)
    outside_mm = (outside * resolution_mm).astype(np.float32)
    design = np.stack([gm[brain], wm[brain], (1 - gm - wm)[brain]], axis=1)
    signals = np.linalg.lstsq(design, t1[brain], rcond=None)[0]
    texture = np.zeros(shape, np.float32)
    texture[brain] = (t1[brain] - design @ signals) / (signals[1] - signals[0])
    texture = np.clip(texture, -0.6, 0.6) * (outside_mm < -2.0)  # the rim holds stripping errors

    # Fluid far from the surface: the ventricles, without the fissures.
    x, y, z = _world(resolution_mm)
    central = (np.abs(x) < 40) & (np.abs(z - 12) < 30) & (outside_mm < -20.0)
    ventricles = np.where(central, np.clip(2 * (1 - gm - wm) - 1, 0, 1), 0)
    channels = np.stack([gm, wm, texture, outside_mm, _soft_tissue_mm(x, y, z), ventricles])
    return Atlas(resolution_mm, channels.astype(np.float32))


def _boxed(image: Any, resolution_mm: int) -> Volume:
    """The 1 mm template image on the box: the cord continued downwards, then halved until it fits."""
    values = np.asarray(image.dataobj, dtype=np.float32)
    first = np.asarray(ORIGIN_MM) - np.round(image.affine[:3, 3]).astype(int)
    for axis, (start, side) in enumerate(zip(first, FIELD_OF_VIEW_MM, strict=True)):
        index = np.clip(np.arange(start, start + side), 0, values.shape[axis] - 1)
        values = np.take(values, index, axis=axis)
    for _ in range(resolution_mm.bit_length() - 1):
        for axis in range(3):
            values = _halved(values, axis)
    return values


def _halved(values: Volume, axis: int) -> Volume:
    """Every second sample after a [1 2 1]/4 filter: the first voxel's centre stays where it is."""
    moved = np.moveaxis(values, axis, 0)
    padded = np.concatenate([moved[:1], moved])
    halved = 0.25 * padded[:-2:2] + 0.5 * padded[1:-1:2] + 0.25 * padded[2::2]
    return np.moveaxis(halved.astype(np.float32), 0, axis)


def _world(resolution_mm: int) -> tuple[Volume, Volume, Volume]:
    axes = (
        np.arange(n, dtype=np.float32) * resolution_mm + origin
        for n, origin in zip(grid_shape(resolution_mm), ORIGIN_MM, strict=True)
    )
    x, y, z = np.meshgrid(*axes, indexing="ij", sparse=True)
    return x, y, z


def _soft_tissue_mm(x: Volume, y: Volume, z: Volume) -> Volume:
    """Signed distance to face and neck, with the airway cut out."""
    neck = _cylinder_mm(x, y + 52, radii_mm=(54, 56)) + np.maximum(z + 45, 0)
    jaw = _ellipsoid_mm(x, y - 22, z + 70, radii_mm=(56, 66, 62))
    nose = _ellipsoid_mm(x, y - 84, z + 50, radii_mm=(14, 20, 22))
    airway = np.minimum(
        _ellipsoid_mm(x, y - 55, z + 45, radii_mm=(11, 32, 16)),
        _ellipsoid_mm(x, y - 12, z + 82, radii_mm=(10, 8, 34)),
    )
    soft = np.minimum(np.minimum(neck, jaw), nose)
    smooth: Volume = gaussian_filter(np.maximum(soft, -airway), sigma=1.0)
    return smooth


def _ellipsoid_mm(x: Volume, y: Volume, z: Volume, radii_mm: tuple[float, float, float]) -> Volume:
    """About the signed distance to an ellipsoid around the origin."""
    a, b, c = radii_mm
    scaled: Volume = (np.sqrt((x / a) ** 2 + (y / b) ** 2 + (z / c) ** 2) - 1) * min(radii_mm)
    return scaled


def _cylinder_mm(x: Volume, y: Volume, radii_mm: tuple[float, float]) -> Volume:
    """About the signed distance to an upright elliptical cylinder around the origin."""
    scaled = (np.sqrt((x / radii_mm[0]) ** 2 + (y / radii_mm[1]) ** 2) - 1) * min(radii_mm)
    return scaled.astype(np.float32)
