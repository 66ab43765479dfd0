"""`meduet-server pretrain-public`: a start from public anatomy, before the network meets a patient.

What it does not do: any of the work; see `server/anatomy/`.
"""

import argparse
from pathlib import Path
from typing import Any, get_args

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from federation.terminal import say
from meduet_models.anatomy_start import AnatomyKind
from meduet_models.weights import sha256_of_file
from server.anatomy.training import AnatomyQuality, AnatomyTraining, train_start

DEFAULTS = AnatomyTraining()
STEPS_IN_MEAN = 20  # of the loss shown beside the progress bar


def add_to(commands: Any) -> None:
    """Add `pretrain-public` to the parser of `meduet-server`."""
    about = "make a start from public anatomy (no patient's scan is read)"
    train = commands.add_parser(
        "pretrain-public",
        help=about,
        description=f"{about.capitalize()}: a U-Net on the volume sees random pictures of random pieces of "
        "the public ICBM 152 template and learns to say where in it each voxel lies and what is there. An "
        "interrupted run goes on from its last checkpoint when the same command is given again.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    train.add_argument(
        "--start",
        choices=get_args(AnatomyKind),
        default=DEFAULTS.start,
        help="canonical: the template, and a few shapes; shapes: random shapes alone, its control",
    )
    train.add_argument("--steps", type=int, default=DEFAULTS.steps, help="optimiser steps, about 0.6 s each")
    train.add_argument("--batch", type=int, default=DEFAULTS.batch_size, help="pieces per step")
    train.add_argument("--seed", type=int, default=DEFAULTS.seed, help="of every draw")
    train.add_argument("--out", type=Path, required=True, help="file to write, .safetensors")
    train.add_argument(
        "--threads", type=int, default=1, help="processor threads; more may change last digits"
    )
    train.set_defaults(run=_train)


def _train(chosen: argparse.Namespace, console: Console) -> None:
    settings = AnatomyTraining(
        start=chosen.start, steps=chosen.steps, batch_size=chosen.batch, seed=chosen.seed
    )
    torch.set_num_threads(chosen.threads)
    losses: list[float] = []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("training", total=settings.steps)

        def report(step: int, loss: float) -> None:
            losses.append(loss)
            recent = losses[-STEPS_IN_MEAN:]
            progress.update(task, completed=step, description=f"loss {sum(recent) / len(recent):.3f}")

        quality = train_start(settings, chosen.out, report)
    assert quality is not None, "nothing was asked to stop before the end"
    console.print(_table(settings, quality))
    size_mb = chosen.out.stat().st_size / 1e6
    say(console, f"{chosen.out}: {settings.start}, {size_mb:.2f} MB, sha256 {sha256_of_file(chosen.out)}")


def _table(settings: AnatomyTraining, quality: AnatomyQuality) -> Table:
    """What the start knows of pieces that no step drew."""
    table = Table("on pieces that training never drew", "known", "by looking at nothing")
    if settings.start == "canonical":
        table.add_row("place in the template (mm off)", f"{quality.place_mm:.1f}", f"{quality.blind_mm:.1f}")
    what = "T1 and tissue" if settings.start == "canonical" else "intensity of the shape"
    table.add_row(f"{what} (explained variance)", f"{quality.maps_r2:.3f}", "0")
    table.add_row("borders (explained variance)", f"{quality.border_r2:.3f}", "0")
    return table
