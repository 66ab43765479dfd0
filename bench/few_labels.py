"""Few labels on real scans: a frozen encoder's code and tokens beside what needs no pretraining.

The people, scanners and encoder of `content_code.py` (110 whole heads; the encoder is trained without labels
on all of them, and makes the cache first); each person at one of three simulated scanners, 66 to learn from,
44 to test. The code has public axes, the site erased from the means of the 66. Closed forms only, so that
twenty draws of the labelled people are cheap; intervals are paired over the test people.

    python bench/few_labels.py --cache runs/code           about 1 CPU minute after the encoder's 2
"""

import argparse
import time
from pathlib import Path

import content_code as bench
import torch

from client.latents.labelled import LabelledScans
from meduet_models.content_code import CodeSums, code_bound, public_code, token_erasure, without_sites
from meduet_models.downstream.task import Target
from server import public_latents
from simulations.downstream.evaluate import DownstreamSettings, evaluate_downstream
from simulations.downstream.report import comparisons_of

SITES, LEARN, SIZE, DRAWS = 3, 66, 64, 20
MODES = ("frozen", "frozen_tokens", "label_map", "ridge", "random")
TASKS = (
    ("classification", "sex", ("F", "M"), 2, (2, 5, 10)),
    ("regression", "age", ("20", "90"), 1, (5, 10, 20)),
)


def main() -> None:
    """Print a row for every mode and number of labels, and its difference from the yardsticks."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--cache", type=Path, required=True, help="folder that content_code.py filled")
    folder = parser.parse_args().cache
    people, plan = torch.load(folder / "people.pt"), bench.a_plan(4)
    latents, count = people["latents"], people["latents"].shape[1]
    of_encoder = torch.arange(count) % 4
    style_bank = bench.bank_of(latents[of_encoder, torch.arange(count)], of_encoder)
    network = bench.an_encoder(plan, latents[of_encoder, torch.arange(count)], of_encoder, style_bank, False)
    network.load_state_dict(torch.load(folder / "encoder.pt"))
    order = torch.randperm(count, generator=torch.Generator().manual_seed(1))
    learn, test = order[:LEARN], order[LEARN:]
    site = torch.arange(count) % SITES
    once = latents[site, torch.arange(count)]

    public = public_latents.restyled(torch.load(folder / "public.pt")["phantoms"], plan, style_bank)
    code, tokens = public_code(bench.tokens_of(network, public), 32, 32, SIZE), bench.tokens_of(network, once)
    codes, pooled = {}, {}
    for s in range(SITES):
        rows = learn[site[learn] == s]
        who = [str(int(row)) for row in rows]
        codes[str(s)] = CodeSums.of(code.read(tokens[rows]), who, code_bound(SIZE))
        pooled[str(s)] = CodeSums.of(tokens[rows].mean(1), who, bench.BOUND)
    network.set_content_code(without_sites(code, codes))
    network.set_erasure(*token_erasure(code, codes, pooled))

    for task, name, values, classes, label_counts in TASKS:
        began = time.process_time()
        answers = people[name].long() if classes == 2 else (people[name] - 55) / 35

        def scans(rows: torch.Tensor, answers: torch.Tensor = answers) -> LabelledScans:
            who = tuple(str(int(row)) for row in rows)
            return LabelledScans(once[rows], answers[rows], who, tuple(site[rows].tolist()))

        settings = DownstreamSettings(
            task=task, classes=classes, target=Target(name, values), spacing_mm=bench.SPACING_MM, draws=DRAWS,
            label_counts=label_counts, label_shares=(1.0,), modes=MODES,
        )  # fmt: skip
        rows = evaluate_downstream(
            network, scans(learn), scans(learn[:0]), {"seen": scans(test)}, settings, 0
        ).rows
        for row in rows:
            if row.resamples:
                interval = f"{row.value:.3f} [{row.low:.3f}, {row.high:.3f}], {row.draws} draws"
                print(f"{name} {row.metric} {row.mode:14s} {row.labels:>5s}  {interval}")
        for one in comparisons_of(rows):
            print(f"{name}: {one.who} - {one.rival}, labels of {one.labels}: {one}", flush=True)
        print(f"{time.process_time() - began:.0f} CPU s", flush=True)


if __name__ == "__main__":
    main()
