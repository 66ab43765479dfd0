"""A network with style axes and one without, from the same start: what its style and its swaps know.

Scans of `bench/style_candidates.py`, at its last three scanners: half of the people train (one process, all
sites in one place, the loss of `masked_first`), the other half is measured. The axes are those of the first
site's people.

    OMP_NUM_THREADS=1 python bench/style_axes.py ixi --cache runs/style
    OMP_NUM_THREADS=1 python bench/style_axes.py phantoms --cache runs/style

Columns: share of the style gap closed and error left (1 nothing done) of swaps to the target's mean style
tokens, as the product measures them; the same of swaps that shift a scan's own tokens, beside the truth
decoded; error of a whole decoded grid in the site's mean style; error at hidden tokens; site from one scan's
style (chance .33); age, sex and volumes from one scan's style and from its content tokens (R² within sites
less chance). One seed is one seed. About 2 CPU minutes. Not importable; not shipped.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from masked_first import SITES, VARIANTS, People, hidden_error, steps_of, train, transfer
from style_candidates import Candidate, anatomy, entry_vector
from torch import Tensor

from meduet_models.factors import Factors, StatisticsStyleHead
from meduet_models.meduet import MeDUET, layer_normed
from meduet_models.probes.quick import site_probe
from meduet_models.probes.swap_fidelity import counterfactual_ratio, style_gap_closed
from meduet_models.style.axes import StyleAxes
from meduet_models.style.bank import StyleBank


def read_people(cached: Path) -> tuple[People, Tensor]:
    """The people, and those who are measured on every scanner [sites people c d h w]."""
    read = torch.load(cached)
    views, targets = read["latents"][-len(SITES) :], read["anatomy"].float()
    count = views.shape[1]
    order = torch.randperm(count, generator=torch.Generator().manual_seed(5))
    trained, fresh = order[: count // 2], order[count // 2 :]
    site = torch.arange(count) % len(SITES)
    site[trained] = torch.arange(len(trained)) % len(SITES)
    names = tuple(str(column) for column in range(targets.shape[1]))
    seen = views[site, torch.arange(count)]
    return People(seen, site, trained.tolist(), fresh.tolist(), views[:, fresh], targets, names), views[
        :, fresh
    ]


@torch.no_grad()
def measure(network: MeDUET, people: People, bank: StyleBank, truth: Tensor) -> dict[str, float]:
    """Every column."""
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
    shifted = transfer(network, people, bank)
    row = {"gap": float(np.mean(gaps)), "left": float(np.mean(left)), "whole": float(np.mean(whole))}
    row |= {"shifted gap": shifted["gap"], "shifted left": shifted["left"]}
    row["hidden"] = hidden_error(network, people.latents[people.report], trained.mean(0))

    def style(x: Tensor) -> Tensor:
        return layer_normed(network.encode(x).style).mean(1).double()

    def content(x: Tensor) -> Tensor:
        return layer_normed(network.encode(x).content).flatten(1).double()

    seen = torch.cat([style(x) for x in truth])
    where = [s for s in range(len(SITES)) for _ in truth[0]]
    who = [str(i) for _ in SITES for i in range(len(truth[0]))]
    row["site from style"] = site_probe(seen.float(), where, who, 0).score
    for name, read in (("style", style), ("content", content)):
        score, _ = anatomy(Candidate(read, lambda x, own, target: x), truth, people.anatomy[people.report])
        row |= {f"age, {name}": float(score[0]), f"sex, {name}": float(score[1])}
        row[f"volumes, {name}"] = float(score[2:].mean())
    return row


def main() -> None:
    """Train with and without axes, and print a row for each."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("data", choices=["ixi", "phantoms"])
    parser.add_argument("--budget", type=float, default=250.0, help="in masked steps")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cache", type=Path, required=True, help="of style_candidates.py")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    people, truth = read_people(chosen.cache / f"{chosen.data}.pt")
    mine = people.latents[people.trained][people.site[people.trained] == 0]

    @torch.no_grad()
    def with_axes(network: MeDUET, bank: StyleBank) -> None:
        own, head = torch.zeros(len(mine), dtype=torch.long), network.style_head
        assert isinstance(head, StatisticsStyleHead)
        seen = [network.style_statistics(bank.restyle(mine, own, own + s)) for s in range(len(SITES))]
        head.set_axes(StyleAxes.of(torch.stack(seen)))

    variant = VARIANTS["masked_first"]
    steps = steps_of(chosen.budget, variant.objective)
    for name, before in (("all statistics", lambda network, bank: None), ("style axes", with_axes)):
        network, bank, seconds = train(people, variant, steps, chosen.seed, 2e-3, before)
        row = {"CPU s": seconds} | measure(network.eval(), people, bank, truth)
        values = "  ".join(f"{key} {value:.3f}" for key, value in row.items())
        print(f"{chosen.data}, {name}, {steps} steps, seed {chosen.seed}: {values}", flush=True)


if __name__ == "__main__":
    main()
