"""`meduet-site`: what a hospital types. Prepare the scans, check the site, harmonise; one line per error.

What it does not do: decide anything (`client/site.py`, `client/checks/site.py` do), or send anything: what
joins a federation is started by `client/connection/supernode.py`. Heavy modules are imported inside the
commands: --help is immediate.
"""

import argparse
import logging
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # read with PyTorch: a thread that waits leaves its core

from rich.console import Console
from rich.logging import RichHandler
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from federation.programs.loopback import spare_loopback
from federation.terminal import DONE, FAILED, VisibleFormatter, cell, ended, failing, say, terminal
from storage.files import keep_to_owner

LINE_EVERY_S = 30.0
"""How often progress is told where there is no terminal (a log, a job queue)."""
_ABOUT = """\
One hospital's side of FedMeDUET. Only `start` connects to the centre: scans are read where they lie, and
everything written goes to the site's own folder (state_dir).

A site is described in site.yaml:

  name: north                     # as the plan lists this site
  data_root: /data/hippocampus    # scans: NIfTI or DICOM; only ever read
  state_dir: /var/lib/meduet      # cache, tables, ledger, journal; not inside data_root
  device: auto                    # auto | cpu | cuda
  allow_non_private: true         # consent: bounded sums without differential privacy may leave

plan.json comes from the coordinating centre and is the same at every site.
"""
_EXAMPLES = """\
examples:
  meduet-site check   --config site.yaml                    is everything in its place?
  meduet-site check   --config site.yaml --plan plan.json   ... and are the scans fit for this plan?
  meduet-site prepare --config site.yaml --plan plan.json   encode the scans; Ctrl-C and again goes on
  meduet-site prepare --config site.yaml --plan plan.json --workers 8    ... on eight cores
  meduet-site harmonise scan.nii.gz --model diffusion.safetensors --style north -o as-north.nii.gz
                                                            the same patient, as scanned at north
  meduet-site segment scan.nii.gz --model finetuned.safetensors -o labels.nii.gz
                                                            a class of every voxel, on the scan's own grid
  meduet-site start   --config site.yaml                    take part, until SIGTERM or Ctrl-C

exit status: 0 done, all checks passed; 1 a check failed, or scans could not be used;
             2 wrong usage, settings or plan; 130 interrupted
"""

_CHECK_STATUS = """\
exit status: 0 every check is ok or look; 1 a check failed; 2 wrong usage, settings or plan; 130 interrupted
"""


def main(arguments: Sequence[str] | None = None, console: Console | None = None) -> int:
    """Run one command; returns the exit status (see `meduet-site --help`)."""
    console = console or terminal()
    spare_loopback()
    keep_to_owner()
    handler = RichHandler(console=console, show_path=False)
    handler.setFormatter(VisibleFormatter("%(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    return ended(
        lambda: _run(arguments, console),
        console,
        interrupted="Interrupted. What was encoded is kept; the same command goes on from there.",
        advice="What was encoded is kept. Put this right and run the same command again.",
    )


def _run(arguments: Sequence[str] | None, console: Console) -> int:
    chosen = _parser().parse_args(arguments)
    status: int = chosen.run(chosen, console)
    return status


def _parser() -> argparse.ArgumentParser:
    from client.commands import audit as audit_commands
    from client.commands import cache_key as cache_key_commands
    from client.commands import forget as forget_commands
    from client.commands import harmonisation as harmonisation_commands
    from client.commands import journal as journal_commands
    from client.commands import key as key_commands
    from client.commands import ledger as ledger_commands
    from client.commands import plan as plan_commands
    from client.commands import releases as releases_commands
    from client.commands import service as service_commands

    parser = argparse.ArgumentParser(
        prog="meduet-site",
        description=_ABOUT,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    service_commands.add_to(commands)
    prepare = commands.add_parser(
        "prepare",
        help="encode the site's scans once, before the first round",
        description="Find the scans, say which take part and why others do not, and encode what is not "
        "encoded yet, reading each scan once. Writes cohort.csv, exclusions.csv and the cache to state_dir. "
        "May be interrupted: the same command goes on behind the last scan that was done.",
    )
    prepare.add_argument(
        "--prune", action="store_true",
        help="then remove every encoding that this plan does not use: of patients who withdrew, of scans "
        "that changed, and of other plans (these are encoded again when needed)",
    )  # fmt: skip
    prepare.add_argument(
        "--workers", type=int, default=1, metavar="N",
        help="processes that read and encode side by side, each with half a gigabyte and the largest scan in "
        "memory; what comes of it does not depend on N (default: 1)",
    )  # fmt: skip
    prepare.set_defaults(run=_prepare)
    check = commands.add_parser(
        "check",
        help="look at device, memory, disk, keys, centre, clock, data, books, plans; say what to do",
        description="Look at everything a run needs and encode nothing. With --plan, every scan is read that "
        "neither `check` nor `prepare` has read before: counts, exclusions, duplicates, patients in two "
        "splits. Each line is ok, look (a person should decide) or failed (a run will not work), and says "
        "what to do.",
        epilog=_CHECK_STATUS,
    )
    check.add_argument(
        "--confirm-patients", action="store_true",
        help="then say, for this hospital, that patients are as shown; `start` asks for it once, and again"
        " when a known scan would get another patient",
    )  # fmt: skip
    check.set_defaults(run=_check)
    key_commands.add_to(commands)
    cache_key_commands.add_to(commands)
    plan_commands.add_to(commands)
    journal_commands.add_to(commands)
    releases_commands.add_to(commands)
    forget_commands.add_to(commands)
    ledger_commands.add_to(commands)
    audit_commands.add_to(commands)
    for command, needed in ((prepare, True), (check, False)):
        command.add_argument(
            "--config", type=Path, required=True, metavar="FILE", help="the site's site.yaml"
        )
        command.add_argument(
            "--plan", type=Path, required=needed, metavar="FILE", help="plan.json from the centre"
        )
    harmonisation_commands.add_to(commands)
    return parser


def _prepare(chosen: argparse.Namespace, console: Console) -> int:
    from client.commands.cache_key import ask_passphrase
    from client.exchanges.exchange import AskRefused
    from client.settings import load_site_config
    from client.site import Site, load_plan

    config, plan = load_site_config(chosen.config), load_plan(chosen.plan)
    ask_passphrase(config, console)
    with failing(ValueError, but=(AskRefused,)):
        site = Site(config)
        with _Bars(console) as bars:
            scans = site.prepared(plan, bars, chosen.workers)
    _summary(console, scans.cohort.summary(), scans.num_scans - site.num_encoded)
    if chosen.prune:
        say(console, f"Removed {site.cache(plan.volumes).prune(scans)} files that this plan does not use.")
    say(console, f"Ready. Tables and cache are in {site.state_dir}; they hold patient data and stay there.")
    return DONE


def _check(chosen: argparse.Namespace, console: Console) -> int:
    from client.checks.site import Seen, run_checks
    from client.commands.cache_key import ask_passphrase
    from client.settings import load_site_config
    from client.site import load_plan
    from client.site_scans import confirm_patients

    config = load_site_config(chosen.config)
    plan = load_plan(chosen.plan) if chosen.plan else None
    if plan is not None:
        ask_passphrase(config, console)
    colours = {"ok": "green", "look": "yellow", "failed": "red"}
    counts, seen = dict.fromkeys(colours, 0), Seen()
    with _Bars(console) as bars:
        for check in run_checks(config, plan, bars, seen):
            counts[check.verdict] += 1
            verdict = Text(f"{check.verdict:>6}", style=colours[check.verdict])
            console.print(verdict, Text(f" {check.what}", style="bold"), end=": ")
            say(console, check.found)
            if check.advice:
                say(console, f"        {check.advice}")
    say(console, f"{counts['ok']} ok, {counts['look']} to look at, {counts['failed']} failed.")
    if plan is None:
        say(console, "Scans were not read: give --plan plan.json to look at them, too.")
    if chosen.confirm_patients:
        with failing(ValueError):
            found = confirm_patients(config, seen.found)
        say(console, f"Confirmed: {found.guess()}. patients_confirmed: {found.sha256}")
    return FAILED if counts["failed"] else DONE


def _summary(console: Console, counts: Mapping[str, Any], num_cached: int) -> None:
    table = Table("scans", "", title="What takes part", title_justify="left")
    table.add_row("scans", str(counts["scans"]))
    table.add_row("encoded before", str(num_cached))
    table.add_row("with a label", str(counts["labelled"]))
    table.add_row("with repaired voxels", str(counts["repaired"]))
    table.add_row("patients", str(counts["patients"]))
    for split, number in counts["splits"].items():
        table.add_row(cell(f"patients for {split}"), str(number))
    console.print(table)
    if counts["exclusions"]:
        table = Table("reason", "files or series", title="What does not, and why", title_justify="left")
        for reason, number in counts["exclusions"].items():
            table.add_row(cell(reason), str(number))
        console.print(table)


class _Bars:
    """A progress bar per phase with the time left; a line now and then where there is no terminal."""

    def __init__(self, console: Console) -> None:
        self._progress = Progress(
            TextColumn("{task.description:<9}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
            console=console, transient=True, disable=not console.is_terminal,
        )  # fmt: skip
        self._console = console
        self._tasks: dict[str, TaskID] = {}
        self._told: dict[str, tuple[float, int]] = {}  # when, and how much was done by then

    def __enter__(self) -> "_Bars":
        self._progress.start()
        return self

    def __exit__(self, *raised: object) -> None:
        self._progress.stop()

    def __call__(self, phase: str, done: int, total: int) -> None:
        if phase not in self._tasks:
            self._tasks[phase] = self._progress.add_task(phase, total=total)
            self._told[phase] = (time.monotonic(), done)
        self._progress.update(self._tasks[phase], completed=done, total=total)
        if not self._console.is_terminal and done < total:
            self._tell(phase, done, total)

    def _tell(self, phase: str, done: int, total: int) -> None:
        now, (before, were_done) = time.monotonic(), self._told[phase]
        if now - before >= LINE_EVERY_S and done > were_done:
            left_s = (total - done) * (now - before) / (done - were_done)
            say(self._console, f"{phase}: {done} of {total}, about {max(1, round(left_s / 60))} min left")
            self._told[phase] = (now, done)


if __name__ == "__main__":
    sys.exit(main())
