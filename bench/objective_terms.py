"""What each term of the loss brings: the loss without it, beside the whole one, from the same start.

People of `bench/rendered_people.py` at its last three scanners: half of the people train, at one simulated
scanner each, the other half is measured, at all three. A seed divides the people anew, starts the network and
draws the steps; everything else is today's default (`conf/objective/ours.yaml`: masked steps first,
`one_stream`; split paths, style axes). Each variant takes as many steps as the whole loss, and so fewer
seconds; `masked` (reconstruction alone) takes as many as cost the same.

    OMP_NUM_THREADS=1 python bench/objective_terms.py run ixi phantoms --cache runs/style
    OMP_NUM_THREADS=1 python bench/objective_terms.py show ixi phantoms --cache runs/style

Every cell (data, variant, seed) is a file; `run` makes those that are missing. `show` prints mean [least,
most] over seeds, and for each term what is lost without it: the differences to the whole loss, seed by seed.
A term brings something where at least three seeds agree on it.

Columns: error at hidden tokens over that of the neighbours' ridge under the same masks; site from the code of
people who did not train (linear, MLP; chance .33); sex (AUC), age and volumes (r) from the code, ridge fitted
on those who trained, and on 10 of them (mean of 20 draws); share of the style gap closed and error left
(1 nothing done) of swaps to the target's mean style tokens; error of a whole decoded grid; site from one
scan's style; age from it (r, as from the code). The code: 64 principal axes within sites of flat content
tokens, then the site taken out, both from those who trained. Rows `raw latents` (the same code of latents as
they are) and `random` (no step) are what must lose. Not importable; not shipped.
"""

import argparse
import dataclasses
import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from masked_first import SITES, VARIANTS, People, Variant, ridge_errors, site_code, train
from rendered_people import cached
from style_axes import axes_of, content_of, read_people, site_from_style, style_of, swaps
from style_candidates import spread
from torch import Tensor

from meduet_models.objective.settings import LossWeights
from meduet_models.probes.quick import site_probe
from meduet_models.probes.ridge import fit_ridge
from meduet_models.tokens import patchify

MASKED_SHARE, LABELLED, DRAWS = 0.9, 10, 20
WHOLE = dataclasses.replace(VARIANTS["masked_first"].objective, masked_share=MASKED_SHARE)
LEFT_OUT = [f.name for f in dataclasses.fields(LossWeights) if f.name != "reconstruction"]
COLUMNS = (
    "hidden/ridge", "site", "site MLP", "sex", "age", "volumes", "sex@10", "age@10", "volumes@10", "gap",
    "left", "whole", "site from style", "age, style",
)  # fmt: skip
LESS_IS_MORE = {"hidden/ridge", "site", "site MLP", "left", "whole", "age, style"}


def variants() -> dict[str, Variant | None]:
    """By name; None is what trains nothing."""
    named: dict[str, Variant | None] = {"raw latents": None, "random": None}
    named |= {"masked": VARIANTS["masked"], "every term": Variant(WHOLE)}
    for name in LEFT_OUT:
        weights = dataclasses.replace(WHOLE.weights, **{name: 0.0})
        named[f"no {name}"] = Variant(dataclasses.replace(WHOLE, weights=weights))
    return named


def cell(people: People, truth: Tensor, ridge: float, name: str, steps: int, seed: int) -> dict[str, float]:
    """Train one variant and measure it."""
    variant = variants()[name]
    if name == "raw latents":
        mean = people.latents[people.trained].mean(0)
        return anatomy_of(people, truth, lambda x: patchify(x - mean, 2).flatten(1))
    if name == "masked":
        steps = round(steps * (MASKED_SHARE + 5.0 * (1 - MASKED_SHARE)))
    own = variant or Variant(WHOLE)
    steps = steps if variant else 0
    network, _, seconds = train(people, own, steps, seed, 2e-3, axes_of(people))
    row = {"CPU s": seconds, "steps": steps} | swaps(network, people, truth)
    row |= anatomy_of(people, truth, partial(content_of, network))
    row |= {"hidden/ridge": row["hidden"] / ridge, "site from style": site_from_style(network, truth)}
    style = torch.cat([style_of(network, x) for x in truth])
    wanted = people.anatomy[people.report].repeat(len(SITES), 1)
    mine = style_of(network, people.latents[people.trained])
    return row | {"age, style": scores(mine, people.anatomy[people.trained], style, wanted)["age"]}


def anatomy_of(people: People, truth: Tensor, flat: Callable[[Tensor], Tensor]) -> dict[str, float]:
    """Site and anatomy from the code of people who did not train."""
    count = truth.shape[1]
    tokens = flat(torch.cat([people.latents, truth.flatten(0, 1)]))
    everybody = dataclasses.replace(
        people, site=torch.cat([people.site, torch.arange(len(SITES)).repeat_interleave(count)])
    )
    code = site_code(tokens, everybody).double()
    fitted, fresh = code[people.trained], code[len(people.latents) :]
    where, who = everybody.site[len(people.latents) :].tolist(), [str(i) for _ in SITES for i in range(count)]
    read = {"site": site_probe(fresh.float(), where, who, 0).score}
    read["site MLP"] = site_probe(fresh.float(), where, who, 0, "mlp").score
    known, wanted = people.anatomy[people.trained], people.anatomy[people.report].repeat(len(SITES), 1)
    read |= scores(fitted, known, fresh, wanted)
    few, draws = [], torch.Generator().manual_seed(0)
    for _ in range(DRAWS):
        rows = torch.randperm(len(fitted), generator=draws)[:LABELLED]
        few.append(scores(fitted[rows], known[rows], fresh, wanted))
    return read | {f"{key}@10": float(torch.tensor([row[key] for row in few]).nanmean()) for key in few[0]}


def scores(x: Tensor, y: Tensor, unseen: Tensor, wanted: Tensor) -> dict[str, float]:
    """Of ridge on each target: AUC of sex, correlation of age, mean correlation of volumes; NaN where there
    is nothing to tell."""
    found = []
    for column in range(y.shape[1]):
        has, asked = ~y[:, column].isnan(), ~wanted[:, column].isnan()
        if int(has.sum()) < 3 or float(y[has, column].std()) == 0:
            found.append(float("nan"))
            continue
        names = [str(i) for i in range(int(has.sum()))]
        told = fit_ridge(x[has], y[has, column, None], names, choice="generalised")(unseen[asked])[:, 0]
        truth = wanted[asked, column].double()
        if column == 1:
            found.append(float((told[truth == 1][:, None] > told[truth == 0]).double().mean()))
        else:
            found.append(float(torch.corrcoef(torch.stack([told, truth]))[0, 1]))
    volumes = torch.tensor(found[2:])
    return {"age": found[0], "sex": found[1], "volumes": float(volumes.nanmean())}


def run(chosen: argparse.Namespace) -> None:
    """Make the cells that are missing."""
    for data in chosen.data:
        for seed in chosen.seeds:
            people, truth = read_people(cached(data, chosen.cache), seed)
            choosing = dataclasses.replace(people, trained=people.trained[:-10])  # its penalty
            ridge = None
            for name in chosen.variants or variants():
                file = file_of(chosen, data, name, seed)
                if file.exists():
                    continue
                ridge = ridge or ridge_errors(choosing, (5, 6, 5))[0]
                began = time.process_time()
                row = cell(people, truth, ridge, name, chosen.steps, seed)
                file.parent.mkdir(exist_ok=True)
                file.write_text(json.dumps({"ridge": ridge, **row}))
                print(f"{data}, {name}, seed {seed}: {time.process_time() - began:.0f} CPU s", flush=True)


def file_of(chosen: argparse.Namespace, data: str, name: str, seed: int) -> Path:
    """Where a cell lies."""
    return chosen.cache / "terms" / f"{data} {name} {chosen.steps} steps, seed {seed}.json"


def show(chosen: argparse.Namespace) -> None:
    """Print the cells that there are, and what each term brings."""
    for data in chosen.data:
        cells: dict[str, dict[int, dict[str, float]]] = {}
        for name in variants():
            files = {seed: file_of(chosen, data, name, seed) for seed in chosen.seeds}
            cells[name] = {seed: json.loads(f.read_text()) for seed, f in files.items() if f.exists()}
        print_table(f"{data}, {chosen.steps} steps", cells, spread)
        whole = cells.pop("every term")
        apart = {
            name: {seed: less(row, whole[seed]) for seed, row in rows.items() if seed in whole}
            for name, rows in cells.items()
        }
        print_table("less every term", apart, verdict)


def less(row: dict[str, float], whole: dict[str, float]) -> dict[str, float]:
    """Each column less that of another row."""
    return {column: row[column] - whole[column] for column in COLUMNS if column in row}


def print_table(
    title: str,
    cells: dict[str, dict[int, dict[str, float]]],
    shown: Callable[[list[dict[str, float]], str], str],
) -> None:
    """A row for each variant that has cells."""
    print(f"\n| {title} (seeds) | " + " | ".join(COLUMNS) + " |")
    print("|---" * (len(COLUMNS) + 1) + "|")
    for name, rows in cells.items():
        if rows:
            values = (shown(list(rows.values()), column) for column in COLUMNS)
            print(f"| {name} ({len(rows)}) | " + " | ".join(values) + " |")


def verdict(rows: list[dict[str, float]], column: str) -> str:
    """The differences; in bold, and whether the row is better or worse, where three or more agree."""
    text = spread(rows, column)
    signs = {row[column] > 0 for row in rows if column in row}
    if not text or len(rows) < 3 or len(signs) > 1 or any(row[column] == 0 for row in rows):
        return text
    worse = signs == {column in LESS_IS_MORE}
    return f"**{text} {'worse' if worse else 'better'}**"


def main() -> None:
    """Make cells, or print them."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=["run", "show"])
    parser.add_argument("data", nargs="+", choices=["ixi", "phantoms"])
    parser.add_argument("--variants", nargs="+", choices=list(variants()))
    parser.add_argument("--steps", type=int, default=139)
    parser.add_argument("--seeds", type=int, nargs="+", default=[11, 12, 13], help="none was used before")
    parser.add_argument("--cache", type=Path, required=True, help="of rendered_people.py")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    {"run": run, "show": show}[chosen.what](chosen)


if __name__ == "__main__":
    main()
