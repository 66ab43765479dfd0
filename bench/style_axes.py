"""A network with style axes and one without, from the same start: what its style and its swaps know.

People of `bench/rendered_people.py`, at its last three scanners: half of the people train (one process, all
sites in one place, the loss of `masked_first`), the other half is measured. The axes are those of the first
site's people.

    OMP_NUM_THREADS=1 python bench/style_axes.py ixi --cache runs/style
    OMP_NUM_THREADS=1 python bench/style_axes.py phantoms --cache runs/style

Columns: share of the style gap closed and error left (1 nothing done) of swaps to the target's mean style
tokens, as the product measures them; the same of swaps that shift a scan's own tokens, beside the truth
decoded; error of a whole decoded grid in the site's mean style; error at hidden tokens; site from one scan's
style (chance .33); age, sex and volumes from one scan's style and from its content tokens (R² within sites
less chance). A seed divides the people, starts the network and draws its steps; about 2 CPU minutes each. Not
importable; not shipped.
"""

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from masked_first import SITES, VARIANTS, People, hidden_error, steps_of, train, transfer
from rendered_people import cached
from style_candidates import Candidate, anatomy, entry_vector, spread
from torch import Tensor

from meduet_models.factors import Factors, StatisticsStyleHead
from meduet_models.meduet import MeDUET, layer_normed
from meduet_models.probes.quick import site_probe
from meduet_models.probes.swap_fidelity import counterfactual_ratio, style_gap_closed
from meduet_models.style.axes import StyleAxes
from meduet_models.style.bank import StyleBank


def read_people(cached: Path, division: int) -> tuple[People, Tensor]:
    """The people, and those who are measured on every scanner [sites people c d h w]; `division` is the seed
    of who trains."""
    read = torch.load(cached)
    views, targets = read["latents"][-len(SITES) :], read["anatomy"].float()
    count = views.shape[1]
    order = torch.randperm(count, generator=torch.Generator().manual_seed(division))
    trained, fresh = order[: count // 2], order[count // 2 :]
    site = torch.arange(count) % len(SITES)
    site[trained] = torch.arange(len(trained)) % len(SITES)
    names = tuple(str(column) for column in range(targets.shape[1]))
    seen = views[site, torch.arange(count)]
    return People(seen, site, trained.tolist(), fresh.tolist(), views[:, fresh], targets, names), views[
        :, fresh
    ]


def axes_of(people: People) -> Callable[[MeDUET, StyleBank], None]:
    """What gives a network, before its first step, the style axes of the first site's people."""
    mine = people.latents[people.trained][people.site[people.trained] == 0]

    @torch.no_grad()
    def with_axes(network: MeDUET, bank: StyleBank) -> None:
        own, head = torch.zeros(len(mine), dtype=torch.long), network.style_head
        assert isinstance(head, StatisticsStyleHead)
        seen = [network.style_statistics(bank.restyle(mine, own, own + s)) for s in range(len(SITES))]
        head.set_axes(StyleAxes.of(torch.stack(seen)))

    return with_axes


@torch.no_grad()
def swaps(network: MeDUET, people: People, truth: Tensor) -> dict[str, float]:
    """What swaps leave, whole grids in the site's mean style, and hidden tokens."""
    trained = people.latents[people.trained]
    at = people.site[people.trained]
    styles = [network.encode(trained[at == s]).style.mean(0) for s in range(len(SITES))]
    entries, gaps, left, whole = [entry_vector(x) for x in truth], [], [], []
    for a in range(len(SITES)):
        content = network.encode(truth[a]).content
        for b in range(len(SITES)):
            made = network.decode(Factors(content, styles[b].expand(len(content), -1, -1)))
            if a == b:
                whole.append(float((made - truth[a]).square().mean() / truth[a].var()))
            else:
                gaps.append(style_gap_closed(entry_vector(made), entries[a], entries[b]))
                left.append(counterfactual_ratio(made, truth[a], truth[b]))
    row = {"gap": float(np.mean(gaps)), "left": float(np.mean(left)), "whole": float(np.mean(whole))}
    return row | {"hidden": hidden_error(network, people.latents[people.report], trained.mean(0))}


@torch.no_grad()
def style_of(network: MeDUET, latents: Tensor) -> Tensor:
    """Pooled style of each scan."""
    return layer_normed(network.encode(latents).style).mean(1).double()


@torch.no_grad()
def content_of(network: MeDUET, latents: Tensor) -> Tensor:
    """Content tokens of each scan, flat."""
    tokens = torch.cat([network.encode(part).content for part in latents.split(16)])
    return layer_normed(tokens).flatten(1).double()


def site_from_style(network: MeDUET, truth: Tensor) -> float:
    """Read by a linear probe from one scan."""
    seen = torch.cat([style_of(network, x) for x in truth])
    where = [s for s in range(len(SITES)) for _ in truth[0]]
    who = [str(i) for _ in SITES for i in range(len(truth[0]))]
    return site_probe(seen.float(), where, who, 0).score


def measure(network: MeDUET, people: People, bank: StyleBank, truth: Tensor) -> dict[str, float]:
    """Every column."""
    shifted = transfer(network, people, bank)
    row = swaps(network, people, truth) | {f"shifted {key}": shifted[key] for key in ("gap", "left")}
    row["site from style"] = site_from_style(network, truth)
    for name, read in (("style", style_of), ("content", content_of)):
        candidate = Candidate(partial(read, network), lambda x, own, target: x)
        score, _ = anatomy(candidate, truth, people.anatomy[people.report])
        row |= {f"age, {name}": float(score[0]), f"sex, {name}": float(score[1])}
        row[f"volumes, {name}"] = float(score[2:].mean())
    return row


def main() -> None:
    """Train with and without axes for every seed, print a row for each, then means and ranges."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("data", choices=["ixi", "phantoms"])
    parser.add_argument("--budget", type=float, default=250.0, help="in masked steps")
    parser.add_argument("--seeds", type=int, nargs="+", default=[11, 12, 13], help="of division and network")
    parser.add_argument("--cache", type=Path, required=True, help="of rendered_people.py")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    variant = VARIANTS["masked_first"]
    steps = steps_of(chosen.budget, variant.objective)
    rows: dict[str, list[dict[str, float]]] = {}
    for seed in chosen.seeds:
        people, truth = read_people(cached(chosen.data, chosen.cache), seed)
        for name, before in (("all statistics", lambda network, bank: None), ("style axes", axes_of(people))):
            network, bank, seconds = train(people, variant, steps, seed, 2e-3, before)
            row = {"CPU s": seconds} | measure(network.eval(), people, bank, truth)
            values = "  ".join(f"{key} {value:.3f}" for key, value in row.items())
            print(f"{chosen.data}, {name}, {steps} steps, seed {seed}: {values}", flush=True)
            rows.setdefault(name, []).append(row)
    for name, own in rows.items():
        print(
            f"{chosen.data}, {name}: " + "  ".join(f"{key} {spread(own, key)}" for key in own[0]), flush=True
        )


if __name__ == "__main__":
    main()
