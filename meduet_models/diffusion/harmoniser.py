"""One scan in another site's style, on its own grid: prepared, encoded, moved, decoded, laid back.

Intensities return to the scan's own range. Outside the part that the model saw the volume holds the lower end
of that range. What it does not do: read or write files (`client/products/harmonisation.py`), or choose a
style (`harmonisation.py`).

Axes: x y z = voxels as the scan stores them.
"""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float32, Float64

from forms.form import build
from meduet_models.diffusion.artefact import GenerativeModel
from meduet_models.diffusion.harmonisation import HarmonisationSettings, check, harmonise, harmonise_whole
from meduet_models.scan_latents import encoded
from meduet_models.tokenizer.tokenizer import Tokenizer
from meduet_models.tokenizer.whole_scans import decode_whole
from scans.scans import Scan
from scans.volume_plan import VolumePlan
from scans.volumes import intensity_range, lay_back, ras_spacing
from scans.whole_volumes import WholeVolume, lay_back_whole

OnStep = Callable[[int, int], None]


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
