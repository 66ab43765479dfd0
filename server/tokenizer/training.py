"""Training the small tokenizer on phantoms: linear in closed form, then the residual VAE started from that.

Nothing here sees a patient: the volumes come from `random_phantoms.py`. The run is a function of its
settings: each step's batch is drawn from (seed, step), so a run that was stopped and resumed ends with the
same weights as one that was not (on the same machine and PyTorch). What is written is the moving average of
the weights, rounded to float16, with its provenance. Measuring a tokenizer is in `quality.py`.

Axes: b = volumes, c = latent channels, D H W = voxels.
"""

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce
from importlib.metadata import version
from operator import add
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from meduet_models.schedules import cosine, rise
from meduet_models.seeds import digest_of
from meduet_models.tokenizer.linear_decoder import NeighbourMoments
from meduet_models.tokenizer.patch_pca import PatchMoments, principal_components, to_patches
from meduet_models.tokenizer.patch_vae import POSTERIOR_DEVIATION, PatchVAE, PatchVAEConfig
from meduet_models.tokenizer.tokenizer import Tokenizer, pca_tokenizer, save_tokenizer, vae_tokenizer
from server.averaged_training import AveragedTraining, check_output
from server.tokenizer.random_phantoms import Recipe, draw_recipe, make_phantom

PHANTOM_SIDE = 40  # of the volumes in the training bank
CROP_SIDE = 32  # of what a step sees
ERROR_FLOOR = 1e-4  # mean squared error (40 dB) below which a volume is good enough

Report = Callable[[int, float], None]
"""Called after each step with its number (from 1) and the PSNR of its noisy crops, in dB."""


@dataclass(frozen=True, kw_only=True)
class TokenizerTraining:
    """Settings of a training run; with the code's version they determine the weights."""

    channels: int = 8
    """Latent channels."""
    steps: int = 2000
    """Optimiser steps."""
    seed: int = 0
    """Of phantoms, crops and draws."""
    num_phantoms: int = 3000
    """Phantoms made before the first step."""
    batch_size: int = 12
    """Crops per step."""
    learning_rate: float = 2e-3
    """Peak; rises over `warmup_steps`, then falls as a cosine to a hundredth."""
    warmup_steps: int = 200
    """Steps over which the learning rate rises."""
    kl_weight: float = 5e-4
    """Of the divergence per latent value from a standard normal, against the log of the squared error (at
    27 dB it weighs as 1e-6 does against the squared error itself)."""
    average_momentum: float = 0.998
    """Of the moving average of the weights."""
    noise: tuple[float, float] = (0.003, 0.08)
    """Deviation of the noise added to each crop, log-uniform."""

    def __post_init__(self) -> None:
        """Raise `ValueError` on settings that cannot train."""
        for name in ("channels", "steps", "num_phantoms", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"Expected {name} of at least 1; got {getattr(self, name)}.")
        if self.channels > CROP_SIDE:
            raise ValueError(f"Expected at most {CROP_SIDE} latent channels; got {self.channels}.")


def train_tokenizer(
    settings: TokenizerTraining, out: Path, report: Report, checkpoint_every: int = 500
) -> Tokenizer:
    """Train and write the tokenizer to `out` (.safetensors); returns it.

    Every `checkpoint_every` steps the state goes to `out` with the suffix .checkpoint; a later call with
    the same settings goes on from there, one with others raises `ValueError`. The checkpoint is removed at
    the end.
    """
    check_output(out)
    run = _Run(settings, training_phantoms(settings))
    checkpoint = out.with_suffix(".checkpoint")
    if checkpoint.is_file():
        run.training.resume(checkpoint)
    run.training.go_on(settings.steps, run.train_step, report, checkpoint, checkpoint_every)
    tokenizer = run.finished()
    save_tokenizer(out, tokenizer, _provenance(settings), dtype=torch.float16)
    checkpoint.unlink(missing_ok=True)
    return tokenizer


def training_phantoms(settings: TokenizerTraining) -> Tensor:
    """The bank of noise-free phantoms that steps crop from: float16 [b 1 D H W]."""
    shape = (PHANTOM_SIDE,) * 3
    recipes = draw_recipes(settings.seed, "training", settings.num_phantoms)
    return torch.stack([make_phantom(recipe, shape).to(torch.float16) for recipe in recipes])


def held_out_phantoms(
    seed: int, count: int, shape: tuple[int, int, int], noise: tuple[float, float] = (0.003, 0.08)
) -> list[Tensor]:
    """Phantoms, with noise, from a stream that training never draws from: float32 [1 D H W] each."""
    generator = torch.Generator().manual_seed(_stream(seed, "held out noise"))
    clean = (make_phantom(recipe, shape) for recipe in draw_recipes(seed, "held out", count))
    return [_noisy(volume[None], noise, generator)[0] for volume in clean]


def draw_recipes(seed: int, purpose: str, count: int) -> list[Recipe]:
    """`count` recipes of the stream that belongs to (`seed`, `purpose`)."""
    generator = torch.Generator().manual_seed(_stream(seed, purpose))
    return [draw_recipe(generator) for _ in range(count)]


class _Run:
    """A training run: its phantoms, what a step draws of them, and what is kept in the end."""

    def __init__(self, settings: TokenizerTraining, phantoms: Tensor) -> None:
        self.settings, self.phantoms = settings, phantoms
        self.config = PatchVAEConfig(channels=settings.channels)
        with torch.random.fork_rng(devices=[]):  # layers initialise from the global generator
            torch.manual_seed(_stream(settings.seed, "weights"))
            self.vae = PatchVAE(self.config)
        start_from(self.vae, phantoms)
        self.training = AveragedTraining(
            self.vae, settings, named="vae", weight_decay=1e-4, momentum=settings.average_momentum
        )

    def train_step(self, step: int) -> float:
        """One optimiser step; returns the mean PSNR of its batch, in dB."""
        settings = self.settings
        generator = torch.Generator().manual_seed(_stream(settings.seed, f"step {step}"))
        volumes = _draw_crops(self.phantoms, settings.batch_size, generator)
        volumes = _noisy(volumes, settings.noise, generator)
        mean = self.vae.posterior_mean(volumes)
        latents = mean + POSTERIOR_DEVIATION * torch.randn(mean.shape, generator=generator)
        errors = (self.vae.reconstruct(latents) - volumes).square().flatten(1).mean(dim=1)
        # The log weighs volumes by what can still be gained on them: the mean PSNR, whereas the mean error is
        # that of the few volumes full of noise.
        loss = torch.log(errors + ERROR_FLOOR).mean()
        divergence = 0.5 * (mean**2).mean()  # and a constant: the deviation is fixed
        self.training.descend(loss + settings.kl_weight * divergence, learning_rate_at(step, settings))
        return float(errors.detach().log10().mean() * -10.0)

    def finished(self) -> Tokenizer:
        """The averaged weights, rounded to float16, scaled so that latents of phantoms have variance 1."""
        with torch.device("meta"):
            vae = PatchVAE(self.config)
        vae.load_state_dict({k: v.half().float() for k, v in self.training.average.items()}, assign=True)
        with torch.no_grad():
            means = torch.cat(
                [vae.posterior_mean(part.float()) for part in torch.split(self.phantoms[:512], 64)]
            )
        return vae_tokenizer(vae, self.config, latent_scale=round(1.0 / float(means.std()), 6))


def linear_tokenizers(channels: int, phantoms: Float[Tensor, "b 1 D H W"]) -> tuple[Tokenizer, Tokenizer]:
    """What a trained tokenizer must beat: the PCA of these phantoms' patches, and the same latents with the
    best linear decoder of 27."""
    moments = (PatchMoments.of(part.float()) for part in torch.split(phantoms, 128))
    pca = pca_tokenizer(reduce(add, moments), channels)
    config = PatchVAEConfig(
        channels=channels, encoder_width=1, encoder_blocks=0, decoder_width=1, decoder_blocks=0
    )
    vae = PatchVAE(config)  # whose corrections are 0
    start_from(vae, phantoms)
    return pca, vae_tokenizer(vae, config, latent_scale=1.0)


def start_from(vae: PatchVAE, phantoms: Float[Tensor, "b 1 D H W"]) -> None:
    """Start `vae` in closed form: PCA of the phantoms' patches, and the best linear decoder of 27 latents."""
    parts = torch.split(phantoms, 128)
    moments = (PatchMoments.of(part.float()) for part in parts)
    vae.start_encoder_from(principal_components(reduce(add, moments), vae.config.channels))
    with torch.no_grad():
        around = (
            NeighbourMoments.of(vae.posterior_mean(part.float()), to_patches(part.float())) for part in parts
        )
        vae.start_decoder_from(reduce(add, around))


def _draw_crops(phantoms: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Random phantoms, cropped, with axes permuted and flipped, contrast scaled and at times inverted."""
    slack = phantoms.shape[-1] - CROP_SIDE + 1
    numbers = torch.randint(2**31, (count, 9), generator=generator).tolist()
    crops = []
    for phantom, x, y, z, order, flips, invert, low, high in numbers:
        corner = [value % slack for value in (x, y, z)]
        volume = phantoms[phantom % len(phantoms), 0]
        volume = volume[tuple(slice(start, start + CROP_SIDE) for start in corner)].float()
        axes = ((0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0))[order % 6]
        volume = volume.permute(axes).flip([axis for axis in range(3) if flips >> axis & 1])
        if invert % 5 == 0:
            volume = 1.0 - volume
        bottom, top = 0.3 * (low / 2**31) ** 2, 1.0 - 0.5 * (high / 2**31) ** 2
        crops.append(bottom + (top - bottom) * volume)
    return torch.stack(crops)[:, None]


def _noisy(volumes: Tensor, noise: tuple[float, float], generator: torch.Generator) -> Tensor:
    """Add white noise of a deviation drawn per volume, log-uniform in `noise`; clip to [0, 1]."""
    low, high = noise
    share = torch.rand(len(volumes), 1, 1, 1, 1, generator=generator)
    deviation = low * (high / low) ** share
    return (volumes + deviation * torch.randn(volumes.shape, generator=generator)).clamp(0.0, 1.0)


def learning_rate_at(step: int, settings: TokenizerTraining) -> float:
    """Learning rate of a step, from 0: a cosine to a hundredth of the peak, after a rise."""
    share = rise(step, settings.warmup_steps - 1) * cosine(1.0, 0.01, step, settings.steps)
    return settings.learning_rate * share


def _stream(seed: int, purpose: str) -> int:
    """A seed for one purpose: the first bytes of a hash, so that streams do not meet."""
    return int.from_bytes(digest_of(seed, purpose, separator="/")[:7], "little")


def _provenance(settings: TokenizerTraining) -> dict[str, str]:
    return {
        "command": "meduet-server tokenizer train",
        "settings": json.dumps(dataclasses.asdict(settings), sort_keys=True),
        "data": "random phantoms of the ICBM 152 (2009) template inside nilearn; no scan of a patient",
        "fedmeduet": version("fedmeduet"),
        "torch": torch.__version__,
        "nilearn": version("nilearn"),
    }
