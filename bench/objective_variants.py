"""What the choices in the objective are worth: short pretraining on real anatomy with simulated scanners.

Every patient of the hippocampus set is rendered by four simulated scanners (as it is; contrast curve; blur
with coil shading; noise), so the right answer of a change of style exists. Each scanner trains on patients
of its own; unseen patients, rendered by all four, are measured. One process, all sites in one place, scans
restyled by the style bank: the loss is compared, not the federation.

    python bench/objective_variants.py                              600 steps of `full`: 2 to 3 CPU minutes
    python bench/objective_variants.py one_stream alternate joint   one after the other
    python bench/objective_variants.py --steps 0                    what the untrained network scores

Columns: processor seconds per step; site read from content (linear probe, chance .25) before and after the
site erasure; patient found again across scanners from content (chance 1 / 110), erased; site read from
style; patient from style; squared error at hidden positions, and of a whole decoded grid, over the variance
left by the centre; share of the style gap closed, and error left, when styles are exchanged (0 perfect, 1
nothing done).

One seed is one seed. Source of the set-up: simulated renderings of one anatomy, as in docs/architecture.md.
"""

import argparse
import os
import sys
import time
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
from scipy.ndimage import gaussian_filter
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from meduet_models.erasure import ErasureMoments, fit_erasure
from meduet_models.factors import Factors
from meduet_models.meduet import MeDUET, NetworkConfig
from meduet_models.objective.demixing import hidden_mean, mix_tokens, unmix_tokens
from meduet_models.objective.distillation import squared_distance
from meduet_models.objective.objective import MeduetObjective, StepBatch, draw_step
from meduet_models.objective.settings import LossWeights, ObjectiveConfig
from meduet_models.objective.teacher import Teacher, momentum_at
from meduet_models.probes.quick import site_probe
from meduet_models.probes.recognition import retrieval_across_sites
from meduet_models.style.bank import StyleBank
from meduet_models.style.moments import StyleLayout, StyleMoments
from meduet_models.tokenizer.patch_pca import PatchMoments
from meduet_models.tokenizer.tokenizer import pca_tokenizer

SHAPE, SITES, TRAINED, BATCH, PEAK = (32, 48, 32), ("plain", "curve", "coil", "noise"), 148, 8, 2e-3
SIZE = dict(
    latent_channels=4, latent_grid=(8, 12, 8), patch_size=2, width=96, depth=3, heads=4,
    decoder_width=60, decoder_depth=2, decoder_heads=4,
)  # fmt: skip
VARIANTS: dict[str, tuple[str, ObjectiveConfig]] = {
    "full": ("split", ObjectiveConfig()),
    "one_stream": ("split", ObjectiveConfig(estimator="one_stream")),
    "alternate": ("split", ObjectiveConfig(estimator="alternate")),
    "hidden_only": ("split", ObjectiveConfig(weights=LossWeights(visible_reconstruction=0.0))),
    "no_invariance": ("split", ObjectiveConfig(weights=LossWeights(invariance=0.0))),
    "no_restyled": ("split", ObjectiveConfig(weights=LossWeights(restyled_reconstruction=0.0))),
    "joint": ("joint", ObjectiveConfig()),
    "published": (
        "joint",
        ObjectiveConfig(
            weights=LossWeights(visible_reconstruction=0.0, invariance=0.0, restyled_reconstruction=0.0)
        ),
    ),
}


def read_crops(root: Path) -> np.ndarray:
    """All clean hippocampus crops, percentile-normalised, [n, 32, 48, 32]."""
    crops = []
    for path in sorted(root.rglob("hippocampus_*.nii.gz")):
        if "label" in path.parent.name.lower():
            continue
        values = np.asarray(nib.load(path).dataobj, np.float32)
        low, high = np.percentile(values, (0.5, 99.5))
        values = np.clip((values - low) / (high - low), 0, 1)
        pad = [
            (max(0, (t - s) // 2), max(0, t - s - (t - s) // 2))
            for s, t in zip(values.shape, SHAPE, strict=True)
        ]
        values = np.pad(values, pad)
        start = [(s - t) // 2 for s, t in zip(values.shape, SHAPE, strict=True)]
        crops.append(values[tuple(slice(a, a + t) for a, t in zip(start, SHAPE, strict=True))])
    return np.stack(crops)


def render(volume: np.ndarray, site: str, rng: np.random.Generator) -> np.ndarray:
    """The volume as the scanner of `site` shows it."""
    x, y, _ = np.meshgrid(*(np.linspace(-1, 1, size) for size in SHAPE), indexing="ij")
    match site:
        case "curve":
            return 0.85 * volume**1.6 + 0.05
        case "coil":
            return gaussian_filter(volume, 0.7) * (1 + 0.35 * x - 0.25 * y)
        case "noise":
            real, imaginary = rng.normal(0, 0.06, (2, *SHAPE))
            return np.hypot(0.7 * volume + 0.1 + real, imaginary)
    return volume


def encode_all(crops: np.ndarray) -> Tensor:
    """Latents of every patient on every scanner, [sites, patients, c, d, h, w]; a linear tokenizer."""
    rng = np.random.default_rng(0)
    volumes = torch.from_numpy(
        np.array([[render(v, site, rng) for v in crops] for site in SITES], np.float32)
    )
    volumes = volumes.unsqueeze(2)
    tokenizer = pca_tokenizer(PatchMoments.of(volumes[:, :TRAINED:4].flatten(0, 1)), 4)
    return torch.stack([tokenizer.encode(own) for own in volumes])


def train(
    latents: Tensor, site: Tensor, style_bank: StyleBank, variant: str, steps: int, seed: int
) -> tuple[MeDUET, float]:
    """Pretrain on scans [n, c, d, h, w] of sites [n]; returns the network and processor seconds per step."""
    paths, config = VARIANTS[variant]
    network = MeDUET(NetworkConfig(**SIZE, factor_paths=paths), len(SITES), seed=seed)
    network.set_latent_scale(style_bank.centre, style_bank.scale)
    teacher, objective = Teacher(network), MeduetObjective(config)
    optimiser = torch.optim.AdamW(network.parameters(), lr=PEAK, betas=(0.9, 0.95), weight_decay=1e-2)
    generator = torch.Generator().manual_seed(seed)
    began = time.process_time()
    for step in range(steps):
        progress = step / steps
        rows = torch.randperm(len(latents), generator=generator)[:BATCH]
        draws = draw_step(generator, BATCH, network.config.num_tokens, config, tuple(range(len(SITES))))
        scans, own, target = latents[rows], site[rows], draws.target_site
        assert target is not None
        batch = StepBatch(
            style_bank.restyle(scans, own, target),
            target,
            style_bank.restyle(scans, own, target[draws.partner]),
        )
        losses = objective(network, teacher, batch, draws, progress)
        optimiser.zero_grad()
        losses.total.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        for group in optimiser.param_groups:
            cosine = 0.6 + 0.4 * np.cos(np.pi * progress)
            group["lr"] = PEAK * min(1.0, (step + 1) / (0.05 * steps)) * cosine
        optimiser.step()
        teacher.update(network, momentum_at(progress, 0.99, 0.9997))
        if step in (0, steps // 10, steps // 2, steps - 1):
            terms = "  ".join(f"{name} {term.item():.2f}" for name, term in losses.terms.items())
            print(f"  step {step}: {terms}", flush=True)
    return network.eval(), (time.process_time() - began) / max(1, steps)


@torch.no_grad()
def measure(network: MeDUET, trained: Tensor, site: Tensor, unseen: Tensor) -> dict[str, float]:
    """Every column; `unseen` [sites, patients, ...] are patients that were not trained on."""
    flat, count = unseen.flatten(0, 1), unseen.shape[1]
    sites = [s for s in range(len(SITES)) for _ in range(count)]
    patients = [f"p{i}" for _ in SITES for i in range(count)]
    content, style = network.pooled_content(flat), network.pooled_style(flat)
    read = {"site content": site_probe(content, sites, patients, 0).score}
    moments = {}
    for index, name in enumerate(SITES):
        mine = network.pooled_content(trained[site == index])
        moments[name] = ErasureMoments.of(mine, [str(i) for i in range(len(mine))], 1e6)
    network.set_erasure(*fit_erasure(moments))
    erased = network.pooled_content(flat)
    read["erased"] = site_probe(erased, sites, patients, 0).score
    read["patient"] = retrieval_across_sites(content, sites, patients).score
    read["p. erased"] = retrieval_across_sites(erased, sites, patients).score
    read["site style"] = site_probe(style, sites, patients, 0).score
    read["p. style"] = retrieval_across_sites(style, sites, patients).score
    return read | reconstruct(network, flat) | transfer(network, trained, site, unseen)


def reconstruct(network: MeDUET, scans: Tensor) -> dict[str, float]:
    """Error at hidden positions of mixtures, and of whole grids, over the variance of the target."""
    draws = draw_step(
        torch.Generator().manual_seed(1), len(scans), network.config.num_tokens, ObjectiveConfig()
    )
    scale = network.latent_deviation.repeat_interleave(network.config.patch_size**3)
    target = network.target_tokens(scans) * scale
    mixed = mix_tokens(network.embed_latents(scans), draws.partner, draws.exchanged)
    features = unmix_tokens(network.encoder(mixed), draws.partner, draws.exchanged)
    hidden = network.predict_tokens(network.factors(scans, features), ~draws.exchanged) * scale
    whole = network.predict_tokens(network.encode(scans)) * scale
    variance = target.square().mean()
    return {
        "hidden": float(hidden_mean(squared_distance(hidden, target), draws.exchanged) / variance),
        "whole": float((whole - target).square().mean() / variance),
    }


def transfer(network: MeDUET, trained: Tensor, site: Tensor, unseen: Tensor) -> dict[str, float]:
    """Shift style tokens from one site's mean to another's and decode; the truth is decoded too."""
    means = [network.encode(trained[site == s]).style.mean(0) for s in range(len(SITES))]
    closed, left = [], []
    for a in range(len(SITES)):
        factors = network.encode(unseen[a])
        kept = network.decode(factors)
        for b in range(len(SITES)):
            if a == b:
                continue
            swapped = network.decode(Factors(factors.content, factors.style - means[a] + means[b]))
            truth = network.decode(network.encode(unseen[b]))
            left.append(float((swapped - truth).square().mean() / (kept - truth).square().mean()))
            now, then, aim = (statistics(x) for x in (swapped, kept, truth))
            closed.append(float(1 - (now - aim).norm() / (then - aim).norm()))
    return {"gap closed": float(np.mean(closed)), "error left": float(np.mean(left))}


def statistics(scans: Tensor) -> Tensor:
    """Channel means and mean channel deviations of a set of scans."""
    return torch.cat([scans.mean((0, 2, 3, 4)), scans.std((2, 3, 4)).mean(0)])


def main() -> None:
    """Train each variant and print its row."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("variants", nargs="*", default=["full"], help=f"of {', '.join(VARIANTS)}")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    data = Path(os.environ.get("FEDMEDUET_DATA") or Path(__file__).resolve().parents[2] / "shared" / "data")
    latents = encode_all(read_crops(data / "msd_hippocampus"))

    share = TRAINED // len(SITES)
    trained = torch.cat([latents[s, s * share : (s + 1) * share] for s in range(len(SITES))])
    site = torch.arange(len(SITES)).repeat_interleave(share)
    layout = StyleLayout(channels=4, latent_grid=(8, 12, 8), map_grid=(2, 3, 2), bound=1e6)
    moments = {
        name: StyleMoments.of(trained[site == s], [str(i) for i in range(share)], layout)
        for s, name in enumerate(SITES)
    }
    style_bank = StyleBank.of(SITES, moments)
    for variant in arguments.variants:
        network, step_s = train(trained, site, style_bank, variant, arguments.steps, arguments.seed)
        row = {"s/step": step_s} | measure(network, trained, site, latents[:, TRAINED:])
        print(
            f"{variant} (seed {arguments.seed}): " + "  ".join(f"{k} {v:.3f}" for k, v in row.items()),
            flush=True,
        )


if __name__ == "__main__":
    main()
