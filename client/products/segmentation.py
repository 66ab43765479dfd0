"""Segmenting scans at a site with a fine-tuned network: file in, a label map on the scan's own grid out.

The scan is read, prepared and encoded as for training. A network of whole scans (`volumes.extent: scan`)
slides over all of the foreground, windows overlap by half and are blended; one of crops sees the central
crop. Outside of that is background: what the model did not see, it does not label.

A label map of a scan is the patient's, as the scan is. It is predicted, not drawn, and the JSON beside it
says so. What this file does not do: train, ask a server, or measure (`simulations/downstream/measuring.py`).

Axes: x y z = voxels as the scan stores them, d h w = latents, D H W = voxels that were encoded.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Float32, Float64, Int16
from torch import Tensor

from client.products.volume_files import VolumeFile
from federation.exchanges.finetuning import FinetunePlan
from federation.plan.plan import RunPlan
from meduet_models.downstream.networks import predict
from meduet_models.downstream.segmentation import likeliest
from meduet_models.downstream.starting import StartedNetwork, starting_network
from meduet_models.downstream.tasks import task_of
from meduet_models.downstream.volume_networks import VolumeSegmenter
from meduet_models.downstream.whole_scans import predict_voxels
from meduet_models.meduet import FactorNetwork
from meduet_models.scan_latents import encoded
from meduet_models.tokenizer.tokenizer import Tokenizer
from meduet_models.weights import load_weights, sha256_of_file
from scans.scans import Scan
from scans.volume_plan import VolumePlan
from scans.volumes import Geometry, Prepared
from scans.whole_volumes import WholeVolume, lay_back_whole


@dataclass(frozen=True, eq=False)
class FinetunedModel:
    """What a federated fine-tuning leaves, ready to use."""

    network: StartedNetwork
    """In evaluation mode, on the CPU."""
    plan: RunPlan
    finetuning: FinetunePlan
    sha256: str
    """Hash of the file."""


def load_finetuned(path: Path) -> FinetunedModel:
    """Read `finetuned.safetensors` of a fine-tuning.

    Raises `ValueError` when the file is damaged, or is no fine-tuned segmenter.
    """
    tensors, said = load_weights(path)
    if not {"plan", "finetuning"} <= set(said):
        raise ValueError(
            f"Expected finetuned.safetensors of a fine-tuning; the header of {path.name} names no such plan."
        )
    plan, finetuning = RunPlan.from_json(said["plan"]), FinetunePlan.from_json(said["finetuning"])
    local = finetuning.local
    if not task_of(local.task).per_voxel:
        raise ValueError(f"Expected a network that segments in {path.name}; it was trained for {local.task}.")
    network = starting_network(
        task_of(local.task), local.network, FactorNetwork(plan.network), local.classes, trainable=False
    )
    expected = {name: tensor.shape for name, tensor in network.state_dict().items()}
    if expected != {name: tensor.shape for name, tensor in tensors.items()}:
        raise ValueError(f"Expected the weights of the fine-tuning that {path.name} names; they are others.")
    network.load_state_dict(tensors)
    return FinetunedModel(network.eval(), plan, finetuning, sha256_of_file(path))


class Segmenter:
    """One fine-tuned network and its tokenizer, for any number of scans."""

    def __init__(
        self, model: FinetunedModel, tokenizer: Tokenizer, device: torch.device | str = "cpu"
    ) -> None:
        """Raises `ValueError` unless the network was trained on latents of this tokenizer."""
        if (wanted := model.plan.tokenizer_sha256) != tokenizer.sha256:
            raise ValueError(
                f"Expected the model's tokenizer {wanted[:8]}…; got {tokenizer.sha256[:8]}… "
                f"({tokenizer.name}). Give the one that the federation agreed on."
            )
        self._device = torch.device(device)
        self._network, self._tokenizer = model.network.to(self._device), tokenizer.to(self._device)
        self._model = model
        self.volumes: VolumePlan = model.plan.volumes
        """How scans are prepared: as for training."""

    def __call__(self, scan: Scan) -> VolumeFile:
        """The class of every voxel of `scan`."""
        prepared, latents = encoded(scan, self.volumes, self._tokenizer, self._device)
        classes, affine = laid_back(self._logits(prepared, latents), prepared.geometry)
        local = self._model.finetuning.local
        facts = {
            "what": "A label map: predicted by a network, not drawn. Not for diagnosis.",
            "patient_data": True,
            "scan_id": scan.scan_id,
            "model_sha256": self._model.sha256,
            "finetuning_sha256": self._model.finetuning.sha256,
            "tokenizer_sha256": self._tokenizer.sha256,
            "classes": local.classes,
            "label_values": {str(value): label for value, label in local.label_values.items()},
            "voxels": {str(label): int((classes == label).sum()) for label in range(1, local.classes)},
        }
        stored = classes.astype(np.uint8 if local.classes <= 256 else np.int16)
        return VolumeFile(stored, affine, facts, "FedMeDUET: predicted label map, not drawn")

    def _logits(
        self, prepared: Prepared, latents: Float32[Tensor, "c d h w"]
    ) -> Float[Tensor, "classes D H W"]:
        network = self._network
        if isinstance(network, VolumeSegmenter):
            volume = prepared.volume.half()[None]  # as it is kept for training
            seen = (volume, latents[None]) if network.reads_latents else (volume,)
            return predict(network, *seen)[0]
        if isinstance(prepared, WholeVolume):
            grid = self._model.plan.network.latent_grid
            return predict_voxels(lambda crops: predict(network, crops), latents, grid)
        return predict(network, latents[None])[0]


def laid_back(
    logits: Float[Tensor, "classes D H W"], geometry: Geometry
) -> tuple[Int16[np.ndarray, "x y z"], Float64[np.ndarray, "4 4"]]:
    """The likeliest class of every voxel of the scan, background where nothing was encoded; with the scan's
    affine."""
    return lay_back_whole(likeliest(logits[None])[0].to(torch.int16), geometry)
