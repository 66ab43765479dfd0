"""What a generative model's pictures show: chosen samples, the real scans beside them, volumes on disk.

Chooses by number, never by look: the first held-out patients, the first samples. What this file does not do:
measure (`generation.py`), lay out figures (`generation_figures.py`).
"""

import dataclasses
import gzip
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from torch import Tensor

from federation.plan.plan import RunPlan
from meduet_models.diffusion.artefact import GenerativeModel
from meduet_models.diffusion.draws import generator_of
from meduet_models.sample_quality import nearest
from meduet_models.tokenizer.tokenizer import Tokenizer
from simulations.generation.figures import Cell, draw_gallery, draw_grid, draw_nearest, draw_steps
from simulations.generation.quality import ScanSet
from simulations.generation.samples import (
    NOTHING,
    OTHER,
    STYLE,
    Request,
    Sampler,
    site_codes,
    styled_sites,
    told_of,
)
from simulations.generation.settings import GenerationSettings
from simulations.hospitals.held_out import Held
from simulations.report.figures import Volume
from simulations.report.viewer import ViewedVolume, ViewerMissing, write_viewer
from storage.files import private_folder, write_whole

Samples = Mapping[str, tuple[Request, ScanSet]]
"""What was told, and what came."""
_NEAREST = 4
_MARK = {True: "synthetic; patient data (raw latents)", False: "synthetic"}


class Pictures:
    """Draws the figures of one model into one folder."""

    def __init__(
        self,
        model: GenerativeModel,
        plan: RunPlan,
        tokenizer: Tokenizer,
        held: Held,
        sampler: Sampler,
        settings: GenerationSettings,
        folder: Path,
    ) -> None:
        self._model, self._plan, self._tokenizer, self._held = model, plan, tokenizer, held
        self._sampler, self._settings, self._folder = sampler, settings, folder

    def draw(
        self, samples: Samples, training: ScanSet, counts: Sequence[Mapping[str, float]]
    ) -> dict[str, Any]:
        """Draw all that this model's samples allow; file names by picture, relative to the folder."""
        drawn: dict[str, Any] = {"gallery": self._gallery(samples).name}
        if grid := self._grid(samples):
            drawn["grid"] = grid.name
        drawn["nearest"] = self._nearest(samples, training).name
        kind = samples.get(STYLE, samples[NOTHING])[0].told
        drawn["steps"] = draw_steps(counts, kind, self._folder / "steps.png").name
        drawn["volumes"] = self._write_volumes(samples)
        drawn["viewer"] = self._viewer(samples)
        return drawn

    def _gallery(self, samples: Samples) -> Path:
        """For each thing told the same conditions with several seeds; the scan asked for comes first."""
        rows: dict[str, list[Cell]] = {}
        for kind, (request, _) in samples.items():
            if kind == OTHER:
                continue
            one = _repeated(request, self._settings.seeds)
            volumes = self._decode(self._sampler.draw(one, f"gallery {kind}"))
            cells = [Cell(f"seed {i + 1}", v, "reconstruction") for i, v in enumerate(volumes)]
            if request.rows:
                cells.insert(0, Cell("scan asked for", self._scan(request.rows[0])))
            rows[kind] = cells
        return draw_gallery(rows, self._folder / "gallery.png")

    def _grid(self, samples: Samples) -> Path | None:
        """Contents of patients by styles of sites; where a phantom was scanned at a site too, the truth."""
        if OTHER not in samples:
            return None
        model, held, known = self._model, self._held, styled_sites(self._model)
        patients: dict[str, int] = {}
        for row in samples[OTHER][0].rows:
            patients.setdefault(held.patient[row], row)
        rows = list(patients.values())[: self._settings.patients]
        content = [row for row in rows for _ in known]
        asked = known * len(rows)
        conditions = told_of(model, held.latents[content], ("content", "style"), site_codes(model, asked))
        shape = tuple(held.latents.shape[1:])
        starts = [
            torch.randn(shape, generator=generator_of("grid", self._plan.seed, i)) for i in range(len(rows))
        ]
        request = Request(
            OTHER, conditions, tuple(content), tuple(asked), tuple(held.patient[i] for i in content)
        )
        noise = torch.stack(
            [start for start in starts for _ in known]
        )  # one for a patient: only style differs
        volumes = self._decode(self._sampler.draw(request, "grid", noise=noise))
        lines: dict[str, list[Cell]] = {}
        for place, row in enumerate(rows):
            own = held.site[row]
            cells = [Cell(f"scan, {model.sites[own]}", self._scan(row))]
            for column, site in enumerate(known):
                cells.append(Cell(f"{model.sites[site]} style", volumes[place * len(known) + column], "swap"))
                if (truth := self._truth(row, site)) is not None:
                    cells.append(Cell("truth", self._scan(truth), "truth"))
            lines[f"patient {place + 1}"] = cells
        return draw_grid(lines, self._folder / "grid.png")

    def _truth(self, row: int, site: int) -> int | None:
        """The same patient on the scanner of `site`, where phantoms are."""
        held = self._held
        if not held.paired:
            return None
        return next(
            (i for i in held.rows(site) if held.patient[i] == held.patient[row]),
            None,
        )

    def _nearest(self, samples: Samples, training: ScanSet) -> Path:
        """Samples that were told no content beside their nearest training scans, closest first."""
        _, scans = samples[NOTHING]
        scale = self._model.encoder.latent_deviation.cpu().reshape(-1, 1, 1, 1)
        distance, which = nearest((scans.latents / scale).flatten(1), (training.latents / scale).flatten(1))
        per_number = distance / scans.latents[0].numel() ** 0.5
        order = distance.argsort()[:_NEAREST].tolist()
        pairs = [
            (
                Cell("synthetic", _array(scans.volumes[i]), "reconstruction"),
                Cell(f"nearest real, {per_number[i]:.2f} apart", _array(training.volumes[int(which[i])])),
            )
            for i in order
        ]
        return draw_nearest(pairs, self._folder / "nearest.png")

    def _write_volumes(self, samples: Samples) -> list[str]:
        """The first samples of each kind as NIfTI, marked in the header and by a note beside them."""
        folder = self._folder / "volumes"
        private_folder(folder)
        names = []
        for kind, (_, scans) in samples.items():
            for i, volume in enumerate(scans.volumes[: self._settings.volumes]):
                image = nib.nifti1.Nifti1Image(volume[0].numpy(), self._affine())
                image.header.set_xyzt_units("mm")
                image.header["descrip"] = f"FedMeDUET, {_MARK[self._model.patient_data]}"[:79]
                name = f"volumes/{kind.replace(', ', '-').replace(' ', '-')}-{i + 1}.nii.gz"
                write_whole(self._folder / name, gzip.compress(image.to_bytes(), mtime=0))
                names.append(name)
        if self._model.patient_data:
            write_whole(
                folder / "PATIENT_DATA.txt",
                "From a model that was trained on raw latents of patients: handle these as their scans.\n",
            )
        return names

    def _viewer(self, samples: Samples) -> str | None:
        """The page with real and synthetic volumes; None where the package that carries it is missing."""
        count, affine = self._settings.volumes, self._affine()
        viewed: list[ViewedVolume] = []
        first = next((request for request, _ in samples.values() if request.rows), None)
        for place, row in enumerate(first.rows[:count] if first else range(count)):
            name = f"patient {place + 1}, scanned at {self._model.sites[self._held.site[row]]}"
            viewed.append(ViewedVolume(name, "real, held out", self._scan(row), affine))
        real = len(viewed)
        for kind, (request, scans) in samples.items():
            for i, volume in enumerate(scans.volumes[:count]):
                who = f"patient {i + 1}, " if request.rows else ""
                site = f"{self._model.sites[request.sites[i]]} style, " if request.sites else ""
                name = f"{who}{site}sample {i + 1}"
                viewed.append(ViewedVolume(name, f"synthetic, told {kind}", _array(volume), affine))
        path = self._folder / "viewer.html"
        try:
            write_viewer(
                path,
                viewed,
                title=f"{self._plan.name}: real and synthetic volumes",
                text="Left and right can show any two of these volumes.",
                patient_data=True,  # real scans are among them
                shown=(0, real),
            )
        except ViewerMissing as missing:
            path.unlink(missing_ok=True)
            write_whole(self._folder / "viewer.txt", f"{missing}\n")
            return None
        return path.name

    def _affine(self) -> np.ndarray:
        """The prepared grid around the origin: samples lie in no patient."""
        volumes = self._plan.volumes
        affine = np.diag([*volumes.spacing_mm, 1.0])
        affine[:3, 3] = [
            -(n - 1) / 2 * edge for n, edge in zip(volumes.shape, volumes.spacing_mm, strict=True)
        ]
        return affine

    def _scan(self, row: int) -> Volume:
        return self._decode(self._held.latents[row : row + 1])[0]

    def _decode(self, latents: Tensor) -> list[Volume]:
        decoded = torch.cat([self._tokenizer.decode(x) for x in torch.split(latents, 16)]).clamp(0, 1)
        return [_array(volume) for volume in decoded]


def _array(volume: Tensor) -> Volume:
    array: Volume = volume[0].numpy()
    return array


def _repeated(request: Request, count: int) -> Request:
    """The first of a request, `count` times."""
    return dataclasses.replace(
        request,
        conditions=request.conditions.each(lambda t: t[:1].expand(count, *t.shape[1:])),
        rows=request.rows[:1] * count,
        sites=request.sites[:1] * count,
        patient=request.patient[:1] * count,
    )
