"""Masked steps before MeDUET steps, and each term of the loss, at equal compute: what they are worth.

Real heads (`ixi_hammersmith`, 110 people of one hospital, 4 mm) and phantoms, each under three simulated
scanners; people are divided into those who train (60%), choose (15%) and report (25%). One process, all sites
in one place, scans restyled by the style bank: the loss and the network are compared, not the federation.

    python bench/masked_first.py ixi masked_first meduet        two variants, one after the other
    python bench/masked_first.py phantoms --budget 2000 --seeds 0 1 2 masked_first

A budget is counted in masked steps; a step with every term costs `RATIO` of them. Columns: processor seconds;
error at hidden tokens of people who report, over the variance around the mean map (1: nothing learned but
the mean), and over that of the neighbours' ridge under the same masks and with every neighbour seen; R² of
age, sex and volumes from content tokens of people who did not train, and the same with 10 labelled people;
site from a 64-number code of them after erasure (chance .33); share of the style gap closed and error left of
a swap against the truth; error of a whole decoded grid. Set-up and ridge are cached in --cache.

Not importable; not shipped.
"""

import argparse
import csv
import dataclasses
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from meduet_models.adamw import AdamW, decay_groups
from meduet_models.erasure import erase, fit_erasure
from meduet_models.factors import Factors
from meduet_models.meduet import MeDUET, NetworkConfig, layer_normed
from meduet_models.muon import Muon
from meduet_models.objective.objective import MeduetObjective, StepBatch, draw_step
from meduet_models.objective.settings import LossWeights, ObjectiveConfig
from meduet_models.objective.teacher import Teacher, momentum_at
from meduet_models.probes.anatomy import anatomy_probe
from meduet_models.probes.quick import site_probe
from meduet_models.schedules import cosine, rise
from meduet_models.style.bank import StyleBank
from meduet_models.style.moments import StyleLayout, StyleMoments
from meduet_models.tokens import patchify
from scans.volume_plan import VolumePlan

SITES, BATCH, RATIO = ("north", "harbour", "valley"), 8, 5.0
SIZE = dict(
    latent_channels=4, latent_grid=(10, 12, 10), patch_size=2, width=96, depth=3,
    decoder_width=60, decoder_depth=2,
)  # fmt: skip
VOLUMES = VolumePlan(
    modality="t1", window="mr_percentiles", spacing_mm=(4.0, 4.0, 4.0), shape=(40, 48, 40), registered=True
)
OURS = LossWeights()
NETWORK = dict(heads=6, decoder_heads=6, attention="neighbours", positions="grid", blocks_start="identity")
PLAIN = dict(heads=4, decoder_heads=4)


def only(**weights: float) -> LossWeights:
    """These terms and no other."""
    return LossWeights(**{f.name: 0.0 for f in dataclasses.fields(LossWeights)} | weights)


def without(name: str) -> LossWeights:
    """Every term but one."""
    return dataclasses.replace(OURS, **{name: 0.0})


@dataclasses.dataclass(frozen=True)
class Variant:
    """A network, a loss and how the budget is divided."""

    objective: ObjectiveConfig
    network: dict[str, object] = dataclasses.field(default_factory=lambda: NETWORK)
    optimiser: str = "muon"


VARIANTS = {
    "meduet": Variant(ObjectiveConfig(estimator="one_stream")),
    "meduet_before": Variant(ObjectiveConfig(estimator="one_stream"), PLAIN, "adamw"),
    "masked": Variant(
        ObjectiveConfig(weights=only(reconstruction=1.0, visible_reconstruction=1.0), masking="masked")
    ),
    "masked_first": Variant(ObjectiveConfig(estimator="one_stream", masked_share=0.8)),
    "masked_half": Variant(ObjectiveConfig(estimator="one_stream", masked_share=0.5)),
    "masked_most": Variant(ObjectiveConfig(estimator="one_stream", masked_share=0.95)),
    "random": Variant(ObjectiveConfig(estimator="one_stream")),
} | {
    f"no_{name}": Variant(ObjectiveConfig(estimator="one_stream", masked_share=0.8, weights=without(name)))
    for name in ("site_adversary", "site_from_style", "mftd", "siqc", "invariance", "restyled_reconstruction")
}


@dataclasses.dataclass(frozen=True)
class People:
    """Latents of everybody on the scanner of their site, and of some on every scanner."""

    latents: Tensor  # n c d h w
    site: Tensor  # n
    trained: list[int]
    report: list[int]
    paired: Tensor  # s m c d h w, people who report
    anatomy: Tensor  # n t, of everybody; NaN where unknown
    names: tuple[str, ...]

    @property
    def fresh(self) -> list[int]:
        """Who did not train."""
        return sorted(set(range(len(self.latents))) - set(self.trained))


def steps_of(budget: float, config: ObjectiveConfig) -> int:
    """Steps that cost as much as `budget` masked ones."""
    if config.masking == "masked":
        return round(budget)
    return round(budget / (config.masked_share + RATIO * (1 - config.masked_share)))


def train(
    people: People,
    variant: Variant,
    steps: int,
    seed: int,
    rate: float,
    before: Callable[[MeDUET, StyleBank], None] = lambda network, bank: None,
) -> tuple[MeDUET, StyleBank, float]:
    """Pretrain; returns the network, the style bank and processor seconds. `before`: done before any step."""
    rows = torch.tensor(people.trained)
    latents, site = people.latents[rows], people.site[rows]
    network = MeDUET(NetworkConfig(**SIZE, **variant.network), len(SITES), seed=seed)
    layout = StyleLayout(
        channels=latents.shape[1], latent_grid=SIZE["latent_grid"], map_grid=(2, 3, 2), bound=1e6
    )
    moments = {
        name: StyleMoments.of(latents[site == s], [str(i) for i in range(int((site == s).sum()))], layout)
        for s, name in enumerate(SITES)
    }
    bank = StyleBank.of(SITES, moments)
    network.set_latent_scale(bank.centre, bank.scale)
    before(network, bank)
    teacher, objective = Teacher(network), MeduetObjective(variant.objective)
    optimiser: AdamW = Muon.of(network, lr=rate, betas=(0.9, 0.95), weight_decay=1e-2)
    if variant.optimiser == "adamw":
        optimiser = AdamW(decay_groups(network.parameters(), 1e-2), lr=rate, betas=(0.9, 0.95), fused=True)
    generator, rising = torch.Generator().manual_seed(seed), max(1, round(0.05 * steps))
    began = time.process_time()
    for step in range(steps):
        progress = step / steps
        drawn = torch.randperm(len(latents), generator=generator)[:BATCH]
        choices = tuple(range(len(SITES)))
        draws = draw_step(generator, BATCH, network.config.num_tokens, variant.objective, choices)
        scans, own, target = latents[drawn], site[drawn], draws.target_site
        assert target is not None
        batch = StepBatch(
            bank.restyle(scans, own, target), target, bank.restyle(scans, own, target[draws.partner])
        )
        losses = objective(network, teacher, batch, draws, progress)
        optimiser.zero_grad()
        losses.total.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        share = (step - rising) / max(1, steps - 1 - rising)
        for group in optimiser.param_groups:
            group["lr"] = rise(step, rising, rate) if step < rising else cosine(rate, 0.2 * rate, share)
        optimiser.step()
        teacher.update(network, momentum_at(progress, 0.99, 0.9997))
    return network.eval(), bank, time.process_time() - began


# What is measured


def hidden_masks(count: int, tokens: int, seed: int) -> Tensor:
    """Half of the tokens of each scan, [count n]."""
    order = torch.rand(count, tokens, generator=torch.Generator().manual_seed(seed)).argsort(1).argsort(1)
    return order < tokens // 2


@torch.no_grad()
def hidden_error(network: MeDUET, latents: Tensor, mean: Tensor) -> float:
    """Error at hidden tokens, visible ones encoded alone, over the variance around `mean`; three masks."""
    variance = patchify((latents - mean) / network.latent_deviation.reshape(-1, 1, 1, 1), 2).square().mean()
    errors = []
    for seed in (1, 2, 3):
        hidden = hidden_masks(len(latents), network.config.num_tokens, seed)
        features = network.encoder.forward_visible(network.embed_latents(latents, ~hidden), ~hidden)
        predicted = network.predict_tokens(network.factors(latents, features), ~hidden)
        errors.append((predicted - network.target_tokens(latents)).square().mean(-1)[hidden].mean())
    return float(torch.stack(errors).mean() / variance)


def neighbours(tokens: Tensor, grid: tuple[int, int, int]) -> Tensor:
    """The 26 tokens around each, zeros beyond the border, [b n 26 p]."""
    b, n, p = tokens.shape
    padded = F.pad(tokens.reshape(b, *grid, p), (0, 0, 1, 1, 1, 1, 1, 1))
    steps = [(i, j, k) for i in range(3) for j in range(3) for k in range(3) if (i, j, k) != (1, 1, 1)]
    d, h, w = grid
    around = [padded[:, i : i + d, j : j + h, k : k + w] for i, j, k in steps]
    return torch.stack(around, 4).reshape(b, n, 26, p)


def ridge_errors(people: People, grid: tuple[int, int, int]) -> tuple[float, float]:
    """The neighbours' ridge on people who report, over the variance: under the masks (hidden neighbours are
    zeros, which ones is told), and with every neighbour seen. The penalty is chosen on people who choose."""
    trained = people.latents[people.trained]
    mean = trained.mean(0)
    deviation = (trained - mean).transpose(0, 1).flatten(1).std(1).reshape(-1, 1, 1, 1)
    choose = [row for row in people.fresh if row not in set(people.report)]
    sets = [
        patchify((people.latents[rows] - mean) / deviation, 2)
        for rows in (people.trained, choose, people.report)
    ]

    def features(tokens: Tensor, hidden: Tensor) -> Tensor:
        seen = (~hidden).float().unsqueeze(-1)
        around, flags = neighbours(tokens * seen, grid), neighbours(seen, grid)
        mean_seen = around.sum(2) / flags.sum(2).clamp(min=1)
        one = torch.ones_like(mean_seen[..., :1])
        return torch.cat([around.flatten(2), flags.flatten(2), mean_seen, one], 2).double()

    found = []
    for masked in (True, False):
        draws = range(50, 70) if masked else range(1)
        hide = [hidden_masks(len(s), sets[0].shape[1], i) if masked else None for i, s in enumerate(sets)]

        def rows_of(tokens: Tensor, hidden: Tensor | None) -> tuple[Tensor, Tensor]:
            none = torch.zeros(tokens.shape[:2], dtype=torch.bool)
            where = ~none if hidden is None else hidden
            return features(tokens, none if hidden is None else hidden)[where], tokens[where].double()

        gram, moment, count = 0.0, 0.0, 0
        for seed in draws:
            hidden = hidden_masks(len(sets[0]), sets[0].shape[1], seed) if masked else None
            x, y = rows_of(sets[0], hidden)
            gram, moment, count = gram + x.T @ x, moment + x.T @ y, count + len(x)
        errors = []
        for penalty in (1e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0):
            weights = torch.linalg.solve(gram / count + penalty * torch.eye(len(gram)), moment / count)
            pair = [
                float((x @ weights - y).square().mean() / s.square().mean())
                for s, (x, y) in zip(sets[1:], map(rows_of, sets[1:], hide[1:]), strict=True)
            ]
            errors.append(pair)
        found.append(min(errors)[1])
    return found[0], found[1]


@torch.no_grad()
def measure(
    network: MeDUET, people: People, bank: StyleBank, ridges: tuple[float, float]
) -> dict[str, float]:
    """Every column."""
    trained = people.latents[people.trained]
    hidden = hidden_error(network, people.latents[people.report], trained.mean(0))
    read = {"hidden": hidden, "/masked ridge": hidden / ridges[0], "/full ridge": hidden / ridges[1]}
    fresh = people.fresh
    tokens = torch.cat([network.encode(part).content for part in people.latents.split(16)])
    tokens = layer_normed(tokens).flatten(1)
    read |= anatomy(tokens[fresh], people.anatomy[fresh], people.names)
    code = site_code(tokens, people)
    fresh_sites = [int(s) for s in people.site[fresh]]
    read["site"] = site_probe(code[fresh], fresh_sites, [str(i) for i in fresh], 0).score
    read["site MLP"] = site_probe(code[fresh], fresh_sites, [str(i) for i in fresh], 0, "mlp").score
    return read | transfer(network, people, bank)


def anatomy(tokens: Tensor, targets: Tensor, names: tuple[str, ...]) -> dict[str, float]:
    """R² out of fold from flat tokens, and from ridge on 10 labelled people, mean of 20 draws."""
    who = [str(i) for i in range(len(tokens))]
    full = anatomy_probe(tokens, targets, who, 0)
    kinds = {
        "age": [i for i, n in enumerate(names) if n == "age"],
        "sex": [i for i, n in enumerate(names) if n == "sex"],
    }
    kinds["volumes"] = [i for i in range(len(names)) if i not in kinds["age"] + kinds["sex"]]
    read = {f"{kind} R2": float(full[i].mean()) for kind, i in kinds.items() if i}
    few = few_labels(tokens.double(), targets.double())
    return read | {f"{kind}@10": float(few[i].mean()) for kind, i in kinds.items() if i}


def few_labels(tokens: Tensor, targets: Tensor, labelled: int = 10, draws: int = 20) -> Tensor:
    """R² of each target on the others; ridge fitted on `labelled` people, penalty a tenth of mean power."""
    generator, scores = torch.Generator().manual_seed(0), []
    for _ in range(draws):
        order = torch.randperm(len(tokens), generator=generator)
        a, b = order[:labelled], order[labelled:]
        x, y, z, truth = tokens[a], targets[a], tokens[b], targets[b]
        known = ~torch.isnan(y).any(0)
        mean = x.mean(0)
        gram = (x - mean) @ (x - mean).T
        weights = torch.linalg.solve(
            gram + 0.1 * gram.diagonal().mean() * torch.eye(labelled), torch.nan_to_num(y - y.mean(0))
        )
        wrong = (y.mean(0) + (z - mean) @ (x - mean).T @ weights - truth).square()
        score = 1 - wrong.nanmean(0) / (truth - truth.nanmean(0)).square().nanmean(0)
        scores.append(torch.where(known, score, torch.nan))
    return torch.stack(scores).nanmean(0)


def site_code(tokens: Tensor, people: People, size: int = 64) -> Tensor:
    """Principal axes of trained people's tokens within sites, then the site taken out, fitted on them."""
    trained, site = tokens[people.trained].double(), people.site[people.trained]
    within = torch.cat([trained[site == s] - trained[site == s].mean(0) for s in range(len(SITES))])
    size = min(size, len(within) - len(SITES))
    axes = torch.linalg.svd(within, full_matrices=False).Vh[:size]
    code = ((tokens.double() - trained.mean(0)) @ axes.T).float()
    mine, own = code[people.trained], people.site[people.trained]
    means = torch.stack([mine[own == s].mean(0) for s in range(len(SITES))])
    return erase(code, *fit_erasure(means, mine.T.cov()))


def transfer(network: MeDUET, people: People, bank: StyleBank) -> dict[str, float]:
    """Shift style tokens from one site's mean to another's and decode; the truth is decoded too."""
    trained, site = people.latents[people.trained], people.site[people.trained]
    means = [network.encode(trained[site == s]).style.mean(0) for s in range(len(SITES))]
    closed, left = [], []
    factors = [network.encode(view) for view in people.paired]
    for a in range(len(SITES)):
        kept = network.decode(factors[a])
        for b in range(len(SITES)):
            if a == b:
                continue
            swapped = network.decode(Factors(factors[a].content, factors[a].style - means[a] + means[b]))
            truth = network.decode(factors[b])
            left.append(float((swapped - truth).square().mean() / (kept - truth).square().mean()))
            now, then, aim = (
                torch.cat([x.mean((0, 2, 3, 4)), x.std((2, 3, 4)).mean(0)]) for x in (swapped, kept, truth)
            )
            closed.append(float(1 - (now - aim).norm() / (then - aim).norm()))
    whole = [
        (network.decode(f) - view).square().mean() / view.var()
        for f, view in zip(factors, people.paired, strict=True)
    ]
    return {
        "gap": float(np.mean(closed)),
        "left": float(np.mean(left)),
        "whole": float(torch.stack(whole).mean()),
    }


# The set-up


def ixi(root: Path, by_age: bool = False) -> People:
    """Real heads, everybody rendered by every simulated scanner; anatomy is age, sex and labels' volumes.

    `by_age`: the sites' ages differ (means 29, 45 and 65 years), as anatomy of real sites does.
    """
    from scans.volumes import prepare, read_files, read_label
    from simulations.phantoms.scanners import draw_acquisition, draw_scanner
    from simulations.phantoms.scans import scan_image

    rows = list(csv.DictReader((root / "participants.tsv").open(), delimiter="\t"))
    structures = {"hippocampus": (47, 48), "ventricles": (51, 52), "caudate": (36, 37), "putamen": (57, 58)}
    scanners = [
        draw_scanner(np.random.default_rng(np.random.SeedSequence(0, spawn_key=(1, i))), i, name)
        for i, name in enumerate(SITES)
    ]
    views: list[list[Tensor]] = [[] for _ in SITES]
    anatomy = []
    for number, row in enumerate(rows):
        name = row["participant_id"]
        scan = read_files([next((root / name / "anat").glob("*T1w.nii.gz"))])
        for site, scanner in enumerate(scanners):
            acquisition = draw_acquisition(np.random.default_rng([7, number, site + 1]), scanner)
            seen = scan_image(scan.array, scanner, acquisition).astype(np.float32)
            views[site].append(prepare(dataclasses.replace(scan, array=seen), VOLUMES).volume)
        label = next((root / "derivatives" / "muse" / name / "anat").glob("*dseg.nii.gz"), None)
        volumes = [np.nan] * len(structures)
        if label is not None:
            read = read_label(label, scan)
            volumes = [
                float(np.isin(read.array, values).sum() * abs(np.linalg.det(read.affine[:3, :3])))
                for values in structures.values()
            ]
        anatomy.append([float(row["age"]), float(row["sex"] == "M"), *volumes])
    latents = torch.stack([encoded(view) for view in views])
    site = torch.arange(len(rows)) % len(SITES)
    if by_age:
        ages = torch.tensor(anatomy)[:, 0]
        blurred = ages + 8 * torch.randn(len(rows), generator=torch.Generator().manual_seed(1000))
        site = blurred.argsort().argsort() * len(SITES) // len(rows)
    trained, _, report = divided(len(rows))
    return People(
        latents[site, torch.arange(len(rows))],
        site,
        trained,
        report,
        latents[:, report],
        torch.tensor(anatomy),
        ("age", "sex", *structures),
    )


def phantoms(folder: Path, patients: int = 40, paired: int = 30) -> People:
    """Phantoms of three hospitals, and further ones seen by every scanner."""
    from forms.json_text import read_json
    from scans.volumes import prepare, read_files
    from simulations.hospitals.phantom import make_phantoms
    from simulations.hospitals.plans import PhantomHospitals

    plan = PhantomHospitals(num_hospitals=len(SITES), patients=patients, paired=paired, seed=1)
    hospitals = make_phantoms(plan, folder)

    def scans(root: Path) -> Tensor:
        files = sorted((root / "images").glob("*.nii.gz"))
        return encoded([prepare(read_files([file]), VOLUMES).volume for file in files])

    def facts(folder: Path) -> Tensor:
        records = [read_json(file.read_text(), "a record") for file in sorted(folder.glob("P*.json"))]
        volumes = [sorted(r["volumes_ml"].items()) for r in records]
        return torch.tensor(
            [[r["patient"]["age"], *(v for _, v in vs)] for r, vs in zip(records, volumes, strict=True)]
        )

    own = [scans(hospital.root) for hospital in hospitals]
    truth = folder / "truth"
    anatomy = torch.cat([facts(truth / hospital.name) for hospital in hospitals])
    trained, _, report = divided(patients)
    everywhere = [
        [s * patients + row for s in range(len(SITES)) for row in rows] for rows in (trained, report)
    ]
    names = ("age", *(f"volume {i}" for i in range(anatomy.shape[1] - 1)))
    site = torch.arange(len(SITES)).repeat_interleave(patients)
    both = torch.stack([scans(hospital.paired) for hospital in hospitals if hospital.paired])
    return People(torch.cat(own), site, everywhere[0], everywhere[1], both, anatomy, names)


def divided(count: int) -> tuple[list[int], list[int], list[int]]:
    """Rows of who trains, chooses and reports."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(1000)).tolist()
    first, second = round(0.6 * count), round(0.75 * count)
    return sorted(order[:first]), sorted(order[first:second]), sorted(order[second:])


def encoded(volumes: list[Tensor]) -> Tensor:
    """Latents of prepared volumes, by the shipped tokenizer."""
    from meduet_models.tokenizer.tokenizer import TokenizerSpec, load_tokenizer

    tokenizer = load_tokenizer(TokenizerSpec())
    whole = torch.stack([v.reshape(1, *VOLUMES.shape).float() for v in volumes])
    return torch.cat([tokenizer.encode(part) for part in whole.split(8)])


def cached(name: str, folder: Path, data: Path) -> tuple[People, tuple[float, float]]:
    """The set-up and its ridge errors, made once."""
    file = folder / f"{name}.pt"
    if not file.exists():
        folder.mkdir(parents=True, exist_ok=True)
        people = (
            phantoms(folder / "phantoms")
            if name == "phantoms"
            else ixi(data / "ixi_hammersmith", name == "ixi_by_age")
        )
        fields = {f.name: getattr(people, f.name) for f in dataclasses.fields(people)}
        torch.save({**fields, "ridges": ridge_errors(people, (5, 6, 5))}, file)
    loaded = torch.load(file)
    ridges = loaded.pop("ridges")
    return People(**loaded), ridges


def main() -> None:
    """Train each variant with each seed and print its row."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("data", choices=["ixi", "ixi_by_age", "phantoms"])
    parser.add_argument("variants", nargs="+", choices=VARIANTS)
    parser.add_argument("--budget", type=float, default=1000.0)
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--cache", type=Path, default=Path("runs/masked_first"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    data = Path(os.environ.get("FEDMEDUET_DATA") or Path(__file__).resolve().parents[2] / "shared" / "data")
    people, ridges = cached(arguments.data, arguments.cache, data)
    print(
        f"{arguments.data}: neighbours' ridge, same masks {ridges[0]:.3f}, all seen {ridges[1]:.3f}",
        flush=True,
    )
    for name in arguments.variants:
        for seed in arguments.seeds:
            variant = VARIANTS[name]
            steps = 0 if name == "random" else steps_of(arguments.budget, variant.objective)
            network, bank, seconds = train(people, variant, steps, seed, arguments.rate)
            row = {"steps": steps, "CPU s": seconds} | measure(network, people, bank, ridges)
            values = "  ".join(f"{k} {v:.3f}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items())
            print(f"{arguments.data} {name} seed {seed}: {values}", flush=True)


if __name__ == "__main__":
    main()
