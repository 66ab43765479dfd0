"""Downstream networks: what is trained with labels on top of the pretrained content branch, and without it.

A `PretrainedNetwork` is a copy of the content branch with a head; which head, its task says
(`segmentation.py`, `PooledNetwork` for a class or a number per scan). "From scratch" is the same network
around an encoder that was not pretrained; `unet.py` is a baseline without one.

Does not do: train (`client/training/finetuning.py`), measure (`simulations/downstream/evaluate.py`), or read
style: the fused decoder and the style branch of pretraining are left out.

Axes: b = scans, c = latent channels, d h w = latent voxels, n = tokens, k = content channels.
"""

import copy
from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor, nn

from meduet_models.meduet import FactorNetwork, layer_normed

_CONTENT_PARTS = ("embed", "embed_volume", "encoder", "content_head")
WIDTH = 32
"""Channels of what is made beside the encoder."""
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


class PretrainedNetwork(nn.Module):
    """A copy of the content branch, and a head."""

    encoder: ContentEncoder


class PooledNetwork(PretrainedNetwork):
    """Latents to numbers per scan: a linear map of pooled content."""

    def __init__(self, network: FactorNetwork, outputs: int, *, trainable: bool, seed: int = 0) -> None:
        """Around a copy of `network`; the head starts from `seed`, whatever was drawn before."""
        super().__init__()
        self.encoder = ContentEncoder(network, trainable=trainable)
        with torch.device("meta"):  # no global random numbers for weights that are replaced at once
            self.head = nn.Linear(network.config.width, outputs)
        initialise(self.head, seed)

    def forward(self, latents: Float[Tensor, "b c d h w"]) -> Float[Tensor, "b outputs"]:
        """Logits of classes, or numbers."""
        outputs: Tensor = self.head(self.encoder(latents)[0].mean(dim=1))
        return outputs


def trained_keys(network: nn.Module) -> list[str]:
    """What fine-tuning changes: in a federation, what travels back. Constants and a frozen encoder are not in
    it."""
    return [name for name, parameter in network.named_parameters() if parameter.requires_grad]


def encoder_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The encoder among the tensors of a network with a head: what sites agree on by its hash."""
    return {name: tensor for name, tensor in tensors.items() if name.startswith("encoder.")}


@torch.inference_mode()
def predict(network: nn.Module, *seen: Tensor) -> Tensor:
    """Outputs of many scans, in batches, on the CPU; `seen`: what the network takes of them, [b ...] each."""
    device = next(network.parameters()).device
    chunks = zip(*(torch.split(tensor, _AT_ONCE) for tensor in seen), strict=True)
    return torch.cat([network(*(part.to(device).float() for part in chunk)).cpu() for chunk in chunks])


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
