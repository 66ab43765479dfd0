"""What the content code is worth: site and patient, read from it, from erased and from plain pooled content.

The set-up of `objective_variants.py` (hippocampus crops, four simulated scanners, patients of its own at each
site, unseen patients rendered by all four), several seeds: each draws other patients for training and other
weights. Half of the unseen patients are for choosing (`validation`: code size and ridge were chosen there,
with seed 0), the other half for reporting (`test`).

    python bench/content_code.py                        seeds 0 to 4, 300 steps: 6 CPU minutes
    python bench/content_code.py --seeds 0 --sizes 12 16 24 --split validation

Each line: linear and MLP probe of the site (chance .25), patient found again across scanners (chance .018);
from style the same. Means over seeds with 95% intervals (Student's t) at the end.
"""

import argparse
import os
from collections import defaultdict
from pathlib import Path

import numpy as np
import objective_variants as variants
import torch
from scipy.stats import t as student_t
from torch import Tensor

from meduet_models.content_code import RenderingMoments, fit_content_code
from meduet_models.erasure import ErasureMoments, erase, fit_erasure
from meduet_models.meduet import MeDUET
from meduet_models.probes.quick import site_probe
from meduet_models.probes.recognition import retrieval_across_sites
from meduet_models.style.bank import StyleBank
from meduet_models.style.moments import StyleLayout, StyleMoments

SITES = variants.SITES
BOUND = 1e6


def read(features: Tensor, num_patients: int) -> tuple[float, float, float]:
    """Site by a linear probe and an MLP, patient across scanners; features [sites * patients, k]."""
    sites = [s for s in range(len(SITES)) for _ in range(num_patients)]
    patients = [f"p{i}" for _ in SITES for i in range(num_patients)]
    return (
        site_probe(features, sites, patients, 0).score,
        site_probe(features, sites, patients, 0, "mlp").score,
        retrieval_across_sites(features, sites, patients).score,
    )


@torch.no_grad()
def codes(
    network: MeDUET, trained: Tensor, site: Tensor, style_bank: StyleBank, sizes: list[int]
) -> dict[str, tuple[Tensor, Tensor]]:
    """The linear maps to compare, fitted on sums of the sites' training patients."""
    own, renderings = {}, {}
    for index, name in enumerate(SITES):
        mine = trained[site == index]
        label, names = torch.full((len(mine),), index), [str(i) for i in range(len(mine))]
        styles = range(len(SITES))
        rendered = [
            network.pooled_content(style_bank.restyle(mine, label, torch.full_like(label, s))) for s in styles
        ]
        own[name] = ErasureMoments.of(network.pooled_content(mine), names, BOUND)
        renderings[name] = RenderingMoments.of(torch.stack(rendered), names, BOUND)
    maps = {f"code {size}": fit_content_code(own, renderings, size) for size in sizes}
    return {"erased": fit_erasure(own), **maps}


def main() -> None:
    """Train a network per seed and print its readings."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--sizes", type=int, nargs="+", default=[16])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--split", choices=["validation", "test"], default="test")
    arguments = parser.parse_args()
    data = Path(os.environ.get("FEDMEDUET_DATA") or Path(__file__).resolve().parents[2] / "shared" / "data")
    latents = variants.encode_all(variants.read_crops(data / "msd_hippocampus"))
    layout = StyleLayout(channels=4, latent_grid=(8, 12, 8), map_grid=(2, 3, 2), bound=BOUND)
    share = variants.TRAINED // len(SITES)
    site = torch.arange(len(SITES)).repeat_interleave(share)
    table: dict[str, list[tuple[float, float, float]]] = defaultdict(list)
    for seed in arguments.seeds:
        order = torch.randperm(latents.shape[1], generator=torch.Generator().manual_seed(100 + seed))
        mixed = latents[:, order]
        trained = torch.cat([mixed[s, s * share : (s + 1) * share] for s in range(len(SITES))])
        unseen = mixed[:, variants.TRAINED :]
        half = unseen.shape[1] // 2
        unseen = unseen[:, :half] if arguments.split == "validation" else unseen[:, half:]
        moments = {
            name: StyleMoments.of(trained[site == s], [str(i) for i in range(share)], layout)
            for s, name in enumerate(SITES)
        }
        style_bank = StyleBank.of(SITES, moments)
        network, _ = variants.train(trained, site, style_bank, "one_stream", arguments.steps, seed)
        with torch.no_grad():
            flat, count = unseen.flatten(0, 1), unseen.shape[1]
            content, style = network.pooled_content(flat), network.pooled_style(flat)
            table["style"].append(read(style, count))
            table["content"].append(read(content, count))
            for name, (mean, matrix) in codes(network, trained, site, style_bank, arguments.sizes).items():
                coded = erase(content, mean, matrix) if name == "erased" else (content - mean) @ matrix.T
                table[name].append(read(coded.float(), count))
        for name, rows in table.items():
            print(f"seed {seed} {name:10s} " + "  ".join(f"{v:.3f}" for v in rows[-1]), flush=True)
    for name, rows in table.items():
        values = np.array(rows)
        spread = student_t.ppf(0.975, max(1, len(rows) - 1)) * values.std(0, ddof=len(rows) > 1)
        pairs = zip(values.mean(0), spread / np.sqrt(len(rows)), strict=True)
        print(f"{arguments.split} {name:10s} " + "  ".join(f"{m:.3f} ± {s:.3f}" for m, s in pairs))


if __name__ == "__main__":
    main()
