"""MONAI's MAISI autoencoder behind our tokenizer, with a strict loader for the published checkpoint files.

Published files hold either the state dict itself or `{"unet_state_dict": state dict, ...}`; both are read,
with `torch.load(weights_only=True)`, as are safetensors. Nothing is guessed: the keys and shapes must be
exactly those of the network. Weights are not shipped here; their licences are NVIDIA's (CT: open model; MR:
non-commercial).
Source: MAISI, arXiv:2409.11169; MeDUET (arXiv:2602.17901) encodes with it, 96 cubed to 4 x 24 cubed.

Axes: b = volumes, c = latent channels (4), D H W = voxels, d h w = D/4 H/4 W/4.
"""

import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from meduet_models.weights import load_weights


@dataclass(frozen=True, kw_only=True)
class MaisiConfig:
    """Size of the MAISI autoencoder; the defaults are the published network (20.9 M parameters)."""

    channels: int = 4
    """Latent channels."""
    widths: tuple[int, int, int] = (64, 128, 256)
    """Features at full, half and quarter resolution."""
    blocks_per_level: tuple[int, int, int] = (2, 2, 2)
    """Residual blocks at each."""
    norm_groups: int = 32
    """Groups of the group norms."""


class Maisi(nn.Module):
    """The MAISI autoencoder as a codec: posterior mean in, volume out, no random draw."""

    def __init__(self, config: MaisiConfig, num_splits: int = 1) -> None:
        """Build the network. `num_splits`: slabs each convolution is computed in; more takes less memory."""
        super().__init__()
        # Imported here: MONAI's generation package takes seconds, and only this kind of tokenizer needs it.
        from monai.apps.generation.maisi.networks.autoencoderkl_maisi import AutoencoderKlMaisi

        self.network = AutoencoderKlMaisi(
            spatial_dims=3,
            in_channels=1,
            out_channels=1,
            latent_channels=config.channels,
            num_channels=config.widths,
            num_res_blocks=config.blocks_per_level,
            attention_levels=(False, False, False),
            norm_num_groups=config.norm_groups,
            norm_eps=1e-6,
            with_encoder_nonlocal_attn=False,
            with_decoder_nonlocal_attn=False,
            use_convtranspose=False,
            num_splits=num_splits,
            dim_split=1,
            norm_float16=False,
            print_info=False,
            save_mem=False,
        )

    def posterior_mean(self, volumes: Float[Tensor, "b 1 D H W"]) -> Float[Tensor, "b c d h w"]:
        """Mean of the latents; MeDUET's own preprocessing caches one random draw instead."""
        mean: Tensor = self.network.encode(volumes)[0]
        return mean

    def reconstruct(self, latents: Float[Tensor, "b c d h w"]) -> Float[Tensor, "b 1 D H W"]:
        """Volumes of these latents; not clipped to [0, 1]."""
        volumes: Tensor = self.network.decode(latents)
        return volumes


def load_maisi(path: str | Path, config: MaisiConfig, num_splits: int = 1) -> Maisi:
    """Build the network and fill it from `path` (.pt in either layout, or .safetensors), as float32.

    Raises `ValueError` when the file is absent, truncated or not a checkpoint, when it holds anything but
    tensors and plain values, or when a key is missing, unexpected or of another shape.
    """
    state = _state_dict(Path(path))
    with torch.device("meta"):  # no memory and no random numbers for weights that are replaced at once
        maisi = Maisi(config, num_splits)
    wanted = {name: tuple(t.shape) for name, t in maisi.network.state_dict().items()}
    where = f"Expected {path} to be a MAISI autoencoder of widths {config.widths}"
    if missing := sorted(wanted.keys() - state.keys()):
        raise ValueError(
            f"{where}; it lacks {len(missing)} keys, first {missing[0]!r}. Is it another network?"
        )
    if extra := sorted(state.keys() - wanted.keys()):
        raise ValueError(
            f"{where}; it has {len(extra)} keys too many, first {extra[0]!r}. Is it another network?"
        )
    for name, shape in wanted.items():
        if tuple(state[name].shape) != shape:
            raise ValueError(
                f"{where}; {name!r} should have shape {shape}, got {tuple(state[name].shape)}. "
                "Set the channels and widths it was trained with."
            )
    maisi.network.load_state_dict({k: t.to(torch.float32) for k, t in state.items()}, assign=True)
    return maisi


def _state_dict(path: Path) -> dict[str, Tensor]:
    if path.suffix == ".safetensors":
        return load_weights(path)[0]
    if not path.is_file():
        raise ValueError(f"Expected a MAISI checkpoint at {path}; there is none. Check the path.")
    broken = (
        f"Expected {path} to be a whole PyTorch checkpoint; it is cut short or foreign. Download it again."
    )
    try:
        with zipfile.ZipFile(path) as archive:  # a torch file is a zip; one cut short has lost its directory
            damaged = archive.testzip()
    except (zipfile.BadZipFile, OSError):
        raise ValueError(broken) from None
    if damaged is not None:
        raise ValueError(broken)
    try:
        unsafe = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        if unsafe:
            raise ValueError(
                f"Expected {path} to hold tensors only; it asks to run {unsafe[0]}. Do not load it; "
                "ask its author for the state dict."
            )
        content: Any = torch.load(path, map_location="cpu", weights_only=True)
    except RuntimeError:
        raise ValueError(broken) from None
    if isinstance(content, Mapping) and "unet_state_dict" in content:
        content = content["unet_state_dict"]
    if not isinstance(content, Mapping) or not all(isinstance(t, Tensor) for t in content.values()):
        raise ValueError(
            f"Expected {path} to hold a state dict, or one under 'unet_state_dict'; got neither. Wrong file?"
        )
    return dict(content)
