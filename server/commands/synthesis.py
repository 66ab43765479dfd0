"""`meduet-server synthesize`: reading arguments and showing progress.

What it does not do: any of the work (`synthesis.py`). Heavy modules are imported inside the command.
"""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from federation.terminal import say
from meduet_models.diffusion.sampling_options import add_sampling_options, sampling_settings

if TYPE_CHECKING:
    from meduet_models.diffusion.artefact import GenerativeModel
    from meduet_models.tokenizer.tokenizer import Tokenizer

_ABOUT = """\
Draw volumes from a generative model and write them as NIfTI. What is told decides what they show: nothing
(any scan of the federation), --style (as scanned at a site), --content (the anatomy of a scan), both (that
patient as scanned at that site), --between (the way from one anatomy to another), --along (an anatomy,
changed in one covariate). The centre opens no scan: SCAN is a file made by `meduet-site encode`, or
bank:ITEM. An interrupted request goes on when the same command is given again, and ends in the same files.
"""
_EXAMPLES = """\
examples, each after `meduet-server synthesize --model diffusion.safetensors`:
  -o any -n 8                                                  any scan of the federation
  -o north -n 8 --style north                                  as scanned at north
  -o elsewhere -n 2 --content scan.safetensors --style north   this patient, as scanned at north
  -o way --between a.safetensors b.safetensors --points 7      from one anatomy to another
  -o older --content scan.safetensors --along age --range -20 20 --points 5
"""


def add_to(commands: Any) -> None:
    """Add `synthesize` to the parser of `meduet-server`."""
    parser = commands.add_parser(
        "synthesize",
        help="draw volumes from a generative model: by style, by content, between scans, along a covariate",
        description=_ABOUT,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--model", type=Path, required=True, metavar="FILE", help="diffusion.safetensors of a run"
    )
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--tokenizer", type=Path, metavar="FILE", help="a tokenizer's .safetensors; default: the shipped"
    )
    which.add_argument("--maisi", type=Path, metavar="FILE", help="a MAISI autoencoder's checkpoint")
    parser.add_argument(
        "--window", type=int, nargs=3, metavar=("D", "H", "W"), help="the tokenizer's sliding window"
    )
    parser.add_argument("-o", "--out", type=Path, required=True, metavar="FOLDER", help="folder to write")
    parser.add_argument(
        "-n",
        "--count",
        type=int,
        metavar="N",
        help="volumes (default 8); with --between or --along, ways (default 1)",
    )
    parser.add_argument("--style", default="", metavar="SITE", help="site of the target style")
    content = parser.add_mutually_exclusive_group()
    content.add_argument("--content", metavar="SCAN", help="encoded scan whose anatomy is shown")
    content.add_argument("--between", nargs=2, metavar=("SCAN_A", "SCAN_B"), help="two encoded scans")
    parser.add_argument("--bank", type=Path, metavar="FOLDER", help="latent bank of SCANs named bank:ITEM")
    parser.add_argument("--key", type=Path, metavar="FILE", help="the bank's key (default FOLDER.key)")
    parser.add_argument(
        "--interpolation",
        choices=("linear", "spherical"),
        help="way between two contents (default spherical)",
    )
    parser.add_argument(
        "--along", default="", metavar="COVARIATE", help="change the content of --content in this"
    )
    parser.add_argument(
        "--range", type=float, nargs=2, metavar=("FROM", "TO"),
        help="by how much the covariate changes, in its own unit (years, mm³; sex: F to M is 1)",
    )  # fmt: skip
    parser.add_argument("--points", type=int, metavar="N", help="volumes along a way (default 7)")
    parser.add_argument("--body-part", default="", metavar="PART", help="told body part")
    parser.add_argument("--category", default="", metavar="CLASS", help="told class")
    parser.add_argument(
        "--spacing",
        type=float,
        nargs=3,
        metavar=("X", "Y", "Z"),
        help="told voxel edges before resampling, mm",
    )
    parser.add_argument(
        "--batch-size", type=int, default=8, metavar="N", help="volumes sampled together (default 8)"
    )
    parser.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: a GPU if there is one"
    )
    add_sampling_options(parser)
    parser.set_defaults(run=_synthesize)


def _synthesize(chosen: argparse.Namespace, console: Console) -> None:
    from meduet_models.diffusion.artefact import load_generative_model
    from meduet_models.weights import sha256_of_file
    from server.synthesis.banked_scan import named_scan
    from server.synthesis.synthesis import SynthesisRequest, synthesise

    way = bool(chosen.between or chosen.along)
    _refuse_without_effect(chosen, way)
    model = load_generative_model(chosen.model)
    scans = [named_scan(name, chosen.bank, chosen.key) for name in _names(chosen)]
    request = SynthesisRequest(
        count=chosen.count if chosen.count is not None else 1 if way else 8,
        style=chosen.style,
        content=scans[0] if chosen.content else None,
        between=(scans[0], scans[1]) if chosen.between else None,
        interpolation=chosen.interpolation or "spherical",
        along=chosen.along,
        amounts=(chosen.range[0], chosen.range[1]) if chosen.range else (0.0, 0.0),
        points=(chosen.points if chosen.points is not None else 7) if way else 1,
        body_part=chosen.body_part,
        category=chosen.category,
        spacing_mm=None if chosen.spacing is None else tuple(chosen.spacing),
        sampling=sampling_settings(chosen),
        seed=chosen.seed or 0,
        batch_size=chosen.batch_size,
    )
    tokenizer = _tokenizer(chosen, model)
    with _bars(console) as bars:
        task = bars.add_task("volumes", total=request.num_volumes)
        written = synthesise(
            model,
            tokenizer,
            request,
            chosen.out,
            model_sha256=sha256_of_file(chosen.model),
            device=_device(chosen.device),
            report=lambda done, total: bars.update(task, completed=done, total=total),
        )
    say(console, f"{len(written)} volumes in {chosen.out}; samples.csv says what each is.")
    if model.patient_data or "content" in request.told:
        say(console, "They are patient data; README.txt says why. Handle them as scans.")


def _refuse_without_effect(chosen: argparse.Namespace, way: bool) -> None:
    """A setting that would do nothing is an error."""
    if chosen.interpolation and not chosen.between:
        raise ValueError("--interpolation has no effect without --between: leave it out.")
    if chosen.points is not None and not way:
        raise ValueError("--points has no effect without --between or --along: leave it out.")
    if bool(chosen.range) != bool(chosen.along):
        raise ValueError("Expected --along COVARIATE and --range FROM TO together; got one of them.")
    if (chosen.bank or chosen.key) and not any(name.startswith("bank:") for name in _names(chosen)):
        raise ValueError("--bank and --key have no effect without a SCAN named bank:ITEM: leave them out.")
    if chosen.window and not chosen.maisi and not chosen.tokenizer:
        raise ValueError("--window is of --tokenizer or --maisi; neither is given.")


def _names(chosen: argparse.Namespace) -> list[str]:
    """The scans that are named, by file or bank item."""
    return list(chosen.between or []) + ([chosen.content] if chosen.content else [])


def _tokenizer(chosen: argparse.Namespace, model: "GenerativeModel") -> "Tokenizer":
    from meduet_models.tokenizer.tokenizer import TokenizerSpec, load_tokenizer, load_tokenizer_file

    window = tuple(chosen.window) if chosen.window else None
    if chosen.maisi is not None:
        channels = model.transformer.config.latent_channels
        spec = TokenizerSpec(kind="maisi", channels=channels, path=str(chosen.maisi), sliding_window=window)
        return load_tokenizer(spec)
    if chosen.tokenizer is not None:
        return load_tokenizer_file(chosen.tokenizer, window)
    return load_tokenizer(TokenizerSpec(channels=model.transformer.config.latent_channels))


def _device(choice: str) -> str:
    import torch

    if choice == "cuda" and not torch.cuda.is_available():
        raise ValueError("Expected a CUDA device (--device cuda); PyTorch finds none. Try --device auto.")
    return "cuda" if choice != "cpu" and torch.cuda.is_available() else "cpu"


def _bars(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
        TimeRemainingColumn(), console=console,
    )  # fmt: skip
