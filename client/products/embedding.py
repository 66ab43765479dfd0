"""Embeddings of scans as files: which scans are meant, what each is called, how results are kept.

Folders and manifests are understood as at a site (`client/scans/layouts.py`): labels, other contrasts and
what is no scan are left out and said. What comes of a scan: `meduet_models/published/scan_model.py`. An
embedding is patient data, as the scan is; files are their owner's alone.

Axes: n = numbers, p q r k = tokens and their channels, as the model gives them.
"""

import csv
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from client.scans.layouts import LayoutRules, survey
from meduet_models.published.scan_model import ScanModel
from scans.nifti import is_nifti_name, nifti_stem
from scans.scans import Exclusion, Reason, UnusableScan, is_label_map
from scans.volume_plan import VolumePlan
from scans.volumes import read_files, read_scan
from storage.files import private_folder, whole_file, write_whole

What = Literal["code", "tokens", "style", "content"]
MANIFESTS = (".csv", ".tsv")
TABLES = (".npz", ".csv")
"""Files of many scans; anything else but `.npy` is a folder with a file for each."""


@dataclass(frozen=True)
class Asked:
    """A scan that is to be embedded."""

    name: str
    """What the result is called: the file's name, or its path below the folder that was given."""
    path: Path
    files: tuple[Path, ...] = ()
    """Of a series that a folder holds; empty: `path` itself says."""


def scans_of(given: Sequence[Path], volumes: VolumePlan) -> tuple[list[Asked], list[Exclusion]]:
    """The scans behind files, folders and manifests, and what is left out of folders.

    Raises `ValueError` for a path that is not there, for nothing to embed, and for two scans of one name.
    """
    asked: list[Asked] = []
    left_out: list[Exclusion] = []
    rules = LayoutRules(wanted=volumes.modalities or (volumes.modality,))
    for path in given:
        if not path.exists():
            raise ValueError(f"Expected a scan, a folder or a manifest at {path}; nothing is there.")
        if path.is_file() and path.suffix.lower() not in MANIFESTS:
            asked.append(Asked(_stem(path.name), path))
            continue
        found = survey(path, "auto", rules)
        left_out += found.exclusions
        root = path if path.is_dir() else path.parent
        for candidate in found.candidates:
            if rules.names.takes(candidate.modality):
                below = candidate.path.relative_to(root)
                name = str(below.with_name(_stem(below.name))) if below.name else path.name
                asked.append(Asked(name, candidate.path, candidate.files))
            else:
                left_out.append(Exclusion(candidate.path, Reason.NO_SUCH_MODALITY, files=candidate.files))
    names = [one.name for one in asked]
    if not asked:
        raise ValueError(f"Expected at least one scan in {', '.join(map(str, given))}; found none.")
    if twice := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"Expected scans of different names; two are called {twice[0]}. Embed one apart.")
    return asked, left_out


def embeddings(
    model: ScanModel, asked: Sequence[Asked], what: What
) -> Iterator[tuple[Asked, np.ndarray | UnusableScan]]:
    """Each scan with its embedding, or with the reason why there is none; one scan is in memory at a time."""
    read: dict[What, Callable[..., np.ndarray]] = {
        "code": model.embed, "tokens": model.tokens, "style": model.style, "content": model.content,
    }  # fmt: skip
    for one in asked:
        try:
            four_d = model.volumes.four_d
            scan = read_files(one.files, four_d) if one.files else read_scan(one.path, four_d)
            if is_label_map(scan.array):
                raise UnusableScan(Reason.LABEL_MAP)
            yield one, read[what](scan)
        except UnusableScan as error:
            yield one, error


def check_target(out: Path, what: What, count: int) -> None:
    """Raise `ValueError` when so many results of this kind cannot be kept in `out`."""
    if out.suffix == ".npy" and count > 1:
        raise ValueError(f"Expected -o to be a folder, .npz or .csv for {count} scans; got the file {out}.")
    if out.suffix == ".csv" and what == "tokens":
        raise ValueError("Expected -o to be a folder or .npz for tokens, which are a grid; got a .csv.")
    if out.suffix in (".npy", *TABLES) and not out.absolute().parent.is_dir():
        raise ValueError(f"Expected the folder {out.absolute().parent} to exist; create it.")
    if is_nifti_name(out):
        raise ValueError(f"Expected -o to be .npy, .npz, .csv or a folder; got {out.name}, a scan's name.")


def write_one(out: Path, name: str, values: np.ndarray) -> Path:
    """Write one scan's array: `out` itself if it ends in .npy, else `<name>.npy` in the folder `out`."""
    path = out if out.suffix == ".npy" else out / f"{name}.npy"
    if path is not out:
        private_folder(path.parent)
    content = io.BytesIO()
    np.save(content, values, allow_pickle=False)
    write_whole(path, content.getvalue())
    return path


def write_table(out: Path, what: What, results: Mapping[str, np.ndarray]) -> None:
    """Write all results into one file: .npz with `ids` and an array of this name, or .csv with a row each.

    Raises `ValueError` when arrays differ in shape, as tokens of whole scans do.
    """
    if len({values.shape for values in results.values()}) > 1:
        raise ValueError(
            "Expected results of one shape for a .npz; tokens of whole scans differ: give a folder."
        )
    stacked = np.stack(list(results.values()))
    if out.suffix == ".npz":
        with whole_file(out) as file:
            np.savez(file, allow_pickle=False, ids=np.array(list(results)), **{what: stacked})
        return
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(["id", *(f"{what}_{number}" for number in range(stacked.shape[1]))])
    writer.writerows([name, *map(repr, map(float, row))] for name, row in zip(results, stacked, strict=True))
    write_whole(out, table.getvalue())


def _stem(name: str) -> str:
    path = Path(name)
    return nifti_stem(path) if is_nifti_name(path) else path.stem
