"""Whole scans and what is to be predicted of them (`volumes.extent: scan`): crops to learn from, all to test.

A step of a fine-tuning sees a crop of the network's grid, drawn where enough of it is foreground, as in
pretraining. Where the answer is a label volume, it is cropped along, and a third of the crops hold a voxel of
a class drawn among those of the scan, as in nnU-Net: a small structure is met, however large the scan. What
is tested, is tested on all of a scan, and label maps on the patient's own grid, against the label as its file
has it.

Does not do: know a network, or choose scans (`labelled.py`).

Axes: c d h w = latents of a scan, p q r = those of a crop, n = crops, D H W = voxels, x y z = voxels as the
scan stores them.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Float, Float32, Int, Int64, Shaped
from torch import Tensor

from client.latents.latent_set import LatentSet
from client.latents.whole_scan import draw_start
from meduet_models.windows import Windows
from scans.scans import Scan
from scans.volumes import Geometry, label_on, read_label

ON_LABEL = 1 / 3
"""Probability that a crop is drawn around a labelled voxel: nnU-Net's."""


@dataclass(frozen=True, eq=False)
class WholeScan:
    """One scan of a set of whole scans."""

    scans: LatentSet
    row: int
    label_values: Mapping[int, int]
    """Values of labels and their classes; every other value is background. Empty: values are classes."""

    @property
    def grid(self) -> tuple[int, int, int]:
        """Latents of a crop."""
        assert self.scans.crop is not None, "made of whole scans alone"
        return self.scans.crop

    @property
    def geometry(self) -> Geometry:
        """Where all that was encoded lies in the patient."""
        return self.scans.whole_geometry(self.row)

    def latents(self) -> Float32[Tensor, "c d h w"]:
        """All of them, a copy."""
        return torch.tensor(self.scans.whole(self.row))

    def classes(self) -> Int64[Tensor, "1 D H W"]:
        """The class of every voxel that was encoded."""
        label = self.scans.whole_label(self.row)
        assert label is not None, "only scans with labels are asked for"
        return as_classes(torch.tensor(label.astype(np.int64)), self.label_values)

    def classes_as_stored(self) -> Int64[Tensor, "1 x y z"]:
        """The label of the file, as classes on the scan's own grid; outside of what was encoded, too.

        Raises `UnusableScan` when it is gone, or is no label any more.
        """
        entry, geometry = self.scans.entries[self.row], self.geometry
        assert entry.label_path is not None, "only scans with labels are asked for"
        nothing = np.broadcast_to(np.float32(0), geometry.source_shape)  # of the image a place alone is read
        label = read_label(entry.label_path, Scan(nothing, geometry.source_affine))
        placed = label_on(label, geometry.source_affine, geometry.source_shape)
        return as_classes(placed.long(), self.label_values)

    def draw(
        self, least: float, generator: torch.Generator, labelled: bool
    ) -> tuple[Float32[Tensor, "c p q r"], Int64[Tensor, "1 D H W"] | None]:
        """A crop of which at least this share is foreground, where there is such a one; `labelled`: with its
        classes."""
        around = None
        if labelled and float(torch.rand((), generator=generator)) < ON_LABEL:
            around = self._labelled_cell(generator)
        start = self._start(around, least, generator)
        latents = self.scans.crops([self.row], [0], start[None])[0]
        if not labelled:
            return latents, None
        return latents, as_classes(self.scans.label_crop(self.row, start), self.label_values)

    def windows(self) -> tuple[Float32[Tensor, "n c p q r"], Float[Tensor, " n"]]:
        """Crops that overlap by half and cover the scan, and the weight of each: its share of foreground."""
        latents = self.latents()
        windows = Windows.over(tuple(latents.shape[1:]), self.grid)
        foreground = torch.tensor(self.scans.foreground(self.row)).float()[None]
        numbers = range(len(windows))
        weights = windows.cut(foreground, numbers).mean((1, 2, 3, 4))
        return windows.cut(latents, numbers), weights / weights.sum()

    def _start(self, around: np.ndarray | None, least: float, generator: torch.Generator) -> Int[Tensor, "3"]:
        """Where a crop begins: anywhere, or where it holds the cell `around`."""
        foreground = self.scans.foreground(self.row)
        if around is None:
            return draw_start(foreground, self.grid, least, generator)
        edges = np.array(self.grid)
        first, last = np.maximum(around - edges + 1, 0), np.minimum(around + edges, foreground.shape)
        near = foreground[tuple(slice(a, b) for a, b in zip(first, last, strict=True))]
        return draw_start(near, self.grid, least, generator) + torch.from_numpy(first)

    def _labelled_cell(self, generator: torch.Generator) -> np.ndarray | None:
        """The latent voxel around a voxel of a class that is drawn; None where nothing is labelled."""
        if not self._values:
            return None
        chosen = list(self._values)[int(torch.randint(len(self._values), (), generator=generator))]
        label = self.scans.whole_label(self.row)
        assert label is not None
        found = np.flatnonzero(np.isin(label[0], self._values[chosen]))
        voxel = found[int(torch.randint(len(found), (), generator=generator))]
        return np.array(np.unravel_index(voxel, label.shape[1:])) // self.scans.stride(self.row)

    @cached_property
    def _values(self) -> dict[int, list[int]]:
        """By class but the background: its values in this scan."""
        label = self.scans.whole_label(self.row)
        assert label is not None
        found: dict[int, list[int]] = {}
        for value in np.unique(label).tolist():
            own = self.label_values.get(value, 0) if self.label_values else value
            if own:
                found.setdefault(own, []).append(value)
        return found


def as_classes(labels: Shaped[Tensor, "..."], label_values: Mapping[int, int]) -> Shaped[Tensor, "..."]:
    """Labels as classes: each value's class, every value without one background."""
    if not label_values:
        return labels
    classes = torch.zeros_like(labels)
    for value, label in label_values.items():
        classes[labels == value] = label
    return classes
