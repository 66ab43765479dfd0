"""`meduet-server tokenizer`: remake the shipped tokenizers, measure them, and say what a file holds.

What it does not do: any of the work; see `server/tokenizer/training.py` and `quality.py`.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from federation.terminal import cell, say
from meduet_models.tokenizer.maisi import MaisiConfig
from meduet_models.tokenizer.tokenizer import Tokenizer, TokenizerSpec, load_tokenizer, load_tokenizer_file
from meduet_models.weights import load_weights
from server.tokenizer.quality import list_scans, measure, read_volumes
from server.tokenizer.training import (
    TokenizerTraining,
    held_out_phantoms,
    linear_tokenizers,
    train_tokenizer,
    training_phantoms,
)

DEFAULTS = TokenizerTraining()
HELD_OUT_SHAPE = (40, 48, 40)
STEPS_IN_MEAN = 50  # of the quality shown beside the progress bar


def add_to(commands: Any) -> None:
    """Add `tokenizer` and its own commands to the parser of `meduet-server`."""
    about = "train, measure or inspect the frozen tokenizer that all sites share"
    tokenizer = commands.add_parser("tokenizer", help=about, description=about.capitalize() + ".")
    actions = tokenizer.add_subparsers(title="what to do", metavar="ACTION", required=True)

    train = actions.add_parser(
        "train",
        help="train a small tokenizer on phantoms (no patient's scan is read)",
        description="Train a small tokenizer on random phantoms; no patient's scan is read. An interrupted "
        "run goes on from its last checkpoint when the same command is given again.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    train.add_argument(
        "--channels", type=int, default=DEFAULTS.channels, help="latent channels: 4, 8, 16, ..."
    )
    train.add_argument("--steps", type=int, default=DEFAULTS.steps, help="optimiser steps, about 0.2 s each")
    train.add_argument("--phantoms", type=int, default=DEFAULTS.num_phantoms, help="phantoms made first")
    train.add_argument("--seed", type=int, default=DEFAULTS.seed, help="of every draw")
    train.add_argument("--out", type=Path, required=True, help="file to write, .safetensors")
    train.add_argument(
        "--threads", type=int, default=1, help="processor threads; more may change last digits"
    )
    train.set_defaults(run=_train)

    evaluate = actions.add_parser(
        "evaluate",
        help="PSNR and SSIM of scans, or of phantoms never trained on, beside the scans' noise",
        description="Encode and decode every scan of a folder, or phantoms that training never drew, and "
        "report PSNR and SSIM, the scans' noise floor, and how much of the latents is noise. Public or "
        "simulated scans: this command is not a site's, it has no gate.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    source = evaluate.add_mutually_exclusive_group(required=True)
    source.add_argument("--data", type=Path, help="folder of NIfTI files", default=argparse.SUPPRESS)
    source.add_argument(
        "--phantoms", type=int, metavar="N", help="N held-out phantoms", default=argparse.SUPPRESS
    )
    evaluate.add_argument("--pattern", default="**/*.nii.gz", help="which files of the folder")
    evaluate.add_argument(
        "--shape", type=int, nargs=3, metavar=("D", "H", "W"), help="crop or pad to these sides, voxels"
    )
    evaluate.add_argument("--seed", type=int, default=DEFAULTS.seed, help="of the held-out phantoms")
    evaluate.add_argument(
        "--baselines",
        type=int,
        metavar="N",
        help="also measure the linear tokenizers of N training phantoms: PCA, and 27 latents for a patch",
    )
    _add_which(evaluate)
    evaluate.set_defaults(run=_evaluate)

    inspect = actions.add_parser(
        "inspect",
        help="hash, size and provenance of a weights file",
        description="Say what a weights file holds.",
    )
    inspect.add_argument("file", type=Path, help="a tokenizer's .safetensors")
    inspect.set_defaults(run=_inspect)


def _add_which(parser: argparse.ArgumentParser) -> None:
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--weights", type=Path, metavar="FILE", help="a tokenizer's .safetensors")
    which.add_argument("--maisi", type=Path, metavar="FILE", help="a MAISI autoencoder's checkpoint")
    which.add_argument(
        "--channels", type=int, default=DEFAULTS.channels, help="the shipped tokenizer of these channels"
    )
    parser.add_argument(
        "--window", type=int, nargs=3, metavar=("D", "H", "W"), help="slide a window of these sides, voxels"
    )


def _train(chosen: argparse.Namespace, console: Console) -> None:
    settings = TokenizerTraining(
        channels=chosen.channels, steps=chosen.steps, num_phantoms=chosen.phantoms, seed=chosen.seed
    )
    torch.set_num_threads(chosen.threads)
    qualities: list[float] = []
    say(console, f"Making {settings.num_phantoms} phantoms and their principal components.")
    with _progress(console) as progress:
        task = progress.add_task("training", total=settings.steps)

        def report(step: int, psnr_db: float) -> None:
            qualities.append(psnr_db)
            recent = qualities[-STEPS_IN_MEAN:]
            mean = sum(recent) / len(recent)
            progress.update(task, completed=step, description=f"{mean:.1f} dB (noisy crops)")

        tokenizer = train_tokenizer(settings, chosen.out, report)
    size_mb = chosen.out.stat().st_size / 1e6
    say(console, f"{chosen.out}: {tokenizer.name}, {size_mb:.2f} MB, sha256 {tokenizer.sha256}")


def _evaluate(chosen: argparse.Namespace, console: Console) -> None:
    shape = tuple(chosen.shape) if chosen.shape else None
    table = Table("tokenizer", "scans", "PSNR dB", "SSIM", "floor dB", "noise (most)")
    for label, tokenizer in _tokenizers_to_measure(chosen):
        if "phantoms" in chosen:
            volumes = iter(held_out_phantoms(chosen.seed, chosen.phantoms, shape or HELD_OUT_SHAPE))
            total, name = chosen.phantoms, "held-out phantoms"
        else:
            paths = list_scans(chosen.data, chosen.pattern)
            volumes, total, name = read_volumes(paths, shape), len(paths), str(chosen.data)
        with _progress(console) as progress:
            task = progress.add_task(label, total=total)

            def report(count: int, progress: Progress = progress, task: TaskID = task) -> None:
                progress.update(task, completed=count)

            quality = measure(tokenizer, volumes, report)
        table.add_row(
            cell(label),
            str(quality.num_volumes),
            f"{quality.psnr_db:.2f}",
            f"{quality.ssim:.3f}",
            f"{quality.noise_floor_db:.2f}",
            f"{quality.noise_share:.1%} ({quality.largest_noise_share:.1%})",
        )
    table.title = cell(name)
    console.print(table)
    say(
        console,
        "Floor: the PSNR left when nothing but a scan's own noise is lost, as measured on the scan. "
        "Noise: its share in the variance of the latents, and of the channel with most.",
    )


def _tokenizers_to_measure(chosen: argparse.Namespace) -> list[tuple[str, Tokenizer]]:
    tokenizer = _chosen_tokenizer(chosen)
    found = [(tokenizer.name, tokenizer)]
    if chosen.baselines is not None:
        channels = tokenizer.latent_channels
        settings = TokenizerTraining(channels=channels, num_phantoms=chosen.baselines)
        pca, linear = linear_tokenizers(channels, training_phantoms(settings))
        found += [(f"PCA-{channels}ch", pca), (f"PCA-{channels}ch, 27 latents", linear)]
    return found


def _inspect(chosen: argparse.Namespace, console: Console) -> None:
    tensors, provenance = load_weights(chosen.file)
    tokenizer = load_tokenizer_file(chosen.file)
    facts = {
        "name": tokenizer.name,
        "sha256": tokenizer.sha256,
        "parameters": f"{sum(t.numel() for t in tensors.values()):,}",
        **provenance,
    }
    say(console, *(f"{fact}: {value}" for fact, value in facts.items()))


def _chosen_tokenizer(chosen: argparse.Namespace) -> Tokenizer:
    window = tuple(chosen.window) if chosen.window else None
    if chosen.maisi is not None:
        spec = TokenizerSpec(
            kind="maisi", channels=MaisiConfig.channels, path=str(chosen.maisi), sliding_window=window
        )
        return load_tokenizer(spec)
    if chosen.weights is not None:
        return load_tokenizer_file(chosen.weights, window)
    return load_tokenizer(TokenizerSpec(channels=chosen.channels, sliding_window=window))


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
    )
