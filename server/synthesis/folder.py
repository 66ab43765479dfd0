"""The folder of a synthesis: NIfTI volumes by number, and what each of them is.

`sample-0001.nii.gz` and so on: RAS, the plan's spacing, centred on zero; intensities in [0, 1], or in HU for
a CT model. `samples.csv` and `samples.json` say seed and condition of each, `request.json` what was asked.
Where the volumes are patient data, header, tables and README.txt say so, and why. Each file is written whole
or not at all; a volume that is there is kept. What this file does not do: make volumes (`synthesis.py`).

Axes: d h w = voxels towards right, anterior, superior.
"""

import csv
import gzip
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from jaxtyping import Float
from torch import Tensor

from scans.volume_plan import VolumePlan
from storage.files import private_folder, write_whole

REQUEST = "request.json"
_PATIENT_DATA = "PATIENT DATA"
_IN_EVERY_ROW = (
    "seed",
    "mode",
    "style",
    "content_sha256",
    "body_part",
    "category",
    "spacing_mm",
    "patient_data",
)


class SynthesisFolder:
    """One folder for one request."""

    def __init__(self, folder: Path, asked: Mapping[str, Any], volumes: VolumePlan) -> None:
        """Create the folder, or go on with it.

        `asked` are the request's plain values, with `patient_data` (why, or empty), `mode` and
        `model_sha256`. Raises `ValueError` when the folder holds another request, or anything else.
        """
        self._folder, self._asked, self._volumes = folder, dict(asked), volumes
        self._patient_data = str(asked["patient_data"])
        path = folder / REQUEST
        if path.is_file():
            self._compare(path)
        elif folder.is_dir() and any(folder.iterdir()):
            raise ValueError(f"Expected {folder} to be new, or of this request; it holds other files.")
        private_folder(folder)
        write_whole(path, json.dumps(self._asked, indent=1, sort_keys=True) + "\n")
        write_whole(folder / "README.txt", self._readme())

    def path(self, number: int) -> Path:
        """Where volume `number` (from 1) is, or will be."""
        return self._folder / f"sample-{number:04d}.nii.gz"

    def write(self, number: int, volume: Float[Tensor, "1 d h w"]) -> None:
        """Write a volume in [0, 1]; the same volume gives the same bytes."""
        plan = self._volumes
        array = volume[0].numpy().astype(np.float32)
        if plan.window != "mr_percentiles":
            low, high = plan.ct_window_hu if plan.window == "ct_hu" else plan.fixed_window
            array = low + array * np.float32(high - low)
        affine = np.diag([*plan.spacing_mm, 1.0])
        affine[:3, 3] = -np.array(plan.spacing_mm) * (np.array(array.shape) - 1) / 2
        image = nib.Nifti1Image(array, affine)
        image.header.set_xyzt_units("mm")
        what = "FedMeDUET: synthetic, not acquired"
        image.header["descrip"] = (f"{what}. {_PATIENT_DATA}" if self._patient_data else what).encode()
        write_whole(self.path(number), gzip.compress(image.to_bytes(), mtime=0))

    def write_tables(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Write samples.csv and samples.json; `rows` hold what differs between volumes, in order."""
        shared = {name: self._asked[name] for name in _IN_EVERY_ROW}
        whole = [{"file": self.path(n).name, **row, **shared} for n, row in enumerate(rows, start=1)]
        text = io.StringIO()
        table = csv.DictWriter(text, fieldnames=list(whole[0]), lineterminator="\n")
        table.writeheader()
        table.writerows({name: _cell(value) for name, value in row.items()} for row in whole)
        write_whole(self._folder / "samples.csv", text.getvalue())
        record = {"request": self._asked, "samples": whole}
        write_whole(self._folder / "samples.json", json.dumps(record, indent=1) + "\n")

    def _compare(self, path: Path) -> None:
        try:
            before = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            raise ValueError(
                f"Expected {path} as it was written; it is damaged. Choose another folder."
            ) from None
        other = sorted(k for k in before.keys() | self._asked.keys() if before.get(k) != self._asked.get(k))
        if other:
            raise ValueError(
                f"Expected {self._folder} to be new, or of this request; it holds one with another "
                f"{other[0]} ({before.get(other[0])}, not {self._asked.get(other[0])}). Choose another."
            )

    def _readme(self) -> str:
        lines = [
            "Synthetic volumes, made by a FedMeDUET generative model; not acquired, not for diagnosis.",
            f"Request: {self._asked['mode']}. Model {self._asked['model_sha256']}.",
        ]
        if self._patient_data:
            lines.append(f"{_PATIENT_DATA}: {self._patient_data}. Handle them as scans.")
        return "\n".join(lines) + "\n"


def _cell(value: Any) -> Any:
    """A value in a table: lists with spaces between, nothing for what was not told."""
    if isinstance(value, list):
        return " ".join(str(item) for item in value)
    return "" if value is None else value
