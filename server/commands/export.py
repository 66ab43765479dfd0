"""`meduet-server export`: reading arguments, one line for what was written.

What it does not do: any of the work (`server/export/`). Heavy modules are imported inside the command.
"""

import argparse
from pathlib import Path
from typing import Any

from rich.console import Console

from federation.terminal import say

_ABOUT = """\
Write a finished run's weights in a form that others load. Each carries the plan's hash, the promise under
which anything left the sites, and the licence that the consortium gives; none carries the plan, a site's name
or a site's count. What each file is says ro-crate-metadata.json.

  folder   config.json, model.safetensors, tokenizer, model card, as hubs have them; `meduet embed` reads it
  bundle   a MONAI bundle: verify_metadata accepts it, its inference configuration runs (with fedmeduet)
  onnx     one graph, prepared volume to content code (needs the packages of fedmeduet[export])

There is no form for nnU-Net's fine-tuning: it builds ResEnc or Primus networks that read voxels; this encoder
reads normalised latents of a frozen tokenizer, by tokens, and fits none of their keys.
"""


def add_to(commands: Any) -> None:
    """Add `export` to the parser of `meduet-server`."""
    parser = commands.add_parser(
        "export",
        help="write a run's weights in a form that others load",
        description=_ABOUT,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "source", type=Path, metavar="RUN", help="folder of a finished run, or its model.safetensors"
    )
    parser.add_argument("--form", choices=("folder", "bundle", "onnx"), required=True, help="which form")
    parser.add_argument(
        "--licence", required=True, metavar="TEXT",
        help="of the weights, as the consortium decided: an SPDX identifier (CC-BY-4.0), or one sentence",
    )  # fmt: skip
    parser.add_argument(
        "-o", "--out", type=Path, required=True, metavar="FOLDER", help="a new or empty folder"
    )
    parser.add_argument(
        "--tokenizer", type=Path, metavar="FILE", help="the run's tokenizer, where it is not the shipped one"
    )
    parser.set_defaults(run=_export)


def _export(chosen: argparse.Namespace, console: Console) -> int:
    from server.export.bundle import write_bundle
    from server.export.crate import write_crate
    from server.export.facts import release_of
    from server.export.folder import write_folder
    from server.export.onnx_graph import write_onnx
    from storage.files import private_folder

    if chosen.out.exists() and (not chosen.out.is_dir() or any(chosen.out.iterdir())):
        raise ValueError(f"Expected -o to be a new or empty folder; {chosen.out} is not.")
    release = release_of(chosen.source, chosen.licence, chosen.tokenizer)
    private_folder(chosen.out)
    {"folder": write_folder, "bundle": write_bundle, "onnx": write_onnx}[chosen.form](release, chosen.out)
    write_crate(release, chosen.out)
    say(
        console, f"{chosen.out}: {chosen.form} of plan {release.plan.sha256[:12]}, licence {release.licence}."
    )
    return 0
