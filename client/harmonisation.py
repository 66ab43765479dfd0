"""Harmonising scans at a site: file in, the same patient as another site would have scanned her out.

A scan is read and prepared as for training, encoded, moved to the asked style, decoded, and laid back on its
own grid: the written NIfTI has the scan's shape and affine and overlays it in any viewer. Intensities return
to the scan's own range (its percentiles, or the CT window in HU, beyond which nothing is known). Outside the
prepared crop the model saw nothing, and the volume holds the lower end of that range: never the original, for
a picture half acquired and half made would be read as one. A model of whole scans (`volumes.extent: scan`)
sees all of the foreground, by windows that overlap and are blended.

A harmonised scan is still the patient's: it stays where the scan may be. It is not an acquired image, and its
header and the JSON beside it say so. What this file does not do: ask a server, or choose a style
(`meduet_models/diffusion/harmonisation.py`).

Axes: x y z = voxels as the scan stores them; d h w = the prepared volume.
"""

import dataclasses
import gzip
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from jaxtyping import Float32, Float64
from torch import Tensor

from client.latents.examples import ras_spacing
from client.latents.whole_scan import central_start
from forms.form import build
from meduet_models.diffusion.artefact import GenerativeModel
from meduet_models.diffusion.harmonisation import HarmonisationSettings, check, harmonise, harmonise_whole
from meduet_models.encoded_scan import EncodedScan
from meduet_models.tokenizer.tokenizer import Tokenizer
from meduet_models.tokenizer.whole_scans import decode_whole, encode_whole
from scans.nifti import is_nifti_name, nifti_stem
from scans.scans import Scan, UnusableScan
from scans.volume_plan import VolumePlan
from scans.volumes import Prepared, intensity_range, lay_back, prepare, read_scan
from scans.whole_volumes import WholeVolume, lay_back_whole, prepare_whole
from storage.files import write_whole

OnStep = Callable[[int, int], None]
_DESCRIPTION_BYTES = 79


@dataclass(frozen=True, eq=False)
class Harmonised:
    """A scan in another style, on its own grid."""

    array: Float32[np.ndarray, "x y z"]
    """Intensities in the range of the scan."""
    affine: Float64[np.ndarray, "4 4"]
    """The scan's own."""
    facts: Mapping[str, Any]
    """What it is, for the JSON beside it."""


class Harmoniser:
    """One model, tokenizer and request, for any number of scans."""

    def __init__(
        self,
        model: GenerativeModel,
        tokenizer: Tokenizer,
        settings: HarmonisationSettings,
        *,
        model_sha256: str = "",
        device: torch.device | str = "cpu",
    ) -> None:
        """Raises `ValueError`, before any scan is read, when model, tokenizer and request do not fit."""
        check(model, settings)
        check_tokenizer(model, tokenizer)
        device = torch.device(device)
        for network in (model.transformer, model.encoder, tokenizer):
            network.to(device)
        self._model, self._tokenizer = model, tokenizer
        self._settings, self._device, self._model_sha256 = settings, device, model_sha256
        self.volumes = volume_plan(model)
        """How scans are prepared: the model's own way."""

    def __call__(self, scan: Scan, on_step: OnStep = lambda done, total: None) -> Harmonised:
        """`scan` in the asked style. Raises `ValueError` when the model makes numbers that are not finite."""
        prepared, latents = encoded(scan, self.volumes, self._tokenizer, self._device)
        spacing = torch.from_numpy(ras_spacing(prepared.geometry))
        if isinstance(prepared, WholeVolume):
            moved = harmonise_whole(
                self._model, latents, prepared.foreground, self._settings, spacing, on_step
            )
            volume = decode_whole(self._tokenizer, moved, self._device).clamp_(0.0, 1.0)
        else:
            moved = harmonise(self._model, latents[None], self._settings, spacing[None], on_step)
            volume = self._tokenizer.decode(moved.to(self._device))[0].cpu().clamp(0.0, 1.0)
        if not bool(torch.isfinite(volume).all()):
            raise ValueError("Expected finite intensities; the model made others. Check its file.")
        low, high = intensity_range(scan.array, self.volumes)
        back = lay_back_whole if isinstance(prepared, WholeVolume) else lay_back
        array, affine = back(volume, prepared.geometry)
        inside, _ = back(torch.ones_like(volume), prepared.geometry)
        facts = {
            "what": "A harmonised scan: made by a network, not acquired. Not for diagnosis.",
            "patient_data": True,
            "scan_id": scan.scan_id,
            "model_sha256": self._model_sha256,
            "model_policy": self._model.policy,
            "tokenizer_sha256": self._tokenizer.sha256,
            **{k: v for k, v in dataclasses.asdict(self._settings).items() if k != "sampling"},
            **dataclasses.asdict(self._settings.sampling),
            "intensity_range": [low, high],
            "share_inside_crop": round(float((inside > 0.5).mean()), 6),
        }
        return Harmonised(low + array.astype(np.float32) * np.float32(high - low), affine, facts)


def volume_plan(model: GenerativeModel) -> VolumePlan:
    """How the model's scans became volumes."""
    return build(VolumePlan, model.volumes, "volumes of the model")


def check_tokenizer(model: GenerativeModel, tokenizer: Tokenizer) -> None:
    """Raise `ValueError` unless the model was trained on latents of this tokenizer."""
    if model.tokenizer_sha256 != tokenizer.sha256:
        raise ValueError(
            f"Expected the model's tokenizer {model.tokenizer_sha256[:8]}…; got {tokenizer.sha256[:8]}… "
            f"({tokenizer.name}). Give the one that the federation agreed on."
        )


def encoded(
    scan: Scan, volumes: VolumePlan, tokenizer: Tokenizer, device: torch.device | str
) -> tuple[Prepared, Float32[Tensor, "c d h w"]]:
    """A scan prepared and encoded as for training: its central crop or all of its foreground, as the plan
    says; latents on the CPU."""
    if volumes.extent == "scan":
        whole = prepare_whole(scan, volumes, tokenizer.stride)
        return whole, encode_whole(tokenizer, whole.volume, device).float()
    prepared = prepare(scan, volumes)
    return prepared, tokenizer.encode(prepared.volume[None].to(device))[0].float().cpu()


def encode_scan(
    scan: Scan, volumes: VolumePlan, tokenizer: Tokenizer, device: torch.device | str = "cpu"
) -> EncodedScan:
    """A scan as the centre may be given it, by somebody who has the right to: patient data. `device`: where
    the tokenizer is."""
    prepared, latents = encoded(scan, volumes, tokenizer, device)
    start = (0, 0, 0)
    if isinstance(prepared, WholeVolume):
        d, h, w = (side // tokenizer.stride for side in volumes.shape)
        start = central_start(prepared.foreground, (d, h, w))
    x, y, z = ras_spacing(prepared.geometry).tolist()
    return EncodedScan(
        latents=latents,
        tokenizer_sha256=tokenizer.sha256,
        volumes=dataclasses.asdict(volumes),
        geometry=prepared.geometry.to_dict(),
        spacing_mm=(x, y, z),
        start=start,
    )


def harmonise_files(
    scans: Sequence[Path],
    targets: Sequence[Path],
    harmoniser: Harmoniser,
    on_scan: Callable[[int, int], None] = lambda done, total: None,
    on_step: OnStep = lambda done, total: None,
) -> list[tuple[Path, str]]:
    """Harmonise each scan into its target, with a JSON beside it; returns what could not be used, and why.

    A scan that cannot be used stops no other. Raises `OSError` when a target cannot be written.
    """
    unusable: list[tuple[Path, str]] = []
    for done, (path, target) in enumerate(zip(scans, targets, strict=True), start=1):
        try:
            scan = read_scan(path, harmoniser.volumes.four_d)
            write_harmonised(target, harmoniser(scan, on_step))
        except UnusableScan as error:
            unusable.append((path, str(error)))
        on_scan(done, len(scans))
    return unusable


def write_harmonised(path: Path, harmonised: Harmonised) -> None:
    """Write a NIfTI and the JSON of the same name, each whole or not at all."""
    image = nib.Nifti1Image(harmonised.array, harmonised.affine)
    image.header.set_xyzt_units("mm")
    image.header["descrip"] = f"FedMeDUET: made, not acquired; style of {harmonised.facts['style']}".encode()[
        :_DESCRIPTION_BYTES
    ]
    content: bytes = image.to_bytes()
    if path.name.lower().endswith(".gz"):
        content = gzip.compress(content, mtime=0)  # the same volume is the same file
    write_whole(path, content)
    facts = json.dumps(dict(harmonised.facts), indent=1, sort_keys=True) + "\n"
    write_whole(path.with_name(f"{nifti_stem(path)}.json"), facts.encode())


def target_paths(scans: Sequence[Path], out: Path, style: str) -> list[Path]:
    """Where each scan's result goes: `out` itself if it names a NIfTI file, else a file in the folder `out`.

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
        targets = [out / f"{_stem(path)}_as_{style}.nii.gz" for path in scans]
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
