"""`meduet embed`: reading arguments, showing progress, one line per error.

What it does not do: any of the work (`client/products/embedding.py`). Heavy modules are imported inside the
command: --help is immediate.
"""

import argparse
import os
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track

from federation.terminal import DONE, FAILED, CommandFailed, failing, say

MODEL_VARIABLE = "MEDUET_MODEL"
_EMBED = """\
Turn scans into numbers with a run's weights: by default the content code, what is where in the scan, as one
vector. Scans are prepared exactly as the header of the weights says; no plan, no site and no network is
needed. A folder or a manifest (.csv) stands for its scans, understood as at a site. The results are patient
data, as the scans are.
"""
_EXAMPLES = f"""\
examples:
  meduet embed scan.nii.gz --model runs/demo -o code.npy         one vector
  meduet embed FOLDER --model runs/demo -o codes.csv             a row for each scan, with its path
  meduet embed FOLDER --model runs/demo -o codes.npz             arrays `ids` and `code`
  meduet embed a.nii.gz b.nii.gz --model runs/demo -o OUT        OUT/a.npy, OUT/b.npy
  {MODEL_VARIABLE}=/model meduet embed --input x.nii.gz --output out.npy     as containers are called

exit status: 0 done; 1 a scan is not usable (the others are done); 2 wrong usage, weights or paths; 130
             interrupted
"""


def add_to(commands: Any) -> None:
    """Add `embed` to the parser of `meduet`."""
    embed = commands.add_parser(
        "embed",
        help="scans in, embeddings out",
        description=_EMBED,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    embed.add_argument(
        "scans", type=Path, nargs="*", default=[], metavar="SCAN",
        help="NIfTI file, DICOM file, folder, or manifest (.csv)",
    )  # fmt: skip
    embed.add_argument("--input", type=Path, action="append", default=[], metavar="SCAN", help="the same")
    embed.add_argument(
        "-o", "--output", type=Path, required=True, metavar="OUT",
        help=".npy for one scan; .npz, .csv or a folder for many",
    )  # fmt: skip
    embed.add_argument(
        "--model", type=Path, default=os.environ.get(MODEL_VARIABLE) and Path(os.environ[MODEL_VARIABLE]),
        metavar="RUN",
        help=f"folder of a run or an export, or its model.safetensors (default: ${MODEL_VARIABLE})",
    )  # fmt: skip
    embed.add_argument(
        "--what", choices=("code", "tokens", "style", "content"), default="code",
        help="code: what is where, one vector (default); tokens: the grid behind it; style: mean and log "
        "deviation of each latent channel; content: the tokens' mean",
    )  # fmt: skip
    embed.add_argument(
        "--tokenizer", type=Path, metavar="FILE", help="the run's tokenizer, where it is not the shipped one"
    )
    embed.add_argument(
        "--trusted", type=Path, metavar="CA.PEM",
        help="certificate of the consortium: refuse weights that it did not sign",
    )  # fmt: skip
    embed.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where it is computed")
    embed.set_defaults(run=_embed)


def _embed(chosen: argparse.Namespace, console: Console) -> int:
    given = [*chosen.scans, *chosen.input]
    if not given:
        raise ValueError("Expected a scan, a folder or a manifest to embed; got none.")
    if chosen.model is None:
        raise ValueError(f"Expected --model RUN (or ${MODEL_VARIABLE}): the folder of a run; got none.")

    from client.products.embedding import TABLES, check_target, embeddings, scans_of, write_one, write_table
    from meduet_models import load

    model = load(chosen.model, tokenizer=chosen.tokenizer, device=chosen.device, trusted=chosen.trusted)
    signed = "The weights are not signed."
    if model.signature is not None:
        signed = f"Signed by {model.signature.consortium}, fingerprint {model.signature.fingerprint}."
    asked, left_out = scans_of(given, model.volumes)
    check_target(chosen.output, chosen.what, len(asked))
    for exclusion in left_out:
        say(console, f"Left out: {exclusion.path}: {exclusion.reason.value}")
    done, failed, last = {}, 0, chosen.output
    found = track(
        embeddings(model, asked, chosen.what), "scans", total=len(asked), console=console, transient=True,
        disable=not console.is_terminal,
    )  # fmt: skip
    with failing(ValueError):
        for one, values in found:
            if isinstance(values, ValueError):
                failed += 1
                say(console, f"Not usable: {one.path}: {values}")
            elif chosen.output.suffix in TABLES:
                done[one.name] = values
            else:
                last, done[one.name] = write_one(chosen.output, one.name, values), values[:0]
        if not done:
            raise CommandFailed("Expected at least one usable scan; none is. Nothing was written.")
        if chosen.output.suffix in TABLES:
            write_table(chosen.output, chosen.what, done)
    where = last if len(done) == 1 else chosen.output
    scans = "1 scan" if len(done) == 1 else f"{len(done)} scans"
    say(console, f"{where}: {chosen.what} of {scans}. Patient data, as the scans are.", signed)
    return FAILED if failed else DONE
