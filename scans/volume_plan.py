"""How a scan becomes a volume: the settings that a plan, and the header of published weights, state.

The same at every site, and wherever the weights are used afterwards. What it does not do: prepare anything
(`scans/volumes.py`, `scans/whole_volumes.py`).
"""

import math
from dataclasses import dataclass
from typing import Annotated, Literal

from forms.form import check
from forms.names import Phrase
from forms.ranges import Entries, Range

_MOST_VOXELS = 2**28
"""Of a volume: 645 voxels cubed, a gigabyte as float32."""


@dataclass(frozen=True, kw_only=True)
class VolumePlan:
    """How a scan becomes a volume, the same at every site."""

    modality: Phrase
    """Shared modality name; sites map their local names to it."""
    modalities: Annotated[tuple[Phrase, ...], Entries(100)] = ()
    """Several contrasts, `modality` among them, each a scan of its own; those of a patient are in one split.
    Empty: `modality` alone."""
    window: Literal["mr_percentiles", "ct_hu", "fixed"] = "mr_percentiles"
    """How intensities become [0, 1]: by percentiles of each scan, by a range in Hounsfield units, or (maps in
    units of their own) by `fixed_window`."""
    mr_percentiles: Annotated[tuple[float, float], Range(at_least=0, at_most=100)] = (0.5, 99.5)
    """Robust range of an MR scan, in percent of its voxels."""
    ct_window_hu: Annotated[tuple[float, float], Range(at_least=-32768, at_most=65535)] = (-175.0, 250.0)
    """Range of a CT scan, in Hounsfield units."""
    fixed_window: Annotated[tuple[float, float], Range(at_least=-1e9, at_most=1e9)] = (0.0, 1.0)
    """Range of a quantitative map, in its own units."""
    spacing_mm: Annotated[tuple[float, float, float], Range(at_least=0.01, at_most=100)] = (1.0, 1.0, 1.0)
    """Voxel spacing after resampling, RAS axes."""
    shape: Annotated[tuple[int, int, int], Range(at_least=1, at_most=2048)] = (32, 48, 32)
    """Voxels that the network sees at once; multiples of the tokenizer's stride. `extent` says which."""
    extent: Literal["crop", "scan"] = "crop"
    """What is encoded of a scan. `crop`: its central `shape`, padded where it is smaller. `scan`: the whole
    foreground, of which each training step draws a random crop of `shape`."""
    crop_foreground: Annotated[float, Range(at_least=0, at_most=1)] = 0.3
    """Least share of foreground in a crop that is drawn (`extent: scan`); a scan without such a crop gives
    the one with most."""
    registered: bool = True
    """Whether crops show the same body part at the same place: allows coarse mean maps."""
    four_d: Literal["first", "mean", "refuse"] = "first"
    """What a 4-D scan becomes: its first volume, its mean over time, or an exclusion."""
    views: Annotated[int, Range(at_least=1, at_most=64)] = 1
    """Encodings cached per scan: the scan itself and `views - 1` augmentations made before encoding."""

    def __post_init__(self) -> None:
        """Refuse a volume that cannot be made."""
        check(self, "volumes")
        for name in ("mr_percentiles", "ct_window_hu", "fixed_window"):
            low, high = getattr(self, name)
            if not low < high:
                raise ValueError(f"Expected volumes.{name} to rise; got [{low:g}, {high:g}].")
        if self.window != "fixed" and self.fixed_window != type(self).fixed_window:
            raise ValueError(f"volumes.fixed_window has no effect with volumes.window={self.window}.")
        if self.extent == "crop" and self.crop_foreground != type(self).crop_foreground:
            raise ValueError("volumes.crop_foreground has no effect with volumes.extent=crop: leave it out.")
        if self.extent == "scan" and self.registered:
            raise ValueError(
                "volumes.extent=scan draws crops from anywhere in a scan, which show no body part at the "
                "same place: set volumes.registered=false."
            )
        if self.modalities and (
            self.modality not in self.modalities or len(set(self.modalities)) < len(self.modalities)
        ):
            raise ValueError(
                f"Expected volumes.modalities to be different names with volumes.modality={self.modality} "
                f"among them; got {', '.join(self.modalities)}."
            )
        if math.prod(self.shape) > _MOST_VOXELS:
            raise ValueError(
                f"Expected volumes.shape of at most {_MOST_VOXELS:,} voxels; got {math.prod(self.shape):,}."
            )
