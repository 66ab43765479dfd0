"""Volumes that a site makes of its scans, as files: a NIfTI on the scan's own grid, and a JSON beside it that
says how it was made.

What a network made of a scan is the patient's, as the scan is: it is written where it was asked for, and the
scan is never replaced. Does not do: make anything (`harmonisation.py`, `segmentation.py`).

Axes: x y z = voxels as the scan stores them.
"""

import gzip
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from jaxtyping import Float64, Shaped

from scans.nifti import is_nifti_name, nifti_stem
from scans.scans import FourD, Scan, UnusableScan
from scans.volumes import read_scan
from storage.files import write_whole

_DESCRIPTION_BYTES = 79


@dataclass(frozen=True, eq=False)
class VolumeFile:
    """What was made of a scan, on its own grid."""

    array: Shaped[np.ndarray, "x y z"]
    """Intensities, or classes."""
    affine: Float64[np.ndarray, "4 4"]
    """The scan's own."""
    facts: Mapping[str, Any]
    """What it is, for the JSON beside it."""
    description: str
    """The same in the header of the NIfTI, which holds 79 bytes of it."""


def make_files(
    scans: Sequence[Path],
    targets: Sequence[Path],
    make: Callable[[Scan], VolumeFile],
    four_d: FourD,
    on_scan: Callable[[int, int], None] = lambda done, total: None,
) -> list[tuple[Path, str]]:
    """Make of each scan its target, with a JSON beside it; returns what could not be used, and why.

    A scan that cannot be used stops no other. Raises `OSError` when a target cannot be written.
    """
    unusable: list[tuple[Path, str]] = []
    for done, (path, target) in enumerate(zip(scans, targets, strict=True), start=1):
        try:
            write_volume(target, make(read_scan(path, four_d)))
        except UnusableScan as error:
            unusable.append((path, str(error)))
        on_scan(done, len(scans))
    return unusable


def write_volume(path: Path, made: VolumeFile) -> None:
    """Write a NIfTI and the JSON of the same name, each whole or not at all."""
    image = nib.Nifti1Image(made.array, made.affine)
    image.header.set_xyzt_units("mm")
    image.header["descrip"] = made.description.encode()[:_DESCRIPTION_BYTES]
    content: bytes = image.to_bytes()
    if path.name.lower().endswith(".gz"):
        content = gzip.compress(content, mtime=0)  # the same volume is the same file
    write_whole(path, content)
    facts = json.dumps(dict(made.facts), indent=1, sort_keys=True) + "\n"
    write_whole(path.with_name(f"{nifti_stem(path)}.json"), facts.encode())


def target_paths(scans: Sequence[Path], out: Path, suffix: str) -> list[Path]:
    """Where each scan's result goes: `out` itself if it names a NIfTI file, else a file in the folder `out`,
    named as the scan and `suffix`.

    Raises `ValueError` for one file and several scans, for a scan that is not there, and when a result would
    replace a scan or another result.
    """
    if missing := [path for path in scans if not path.exists()]:
        raise ValueError(f"Expected a scan at {missing[0]}; nothing is there.")
    if is_nifti_name(out):
        if len(scans) > 1:
            raise ValueError(f"Expected -o to be a folder for {len(scans)} scans; got the file {out}.")
        targets = [out]
    else:
        targets = [out / f"{_stem(path)}_{suffix}.nii.gz" for path in scans]
    if twice := [target for target in targets if targets.count(target) > 1]:
        raise ValueError(
            f"Expected scans of different names; two would become {twice[0].name}. Use two folders."
        )
    inputs = {path.resolve() for path in scans}
    if replaced := [target for target in targets if target.resolve() in inputs]:
        raise ValueError(f"Expected -o to be no scan; {replaced[0]} is one, and would be replaced.")
    return targets


def _stem(path: Path) -> str:
    return nifti_stem(path) if is_nifti_name(path) else path.stem if path.is_file() else path.name
