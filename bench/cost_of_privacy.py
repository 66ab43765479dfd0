"""What privacy costs: scans dealt to three hospitals, by epsilon and level, beside baselines that must lose.

    python bench/cost_of_privacy.py root=DATA/msd_hippocampus --cells random sums-1 sums-8 patients full-8
    python bench/cost_of_privacy.py --phantoms --folder runs/cost-phantoms

Hippocampus scans of one hospital, dealt at random, a simulated scanner at each of three; or (`--phantoms`)
60 phantoms of one population at each. The same hospitals for all cells of a seed; other settings as
overrides. Every cell is a whole run, measured after it on patients that no hospital trained on, with the site
erasure that the run ended with. `patients` is the run without privacy, of as many steps at each site;
`full-E` and `adapters-E` take noisy steps after those of `sums`, within one epsilon. `exact` is `sums`
without any noise: epsilon infinite. Anatomy is read from all content tokens (R² of the volumes of labelled
structures, out of fold), Dice from a frozen network with the labels of `LABELLED` training patients
(`label map`: the mean of their labels, which reads no scan). A cell that is done is read from its folder, so
the table may be made in several sittings.
"""

import argparse
import json
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from statistics import mean
from typing import Any
from unittest.mock import patch

import torch
from matplotlib.figure import Figure

from client.latents.style_moments import own_moments
from federation.exchanges.finetuning import LocalFinetuning
from federation.plan.plan import RunPlan
from meduet_models.meduet import MeDUET
from meduet_models.probes.anatomy import anatomy_probe
from meduet_models.style.bank import StyleBank
from privacy.randomness import Stream
from server.app import RunObserver
from server.config import compose_config, plain
from server.public_scans import PUBLIC_SCANS
from simulations.downstream.evaluate import evaluate_downstream
from simulations.downstream.settings import DownstreamSettings
from simulations.evaluation import encode_all, measure
from simulations.hospitals.held_out import join, own_scans
from simulations.hospitals.labelled import known_answers, num_classes
from simulations.observer import TRAINING_SCANS, site_models
from simulations.progress import Live
from simulations.run import Made, Simulation, prepare, simulate

BOTH = ["site.split_fractions=[0.7,0.1,0.2]", "engine.workers=1"]
SPLIT = ["experiment=hippocampus", "hospitals.by=random", "hospitals.styles_on_top=true"]
PHANTOMS = ["hospitals.patients=60", "hospitals.resolution_mm=4", "hospitals.paired=0", "hospitals.skew=0"]
SHOWN = ("reconstruction_error", "style_gap_closed", "site_from_content", "site_from_code")
READ = ("anatomy_from_content", "dice_frozen", "dice_label_map")
NOISY = ["privacy.noisy.although_noise_wins=true"]
CELLS = ["random", "patients", "exact", "sums-8", "sums-3", "sums-1", "adapters-8"]
CELLS += ["full-8", "full-3", "full-1"]
LABELLED, DRAWS = 5, 10
"""Training patients whose labels are used, and draws of them."""


def settings_of(cell: str) -> list[str]:
    """The overrides of a cell."""
    kind, _, epsilon = cell.partition("-")
    match kind:
        case "random" | "patients":
            return ["probes.every_rounds=0", "probes.anatomy={}"]
        case "exact":
            return ["privacy=sums", "privacy.epsilon=20"]
        case "sums":
            return ["privacy=sums", f"privacy.epsilon={epsilon}"]
        case "adapters" | "full":
            share = f"privacy.noisy.epsilon_style={float(epsilon) / 2}"
            return [f"privacy={kind}", f"privacy.epsilon={epsilon}", share, *NOISY]
    raise ValueError(f"Expected random, exact, patients, or sums-, adapters- or full-EPSILON; got {cell!r}.")


def measured(simulation: Simulation, models: Sequence[MeDUET]) -> dict[str, float]:
    """Mean over the sites' models, on patients that no site trained on."""
    plan, everyone = simulation.plan, simulation.consortium.everyone
    scans = [simulation.consortium.site(site).scans(everyone) for site in plan.sites]
    held = join([own_scans(everyone, s, i, ("validation", "test")) for i, s in enumerate(scans)])
    training = [s.latents(s.indices("train")[:TRAINING_SCANS]) for s in scans]
    readings = [measure(model, plan, held, training) for model in models]
    seen = {name: mean(one[name] for one in readings) for name in SHOWN if all(name in r for r in readings)}
    tokens = models[0].erased(encode_all(models[0], held.latents).content).flatten(1)  # the same at all sites
    of_structure = [i for i, name in enumerate(held.anatomy_names) if name.startswith("volume_")]
    read = anatomy_probe(tokens, held.anatomy[:, of_structure], held.patient, plan.seed)
    return seen | {"anatomy_from_content": float(read.nanmean())} | dice(simulation, models[0])


def dice(simulation: Simulation, model: MeDUET) -> dict[str, float]:
    """Mean Dice on held-out patients, of a frozen network and of the mean label."""
    plan, everyone = simulation.plan, simulation.consortium.everyone
    scans = {site: simulation.consortium.site(site).scans(everyone) for site in plan.sites}
    local = LocalFinetuning(task="segmentation", classes=num_classes(scans.values()))
    learn = known_answers([(name, s, s.indices("train")) for name, s in scans.items()], local)
    held = [(name, s, [*s.indices("validation"), *s.indices("test")]) for name, s in scans.items()]
    test = known_answers(held, local)
    assert learn is not None and test is not None, "both data sets have labels"
    settings = DownstreamSettings(
        task="segmentation", classes=local.classes, spacing_mm=plan.volumes.spacing_mm, draws=DRAWS,
        label_counts=(LABELLED,), label_shares=(), modes=("frozen", "label_map"), bootstrap=10,
    )  # fmt: skip
    rows = evaluate_downstream(model, learn, learn.rows([]), {"held": test}, settings, plan.seed).rows
    return {f"dice_{row.mode}": row.value for row in rows if row.metric == "dice"}


def made_once(config: dict[str, Any], folder: Path, live: Live) -> Made:
    """The hospitals of a seed, and where their encodings are."""
    first = prepare({**config, "folder": str(folder)}, live)
    return Made(first.hospitals, folder / "cache")


def shown(cell: str, config: dict[str, Any], made: Made, public: Path, live: Live) -> dict[str, Any]:
    """What a cell shows after its run; `public` keeps the public scans of the seed."""
    began, own = time.process_time(), Path(config["folder"])
    own.mkdir(parents=True, exist_ok=True)
    if public.is_file():
        (own / PUBLIC_SCANS).write_bytes(public.read_bytes())
    simulation = prepare(config, live, made)
    live.begin(simulation.plan)
    models, said = _models(cell, simulation, live)
    if simulation.plan.privacy is not None:
        public.write_bytes((own / PUBLIC_SCANS).read_bytes())
    return {**measured(simulation, models), **said, "cpu_s": round(time.process_time() - began)}


def _models(cell: str, simulation: Simulation, live: Live) -> tuple[list[MeDUET], dict[str, float]]:
    plan = simulation.plan
    if cell == "random":
        return [_start(plan, simulation)], {}
    silent = patch.object(Stream, "normals", lambda stream, shape: torch.zeros(shape, dtype=torch.float64))
    with silent if cell == "exact" else nullcontext():
        result = simulate(simulation, live, RunObserver())
    worth = [r["signal_to_noise"] for r in result.metrics["rounds"] if "signal_to_noise" in r]
    models = site_models(plan, simulation.consortium, result.shared, plan.num_rounds)
    return models, {"signal_to_noise": worth[0]} if worth else {}


def _start(plan: RunPlan, simulation: Simulation) -> MeDUET:
    """Random weights, on the latent scale of the hospitals' exact sums."""
    scans = {site: simulation.consortium.site(site).scans(plan) for site in plan.sites}
    bank = StyleBank.of(plan.sites, {site: own_moments(s, plan) for site, s in scans.items()})
    model = MeDUET(plan.network, len(plan.sites), seed=plan.seed)
    model.set_latent_scale(bank.centre, bank.scale)
    return model.eval()


def main() -> None:
    """Print the table as it grows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("overrides", nargs="*", help="settings, as root=DIR training.rounds=15")
    parser.add_argument("--phantoms", action="store_true", help="hospitals of phantoms; no root is needed")
    parser.add_argument("--cells", nargs="+", default=CELLS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--folder", type=Path, default=Path("runs/cost"))
    parser.add_argument("--figure", type=Path, help="where to draw the table")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    chosen.folder.mkdir(parents=True, exist_ok=True)
    rows: dict[str, list[dict[str, Any]]] = {cell: [] for cell in chosen.cells}
    hospitals = PHANTOMS if chosen.phantoms else SPLIT
    with Live() as live:
        for seed in chosen.seeds:
            made: Made | None = None
            for cell in chosen.cells:
                path = chosen.folder / f"{seed}-{cell}.json"
                if not path.is_file():
                    asked = [*BOTH, *hospitals, *settings_of(cell), *chosen.overrides, f"seed={seed}"]
                    config = {**plain(compose_config(asked)), "folder": str(chosen.folder / f"{seed}-{cell}")}
                    made = made or made_once(config, chosen.folder / f"{seed}-hospitals", live)
                    found = shown(cell, config, made, chosen.folder / f"{seed}-{PUBLIC_SCANS}", live)
                    path.write_text(json.dumps(found), encoding="utf-8")
                rows[cell].append(json.loads(path.read_text(encoding="utf-8")))
                print(f"{seed} {cell}: {rows[cell][-1]}", flush=True)
    if chosen.figure is not None:
        draw(rows, chosen.figure)
    columns = (*SHOWN, *READ, "signal_to_noise", "cpu_s")
    print("| cell | " + " | ".join(columns) + " |")
    for cell, found in rows.items():
        print(f"| {cell} | " + " | ".join(_said(found, name) for name in columns) + " |")


def draw(rows: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """A panel for each of what matters most, a point for each seed, a line at their mean; the baselines that
    must lose are grey."""
    panels = {
        "reconstruction_error": "reconstruction error",
        "style_gap_closed": "style gap closed",
        "site_from_content": "hospital from content",
        "anatomy_from_content": "anatomy from content (R²)",
        "dice_frozen": f"Dice, {LABELLED} labels, frozen",
    }
    figure = Figure(figsize=(2.6 * len(panels), 3.4), layout="constrained")
    for axes, (name, title) in zip(figure.subplots(1, len(panels), sharey=True), panels.items(), strict=True):
        for place, found in enumerate(rows.values()):
            values = [one[name] for one in found if name in one]
            colour = "0.6" if list(rows)[place] == "random" else "tab:blue"
            axes.plot(values, [place] * len(values), "o", color=colour, markersize=4)
            if values:
                axes.plot([mean(values)] * 2, [place - 0.3, place + 0.3], color=colour)
        if name == "dice_frozen":
            flat = [one["dice_label_map"] for found in rows.values() for one in found]
            axes.axvline(mean(flat), color="0.6", linestyle=":")
        axes.set_title(title, fontsize=9)
        axes.tick_params(labelsize=8)
        axes.grid(axis="x", alpha=0.3)
        axes.set_yticks(range(len(rows)), list(rows))
        axes.set_ylim(len(rows) - 0.5, -0.5)
    figure.savefig(path, dpi=110)


def _said(found: Sequence[dict[str, Any]], name: str) -> str:
    """Mean over seeds, and the least and the most."""
    values = [one[name] for one in found if name in one]
    if not values:
        return "-"
    return f"{mean(values):.3f}" + (f" ({min(values):.3f} to {max(values):.3f})" if len(values) > 1 else "")


if __name__ == "__main__":
    main()
