"""The U-Net on the volume as encoder of the pretraining, from each start, beside the ViT at equal compute.

Two real sets: whole heads at 4 mm under three simulated scanners (`masked_first.py`: hidden error, anatomy,
site, style), and hippocampus (Dice of a frozen encoder read in closed form, with few labels, beside ridge on
raw latents and encoders that took no step). Networks are compared, not the federation: one process, all sites
in one place. Cells are written as they end; the same command goes on where it stopped.

    python bench/volume_encoder.py run ixi OUT --starts canonical.safetensors shapes.safetensors
    python bench/volume_encoder.py run hippocampus OUT --starts ... --seeds 0 1
    python bench/volume_encoder.py report OUT

A budget is counted in masked steps of the ViT; `COST` is what each step costs, measured on an idle core.
"""

import argparse
import dataclasses
import json
import math
import os
import sys
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import anatomy_start
import masked_first as bench
import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from client.latents.labelled import LabelledScans
from meduet_models.anatomy_start import load_start
from meduet_models.downstream.baselines import fit_per_position
from meduet_models.downstream.frozen import fit_voxels, frozen_tokens
from meduet_models.meduet import MeDUET
from meduet_models.probes.hidden import with_neighbours
from meduet_models.seeds import digest_of
from meduet_models.style.bank import StyleBank
from meduet_models.tokenizer.tokenizer import TokenizerSpec, load_tokenizer
from meduet_models.tokens import patchify
from server.config import compose_config, plain, plan_from
from server.public_latents import picture_moments

COST = {"vit": (1.0, 6.5), "volume_unet": (2.6, 14.3)}
"""Of a masked step, and of one with every term; in masked steps of the ViT."""
MASKED = 0.8
LABELLED, DRAWS = (1, 2, 8, 0), 5


def main() -> None:
    """Run cells, or report them."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    actions = parser.add_subparsers(required=True)
    run = actions.add_parser("run")
    run.add_argument("data", choices=["ixi", "hippocampus"])
    run.add_argument("out", type=Path)
    run.add_argument("--starts", type=Path, nargs="*", default=[])
    run.add_argument("--arms", nargs="+", default=["vit", "none", "canonical", "shapes"])
    run.add_argument("--seeds", type=int, nargs="+", default=[0])
    run.add_argument("--budget", type=float, default=700.0)
    run.add_argument("--rate", type=float, default=2e-3)
    run.set_defaults(act=_run)
    report = actions.add_parser("report")
    report.add_argument("out", type=Path)
    report.set_defaults(act=_report)
    chosen = parser.parse_args()
    chosen.act(chosen)


def _run(chosen: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    chosen.out.mkdir(parents=True, exist_ok=True)
    data = Path(os.environ.get("FEDMEDUET_DATA") or Path(__file__).resolve().parents[2] / "shared" / "data")
    starts = {load_start(path).kind: path for path in chosen.starts}
    cells = {tuple(cell["key"]): cell for cell in cells_of(chosen.out)}
    if chosen.data == "ixi":
        people, ridges = bench.cached("ixi", chosen.out, data)
        read: Callable = lambda network, bank: bench.measure(network, people, bank, ridges)  # noqa: E731
    else:
        bench.SIZE["latent_grid"] = (8, 12, 8)
        bench.VOLUMES = anatomy_start.SETS["hippocampus"].plan
        people, labelled = hippocampus(data, chosen.out)
        read = lambda network, bank: dice_of_frozen(network, *labelled)  # noqa: E731
    moments = None
    for seed in chosen.seeds:
        for arm in [*chosen.arms, *(f"{arm} at its start" for arm in chosen.arms)]:
            key = (chosen.data, arm, seed, chosen.budget, chosen.rate)
            if key in cells or (arm.endswith("start") and chosen.data == "ixi"):
                continue
            kind = arm.split()[0]
            encoder = "vit" if kind == "vit" else "volume_unet"
            if encoder != "vit" and moments is None:
                moments = picture_moments(*a_plan())

            def before(network: MeDUET, bank: StyleBank, kind: str = kind, moments: object = moments) -> None:
                if network.embed_volume is not None:
                    network.embed_volume.set_picture(moments)
                    if kind != "none":
                        start = load_start(starts[kind]).network.state_dict()
                        mine = network.embed_volume.levels.state_dict()
                        network.embed_volume.levels.load_state_dict({name: start[name] for name in mine})

            objective = bench.ObjectiveConfig(estimator="one_stream", masked_share=MASKED)
            variant = bench.Variant(objective, {**bench.NETWORK, "encoder": encoder})
            masked, whole = COST[encoder]
            steps = round(chosen.budget / (MASKED * masked + (1 - MASKED) * whole))
            steps = 0 if arm.endswith("start") else steps
            network, bank, seconds = bench.train(people, variant, steps, seed, chosen.rate, before)
            cell = {"key": key, "steps": steps, "cpu": seconds, "read": read(network, bank)}
            with (chosen.out / "cells.jsonl").open("a") as file:
                file.write(json.dumps(cell) + "\n")
            print(*key, f"{steps} steps, {seconds:.0f} CPU s", flush=True)


def a_plan() -> tuple:
    """The plan of such a run, and its tokenizer: what the picture is fitted with."""
    tokenizer, volumes = load_tokenizer(TokenizerSpec()), bench.VOLUMES
    wanted = [f"volumes.spacing_mm={list(volumes.spacing_mm)}", f"volumes.shape={list(volumes.shape)}"]
    plan = plan_from(
        plain(compose_config(wanted)),
        sites=bench.SITES,
        tokenizer_sha256=tokenizer.sha256,
        latent_channels=tokenizer.latent_channels,
        stride=tokenizer.stride,
    )
    return plan, tokenizer


def hippocampus(root: Path, folder: Path) -> tuple[bench.People, tuple[LabelledScans, LabelledScans]]:
    """Patients dealt to three sites; those whose labels may be used train, the others are tested."""
    data = anatomy_start.SETS["hippocampus"]
    scans = anatomy_start.read_set(data, root, folder / "hippocampus.safetensors")
    assert scans.volumes is not None
    scans = dataclasses.replace(scans, latents=bench.encoded([v.float() for v in scans.volumes]))
    test, _, pool = anatomy_start.divided(scans, data)
    nobody = torch.zeros(len(pool), 0)
    people = bench.People(
        pool.latents, torch.arange(len(pool)) % 3, list(range(len(pool))), [], pool.latents[None], nobody, ()
    )
    return people, (pool, test)


def dice_of_frozen(network: MeDUET, pool: LabelledScans, test: LabelledScans) -> dict[str, list[float]]:
    """Dice of each test patient, the mean of draws, at each number of labelled patients: of content tokens
    and, beside the ViT, of raw latents, which are the same whatever the encoder."""
    config, found = network.config, {}
    own = frozen_tokens(network, pool.latents), frozen_tokens(network, test.latents)
    raw = patchify(pool.latents, config.patch_size), patchify(test.latents, config.patch_size)
    around = tuple(with_neighbours(tokens, config.token_grid) for tokens in raw)
    for count in LABELLED:
        draws: dict[str, list] = defaultdict(list)
        for draw in range(DRAWS if count else 1):
            order = sorted(pool.patients, key=lambda name, draw=draw: digest_of("labels", draw, name))
            rows = [pool.patient.index(name) for name in order[: count or len(order)]]
            few = pool.rows(rows)
            fitted = fit_voxels(own[0][rows], few.answers, 3, few.patient, config, draw)
            draws["frozen"].append(anatomy_start.dice_of(fitted(own[1]), test))
            beside = {"ridge": raw, "ridge 27": around} if config.encoder == "vit" else {}
            for name, (train, unseen) in beside.items():
                answer = fit_per_position(train[rows], few.answers, 3, config.token_grid, few.patient, draw)
                draws[name].append(anatomy_start.dice_of(answer(unseen), test))
        for name, dice in draws.items():
            found[f"{name}, {count or 'all'}"] = np.mean(dice, axis=0).tolist()
    return found


def cells_of(folder: Path) -> list[dict]:
    """What was written so far."""
    path = folder / "cells.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def _report(chosen: argparse.Namespace) -> None:
    arms: dict[tuple, dict[int, dict]] = defaultdict(dict)
    for cell in cells_of(chosen.out):
        data, arm, seed, budget, rate = cell["key"]
        arms[data, budget, rate, arm][seed] = cell
    for (data, budget, rate, arm), seeds in arms.items():
        rival = arms.get((data, budget, rate, "vit"), {})
        cpu = np.mean([cell["cpu"] for cell in seeds.values()])
        print(f"{data} {arm}: {len(seeds)} seeds, {cell_steps(seeds)} steps, {cpu:.0f} CPU s, rate {rate:g}")
        for name in next(iter(seeds.values()))["read"]:
            values = [np.mean(cell["read"][name]) for cell in seeds.values()]
            line = f"  {name:16s} " + " ".join(f"{value:.3f}" for value in values)
            shared = sorted(set(seeds) & set(rival))
            each = [np.array(seeds[s]["read"][name]) - np.array(rival[s]["read"][name]) for s in shared]
            if each and arm != "vit" and each[0].ndim:
                line += f"   minus vit {_paired(np.mean(each, axis=0))}"
            print(line)


def cell_steps(seeds: dict[int, dict]) -> int:
    """Steps of these cells, which all took as many."""
    return next(iter(seeds.values()))["steps"]


def _paired(each: np.ndarray) -> str:
    rows = np.random.default_rng(0).integers(len(each), size=(10_000, len(each)))
    low, high = np.quantile(each[rows].mean(axis=1), (0.025, 0.975))
    return "nan" if math.isnan(low) else f"{each.mean():+.3f} [{low:+.3f}, {high:+.3f}]"


if __name__ == "__main__":
    main()
