"""The downstream network of a plan before its first step: on tokens, on the volume, or on both.

What it starts from is named by one hash, over everything in it that is not its head. What this file does not
do: train, or know a plan.
"""

from pathlib import Path

from torch import nn

from meduet_models.anatomy_start import AnatomyStart, started_unet
from meduet_models.downstream.kinds import NetworkKind
from meduet_models.downstream.networks import PretrainedNetwork, encoder_tensors
from meduet_models.downstream.task import Task
from meduet_models.downstream.volume_networks import VolumeSegmenter
from meduet_models.meduet import FactorNetwork
from meduet_models.weights import sha256_of_tensors

StartedNetwork = PretrainedNetwork | VolumeSegmenter


def starting_network(
    task: Task,
    kind: NetworkKind,
    pretrained: FactorNetwork,
    classes: int,
    *,
    trainable: bool,
    seed: int = 0,
    anatomy_start: AnatomyStart = "none",
    anatomy: Path | None = None,
) -> StartedNetwork:
    """A head from `seed` around a copy of the content branch of `pretrained`, a U-Net that starts from
    `anatomy_start` (`none`: from `seed`; else the file `anatomy`, or the shipped one), or both. Raises as
    `started_unet`."""
    if kind == "tokens":
        return task.network(pretrained, classes, trainable=trainable, seed=seed)
    return VolumeSegmenter(
        started_unet(anatomy_start, seed=seed, path=anatomy),
        classes,
        content=pretrained if kind == "joined" else None,
        trainable=trainable,
        seed=seed,
    )


def start_sha256(network: nn.Module) -> str:
    """Hash of all that a downstream network starts from: everything but its head."""
    return sha256_of_tensors(encoder_tensors(network.state_dict()))
