"""The page's part on a generative model: what `generation/` holds, ready for the template `generation.html`.

Reads `generation/quality.json` and the figures beside it; samples and measures nothing. In the page:
`generation_part(folder)` is rendered as `generation`, and `generation/page.html` is included.
"""

import base64
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from simulations.generation.settings import ALL, FOLDER

_FIGURES = (
    (
        "gallery",
        "Samples over seeds",
        "Told the same, from different noise: sagittal, coronal and axial slices.",
    ),
    (
        "grid",
        "Contents by styles",
        "The content of held-out patients in the style of every site, from one noise per patient. Truth, "
        "where it stands: the same phantom on that site's scanner.",
    ),
    (
        "nearest",
        "Real beside synthetic",
        "Samples that were told nothing, those closest to a training scan, beside it. Distance: root mean "
        "square per latent value, over its deviation.",
    ),
    ("steps", "Quality over solver steps", "The same noise, with more and more steps."),
)
_PATIENT_DATA = (
    "Patient data: this model was trained on raw latents, from which scans can be decoded, and may repeat "
    "them. Its samples are handled as the scans are."
)


def generation_part(folder: Path) -> dict[str, Any] | None:
    """What the template needs; None where the run in `folder` made no generative model."""
    place = folder / FOLDER
    if not (place / "quality.json").is_file():
        return None
    found = json.loads((place / "quality.json").read_text(encoding="utf-8"))
    pictures = found["pictures"]
    viewer = pictures["viewer"]
    return {
        "note": _PATIENT_DATA if found["patient_data"] else "",
        "figures": [
            {"title": title, "text": text, "data": _embed(place / pictures[name])}
            for name, title, text in _FIGURES
            if name in pictures
        ],
        "rows": _rows(found["rows"]),
        "harmonised": _harmonised(place),
        "steps": _steps(found["steps"]),
        "seconds": f"{found['seconds_per_volume']:.2g} s",
        "viewer": f"{FOLDER}/{viewer}" if viewer else "",
        "without_viewer": "" if viewer else (place / "viewer.txt").read_text(encoding="utf-8").strip(),
    }


def _embed(path: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()


def _rows(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """Rows in the order of what was told, a heading once."""
    cells, last = [], ""
    for row in sorted(rows, key=lambda row: [r["told"] for r in rows].index(row["told"])):
        counted = f"{row['samples']} / {row['real']}"
        cells.append(
            {
                "told": row["told"] if row["told"] != last else "",
                "measure": row["measure"],
                "features": row["features"] + (f", {row['axes']} axes" if row["axes"] else ""),
                "value": _number(row["value"]),
                "interval": _interval(row["low"], row["high"]),
                "floor": _number(row["floor"]),
                "floor_interval": _interval(row["floor_low"], row["floor_high"]),
                "counted": counted,
            }
        )
        last = row["told"]
    return cells


def _harmonised(place: Path) -> dict[str, Any] | None:
    """Methods against the truth, mean over pairs of sites; none where no patient was seen by two scanners."""
    if not (place / "harmonisation.json").is_file():
        return None
    found = json.loads((place / "harmonisation.json").read_text(encoding="utf-8"))["rows"]
    mean = {(row["method"], row["measure"]): row for row in found if row["source"] == ALL}

    def cell(method: str, measure: str, digits: int) -> str:
        row = mean[method, measure]
        return f"{row['value']:.{digits}f} [{row['low']:.{digits}f}, {row['high']:.{digits}f}]"

    methods = list(dict.fromkeys(method for method, _ in mean))
    return {
        "figure": _embed(place / "harmonisation.png"),
        "rows": [[method, cell(method, "psnr_db", 2), cell(method, "ssim", 3)] for method in methods],
        "patients": next(iter(mean.values()))["patients"],
    }


def _steps(steps: Mapping[str, Any]) -> str:
    """One sentence on how many steps suffice."""
    last = steps["counts"][-1]["steps"]
    enough = [count["steps"] for count in steps["counts"][:-1] if abs(count["relative"]) <= 0.02]
    within = f"{enough[0]} steps are within 2% of it" if enough else "none of the others is within 2% of it"
    return (
        f"Solver {steps['solver']}, {steps['samples']} samples told {steps['told']}. Against the Fréchet "
        f"distance of {last} steps, {within}."
    )


def _number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.3f}" if abs(value) < 1 else f"{value:.2f}"


def _interval(low: float | None, high: float | None) -> str:
    return "" if low is None or high is None else f"{_number(low)} to {_number(high)}"
