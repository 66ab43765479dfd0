"""Which content code: how tokens are read, and how the site is taken out, on people that no sum has seen.

110 healthy adults of one hospital (`ixi_hammersmith`: whole heads, ages, sexes), 3 mm, every one rendered by
simulated scanners, so a site here is a scanner and the right answer of a change of scanner exists. A small
encoder is trained for a few CPU minutes (masked first, then the published terms); sums are told by people of
one half, each at one site; the other half is what is read. With `choose` both are parts of the first half of
the people: choices are made there, and `report` is looked at once.

    python bench/content_code.py choose --cache runs/code         about 6 CPU minutes after the encoder's 2
    python bench/content_code.py report --cache runs/code --sites 2

Columns: site by a linear probe from the people of the sums, from fresh people, and from these by an MLP;
sex (AUC) and age (correlation) by ridge regression, cross-validated among fresh people, each at one site;
the same person found again across scanners. Means over draws of who is fitted.
"""

import argparse
import csv
import dataclasses
import os
from collections import defaultdict
from pathlib import Path
from statistics import NormalDist

import numpy as np
import objective_variants as variants
import torch
from torch import Tensor

from federation.plan.plan import RunPlan
from meduet_models import content_code
from meduet_models.content_code import CodeSums, public_code, shift_left, token_erasure, without_sites
from meduet_models.erasure import erase, fit_erasure
from meduet_models.factors import normalise
from meduet_models.meduet import MeDUET, layer_normed
from meduet_models.objective.objective import MeduetObjective, StepBatch, draw_step
from meduet_models.objective.settings import LossWeights, ObjectiveConfig
from meduet_models.objective.teacher import Teacher, momentum_at
from meduet_models.probes.quick import site_probe
from meduet_models.probes.recognition import retrieval_across_sites
from meduet_models.probes.ridge import fit_ridge
from meduet_models.style.bank import StyleBank
from meduet_models.style.moments import StyleLayout, StyleMoments
from meduet_models.tokenizer.tokenizer import TokenizerSpec, load_tokenizer
from scans.volumes import prepare, read_scan
from server import public_latents
from server.config import compose_config, plain, plan_from

SHAPE, SPACING_MM = (48, 64, 48), (3.0, 3.0, 3.0)
MASKED, PUBLISHED, BATCH, PEAK = 220, 40, 8, 2e-3
_NOTHING_BUT = {f.name: 0.0 for f in dataclasses.fields(LossWeights)}
MASKED_ONLY = ObjectiveConfig(
    masking="masked", mask_ratio=0.6, weights=LossWeights(**{**_NOTHING_BUT, "reconstruction": 1.0})
)
BOUND = 1e9


def read_people(root: Path) -> dict[str, Tensor]:
    """Latents on every scanner [sites people c d h w], ages and sexes."""
    plan, tokenizer = a_plan(4), load_tokenizer(TokenizerSpec())
    with (root / "participants.tsv").open() as table:
        rows = list(csv.DictReader(table, delimiter="\t"))
    paths = [next((root / row["participant_id"]).rglob("*T1w.nii.gz")) for row in rows]
    volumes = [prepare(read_scan(path), plan.volumes).volume[0].numpy() for path in paths]
    variants.SHAPE, rng = SHAPE, np.random.default_rng(0)
    latents = []
    for scanner in variants.SITES:
        seen = np.stack([variants.render(volume, scanner, rng) for volume in volumes]).astype(np.float32)
        latents.append(torch.cat([tokenizer.encode(x) for x in torch.from_numpy(seen)[:, None].split(8)]))
    return {
        "latents": torch.stack(latents),
        "age": torch.tensor([float(row["age"]) for row in rows]),
        "sex": torch.tensor([float(row["sex"] == "M") for row in rows]),
    }


def a_plan(num_sites: int) -> RunPlan:
    """The plan of such a federation, with the network of `small`."""
    wanted = [f"volumes.spacing_mm={list(SPACING_MM)}", f"volumes.shape={list(SHAPE)}"]
    tokenizer = load_tokenizer(TokenizerSpec())
    return plan_from(
        plain(compose_config(wanted)),
        sites=variants.SITES[:num_sites],
        tokenizer_sha256=tokenizer.sha256,
        latent_channels=tokenizer.latent_channels,
        stride=tokenizer.stride,
    )


def bank_of(latents: Tensor, site: Tensor) -> StyleBank:
    """The styles of the scanners."""
    layout = StyleLayout(channels=latents.shape[1], latent_grid=(12, 16, 12), map_grid=(2, 3, 2), bound=BOUND)
    told = {
        name: StyleMoments.of(latents[site == s], [str(i) for i in range(int((site == s).sum()))], layout)
        for s, name in enumerate(variants.SITES)
    }
    return StyleBank.of(variants.SITES, told)


def an_encoder(plan: RunPlan, latents: Tensor, site: Tensor, style_bank: StyleBank, steps: bool) -> MeDUET:
    """Trained for a few minutes, or as it starts."""
    network = MeDUET(plan.network, len(variants.SITES), seed=0)
    network.set_latent_scale(style_bank.centre, style_bank.scale)
    teacher, published = Teacher(network), ObjectiveConfig(estimator="one_stream")
    optimiser = torch.optim.AdamW(network.parameters(), lr=PEAK, betas=(0.9, 0.95), weight_decay=1e-2)
    generator, total = torch.Generator().manual_seed(0), (MASKED + PUBLISHED) * steps
    for step in range(total):
        progress = step / total
        for group in optimiser.param_groups:
            group["lr"] = (
                PEAK * min(1.0, (step + 1) / (0.05 * total)) * (0.6 + 0.4 * np.cos(np.pi * progress))
            )
        config = MASKED_ONLY if step < MASKED else published
        rows = torch.randperm(len(latents), generator=generator)[:BATCH]
        draws = draw_step(generator, BATCH, plan.network.num_tokens, config, tuple(range(4)))
        target = draws.target_site
        assert target is not None
        restyled = [
            style_bank.restyle(latents[rows], site[rows], to) for to in (target, target[draws.partner])
        ]
        losses = MeduetObjective(config)(
            network, teacher, StepBatch(restyled[0], target, restyled[1]), draws, progress
        )
        optimiser.zero_grad()
        losses.total.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimiser.step()
        teacher.update(network, momentum_at(progress, 0.99, 0.9997))
        if step % 50 == 0:
            print(
                f"step {step}: " + "  ".join(f"{k} {v.item():.2f}" for k, v in losses.terms.items()),
                flush=True,
            )
    return network.eval()


@torch.no_grad()
def tokens_of(network: MeDUET | None, latents: Tensor) -> Tensor:
    """Content tokens; without a network the latents themselves, normalised, as one token."""
    if network is None:
        return torch.cat([normalise(x).flatten(1)[:, None] for x in latents.split(32)])
    return torch.cat([layer_normed(network.encode(x).content) for x in latents.split(32)])


class Readings:
    """What is read of one way to describe a person, over draws of who is fitted."""

    def __init__(self, people: dict[str, Tensor]) -> None:
        self.people = people
        self.rows: dict[str, list[tuple[float, ...]]] = defaultdict(list)

    def read(self, label: str, codes: Tensor, fitted: Tensor, fresh: Tensor, sites: int) -> None:
        """`codes` [scanners people q]; person i of those fitted is at site i mod `sites`."""
        at = torch.arange(len(fitted)) % sites
        told = site_probe(codes[at, fitted].float(), at.tolist(), [f"f{i}" for i in range(len(at))], 0).score
        everywhere = codes[:sites, fresh].flatten(0, 1).float()
        where = [s for s in range(sites) for _ in fresh]
        who = [f"p{int(i)}" for _ in range(sites) for i in fresh]
        site = [site_probe(everywhere, where, who, 0, probe).score for probe in ("linear", "mlp")]  # type: ignore[arg-type]
        once = codes[torch.arange(len(fresh)) % sites, fresh]
        sex, age = self.people["sex"][fresh], self.people["age"][fresh]
        found = retrieval_across_sites(everywhere, where, who).score
        row = (told, *site, auc(once, sex), correlation(once, age), found)
        print(f"    {label:40s} " + "  ".join(f"{v:.3f}" for v in row), flush=True)
        self.rows[label].append(row)

    def show(self, title: str) -> None:
        """Print the means."""
        print(f"{title}\n  {'':40s} fitted  fresh  mlp    sex    age    again")
        for label, rows in self.rows.items():
            print(f"  {label:40s} " + "  ".join(f"{v:.3f}" for v in np.mean(rows, axis=0)), flush=True)
        self.rows.clear()


def out_of_fold(features: Tensor, truth: Tensor) -> list[Tensor]:
    """Ridge predictions of unseen people, three divisions into five folds."""
    told = []
    for draw in range(3):
        fold = torch.randperm(len(truth), generator=torch.Generator().manual_seed(draw)) % 5
        out = torch.zeros(len(truth), dtype=torch.float64)
        for f in range(5):
            seen, names = fold != f, [str(i) for i in range(int((fold != f).sum()))]
            fit = fit_ridge(features[seen], truth[seen, None], names, choice="generalised")
            out[fold == f] = fit(features[fold == f])[:, 0]
        told.append(out)
    return told


def auc(features: Tensor, label: Tensor) -> float:
    """Area under the curve of ridge regression on a class."""
    told = out_of_fold(features, label)
    return float(np.mean([(o[label == 1][:, None] > o[label == 0]).double().mean() for o in told]))


def correlation(features: Tensor, truth: Tensor) -> float:
    """Of what is read with the truth."""
    return float(np.mean([np.corrcoef(o, truth)[0, 1] for o in out_of_fold(features, truth)]))


def compare(
    readings: Readings, tokens: Tensor, public: dict[str, Tensor], fitted: Tensor, fresh: Tensor, sites: int
) -> None:
    """Every row, from tokens [scanners people n k] and those of public latents by kind."""
    at = torch.arange(len(fitted)) % sites
    ask = (fitted, fresh, sites)

    def means(values: Tensor) -> Tensor:
        return torch.stack([values[s, fitted[at == s]].double().mean(0) for s in range(sites)])

    flat, pooled = tokens.flatten(2), tokens.mean(2)
    readings.read("tokens, whole", flat, *ask)
    if tokens.shape[2] > 1:
        readings.read("mean over tokens", pooled, *ask)
        cov = torch.cov(pooled[at, fitted].T.double(), correction=0)
        readings.read("  LEACE", erase(pooled, *fit_erasure(means(pooled), cov)), *ask)
        readings.read("  means projected out", erase(pooled, *fit_erasure(means(pooled))), *ask)
    for kind, seen in public.items():
        for size, axes, whitening in wanted(kind, tokens):
            content_code.WHITENING = whitening
            code = public_code(seen, *axes, size)
            name = f"{kind}, {size}, {axes[0]}x{axes[1]}, whitening {whitening}"
            told = {
                str(s): CodeSums.of(
                    code.read(tokens[s, fitted[at == s]]),
                    [str(i) for i in range(int((at == s).sum()))],
                    BOUND,
                )
                for s in range(sites)
            }
            main = (kind, size, whitening) == ("phantoms", 64, 0.5) and axes == (32, 32)
            plain = torch.stack([code.read(own) for own in tokens]).double()
            if main:
                lengths = plain[:sites].norm(dim=2) / size**0.5
                print(f"    lengths over root of size: mean {lengths.mean():.2f}, most {lengths.max():.2f}")
                readings.read(f"{name}: site left in", plain, *ask)
                for label, codes in others(plain, means(plain), at, fitted):
                    readings.read(f"  {label}", codes, *ask)
                beside = {
                    str(s): CodeSums.of(
                        pooled[s, fitted[at == s]], [str(i) for i in range(int((at == s).sum()))], BOUND
                    )
                    for s in range(sites)
                }
                for how, known in (("laid back from it", {}), ("pooled content told", beside)):
                    erased = erase(pooled, *token_erasure(code, told, known))
                    readings.read(f"  mean over tokens, {how}", erased, *ask)
                patients = len(fitted) // sites
                apart = shift_left(size, patients)
                print(f"    foretold: {apart:.2f} deviations, {NormalDist().cdf(apart / 2):.3f}")
            readings.read(name, torch.stack([without_sites(code, told).read(own) for own in tokens]), *ask)
    readings.read(*within(tokens, means, at, fitted), *ask)


def wanted(kind: str, tokens: Tensor) -> list[tuple[int, tuple[int, int], float]]:
    """Size, axes over places and channels, and whitening of the codes to fit."""
    n, k = tokens.shape[2:]
    if n == 1:  # raw latents, as they are
        return []
    if kind != "phantoms":
        return [(64, (32, 32), 0.5)]
    sizes = [(size, (32, 32), 0.5) for size in (32, 64, 96, 120)]
    return [
        *sizes,
        *((64, (32, 32), w) for w in (0.0, 1.0)),
        *((64, axes, 0.5) for axes in ((16, 16), (min(n, 96), k))),
    ]


def others(codes: Tensor, means: Tensor, at: Tensor, fitted: Tensor) -> list[tuple[str, Tensor]]:
    """Other ways to take the site out of a code: with products, from one's own mean, only what is clear."""
    centre, sites = means.mean(0), len(means)
    own = codes[at, fitted]
    noise = (own - means[at]).var(0).sum() * sites / len(fitted)
    apart = means - centre
    kept = (1 - noise / apart.square().sum(1)).clamp(0, 1)
    shrunk = codes - centre
    shrunk[:sites] -= (kept[:, None] * apart)[:, None]
    leace = erase(codes, *fit_erasure(means, torch.cov(own.T, correction=0)))
    return [("LEACE", leace), ("own site's mean taken away, shrunk", shrunk)]


def within(tokens: Tensor, means: object, at: Tensor, fitted: Tensor) -> tuple[str, Tensor]:
    """Axes from the people of the sums themselves, each site about its own mean; the site projected out."""
    flat = tokens.flatten(2).double()
    site_means = torch.stack([flat[s, fitted[at == s]].mean(0) for s in range(int(at.max()) + 1)])
    axes = torch.linalg.svd(flat[at, fitted] - site_means[at], full_matrices=False)[2][:64]
    codes = flat @ axes.T
    return f"within-site axes, {len(axes)}", erase(codes, *fit_erasure(site_means @ axes.T))


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("half", choices=["choose", "report"])
    parser.add_argument("--sites", type=int, nargs="+", default=[4, 2])
    parser.add_argument("--draws", type=int, default=2)
    parser.add_argument("--encoders", nargs="+", default=["trained", "random", "raw latents"])
    parser.add_argument("--cache", type=Path, required=True, help="folder of what takes minutes")
    chosen = parser.parse_args()
    chosen.cache.mkdir(parents=True, exist_ok=True)
    data = Path(os.environ.get("FEDMEDUET_DATA") or Path(__file__).resolve().parents[2] / "shared" / "data")
    if not (cached := chosen.cache / "people.pt").exists():
        torch.save(read_people(data / "ixi_hammersmith"), cached)
    people = torch.load(cached)
    latents, plan = people["latents"], a_plan(4)
    count = latents.shape[1]
    site = torch.arange(count) % 4
    once = latents[site, torch.arange(count)]
    style_bank = bank_of(once, site)
    if not (cached := chosen.cache / "encoder.pt").exists():
        torch.save(an_encoder(plan, once, site, style_bank, True).state_dict(), cached)
    trained = an_encoder(plan, once, site, style_bank, False)
    trained.load_state_dict(torch.load(cached))
    if not (cached := chosen.cache / "public.pt").exists():
        args = (trained.latent_mean, trained.latent_deviation)
        other = dataclasses.replace(plan, tokenizer_sha256="0" * 64)
        torch.save(
            {
                "phantoms": public_latents.public_latents(plan, *args),
                "fields": public_latents.public_latents(other, *args),
            },
            cached,
        )
    public = {k: public_latents.restyled(v, plan, style_bank) for k, v in torch.load(cached).items()}
    order = torch.randperm(count, generator=torch.Generator().manual_seed(1))
    halves = order[: count // 2], order[count // 2 :]
    encoders = {
        "trained": trained,
        "random": an_encoder(plan, once, site, style_bank, False),
        "raw latents": None,
    }
    for name in chosen.encoders:
        network = encoders[name]
        tokens = torch.stack([tokens_of(network, own) for own in latents])
        seen = {kind: tokens_of(network, own) for kind, own in public.items()}
        for sites in chosen.sites:
            readings = Readings(people)
            for draw in range(chosen.draws):
                mixed = halves[0][
                    torch.randperm(len(halves[0]), generator=torch.Generator().manual_seed(2 + draw))
                ]
                middle = len(mixed) // 2
                pairs = [(mixed[:middle], mixed[middle:]), (mixed[middle:], mixed[:middle])]
                for fitted, fresh in pairs if chosen.half == "choose" else [(mixed, halves[1])]:
                    compare(readings, tokens, seen, fitted, fresh, sites)
            readings.show(f"{chosen.half}, {sites} sites, {name}")


if __name__ == "__main__":
    main()
