"""The frozen tokenizer that all sites share: volume <-> latent, a quarter of the resolution per axis.

Its hash, over weights and settings, is pinned in the plan, so that two sites never mean different things by
a latent. Kinds: `shipped` (ours, small, trained on phantoms; see docs/tokenizer.md), `file` (ours, from a
path), `maisi` (the paper's). The latent is the posterior's mean: encoding twice gives the same numbers, and
what is cached is no draw. What it does not do: train (`server/tokenizer/training.py`), cache
(`client/latents/cache.py`), or protect anyone: the decoder is public, so a latent is a scan.

Axes: b = volumes, c = latent channels, D H W = voxels, d h w = D/4 H/4 W/4.
"""

import dataclasses
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol

import torch
from jaxtyping import Float
from torch import Tensor, nn

from forms.form import build
from forms.json_text import canonical, read_json, sha256_of
from forms.ranges import Range, shown
from meduet_models.tokenizer.maisi import MaisiConfig, load_maisi
from meduet_models.tokenizer.patch_pca import PatchMoments, PatchPCA, principal_components
from meduet_models.tokenizer.patch_vae import PatchVAE, PatchVAEConfig
from meduet_models.weights import load_weights, save_weights, sha256_of_tensors

STRIDE = 4
OVERLAP = 0.4  # of neighbouring windows: MAISI's published inference setting
DESCRIPTION_KEY = "tokenizer"  # of a weights file's provenance


@dataclass(frozen=True, kw_only=True)
class TokenizerSpec:
    """Which tokenizer. The paper's: kind `maisi` with its checkpoint; crops of 96 cubed give 4 x 24 cubed."""

    kind: Literal["shipped", "file", "maisi"] = "shipped"
    """`shipped`: ours, inside the package. `file`: ours, at `path`. `maisi`: a MAISI checkpoint at `path`."""
    channels: Annotated[int, Range(at_least=1, at_most=256)] = 8
    """Latent channels; shipped: 4 and 8; MAISI's: 4."""
    path: str | None = None
    """Weights file of the kinds `file` and `maisi`."""
    sliding_window: Annotated[tuple[int, int, int], Range(at_least=STRIDE, at_most=4096)] | None = None
    """Voxels per axis of the window that slides over larger volumes; none: whole volumes at once."""
    num_splits: Annotated[int, Range(at_least=1, at_most=256)] = 1
    """MAISI only: slabs each convolution is computed in; more takes less memory, and gives the same."""


class Codec(Protocol):
    """A deterministic pair of maps, as `PatchPCA`, `PatchVAE` and `Maisi` offer it."""

    def posterior_mean(self, volumes: Tensor) -> Tensor:
        """Volumes to latents."""
        ...

    def reconstruct(self, latents: Tensor) -> Tensor:
        """Latents to volumes."""
        ...


class Tokenizer(nn.Module):
    """A frozen codec with a scale, a hash and, for large volumes, a sliding window."""

    def __init__(
        self,
        codec: nn.Module,
        architecture: Mapping[str, Any],
        *,
        latent_scale: float = 1.0,
        sliding_window: tuple[int, int, int] | None = None,
    ) -> None:
        """Freeze `codec`.

        `architecture` describes it (JSON values; with "kind" and "channels") and enters the hash; latents are
        multiplied by `latent_scale`.
        """
        super().__init__()
        if sliding_window is not None and any(side < STRIDE or side % STRIDE for side in sliding_window):
            raise ValueError(
                f"Expected sliding_window sides that are multiples of {STRIDE}; got {sliding_window}."
            )
        self.codec = codec.requires_grad_(False).eval()
        self.latent_channels = int(architecture["channels"])
        self.stride = STRIDE
        self.sliding_window = sliding_window
        self.name = f"{architecture['kind']}-{self.latent_channels}ch"
        self.description: dict[str, Any] = {
            "architecture": dict(architecture),
            "latent_scale": latent_scale,
            "sliding_window": sliding_window,
        }
        self.sha256 = sha256_of(f"{canonical(self.description)}\n{sha256_of_tensors(codec.state_dict())}")
        self._latent_scale = latent_scale

    def train(self, mode: bool = True) -> "Tokenizer":
        """Stay in evaluation mode: this module is frozen, also inside one that trains."""
        super().train(False)
        return self

    @torch.no_grad()
    def encode(self, volumes: Float[Tensor, "b 1 D H W"]) -> Float[Tensor, "b c d h w"]:
        """Posterior mean of `volumes` in [0, 1], scaled to about unit variance; no gradient, no random draw.

        Raises `ValueError` when a side is not a multiple of the stride.
        """
        sides = tuple(volumes.shape[2:])
        if any(side % STRIDE for side in sides):
            raise ValueError(
                f"Expected volume sides that are multiples of {STRIDE}; got {sides}. Crop or pad first."
            )
        codec: Codec = self.codec  # type: ignore[assignment]
        if self.sliding_window is not None and _exceeds(sides, self.sliding_window):
            latents = _slide(volumes, self.sliding_window, codec.posterior_mean, step=STRIDE)
        else:
            latents = codec.posterior_mean(volumes)
        return latents * self._latent_scale

    @torch.no_grad()
    def decode(self, latents: Float[Tensor, "b c d h w"]) -> Float[Tensor, "b 1 D H W"]:
        """Volumes of `latents`; intensities about [0, 1], not clipped; no gradient."""
        codec: Codec = self.codec  # type: ignore[assignment]
        latents = latents / self._latent_scale
        if self.sliding_window is not None:
            window = tuple(side // STRIDE for side in self.sliding_window)
            if _exceeds(tuple(latents.shape[2:]), window):
                return _slide(latents, window, codec.reconstruct, step=1)
        return codec.reconstruct(latents)


def load_tokenizer(spec: TokenizerSpec) -> Tokenizer:
    """The tokenizer that `spec` names, float32, on the CPU.

    Raises `ValueError` when its file is absent, damaged, or of another width than `spec` says.
    """
    if spec.kind == "shipped":
        return _load_ours(shipped_tokenizer(spec.channels), spec)
    if spec.path is None:
        raise ValueError(
            f"Expected the path of a weights file for a tokenizer of kind {spec.kind}; got none."
        )
    if spec.kind == "file":
        return _load_ours(Path(spec.path), spec)
    config = MaisiConfig(channels=spec.channels)
    return Tokenizer(
        load_maisi(spec.path, config, spec.num_splits),
        {"kind": "maisi", **dataclasses.asdict(config)},
        sliding_window=spec.sliding_window,
    )


def shipped_tokenizer(channels: int) -> Path:
    """Where the package's tokenizer of this width lies, if there is one."""
    return Path(__file__).with_name(f"tokenizer_{channels}ch.safetensors")


def load_tokenizer_file(path: Path, sliding_window: tuple[int, int, int] | None = None) -> Tokenizer:
    """A tokenizer of ours from its file, of whatever width it says. Raises `ValueError` when it is none."""
    _, provenance = load_weights(path)
    if DESCRIPTION_KEY not in provenance:
        raise ValueError(f"Expected {path} to be a tokenizer of FedMeDUET; its header says nothing of one.")
    channels = _description(provenance, path).architecture["channels"]
    spec = TokenizerSpec(kind="file", path=str(path), channels=channels, sliding_window=sliding_window)
    return load_tokenizer(spec)


def pca_tokenizer(moments: PatchMoments, channels: int) -> Tokenizer:
    """The linear tokenizer of these patches: what sites can compute together in one exchange of sums."""
    codec = PatchPCA(channels)
    codec.start_from(principal_components(moments, channels))
    return Tokenizer(codec, {"kind": "patch_pca", "channels": channels})


def vae_tokenizer(vae: PatchVAE, config: PatchVAEConfig, latent_scale: float) -> Tokenizer:
    """The small tokenizer around a trained `vae`; latents are multiplied by `latent_scale`."""
    return Tokenizer(vae, {"kind": "patch_vae", **dataclasses.asdict(config)}, latent_scale=latent_scale)


def save_tokenizer(
    path: str | Path,
    tokenizer: Tokenizer,
    provenance: Mapping[str, str],
    dtype: torch.dtype = torch.float32,
) -> None:
    """Write a tokenizer of ours (not MAISI) so that kind `file` finds it; its window is the reader's choice.

    Raises `ValueError` unless `path` ends in .safetensors, and when storing as `dtype` would change a weight:
    what is loaded must have the hash of what was saved.
    """
    if Path(path).suffix != ".safetensors":
        raise ValueError(f"Expected a file name that ends in .safetensors; got {Path(path).name}.")
    state = tokenizer.codec.state_dict()
    stored = {name: t.to(dtype) for name, t in state.items()}
    if changed := [name for name, t in state.items() if not torch.equal(stored[name].to(t.dtype), t)]:
        raise ValueError(
            f"Expected weights that {dtype} holds exactly; {changed[0]!r} is not. Round it first."
        )
    description = {k: v for k, v in tokenizer.description.items() if k != "sliding_window"}
    save_weights(path, stored, {**provenance, DESCRIPTION_KEY: json.dumps(description, sort_keys=True)})


def _load_ours(path: Path, spec: TokenizerSpec) -> Tokenizer:
    if spec.kind == "shipped" and not path.is_file():
        here = sorted(p.name for p in path.parent.glob("tokenizer_*ch.safetensors"))
        raise ValueError(
            f"Expected {path.name} beside the code; found {', '.join(here) or 'none'}. Choose among them, "
            "or give a file (kind: file); a Flower bundle carries code only."
        )
    tensors, provenance = load_weights(path)
    if DESCRIPTION_KEY not in provenance:
        raise ValueError(f"Expected {path} to be a tokenizer of FedMeDUET; its header says nothing of one.")
    description = _description(provenance, path)
    architecture = description.architecture
    if architecture["channels"] != spec.channels:
        raise ValueError(
            f"Expected {spec.channels} latent channels; {path.name} has {architecture['channels']}. "
            "Set channels to that, or choose another file."
        )
    sizes = {k: v for k, v in architecture.items() if k != "kind"}
    codec: nn.Module
    with torch.device("meta"):  # no random numbers for weights that are replaced at once
        if architecture["kind"] == "patch_pca":
            codec = PatchPCA(spec.channels)
        elif architecture["kind"] == "patch_vae":
            codec = PatchVAE(build(PatchVAEConfig, sizes, f"the architecture in {path.name}"))
        else:
            raise ValueError(
                f"Expected a tokenizer of kind patch_pca or patch_vae; got {architecture['kind']!r}."
            )
    try:
        codec.load_state_dict({k: t.to(torch.float32) for k, t in tensors.items()}, assign=True)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"Expected the weights in {path} to fit its own description; {reason}") from None
    return Tokenizer(
        codec, architecture, latent_scale=description.latent_scale, sliding_window=spec.sliding_window
    )


@dataclass(frozen=True)
class _Description:
    """What a file says of its tokenizer."""

    architecture: dict[str, Any]
    latent_scale: float


def _description(provenance: Mapping[str, str], path: Path) -> _Description:
    what = f"the description of a tokenizer in {path.name}"
    values = read_json(provenance[DESCRIPTION_KEY], what)
    if not isinstance(values, dict) or not isinstance(values.get("architecture"), dict):
        raise ValueError(f"Expected {what}; got another.")
    architecture = values["architecture"]
    channels = architecture.get("channels")
    if not isinstance(architecture.get("kind"), str) or not isinstance(channels, int) or channels < 1:
        raise ValueError(f"Expected {what} with its kind and channels; got another.")
    scale = values.get("latent_scale")
    if not isinstance(scale, float | int) or isinstance(scale, bool) or not 0 < scale < 1e6:
        raise ValueError(f"Expected {what} with a latent_scale above 0; got {shown(scale)}.")
    return _Description(architecture, float(scale))


def _exceeds(sides: tuple[int, ...], window: tuple[int, ...]) -> bool:
    return any(side > edge for side, edge in zip(sides, window, strict=True))


def _slide(x: Tensor, window: tuple[int, ...], function: Callable[[Tensor], Tensor], step: int) -> Tensor:
    """Apply `function` to overlapping windows of `x` and blend; windows start at multiples of `step`."""
    # Imported here: MONAI takes a second to import, and whole volumes do not need it.
    from monai.inferers.utils import sliding_window_inference

    # A window may be longer than the volume; MONAI would pad there, and padding changes latents.
    window = tuple(min(edge, side) for edge, side in zip(window, x.shape[2:], strict=True))
    strides = [max(step, int(edge * (1 - OVERLAP)) // step * step) for edge in window]
    # MONAI takes int(window * (1 - overlap)) as stride; half a voxel more keeps rounding on our side.
    overlap = [max(0.0, 1 - (stride + 0.5) / edge) for stride, edge in zip(strides, window, strict=True)]
    blended: Tensor = sliding_window_inference(
        x, window, 1, function, overlap=overlap, mode="gaussian", sw_device=x.device, device=x.device
    )
    return blended
