"""Which statistics of a scan are its scanner's and not its patient's: candidates for what a style is.

Each candidate reads numbers from a scan, and moves a scan from the mean of its site to that of another.
Everybody is rendered by six simulated scanners (`rendered_people.py`), so the right answer of a change of
scanner exists. Three scanners are sites, to which one half of the people is dealt, at random or by age; from
these come styles and directions. `choose` measures on the same people at the first three scanners; `report`
takes the last three, and measures on people of the other half.

    OMP_NUM_THREADS=1 python bench/style_candidates.py choose --cache runs/style
    OMP_NUM_THREADS=1 python bench/style_candidates.py report --cache runs/style

Columns: numbers of a scan's style; share of the style gap closed and error left of restyled latents against
the same people on the other scanner (0 perfect, 1 nothing done), mean over pairs of sites; the same error
where the other scanner is no site; anatomy from one scan's numbers: R² of ridge out of fold, within sites,
less its mean over `PERMUTED` permutations of people (age, sex, mean of volumes; `null`: 95% of permutations
are below, for age). Three dealings of who is measured at which scanner, averaged. `--divisions 11 12 13`: of
people into halves, and in the end mean [least, most] over them.

5 CPU minutes the first time, 3 after that for each division. Not importable; not shipped.
"""

import argparse
import itertools
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from rendered_people import SCANNERS, cached

from meduet_models.factors import StyleMeter
from meduet_models.probes.anatomy import anatomy_probe
from meduet_models.probes.swap_fidelity import counterfactual_ratio, style_gap_closed
from meduet_models.style.axes import SHRINKAGE, StyleAxes
from meduet_models.style.code import entry_of
from meduet_models.style.moments import StyleLayout, StyleMoments, restyle

SITES, PERMUTED = 3, 8
MAP, CELLS = (2, 3, 2), (5, 6, 5)
COLUMNS = ("gap", "left", "new", "age", "sex", "volumes", "null")


# Candidates


@dataclass(frozen=True)
class Candidate:
    """What is read of a scan, and how one moves."""

    entry: Callable[[Tensor], Tensor]
    """Latents to statistics, row by row; a site's are the mean."""
    move: Callable[[Tensor, Tensor, Tensor], Tensor]
    """Latents from the statistics of one site to those of another."""
    told: Callable[[Tensor], Tensor] = lambda statistics: statistics
    """Statistics to the numbers that a style has."""


def layout_of(latents: Tensor) -> StyleLayout:
    """Of style sums of such latents, unbounded."""
    channels, d, h, w = latents.shape[1:]
    return StyleLayout(channels=channels, latent_grid=(d, h, w), map_grid=MAP, bound=1e9)


def statistics(latents: Tensor) -> Tensor:
    """What the style head reads today: means, log deviations, coarse maps of both."""
    _, d, h, w = latents.shape[1:]
    return StyleMeter((d, h, w), MAP)(latents).to_vector().double()


def moved(latents: Tensor, own: Tensor, target: Tensor) -> Tensor:
    """As the style bank restyles."""
    layout = layout_of(latents)
    return restyle(latents, entry_of(own, layout), entry_of(target, layout))


WHOLE = Candidate(statistics, moved)


def projected(read: Tensor, back: Tensor) -> Candidate:
    """Of the statistics, what some directions read."""
    return Candidate(
        statistics,
        lambda x, own, target: moved(x, own, own + back @ (read @ (target - own))),
        lambda seen: seen @ read.T,
    )


def channels() -> Candidate:
    """Channel means and deviations."""

    def entry(x: Tensor) -> Tensor:
        return torch.cat([x.mean((2, 3, 4)), x.std((2, 3, 4)).log()], 1).double()

    def move(x: Tensor, own: Tensor, target: Tensor) -> Tensor:
        (mean, log), (to, to_log) = (v.float().reshape(2, -1, 1, 1, 1) for v in (own, target))
        return to + (x - mean) * (to_log - log).exp()

    return Candidate(entry, move)


def field(degree: int) -> Candidate:
    """Fields of mean and log deviation that are polynomials over the volume."""

    def powers(shape: tuple[int, ...]) -> Tensor:
        places = torch.meshgrid(*(torch.linspace(-1 + 1 / n, 1 - 1 / n, n) for n in shape), indexing="ij")
        which = [p for p in itertools.product(range(degree + 1), repeat=3) if sum(p) <= degree]
        return torch.stack([places[0] ** i * places[1] ** j * places[2] ** k for i, j, k in which])

    cells = torch.linalg.pinv(powers(CELLS).flatten(1))  # cells, powers

    def entry(x: Tensor) -> Tensor:
        mean = F.adaptive_avg_pool3d(x, CELLS)
        within = (F.adaptive_avg_pool3d(x.square(), CELLS) - mean.square()).clamp(min=1e-6)
        both = torch.stack([mean, within.log() / 2], 1)  # b 2 c x y z
        return (both.flatten(3) @ cells).flatten(1).double()

    def move(x: Tensor, own: Tensor, target: Tensor) -> Tensor:
        at = powers(x.shape[2:]).flatten(1)
        mean, log, to, to_log = (
            (part @ at).reshape(x.shape[1:])
            for v in (own, target)
            for part in v.float().reshape(2, x.shape[1], -1)
        )
        return to + (x - mean) * (to_log - log).exp()

    return Candidate(entry, move)


def histogram(number: int = 17) -> Candidate:
    """Quantiles of each channel."""
    shares = torch.linspace(0, 1, number)

    def entry(x: Tensor) -> Tensor:
        return torch.quantile(x.flatten(2), shares, dim=2).permute(1, 2, 0).flatten(1).double()

    def move(x: Tensor, own: Tensor, target: Tensor) -> Tensor:
        flat = x.transpose(0, 1).flatten(1)
        made = []
        for values, old, new in zip(
            flat, own.reshape(len(flat), -1), target.reshape(len(flat), -1), strict=True
        ):
            place = torch.searchsorted(old.float().contiguous(), values).clamp(1, number - 1)
            old, new = old.float(), new.float()
            slope = (new[place] - new[place - 1]) / (old[place] - old[place - 1]).clamp(min=1e-4)
            made.append(new[place - 1] + (values - old[place - 1]) * slope)
        return torch.stack(made).reshape(x.transpose(0, 1).shape).transpose(0, 1)

    return Candidate(entry, move)


def shrunk(covariance: Tensor) -> Tensor:
    """With weaker correlations, as the style axes have it."""
    deviation = covariance.diagonal().sqrt()
    correlation = covariance / deviation[:, None] / deviation
    kept = (1 - SHRINKAGE) * correlation + SHRINKAGE * torch.eye(len(deviation), dtype=torch.float64)
    return deviation[:, None] * kept * deviation


def ratio(between: Tensor, within: Tensor, number: int) -> Candidate:
    """Directions in which one covariance is largest beside the other."""
    root = torch.linalg.cholesky(shrunk(within))
    inverse = torch.linalg.inv(root)
    axes = torch.linalg.eigh(inverse @ between @ inverse.T).eigenvectors[:, -number:]
    return projected((inverse.T @ axes).T, root @ axes)


def covariance_within(rows: Tensor) -> Tensor:
    """Of rows [groups members v] about the mean of their group."""
    apart = (rows - rows.mean(1, keepdim=True)).flatten(0, 1)
    return apart.T @ apart / (len(apart) - len(rows))


def slopes_of(covariates: list[Tensor], apart: list[Tensor]) -> Tensor:
    """What a unit of each covariate adds to statistics about the mean of their site [covariates v]."""
    known = torch.cat([c - c.mean(0) for c in covariates]).double()
    return torch.linalg.lstsq(known, torch.cat(apart)).solution


def erasing(slope: Tensor, pooled: Tensor) -> Tensor:
    """Takes these directions out of statistics, which otherwise change as little as can be [v v]."""
    along = torch.linalg.solve(shrunk(pooled), slope.T)
    return torch.eye(len(pooled), dtype=torch.float64) - slope.T @ torch.linalg.solve(slope @ along, along.T)


def candidates(
    own: list[Tensor], covariates: list[Tensor], public: Tensor
) -> dict[str, tuple[list[Candidate], Callable[[Tensor], Tensor]]]:
    """By name: the candidate as each site has it (or one for all), and what is done to the sites' means.
    `own`: latents of each site's people; `covariates`: their age and sex."""
    seen = [statistics(x) for x in own]
    means = torch.stack([s.mean(0) for s in seen])
    apart = torch.cat([s - s.mean(0) for s in seen])
    pooled = apart.T @ apart / (len(apart) - len(own))
    of_public = torch.stack([statistics(row) for row in public])
    imaging, anatomies = torch.cov(of_public.mean(1).T), covariance_within(of_public)
    between, numbers = torch.cov(means.T), means.shape[1]

    slope = slopes_of(covariates, [apart])
    of_site = torch.stack([c.double().mean(0) for c in covariates])
    adjusting = (of_site - of_site.mean(0)) @ slope
    blind = erasing(slope, pooled)

    def axes(towards: Tensor, beside: Tensor | None = None) -> list[StyleAxes]:
        """As each site has them, of these styles; `beside` scatters, as much as its own scans do."""
        found = []
        for site, x in enumerate(own):
            seen = torch.stack([statistics(moved(x, means[site], target)) for target in towards])
            if beside is not None:
                half = beside[torch.linspace(0, len(beside) - 1, len(x) // 2).long()]
                around = seen.mean(1, keepdim=True)
                seen = torch.cat([seen, around + half, around - half], 1)
            found.append(StyleAxes.of(seen))
        return found

    def blind_axes(slopes: list[Tensor]) -> list[Candidate]:
        """Axes whose reading does not change along slopes."""
        return [
            projected(found.read @ erasing(slope, pooled), found.back)
            for found, slope in zip(axes(means), slopes, strict=True)
        ]

    public_scatter = (of_public - of_public.mean(1, keepdim=True)).flatten(0, 1)
    own_slopes = [slopes_of([c], [s - s.mean(0)]) for c, s in zip(covariates, seen, strict=True)]
    two = torch.linalg.qr(
        torch.randn(numbers, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    )
    deviation = pooled.diagonal().sqrt()[:, None]

    def same(values: Tensor) -> Tensor:
        return values

    none = torch.zeros(1, numbers, dtype=torch.float64)
    return {
        "nothing done": ([projected(none, none.T)], same),
        "a mean style": ([Candidate(statistics, lambda x, a, b: moved(x, a, means.mean(0)))], same),
        "2 random directions": ([projected((two.Q / deviation).T, deviation * two.Q)], same),
        "all statistics (before)": ([WHOLE], same),
        "channel mean, deviation": ([channels()], same),
        "with fields of degree 1": ([field(1)], same),
        "with fields of degree 2": ([field(2)], same),
        "quantiles of channels": ([histogram()], same),
        "adjusted for age and sex": ([WHOLE], lambda m: m - adjusting),
        "age and sex erased": ([projected(blind, torch.eye(numbers, dtype=torch.float64))], same),
        "public: imaging over anatomy, 8": ([ratio(imaging, anatomies, 8)], same),
        "sites over public anatomy": ([ratio(between, anatomies, SITES - 1)], same),
        "sites over all sites' patients": ([ratio(between, pooled, SITES - 1)], same),
        "sites over one site's patients": ([projected(a.read, a.back) for a in axes(means)], same),
        "axes of adjusted means": ([projected(a.read, a.back) for a in axes(means - adjusting)], same),
        "axes, public anatomy beside": (
            [projected(a.read, a.back) for a in axes(means, public_scatter)],
            same,
        ),
        "axes, all sites' slopes erased": (blind_axes([slope] * len(own)), same),
        "axes, own slopes erased": (blind_axes(own_slopes), same),
    }


# Measures


def entry_vector(latents: Tensor) -> Tensor:
    """Of scans of one site, as the product measures a style gap."""
    return (
        StyleMoments.of(latents, [str(i) for i in range(len(latents))], layout_of(latents))
        .entry()
        .to_vector()
    )


def fidelity(
    forms: list[Candidate],
    change: Callable[[Tensor], Tensor],
    own: list[Tensor],
    truth: Tensor,
    new: Tensor,
    told: Tensor,
) -> tuple[float, float, float]:
    """Gap closed and error left between sites; error left towards scanners that are none.

    `truth` [sites people c d h w], `new` the same at other scanners, `told` [scanners people ...] what these
    tell of their style."""
    gaps, left, late = [], [], []
    entries = [entry_vector(x) for x in truth]
    for a, form in enumerate(forms * (SITES if len(forms) == 1 else 1)):
        means = change(torch.stack([form.entry(x).mean(0) for x in own]))
        for b in range(SITES):
            if a != b:
                swapped = form.move(truth[a], means[a], means[b])
                gaps.append(style_gap_closed(entry_vector(swapped), entries[a], entries[b]))
                left.append(counterfactual_ratio(swapped, truth[a], truth[b]))
        for b in range(len(new)):
            swapped = form.move(truth[a], means[a], form.entry(told[b]).mean(0))
            late.append(counterfactual_ratio(swapped, truth[a], new[b]))
    return float(np.mean(gaps)), float(np.mean(left)), float(np.mean(late))


def anatomy(form: Candidate, truth: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """R² of each target less chance, and the 95% quantile of chance."""
    numbers = torch.stack([form.told(form.entry(x)) for x in truth])
    people = numbers.shape[1]
    who, found, null = [str(i) for i in range(people)], [], []
    for turn in range(SITES):
        at = (torch.arange(people) + turn) % SITES
        x, y = numbers[at, torch.arange(people)].clone(), targets.clone()
        for site in range(SITES):
            x[at == site] -= x[at == site].mean(0)
            y[at == site] -= y[at == site].nanmean(0)
        draws = torch.Generator().manual_seed(turn)
        by_chance = torch.stack(
            [anatomy_probe(x, y[torch.randperm(people, generator=draws)], who, 0) for _ in range(PERMUTED)]
        )
        found.append(anatomy_probe(x, y, who, 0) - by_chance.mean(0))
        null.append(torch.quantile(by_chance - by_chance.mean(0), 0.95, dim=0))
    return torch.stack(found).mean(0), torch.stack(null).mean(0)


def table(
    name: str, people: dict[str, Tensor], public: Tensor, half: str, division: int, wanted: list[str]
) -> dict[str, dict[str, dict[str, float]]]:
    """Print the rows of the candidates, and return them by dealing and candidate."""
    latents, targets = people["latents"], people["anatomy"]
    count = latents.shape[1]
    order = torch.randperm(count, generator=torch.Generator().manual_seed(division))
    fitted, fresh = order[: count // 2], order[count // 2 :]
    first = 0 if half == "choose" else SITES
    if half == "choose":
        fresh = fitted
    sites, late = (
        latents[first : first + SITES],
        latents[[s for s in range(SCANNERS) if not first <= s < first + SITES]],
    )
    ages = targets[fitted, 0] + 8 * torch.randn(len(fitted), generator=torch.Generator().manual_seed(1000))
    dealings = {
        "at random": torch.arange(len(fitted)) % SITES,
        "by age": ages.argsort().argsort() * SITES // len(fitted),
    }
    found: dict[str, dict[str, dict[str, float]]] = {}
    for dealing, at in dealings.items():
        own = [sites[s, fitted[at == s]] for s in range(SITES)]
        varying = [column for column in range(2) if float(targets[:, column].std()) > 0]
        known = [targets[fitted[at == s]][:, varying] for s in range(SITES)]
        print(f"{name}, {half}, {dealing}, division {division}: {[len(x) for x in own]}, {len(fresh)} fresh")
        print(f"  {'':32s} numbers  " + " ".join(f"{c:>6s}" for c in COLUMNS), flush=True)
        for label, (forms, change) in candidates(own, known, public).items():
            if wanted and label not in wanted:
                continue
            gap, left, new = fidelity(forms, change, own, sites[:, fresh], late[:, fresh], late[:, fitted])
            read = [anatomy(form, sites[:, fresh], targets[fresh]) for form in forms]
            score, null = (torch.stack(values).mean(0) for values in zip(*read, strict=True))
            size = forms[0].told(forms[0].entry(own[0][:1])).shape[1]
            values = (gap, left, new, *score[:2].tolist(), float(score[2:].mean()), float(null[0]))
            print(f"  {label:32s} {size:5d}    " + " ".join(f"{v:6.3f}" for v in values), flush=True)
            found.setdefault(dealing, {})[label] = dict(zip(COLUMNS, values, strict=True))
    return found


def spread(rows: list[dict[str, float]], column: str) -> str:
    """Mean [least, most] of the rows that have it; nothing where one is unknown."""
    values = [row[column] for row in rows if column in row]
    if not values or np.isnan(values).any():
        return ""
    return f"{np.mean(values):.3f} [{min(values):.3f}, {max(values):.3f}]"


def main() -> None:
    """Read or make the scans, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("half", choices=["choose", "report"])
    parser.add_argument("--data", nargs="+", default=["ixi", "phantoms"])
    parser.add_argument("--divisions", type=int, nargs="+", default=[5], help="seeds; several end in means")
    parser.add_argument("--candidates", nargs="+", default=[], help="their names; all when none")
    parser.add_argument("--cache", type=Path, required=True, help="folder of what takes minutes")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    public = torch.load(cached("public", chosen.cache))
    for name in chosen.data:
        people = torch.load(cached(name, chosen.cache))
        tables = [
            table(name, people, public, chosen.half, division, chosen.candidates)
            for division in chosen.divisions
        ]
        for dealing, rows in tables[0].items() if len(tables) > 1 else ():
            print(f"| {name}, {chosen.half}, {dealing} | " + " | ".join(COLUMNS) + " |")
            for label in rows:
                own = [found[dealing][label] for found in tables]
                print(f"| {label} | " + " | ".join(spread(own, column) for column in COLUMNS) + " |")


if __name__ == "__main__":
    main()
