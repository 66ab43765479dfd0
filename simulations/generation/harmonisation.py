"""Harmonisation against the truth: phantoms that every scanner saw, each shown as another scanner sees them.

For every ordered pair of sites, the scans of one in the style of the other, compared with the same patients
really rendered there: peak signal-to-noise ratio and structural similarity (MONAI's) on the prepared volumes,
with bootstrap intervals over patients. Beside the model's three ways stand doing nothing, histogram matching
and, where a MeDUET network is given, its swap; all but the first two pass through the tokenizer, whose round
trip of the truth is their ceiling. What this file does not do: train, or judge scans without a truth.

Axes: b = scans, p = patients, c d h w = latents, D H W = voxels.
"""

import csv
import dataclasses
import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor

from federation.plan.plan import RunPlan
from meduet_models.diffusion.artefact import GenerativeModel
from meduet_models.diffusion.harmonisation import HarmonisationSettings, Method, harmonise
from meduet_models.diffusion.sampling import SamplingSettings
from meduet_models.meduet import MeDUET
from meduet_models.probes.swap_fidelity import match_histogram, quantiles
from meduet_models.tokenizer.tokenizer import Tokenizer
from simulations.evaluation import mean_style, swap
from simulations.generation.settings import ALL
from simulations.hospitals.held_out import Held
from simulations.report.figures import GOOD, INK, MUTED, save, style_axes
from storage.files import private_folder, write_whole

MEASURES = ("psnr_db", "ssim")
CEILING = "tokenizer round trip of the truth"
_RESAMPLES = 2000
_SSIM_WINDOW = 11
_BATCH = 16
_OURS: dict[str, Method] = {
    "style bank, restyled": "restyle",
    "diffusion, sampled": "sample",
    "diffusion, inverted": "invert",
}


@dataclass(frozen=True)
class HarmonisationRow:
    """One number with its interval."""

    source: str
    """Site that scanned the patients; `all`: mean over pairs of sites."""
    target: str
    """Site of the target style."""
    method: str
    """How."""
    measure: str
    """`psnr_db` or `ssim`, against the same patients rendered at the target."""
    value: float
    """Mean over patients."""
    low: float
    """2.5th percentile of the mean over patients drawn with replacement."""
    high: float
    """97.5th percentile."""
    patients: int
    """Patients behind it."""


def measure_harmonisation(
    model: GenerativeModel,
    plan: RunPlan,
    tokenizer: Tokenizer,
    held: Held,
    training: Sequence[Float[Tensor, "b c d h w"]],
    folder: Path,
    *,
    volumes: Float[Tensor, "b 1 D H W"],
    settings: SamplingSettings,
    swap_model: MeDUET | None = None,
    on_step: Callable[[int, int], None] = lambda done, total: None,
) -> list[HarmonisationRow]:
    """Measure every way on every ordered pair of sites; write `harmonisation.csv`, `.json` and `.png`.

    `held` are the paired patients of all sites and `volumes` the prepared scans behind its rows;
    `training[i]` are training latents of site i, for histograms and the swap's style.
    `on_step(done, total)` counts pairs of sites. Raises `ValueError` when patients are not paired.
    """
    if len(volumes) != len(held.site):
        raise ValueError(
            f"Expected the {len(held.site)} volumes behind the held-out scans; got {len(volumes)}."
        )
    names = model.sites
    there = () if model.bank is None else model.bank.present
    sites = [site for site in sorted(set(held.site)) if site < len(names) and names[site] in there]
    patients = {site: [held.patient[row] for row in held.rows(site)] for site in sites}
    pairs = [(a, b) for a in sites for b in sites if a != b]
    if not pairs or any(patients[a] != patients[b] for a, b in pairs):
        raise ValueError("Expected the same patients at two sites or more whose style is known; got others.")
    measured: dict[str, dict[tuple[int, int], NDArray[np.float64]]] = {}
    ways = _Ways(model, tokenizer, held, training, volumes, settings, swap_model, plan.seed)
    for done, (a, b) in enumerate(pairs, start=1):
        for method, moved in ways.between(a, b):
            measured.setdefault(method, {})[a, b] = fidelity(moved, volumes[held.rows(b)])
        on_step(done, len(pairs))
    rows = [
        row
        for method, by_pair in measured.items()
        for pair, values in [*by_pair.items(), (None, np.mean(list(by_pair.values()), axis=0))]
        for row in _rows(pair, names, method, values, plan.seed)
    ]
    _write(folder, rows, settings)
    return rows


@torch.no_grad()
def fidelity(moved: Float[Tensor, "p 1 D H W"], truth: Float[Tensor, "p 1 D H W"]) -> NDArray[np.float64]:
    """PSNR (dB) and SSIM of each patient, [p 2]; intensities outside [0, 1] are clipped first."""
    from monai.metrics.regression import PSNRMetric, SSIMMetric  # a second to import

    window = min(_SSIM_WINDOW, *((side - 1) // 2 * 2 + 1 for side in truth.shape[2:]))
    psnr = PSNRMetric(max_val=1.0, reduction="none")
    ssim = SSIMMetric(spatial_dims=3, data_range=1.0, win_size=window, reduction="none")
    values = [
        [float(metric(one[None].clamp(0, 1), real[None].clamp(0, 1))) for metric in (psnr, ssim)]
        for one, real in zip(moved, truth, strict=True)
    ]
    return np.array(values)


@dataclass(frozen=True)
class _Ways:
    """Everything that a pair of sites needs to be measured."""

    model: GenerativeModel
    tokenizer: Tokenizer
    held: Held
    training: Sequence[Tensor]
    volumes: Tensor
    settings: SamplingSettings
    swap_model: MeDUET | None
    seed: int

    def between(self, a: int, b: int) -> list[tuple[str, Tensor]]:
        """The scans of site `a` as every method shows them in the style of site `b`, [p 1 D H W] each."""
        mine, model = self.held.rows(a), self.model
        latents, own, truth = self.held.latents[mine], self.volumes[mine], self.volumes[self.held.rows(b)]
        target = quantiles(_decoded(self.tokenizer, self.training[b]))
        ways = [("nothing", own), ("histogram matching", match_histogram(own, target))]
        if self.swap_model is not None:
            swapped = swap(self.swap_model, latents, mean_style(self.swap_model, self.training[b]))
            ways.append(("MeDUET swap", _decoded(self.tokenizer, swapped)))
        for name, method in _OURS.items():
            if method != "restyle" and not {"content", "style"} <= set(model.transformer.config.sizes.names):
                continue
            asked = HarmonisationSettings(
                style=model.sites[b],
                own_style="" if method == "sample" else model.sites[a],
                method=method,
                sampling=self.settings,
                seed=self.seed,
            )
            ways.append((name, _decoded(self.tokenizer, harmonise(model, latents, asked))))
        encoded = torch.cat([self.tokenizer.encode(chunk) for chunk in torch.split(truth, _BATCH)])
        return [*ways, (CEILING, _decoded(self.tokenizer, encoded))]


@torch.no_grad()
def _decoded(tokenizer: Tokenizer, latents: Tensor) -> Tensor:
    return torch.cat([tokenizer.decode(chunk) for chunk in torch.split(latents, _BATCH)]).clamp(0, 1)


def _rows(
    pair: tuple[int, int] | None,
    names: Sequence[str],
    method: str,
    values: NDArray[np.float64],
    seed: int,
) -> list[HarmonisationRow]:
    """One row per measure; the same patients are drawn for every method, so that methods can be compared."""
    source, target = (ALL, ALL) if pair is None else (names[pair[0]], names[pair[1]])
    draws = np.random.default_rng(seed).integers(len(values), size=(_RESAMPLES, len(values)))
    low, high = np.percentile(values[draws].mean(1), [2.5, 97.5], axis=0)
    return [
        HarmonisationRow(
            source,
            target,
            method,
            measure,
            float(values[:, i].mean()),
            float(low[i]),
            float(high[i]),
            len(values),
        )
        for i, measure in enumerate(MEASURES)
    ]


def _write(folder: Path, rows: Sequence[HarmonisationRow], settings: SamplingSettings) -> None:
    private_folder(folder)
    plain = [dataclasses.asdict(row) for row in rows]
    record = {"sampling": dataclasses.asdict(settings), "rows": plain}
    write_whole(folder / "harmonisation.json", json.dumps(record, indent=1) + "\n")
    text = io.StringIO()
    table = csv.DictWriter(text, fieldnames=list(plain[0]), lineterminator="\n")
    table.writeheader()
    table.writerows(plain)
    write_whole(folder / "harmonisation.csv", text.getvalue())
    draw_harmonisation(rows, folder / "harmonisation.png")


def draw_harmonisation(rows: Sequence[HarmonisationRow], path: Path) -> Path:
    """Mean over pairs of sites with its interval, and each pair as a small dot; a panel per measure."""
    titles: Mapping[str, str] = {"psnr_db": "PSNR against the truth (dB)", "ssim": "SSIM against the truth"}
    methods = list(dict.fromkeys(row.method for row in rows))
    figure = Figure(figsize=(9.6, 0.42 * len(methods) + 1.3), layout="constrained")
    panels = figure.subplots(1, len(MEASURES), sharey=True)
    for axes, measure in zip(panels, MEASURES, strict=True):
        style_axes(axes, titles[measure])
        axes.grid(True, axis="x", color="#e3e8ee", linewidth=0.8)
        for place, method in enumerate(methods):
            mine = [row for row in rows if row.method == method and row.measure == measure]
            for row in mine:
                if row.source == ALL:
                    axes.plot([row.low, row.high], [place, place], color=INK, linewidth=1.6, zorder=2)
                    colour = MUTED if method == CEILING else GOOD if method.startswith("diffusion") else INK
                    axes.plot(row.value, place, "o", color=colour, markersize=7, zorder=3)
                else:
                    axes.plot(row.value, place + 0.22, ".", color=MUTED, markersize=4, zorder=1)
        axes.set_yticks(range(len(methods)), methods)
        axes.invert_yaxis() if measure == MEASURES[0] else None
    return save(figure, path)
