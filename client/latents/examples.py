"""A site's scans as examples for the diffusion model: latents, and what is known of each.

Does not do: choose what leaves the site (`client/exchanges/latents.py`), or compute content and style
(`meduet_models/diffusion/conditioner.py`).

Axes: b = scans, n = scans of the site, c d h w = latents, l = label values, D H W = voxels.
"""

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, Int, Int64
from torch import Tensor
from torch.nn import functional as F

from client.latents.batches import TrainingScans
from federation.plan.plan import RunPlan
from meduet_models.diffusion.conditions import UNKNOWN, Examples
from meduet_models.downstream.task import covariate_text
from scans.volumes import Geometry, ras_spacing


@runtime_checkable
class ScansWithGeometry(TrainingScans, Protocol):
    """What examples need of a site's latents (`client/latents/latent_set.py`)."""

    @property
    def has_label(self) -> Sequence[bool]:
        """Whether each scan has a label volume."""

    def labels(self, indices: Sequence[int], view: int = 0) -> Int64[Tensor, "b 1 D H W"] | None:
        """Label volumes of these scans."""

    def geometry(self, row: int, view: int = 0) -> Geometry:
        """Where a scan lies in the patient, and the grid it had."""


def examples_of(scans: ScansWithGeometry, rows: Sequence[int], plan: RunPlan) -> Examples:
    """These scans (never their augmentations) with what the plan's diffusion model can be told of them.

    Body part and class are those of the covariates `body_part` and `diffusion.category`; a scan of which one
    is not known has -1 there. Raises `ValueError` when a covariate or a label has a value that the plan does
    not name, and `IndexError` without rows.
    """
    diffusion = plan.diffusion
    category, categories = ("", ()) if diffusion is None else (diffusion.category, diffusion.categories)
    return Examples(
        latents=scans.latents(list(rows)),
        site=scans.site_index[list(rows)].clone(),
        body_part=_places(scans, rows, "body_part", plan.style.body_parts, "style.body_parts"),
        spacing=torch.tensor(np.stack([ras_spacing(scans.geometry(row)) for row in rows])),
        category=_places(scans, rows, category, categories, "diffusion.categories"),
        label_map=label_maps(scans, rows, plan) if diffusion is not None and diffusion.labels else None,
    )


class SiteExamples:
    """The training scans of a site, in the order of their rows: an `ExampleSource`."""

    def __init__(self, scans: ScansWithGeometry, plan: RunPlan) -> None:
        self._scans, self._plan = scans, plan
        self._rows = list(scans.indices("train"))

    def __len__(self) -> int:
        """Training scans."""
        return len(self._rows)

    def read(self, rows: Int[Tensor, " b"]) -> Examples:
        """These of them. Raises as `examples_of`."""
        return examples_of(self._scans, [self._rows[row] for row in rows.tolist()], self._plan)


def label_maps(
    scans: ScansWithGeometry, rows: Sequence[int], plan: RunPlan
) -> Float[Tensor, "b l d h w"] | None:
    """Share of each label value in each latent voxel; NaN throughout where a scan has no label.

    None when the plan tells no labels. Raises `ValueError` for a label that the plan does not count.
    """
    if plan.diffusion is None or not plan.diffusion.labels:
        return None
    values, grid = plan.diffusion.labels, plan.network.latent_grid
    stride = tuple(size // cells for size, cells in zip(plan.volumes.shape, grid, strict=True))
    maps = torch.full((len(rows), values, *grid), torch.nan)
    for place, row in enumerate(rows):
        label = scans.labels([row]) if scans.has_label[row] else None
        if label is None:
            continue
        if not 0 <= int(label.min()) <= int(label.max()) < values:
            raise ValueError(
                f"Expected labels from 0 to {values - 1} (diffusion.labels); got {int(label.min())} to "
                f"{int(label.max())}."
            )
        one_hot = F.one_hot(label[0, 0], values).movedim(-1, 0).float()  # l D H W
        maps[place] = F.avg_pool3d(one_hot, stride)
    return maps


def _places(
    scans: ScansWithGeometry, rows: Sequence[int], covariate: str, values: Sequence[str], setting: str
) -> Int[Tensor, " b"]:
    """Place of each scan's covariate among the plan's values; -1 where the scan's is not known."""
    places = {value: place for place, value in enumerate(values)}
    found = [covariate_text(scans.covariates[row], covariate) if values else "" for row in rows]
    if odd := sorted({value for value in found if value and value not in places}):
        raise ValueError(
            f"Expected covariate {covariate} to be one of {', '.join(places)} ({setting}), or not known; got "
            f"{odd[0]!r}. Exclude these scans, or name the value in the plan."
        )
    return torch.tensor([places[value] if value else UNKNOWN for value in found], dtype=torch.long)
