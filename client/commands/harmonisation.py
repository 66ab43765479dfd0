"""`meduet-site harmonise | encode | segment`: reading arguments, showing progress, one line per error.

What it does not do: any of the work (`client/products/harmonisation.py`, `client/products/segmentation.py`).
No command asks a server or writes to the site's books: nothing leaves. Heavy modules are imported inside the
commands: --help is immediate.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from federation.terminal import DONE, FAILED, CommandFailed, failing, say
from meduet_models.diffusion.sampling_options import OPTIONS, add_sampling_options, sampling_settings

_HARMONISE = """\
Show scans as another site's scanner would have made them: the anatomy of the scan, the style of SITE.
Needs no server: model and tokenizer are files. Each result is a NIfTI on the scan's own grid, intensities
in the scan's own range, with a JSON beside it that says how it was made. Outside the part that the model
saw there is background. The result is made, not acquired: it is not for diagnosis; and it is the patient's,
as the scan is.
"""
_ENCODE = """\
Write a scan's latents to a file, for `meduet-server synthesize --content`. THE FILE IS PATIENT DATA: the scan
can be decoded from it. Nothing is sent; giving the file to anybody is giving away the scan.
"""


_SEGMENT = """\
Label every voxel of scans with a network that a federation fine-tuned. Needs no server: model and tokenizer
are files. Each result is a NIfTI of classes on the scan's own grid, with a JSON beside it that says how it
was made; a network of whole scans labels all of the patient, one of crops the central crop. The result is
predicted, not drawn: it is not for diagnosis; and it is the patient's, as the scan is.
"""


def add_to(commands: Any) -> None:
    """Add `harmonise`, `encode` and `segment` to the parser of `meduet-site`."""
    harmonise = commands.add_parser(
        "harmonise",
        help="show scans in another site's style; needs no server",
        description=_HARMONISE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    harmonise.add_argument(
        "scans", type=Path, nargs="+", metavar="SCAN", help="NIfTI file, DICOM file or folder"
    )
    harmonise.add_argument(
        "--model", type=Path, required=True, metavar="FILE", help="diffusion.safetensors of a run"
    )
    harmonise.add_argument("--style", required=True, metavar="SITE", help="site of the target style")
    harmonise.add_argument(
        "-o",
        "--out",
        type=Path,
        required=True,
        metavar="OUT",
        help="file to write, .nii.gz; for several scans a folder",
    )
    harmonise.add_argument(
        "--own-style", default="", metavar="SITE",
        help="site that made the scans (invert, restyle); by default each scan's own statistics tell",
    )  # fmt: skip
    harmonise.add_argument(
        "--method", choices=("sample", "invert", "restyle"), default="sample",
        help="sample: the scan's content with new noise (default); invert: with the scan's own noise, keeps "
        "detail; restyle: the sites' statistics alone, no network",
    )  # fmt: skip
    harmonise.add_argument(
        "--body-part", default="", metavar="PART", help="of the scans, where the model tells them apart"
    )
    add_sampling_options(harmonise)
    harmonise.set_defaults(run=_harmonise)
    encode = commands.add_parser(
        "encode",
        help="write one scan's latents to a file: patient data",
        description=_ENCODE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    encode.add_argument("scan", type=Path, metavar="SCAN", help="NIfTI file, DICOM file or folder")
    prepared = encode.add_mutually_exclusive_group(required=True)
    prepared.add_argument("--model", type=Path, metavar="FILE", help="prepare as this model's scans were")
    prepared.add_argument("--plan", type=Path, metavar="FILE", help="prepare as this plan.json says")
    encode.add_argument(
        "-o", "--out", type=Path, required=True, metavar="FILE", help="file to write, .safetensors"
    )
    encode.set_defaults(run=_encode)
    segment = commands.add_parser(
        "segment",
        help="label every voxel of scans with a fine-tuned network; needs no server",
        description=_SEGMENT,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    segment.add_argument(
        "scans", type=Path, nargs="+", metavar="SCAN", help="NIfTI file, DICOM file or folder"
    )
    segment.add_argument(
        "--model", type=Path, required=True, metavar="FILE", help="finetuned.safetensors of a fine-tuning"
    )
    segment.add_argument(
        "-o", "--out", type=Path, required=True, metavar="OUT",
        help="file to write, .nii.gz; for several scans a folder",
    )  # fmt: skip
    segment.set_defaults(run=_segment)
    for command in (harmonise, encode, segment):
        which = command.add_mutually_exclusive_group()
        which.add_argument("--config", type=Path, metavar="FILE", help="site.yaml: its tokenizer and device")
        which.add_argument(
            "--tokenizer",
            type=Path,
            metavar="FILE",
            help="a tokenizer's .safetensors; by default the shipped one",
        )


def _harmonise(chosen: argparse.Namespace, console: Console) -> int:
    from client.products.harmonisation import volume_file
    from client.products.volume_files import make_files, target_paths
    from meduet_models.diffusion.artefact import load_generative_model
    from meduet_models.diffusion.harmonisation import HarmonisationSettings
    from meduet_models.diffusion.harmoniser import Harmoniser
    from meduet_models.weights import sha256_of_file

    if chosen.method == "restyle":
        _refuse_without_effect(chosen)
    settings = HarmonisationSettings(
        style=chosen.style,
        own_style=chosen.own_style,
        method=chosen.method,
        body_part=chosen.body_part,
        sampling=sampling_settings(chosen),
        seed=chosen.seed or 0,
    )
    targets = target_paths(chosen.scans, chosen.out, f"as_{chosen.style}")
    model = load_generative_model(chosen.model)
    tokenizer, device = _tokenizer(chosen, model.transformer.config.latent_channels)
    harmoniser = Harmoniser(
        model, tokenizer, settings, model_sha256=sha256_of_file(chosen.model), device=device
    )
    with failing(ValueError), _bars(console) as bars:
        scans, steps = bars.add_task("scans", total=len(targets)), bars.add_task("steps", total=1)
        unusable = make_files(
            chosen.scans,
            targets,
            lambda scan: volume_file(
                harmoniser(scan, lambda done, total: bars.update(steps, completed=done, total=total))
            ),
            harmoniser.volumes.four_d,
            lambda done, total: bars.update(scans, completed=done, total=total),
        )
    return _told(chosen.scans, targets, unusable, "Made, not acquired", console)


def _segment(chosen: argparse.Namespace, console: Console) -> int:
    from client.products.segmentation import Segmenter, load_finetuned
    from client.products.volume_files import make_files, target_paths

    targets = target_paths(chosen.scans, chosen.out, "segmented")
    model = load_finetuned(chosen.model)
    segmenter = Segmenter(model, *_tokenizer(chosen, model.plan.network.latent_channels))
    with failing(ValueError), _bars(console) as bars:
        scans = bars.add_task("scans", total=len(targets))
        unusable = make_files(
            chosen.scans,
            targets,
            segmenter,
            segmenter.volumes.four_d,
            lambda done, total: bars.update(scans, completed=done, total=total),
        )
    return _told(chosen.scans, targets, unusable, "Predicted, not drawn", console)


def _told(
    scans: Sequence[Path],
    targets: Sequence[Path],
    unusable: Sequence[tuple[Path, str]],
    what: str,
    console: Console,
) -> int:
    """Say what was written and what could not be used; returns the exit status."""
    for path, reason in unusable:
        say(console, f"Not usable: {path}: {reason}")
    left = {path for path, _ in unusable}
    written = [target for target, path in zip(targets, scans, strict=True) if path not in left]
    for target in written:
        say(console, f"{target}")
    if written:
        say(console, f"{what}: not for diagnosis. Patient data, as the scans are.")
    return FAILED if unusable else DONE


def _encode(chosen: argparse.Namespace, console: Console) -> int:
    from client.products.harmonisation import encode_scan
    from client.site import load_plan
    from meduet_models.diffusion.artefact import load_generative_model
    from meduet_models.diffusion.harmoniser import check_tokenizer, volume_plan
    from meduet_models.encoded_scan import PATIENT_DATA, save_encoded_scan
    from scans.scans import UnusableScan
    from scans.volumes import read_scan

    if not chosen.scan.exists():
        raise ValueError(f"Expected a scan at {chosen.scan}; nothing is there.")
    if chosen.model is not None:
        model = load_generative_model(chosen.model)
        tokenizer, device = _tokenizer(chosen, model.transformer.config.latent_channels)
        check_tokenizer(model, tokenizer)
        volumes = volume_plan(model)
    else:
        plan = load_plan(chosen.plan)
        tokenizer, device = _tokenizer(chosen, plan.network.latent_channels)
        if plan.tokenizer_sha256 != tokenizer.sha256:
            raise ValueError(
                f"Expected the plan's tokenizer {plan.tokenizer_sha256[:8]}…; got {tokenizer.sha256[:8]}…."
            )
        volumes = plan.volumes
    try:
        scan = read_scan(chosen.scan, volumes.four_d)
        encoded = encode_scan(scan, volumes, tokenizer.to(device), device)
    except UnusableScan as error:
        raise CommandFailed(f"Not usable: {chosen.scan}: {error}") from None
    save_encoded_scan(chosen.out, encoded)
    say(console, f"{chosen.out}. {PATIENT_DATA}")
    return DONE


def _refuse_without_effect(chosen: argparse.Namespace) -> None:
    for option in OPTIONS:
        if getattr(chosen, option) is not None:
            raise ValueError(
                f"--{option} has no effect with --method restyle, which samples nothing: leave it out."
            )


def _tokenizer(chosen: argparse.Namespace, channels: int) -> tuple[Any, Any]:
    """Tokenizer and device that the options mean."""
    from client.settings import load_site_config, resolve_device
    from meduet_models.tokenizer.tokenizer import TokenizerSpec, load_tokenizer, load_tokenizer_file

    if chosen.config is not None:
        config = load_site_config(chosen.config)
        return load_tokenizer(config.tokenizer), resolve_device(config.device)
    device = resolve_device("auto")
    if chosen.tokenizer is not None:
        return load_tokenizer_file(chosen.tokenizer), device
    return load_tokenizer(TokenizerSpec(channels=channels)), device


def _bars(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description:<6}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
        console=console, transient=True, disable=not console.is_terminal,
    )  # fmt: skip
