"""A page that shows volumes in the browser: NiiVue, two linked panes, all in one file, nothing fetched.

NiiVue's JavaScript is taken from the installed package `ipyniivue` (extra `viewer`), which carries the whole
library for the pages that its widget saves; neither Python nor Jupyter of it is run. Volumes are embedded as
NIfTI. What this file does not do: it decides nothing about intensities or geometry, and hides nothing: who
has the page has the volumes.
"""

import base64
import gzip
import json
import re
import urllib.parse
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from itertools import groupby
from pathlib import Path

import nibabel as nib
import numpy as np
from jaxtyping import Float, Float32
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from storage.files import write_whole

_TEMPLATES = Path(__file__).resolve().parents[1]
_TEMPLATE = "report/viewer.html"
_PACKAGE = "ipyniivue"
_WIDGET = f"{_PACKAGE}/static/widget.js"
_USE = re.compile(r"decodeURIComponent\((\w+)\)\)")
PATIENT_DATA = (
    "Patient data: volumes of this page are scans of patients, or come from a model that was trained on raw "
    "latents of patients. Treat the page as you treat their scans."
)
"""What stands on a page that holds patient data."""


class ViewerMissing(ValueError):
    """The package that carries the viewer is not installed, or carries it no longer."""


@dataclass(frozen=True)
class ViewedVolume:
    """One volume to choose from."""

    name: str
    """What it is, for the reader."""
    group: str
    """Heading under which it is listed; volumes of one group follow each other."""
    values: Float32[np.ndarray, "x y z"]
    """Intensities; black is 0, white is 1."""
    affine: Float[np.ndarray, "4 4"]
    """Voxel to millimetres, towards right, anterior, superior."""


def write_viewer(
    path: Path,
    volumes: Sequence[ViewedVolume],
    *,
    title: str,
    text: str,
    patient_data: bool,
    shown: tuple[int, int] = (0, 1),
) -> Path:
    """Write the page; `shown` are the volumes of the two panes at first. `patient_data`: the page says so.

    Raises `ValueError` for fewer than two volumes, `ViewerMissing` without the package.
    """
    if len(volumes) < 2 or not all(0 <= number < len(volumes) for number in shown):
        raise ValueError(
            f"Expected two volumes or more, and two of them to begin with; got {len(volumes)}, {shown}."
        )
    package, source = niivue()
    numbered = [(number, volume) for number, volume in enumerate(volumes)]
    embedded = [{"name": volume.name, "nifti": _nifti(volume)} for volume in volumes]
    environment = Environment(loader=FileSystemLoader(_TEMPLATES), autoescape=True, undefined=StrictUndefined)
    page = environment.get_template(_TEMPLATE).render(
        title=title,
        text=text,
        patient_data=PATIENT_DATA if patient_data else "",
        groups=[
            (group, [(number, volume.name) for number, volume in members])
            for group, members in groupby(numbered, key=lambda pair: pair[1].group)
        ],
        shown=shown,
        version=package.version,
        volumes=Markup(json.dumps(embedded).replace("<", "\\u003c")),
        niivue=Markup(base64.b64encode(gzip.compress(source.encode(), mtime=0)).decode()),
    )
    write_whole(path, page)
    return path


def niivue() -> tuple[Distribution, str]:
    """The package, and the NiiVue that it carries: an ES module that exports `Niivue`.

    Raises `ViewerMissing` when there is none.
    """
    try:
        package = distribution(_PACKAGE)
    except PackageNotFoundError:
        raise ViewerMissing(
            f"Expected the package {_PACKAGE}, which carries the volume viewer; install fedmeduet[viewer]."
        ) from None
    widget = Path(str(package.locate_file(_WIDGET))).read_text(encoding="utf-8")
    used = _USE.search(widget)  # NiiVue.saveHTML(..., decodeURIComponent(<the library, quoted>))
    quoted = used and re.search(rf'\b{used[1]}="([^"]*)"', widget)
    source = urllib.parse.unquote(quoted[1]) if quoted else ""
    if not re.search(r"export\{[^}]*\bNiivue\b", source):
        raise ViewerMissing(
            f"Expected NiiVue inside {_PACKAGE} {package.version}, as 2.4.4 carries it; install that version."
        )
    return package, source


def _nifti(volume: ViewedVolume) -> str:
    """A volume as compressed NIfTI of a byte per voxel, base64."""
    levels = np.round(np.clip(volume.values, 0, 1) * 255).astype(np.uint8)
    image = nib.nifti1.Nifti1Image(levels, volume.affine)
    image.header.set_slope_inter(1 / 255, 0)
    return base64.b64encode(gzip.compress(image.to_bytes(), mtime=0)).decode()
