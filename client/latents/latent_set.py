"""The latent set: a site's encoded scans, read from the cache by number, mapped into memory.

A row is a scan of the cohort. Rows know their patient, split, covariates, site label and geometry; latents
and labels are read from disk when asked for, one small file each. Sets of several sites merge into one for
the pooled baseline. Of whole scans (`volumes.extent: scan`) a reader gets a crop of the network's grid: the
central one, or any that it names, and only its pages are read. Does not do: encode
(`client/latents/cache.py`), or choose rows and crops (`client/latents/batches.py`).

Axes: b = rows asked for, n = rows of the set, c d h w = a latent volume, D H W = the volume it encodes.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float16, Float32, Int, Int64, Shaped
from torch import Tensor

from client.latents.cache_files import (
    CacheFiles,
    ClearFiles,
    Inside,
    Place,
    StoredFile,
    damaged,
)
from client.latents.prepared_volumes import prepared_volume
from client.scans.cohort import Cohort, ScanEntry
from scans.volume_plan import VolumePlan
from scans.volumes import Geometry
from scans.whole_volumes import part_of

LATENTS, LABEL, FOREGROUND = "latents", "label", "foreground"
_DTYPES: dict[str, np.dtype[Any]] = {"F32": np.dtype("<f4"), "I16": np.dtype("<i2"), "U8": np.dtype("u1")}


@dataclass(frozen=True)
class StoredLatent:
    """One encoded view on disk: its header, read; its arrays, not."""

    path: Path
    file: StoredFile
    latents: Place
    label: Place | None
    geometry_json: str
    """Geometry of the volume that was encoded."""
    foreground: Place | None = None
    """Which latent voxels are foreground, of a whole scan."""
    start: tuple[int, int, int] = (0, 0, 0)
    """First latent voxel of the central crop, of a whole scan."""
    scan_id: str = ""
    """Of which scan; empty in files that do not say."""

    @property
    def stride(self) -> int:
        """Voxels per latent voxel and axis."""
        return int(json.loads(self.geometry_json)["prepared_shape"][0]) // self.latents.shape[1]

    def read(self, place: Place, inside: Inside | None = None) -> np.ndarray:
        """An array of the file, or a part of it; nothing else is read.

        Raises `DamagedEncoding` when the file went, or changed, since its header was read.
        """
        return self.file.array(place, inside)


def open_stored(path: Path, files: CacheFiles) -> StoredLatent | None:
    """Read the header of a cached file; None when there is no such file.

    Raises `DamagedEncoding` when the file is shorter or longer than its header says, or has another header.
    """
    try:
        file = files.open(path)
    except FileNotFoundError:
        return None
    try:
        fields = json.loads(file.head)
        said = json.loads(fields.pop("__metadata__")["provenance"])
        geometry_json = said["geometry"]
        d, h, w = map(int, json.loads(said.get("start", "[0, 0, 0]")))
        scan_id = str(said.get("scan_id", ""))
        ends = [field["data_offsets"][1] for field in fields.values()]
        places = {
            name: Place(field["data_offsets"][0], _DTYPES[field["dtype"]], tuple(field["shape"]))
            for name, field in fields.items()
        }
        stored = StoredLatent(
            path, file, places[LATENTS], places.get(LABEL), geometry_json, places.get(FOREGROUND), (d, h, w),
            scan_id,
        )  # fmt: skip
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise damaged(path, "has a header of another kind") from error
    if max(ends) != file.size:
        raise damaged(path, "was cut short")
    return stored


class LatentSet:
    """Encoded scans, by row. Made by `LatentCache.encode` and by `merge`."""

    def __init__(
        self,
        cohort: Cohort,
        stored: Sequence[Sequence[StoredLatent]],
        site_index: Sequence[int],
        patients: Sequence[str] | None = None,
        crop: tuple[int, int, int] | None = None,
        files: CacheFiles | None = None,
    ) -> None:
        """Row i is `cohort.scans[i]`, its views `stored[i]`, its site label `site_index[i]`.

        `patients` replaces the cohort's names. `crop`: latent voxels of the crops that are read of whole
        scans; None: what is stored is a crop. `files`: how prepared volumes are kept; None: in clear. Raises
        `ValueError` when rows differ in shape (of whole scans: in channels) or views.
        """
        if not len(cohort.scans) == len(stored) == len(site_index):
            raise ValueError(
                f"Expected as many encodings and site labels as scans; got {len(stored)}, {len(site_index)} "
                f"and {len(cohort.scans)}."
            )
        kinds = {(len(views), views[0].latents.shape[: 1 if crop else None]) for views in stored}
        if len(kinds) > 1:
            raise ValueError(f"Expected rows of one shape and number of views; got {sorted(kinds)}.")
        self.cohort = cohort
        """The scans that take part and, with those that could not be encoded, all other files."""
        self.patients = list(patients) if patients is not None else [scan.patient for scan in cohort.scans]
        """Patient of each row."""
        self.splits = [scan.split for scan in cohort.scans]
        """Split of each row."""
        self.covariates = [scan.covariates for scan in cohort.scans]
        """What is known of each row."""
        self.site_index: Int[Tensor, " n"] = torch.tensor(list(site_index), dtype=torch.long)
        """Site label of each row."""
        self.has_label = [views[0].label is not None for views in stored]
        """Whether a row has a label."""
        self.num_scans = len(stored)
        self.num_views = len(stored[0]) if stored else 0
        self.crop = crop
        """Latent voxels of a crop of a whole scan; None where a scan is a crop."""
        self._stored = [tuple(views) for views in stored]
        self._files = files or ClearFiles()

    def __len__(self) -> int:
        """Rows."""
        return self.num_scans

    @property
    def entries(self) -> Sequence[ScanEntry]:
        """The scan of each row."""
        return self.cohort.scans

    def indices(self, split: str) -> list[int]:
        """Rows of a split, in order."""
        return [row for row, own in enumerate(self.splits) if own == split]

    def latents(self, indices: Sequence[int], view: int = 0) -> Float32[Tensor, "b c d h w"]:
        """Latents of these rows, of whole scans the central crops, a copy on the CPU.

        Raises `IndexError` and `DamagedEncoding`.
        """
        stored = [self._at(row, view) for row in indices]
        if not stored:
            raise IndexError("Expected at least one row to read.")
        return self._read(stored, [one.start for one in stored])

    def crops(
        self, indices: Sequence[int], views: Sequence[int], starts: Int[Tensor, "b 3"]
    ) -> Float32[Tensor, "b c d h w"]:
        """The crops of whole scans that begin at these latent voxels, each of its own view; only they are
        read. Raises as `latents`, and `IndexError` for a crop that reaches outside its scan."""
        stored = [self._at(row, view) for row, view in zip(indices, views, strict=True)]
        d, h, w = starts.unbind(1)
        return self._read(stored, list(zip(d.tolist(), h.tolist(), w.tolist(), strict=True)))

    def whole(self, row: int, view: int = 0) -> Float32[np.ndarray, "c d h w"]:
        """Everything that is stored of a row, mapped read-only."""
        one = self._at(row, view)
        return one.read(one.latents)

    def foreground(self, row: int, view: int = 0) -> Bool[np.ndarray, "d h w"]:
        """Which latent voxels of a row are foreground, mapped read-only: all, where nothing says so."""
        return self._foreground(self._at(row, view))

    def central_foreground(self, indices: Sequence[int], view: int = 0) -> Bool[Tensor, "b d h w"]:
        """Which latent voxels that `latents` gives are foreground."""
        stored = [self._at(row, view) for row in indices]
        inside = [self._foreground(one, self._inside(one, one.start)) for one in stored]
        return torch.from_numpy(np.stack(inside))

    def labels(self, indices: Sequence[int], view: int = 0) -> Int64[Tensor, "b 1 D H W"] | None:
        """Labels of these rows, on the grid of the encoded volumes (of whole scans: of the central crops);
        None when none of them has one.

        Raises `ValueError` when only some have: choose rows by `has_label`.
        """
        stored = [self._at(row, view) for row in indices]
        labelled = [one.label for one in stored if one.label is not None]
        if not labelled:
            return None
        if len(labelled) < len(stored):
            raise ValueError(
                f"Expected all or none of {len(stored)} rows to have a label; {len(labelled)} have. "
                "Choose rows by has_label."
            )
        arrays = [
            one.read(place, None if self.crop is None else self._label_inside(one, one.start))
            for one, place in zip(stored, labelled, strict=True)
        ]
        return torch.from_numpy(np.stack(arrays).astype(np.int64))

    def whole_label(self, row: int, view: int = 0) -> Shaped[np.ndarray, "1 D H W"] | None:
        """The label of a row at its own size, uint8 or int16, mapped read-only; None when it has none."""
        one = self._at(row, view)
        return None if one.label is None else one.read(one.label)

    def label_crop(self, row: int, start: Int[Tensor, "3"], view: int = 0) -> Int64[Tensor, "1 D H W"]:
        """The label of the crop of a whole scan that begins at this latent voxel; only it is read."""
        one = self._at(row, view)
        assert one.label is not None, "only scans with labels are asked for"
        d, h, w = start.tolist()
        return torch.from_numpy(one.read(one.label, self._label_inside(one, (d, h, w))).astype(np.int64))

    def stride(self, row: int) -> int:
        """Voxels per latent voxel and axis."""
        return self._at(row, 0).stride

    def geometry(self, row: int, view: int = 0) -> Geometry:
        """Where the volume of a row (of a whole scan: its central crop) lies in the patient;
        `scans.volumes.lay_back` uses it."""
        one, whole = self._at(row, view), self.whole_geometry(row, view)
        if self.crop is None:
            return whole
        (x, y, z), (d, h, w), edge = one.start, self.crop, one.stride
        return part_of(whole, (x * edge, y * edge, z * edge), (d * edge, h * edge, w * edge))

    def whole_geometry(self, row: int, view: int = 0) -> Geometry:
        """Where everything that was encoded of a row lies in the patient."""
        values: Mapping[str, Any] = json.loads(self._at(row, view).geometry_json)
        return Geometry.from_dict(dict(values))

    def volumes(
        self, indices: Sequence[int], plan: VolumePlan, view: int = 0
    ) -> Float16[Tensor, "b 1 D H W"]:
        """The volumes that these rows' latents encode, prepared now as `plan` says where they are not kept
        yet. Raises `UnusableScan` when a scan is gone or changed since it was encoded."""
        return torch.stack(
            [
                prepared_volume(self.entries[row], self.path(row, view), plan, self._files, view)
                for row in indices
            ]
        )

    def path(self, row: int, view: int = 0) -> Path:
        """The file of a row's latents. Raises `IndexError`."""
        return self._at(row, view).path

    def files(self) -> set[Path]:
        """Every file of latents that this set reads."""
        return {one.path for views in self._stored for one in views}

    @staticmethod
    def merge(sets: Sequence["LatentSet"]) -> "LatentSet":
        """All rows of several sites; `site_index` is a set's place in `sets`.

        Patients are named `<place>/<name>`, as two hospitals may use one name for two people. For the pooled
        baseline of a simulation: in a federation no place sees more than its own set.
        """
        if not sets:
            raise ValueError("Expected at least one set to merge; got none.")
        scans = tuple(scan for one in sets for scan in one.cohort.scans)
        exclusions = tuple(exclusion for one in sets for exclusion in one.cohort.exclusions)
        cohort = dataclasses.replace(sets[0].cohort, scans=scans, exclusions=exclusions)
        return LatentSet(
            cohort,
            [views for one in sets for views in one._stored],
            [place for place, one in enumerate(sets) for _ in range(one.num_scans)],
            [f"{place}/{patient}" for place, one in enumerate(sets) for patient in one.patients],
            sets[0].crop,
            sets[0]._files,
        )

    def _read(
        self, stored: Sequence[StoredLatent], starts: Sequence[tuple[int, int, int]]
    ) -> Float32[Tensor, "b c d h w"]:
        batch = np.empty((len(stored), stored[0].latents.shape[0], *self._sides(stored[0])), np.float32)
        for place, one, start in zip(batch, stored, starts, strict=True):
            channels = slice(0, one.latents.shape[0])
            one.file.copy(one.latents, (channels, *self._inside(one, start)), place)
        return torch.from_numpy(batch)

    def _foreground(self, one: StoredLatent, inside: Inside | None = None) -> np.ndarray:
        if one.foreground is not None:
            return one.read(one.foreground, inside).view(bool)
        everything = np.ones(one.latents.shape[1:], dtype=bool)
        return everything if inside is None else everything[inside]

    def _label_inside(self, one: StoredLatent, start: tuple[int, int, int]) -> Inside:
        """The crop that begins at a latent voxel, in the label."""
        return (slice(0, 1), *self._inside(one, start, one.stride))

    def _sides(self, one: StoredLatent) -> tuple[int, ...]:
        return one.latents.shape[1:] if self.crop is None else self.crop

    def _inside(
        self, one: StoredLatent, start: tuple[int, int, int], edge: int = 1
    ) -> tuple[slice, slice, slice]:
        """The crop that begins at a latent voxel, in an array with `edge` elements for each."""
        ends = [a + n for a, n in zip(start, self._sides(one), strict=True)]
        if min(start) < 0 or any(end > n for end, n in zip(ends, one.latents.shape[1:], strict=True)):
            raise IndexError(f"Expected a crop within {one.latents.shape[1:]}; got one from {start}.")
        d, h, w = (slice(a * edge, b * edge) for a, b in zip(start, ends, strict=True))
        return d, h, w

    def _at(self, row: int, view: int) -> StoredLatent:
        if not (0 <= row < self.num_scans and 0 <= view < self.num_views):
            raise IndexError(
                f"Expected a row below {self.num_scans} and a view below {self.num_views}; got {row}, {view}."
            )
        return self._stored[row][view]
