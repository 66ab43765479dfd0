"""Downstream networks: what is trained with labels on top of the pretrained content branch, and without it.

`SegmentationNetwork`: content tokens and hidden states of the encoder, brought from the token grid to the
latent grid, joined with the latents, read out to voxels by a sub-voxel shuffle; as UNETR, but without
convolutions at full resolution, which take the time on a CPU, and with MONAI's residual units, whose
shortcuts are not normalised (UNETR's blocks, norms affine, reached a Dice of .35 in 100 steps on 20 scans
where these reach .66). `ClassificationNetwork`: one linear map of pooled content. `SmallUNet` is the baseline
without an encoder: a MONAI U-Net over the same latents, so that all networks see the same input and the
frozen tokenizer is everybody's stem. "From scratch" is the same network around an encoder that was not
pretrained.

Does not do: train (`client/training/finetuning.py`), measure (`simulations/downstream/evaluate.py`), or read
style: the fused decoder and the style branch of pretraining are left out.

Axes: b = scans, c = latent channels, d h w = latent voxels, D H W = voxels, n = tokens, k = content channels.
Source: UNETR (arXiv:2103.10504) for skips of hidden states; sub-pixel convolution (arXiv:1609.05158).
"""

import copy
from collections.abc import Mapping
from typing import Literal

import torch
from jaxtyping import Float
from monai.networks.blocks import Convolution, ResidualUnit
from monai.networks.nets import UNet
from monai.networks.utils import pixelshuffle
from torch import Tensor, nn

from meduet_models.factors import normalise
from meduet_models.meduet import FactorNetwork, layer_normed
from meduet_models.tokenizer.tokenizer import STRIDE

Task = Literal["segmentation", "classification"]

_CONTENT_PARTS = ("embed", "encoder", "content_head")
_WIDTH = 32
_AT_ONCE = 16


class ContentEncoder(nn.Module):
    """The part of a pretrained network that content comes from: a copy, trainable or frozen."""

    def __init__(self, network: FactorNetwork, *, trainable: bool) -> None:
        super().__init__()
        self.branch = copy.deepcopy(network)
        for name in [name for name, _ in self.branch.named_children() if name not in _CONTENT_PARTS]:
            delattr(self.branch, name)
        self.branch.requires_grad_(trainable)
        self.trainable = trainable
        depth = network.config.depth
        self.tapped = sorted({max(0, round(depth * quarter / 4) - 1) for quarter in (1, 2, 3)} - {depth - 1})
        """Blocks whose hidden states become skips: at a quarter, half and three quarters of the depth."""

    def forward(
        self, latents: Float[Tensor, "b c d h w"]
    ) -> tuple[Float[Tensor, "b n k"], list[Float[Tensor, "b n k"]]]:
        """Content tokens (erasure included) and the tapped hidden states, layer-normed."""
        with torch.set_grad_enabled(self.trainable and torch.is_grad_enabled()):
            encoder = self.branch.encoder
            states = encoder.hidden_states(self.branch.embed_latents(latents))
            content = self.branch.content_head(encoder.norm(states[-1]))
            return self.branch.erased(content), [layer_normed(states[i]) for i in self.tapped]


class SegmentationNetwork(nn.Module):
    """Latents to a class per voxel."""

    def __init__(self, network: FactorNetwork, classes: int, *, trainable: bool, seed: int = 0) -> None:
        """Around a copy of `network`; the head starts from `seed`, whatever was drawn before."""
        super().__init__()
        config = network.config
        self.encoder = ContentEncoder(network, trainable=trainable)
        self.token_grid = config.token_grid
        with torch.device("meta"):  # no global random numbers for weights that are replaced at once
            self.head = nn.ModuleDict(
                {
                    "narrow": nn.Linear(config.width * (1 + len(self.encoder.tapped)), 2 * _WIDTH),
                    "mix": ResidualUnit(3, 2 * _WIDTH, 2 * _WIDTH),
                    "up": Convolution(3, 2 * _WIDTH, _WIDTH, config.patch_size, is_transposed=True),
                    "latents": ResidualUnit(3, 2 * config.latent_channels, _WIDTH),
                    "join": ResidualUnit(3, 2 * _WIDTH, _WIDTH, last_conv_only=True),
                    "predict": nn.Conv3d(_WIDTH, classes * STRIDE**3, 1),
                }
            )
        initialise(self.head, seed)

    def forward(self, latents: Float[Tensor, "b c d h w"]) -> Float[Tensor, "b classes D H W"]:
        """Logits on the grid of the volumes that were encoded."""
        content, states = self.encoder(latents)
        tokens = self.head["narrow"](torch.cat([content, *states], dim=2))  # b n, two widths
        grid = tokens.transpose(1, 2).unflatten(2, self.token_grid)
        up = self.head["up"](self.head["mix"](grid))  # b width d h w
        both = torch.cat([normalise(latents), self.encoder.branch.standardise(latents)], dim=1)
        joined = self.head["join"](torch.cat([up, self.head["latents"](both)], dim=1))
        logits: Tensor = pixelshuffle(self.head["predict"](joined), 3, STRIDE)
        return logits


class ClassificationNetwork(nn.Module):
    """Latents to a class per scan: a linear map of pooled content."""

    def __init__(self, network: FactorNetwork, classes: int, *, trainable: bool, seed: int = 0) -> None:
        """Around a copy of `network`; the head starts from `seed`, whatever was drawn before."""
        super().__init__()
        self.encoder = ContentEncoder(network, trainable=trainable)
        with torch.device("meta"):
            self.head = nn.Linear(network.config.width, classes)
        initialise(self.head, seed)

    def forward(self, latents: Float[Tensor, "b c d h w"]) -> Float[Tensor, "b classes"]:
        """Logits of the classes."""
        logits: Tensor = self.head(self.encoder(latents)[0].mean(dim=1))
        return logits


class SmallUNet(nn.Module):
    """The baseline: a MONAI U-Net of two resolutions over latents as they are and normalised per scan."""

    def __init__(self, latent_channels: int, classes: int, task: Task, *, seed: int = 0) -> None:
        super().__init__()
        self.task = task
        outputs = classes * (STRIDE**3 if task == "segmentation" else 1)
        with torch.device("meta"):
            channels = (_WIDTH, 2 * _WIDTH, 2 * _WIDTH)
            unet = UNet(3, 2 * latent_channels, _WIDTH, channels, (1, 2), num_res_units=2)
            self.head = nn.ModuleDict({"unet": unet, "predict": nn.Conv3d(_WIDTH, outputs, 1)})
        initialise(self.head, seed)

    def forward(
        self, latents: Float[Tensor, "b c d h w"]
    ) -> Float[Tensor, "b classes D H W"] | Float[Tensor, "b classes"]:
        """Logits per voxel, or per scan (the mean over the latent grid).

        Raises `ValueError` for a latent grid with an odd axis, which one halving does not divide.
        """
        if any(size % 2 for size in latents.shape[2:]):
            raise ValueError(f"Expected an even latent grid for the U-Net; got {tuple(latents.shape[2:])}.")
        out: Tensor = self.head["predict"](self.head["unet"](torch.cat([normalise(latents), latents], dim=1)))
        shuffled: Tensor = (
            pixelshuffle(out, 3, STRIDE) if self.task == "segmentation" else out.mean((2, 3, 4))
        )
        return shuffled


DownstreamNetwork = SegmentationNetwork | ClassificationNetwork | SmallUNet


def with_head(
    network: FactorNetwork, task: Task, classes: int, *, trainable: bool, seed: int = 0
) -> SegmentationNetwork | ClassificationNetwork:
    """The network of `task` around a copy of `network`."""
    kind = SegmentationNetwork if task == "segmentation" else ClassificationNetwork
    return kind(network, classes, trainable=trainable, seed=seed)


def trained_keys(network: DownstreamNetwork) -> list[str]:
    """What fine-tuning changes: in a federation, what travels back. Constants and a frozen encoder are not in
    it."""
    return [name for name, parameter in network.named_parameters() if parameter.requires_grad]


def encoder_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The encoder among the tensors of a network with a head: what sites agree on by its hash."""
    return {name: tensor for name, tensor in tensors.items() if name.startswith("encoder.")}


@torch.inference_mode()
def predict(network: DownstreamNetwork, latents: Float[Tensor, "b c d h w"]) -> Tensor:
    """Logits of many scans, in batches, on the CPU."""
    device = next(network.parameters()).device
    return torch.cat([network(chunk.to(device)).cpu() for chunk in torch.split(latents, _AT_ONCE)])


def initialise(module: nn.Module, seed: int) -> None:
    """Give a module made on the meta device its weights: He's for convolutions, Xavier's for linear maps.

    Biases start at 0, PReLU's slopes at PyTorch's .25. From `seed` alone.
    """
    module.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(seed)
    for part in module.modules():
        match part:
            case nn.Conv3d() | nn.ConvTranspose3d():
                nn.init.kaiming_normal_(part.weight, a=0.01, generator=generator)
            case nn.Linear():
                nn.init.xavier_uniform_(part.weight, generator=generator)
            case nn.PReLU():
                nn.init.constant_(part.weight, part.init)
                continue
            case _:
                if any(True for _ in part.parameters(recurse=False)) or any(
                    True for _ in part.buffers(recurse=False)
                ):
                    raise TypeError(f"Expected parts with a known start; got {type(part).__name__}.")
                continue
        if part.bias is not None:
            nn.init.zeros_(part.bias)
