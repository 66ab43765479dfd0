"""`meduet-audit`: attack what a simulated run released, and say what was found; one line per error.

Does not do: open the run (`audit_run.py`), attack (`audit/`).
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from audit.options import STATUS, add_audit_options
from federation.terminal import DONE, ended, say, terminal
from storage.files import keep_to_owner

_ABOUT = """\
Attacks everything that a run of meduet-simulate released, as the coordinating centre could, and writes
audit.html and audit.json into the run's folder `audit`. Nothing leaves this machine.
"""
_EXAMPLES = """\
examples:
  meduet-audit runs/demo --quick                      minutes
  meduet-audit runs/demo --policy privacy_policy.yaml against what your board allows
  meduet-audit runs/demo --shadow 2                   two models retrained in the run's place: twice its time
  meduet-audit runs/demo --dossier                    the last record, as a page to file

"""


def main(arguments: Sequence[str] | None = None, console: Console | None = None) -> int:
    """Entry point of `meduet-audit`; returns the exit status."""
    keep_to_owner()
    parser = argparse.ArgumentParser(
        prog="meduet-audit",
        description=_ABOUT,
        epilog=_EXAMPLES + STATUS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", type=Path, help="folder of a run of meduet-simulate")
    parser.add_argument(
        "--dossier",
        action="store_true",
        help="print the record of the last audit as a page to file, and stop",
    )
    parser.add_argument(
        "--shadow",
        type=int,
        default=0,
        metavar="N",
        help="retrain 1 to 4 models in the run's place and compare with them; each takes as long as the run",
    )
    add_audit_options(parser)
    chosen = parser.parse_args(arguments)
    return ended(
        lambda: _audit(chosen, console or terminal()),
        console or terminal(stderr=True),
        interrupted="Interrupted. Nothing was written.",
    )


def _audit(chosen: argparse.Namespace, console: Console) -> int:
    if chosen.dossier:
        return _dossier(chosen, console)
    say(console, "loading PyTorch and the run")
    from audit.report import FOLDER, asked_effort, asked_policy, write_audit
    from meduet_models.threads import fixed_threads
    from server.export.crate import write_run_crate
    from simulations.audit_run import MOST_SHADOWS, evidence_of
    from simulations.progress import Live

    policy, effort = asked_policy(chosen), asked_effort(chosen)
    if not 0 <= chosen.shadow <= MOST_SHADOWS:
        raise ValueError(f"Expected --shadow of at most {MOST_SHADOWS} models; got {chosen.shadow}.")
    with fixed_threads(1):
        with Live() as live:
            evidence = evidence_of(chosen.run, live, chosen.shadow)
        command = " ".join(["meduet-audit", *sys.argv[1:]])
        folder = chosen.run / FOLDER
        status = write_audit(evidence, folder, policy, effort, command, lambda text: say(console, text))
        write_run_crate(chosen.run)
        return status


def _dossier(chosen: argparse.Namespace, console: Console) -> int:
    from audit.record.dossier import dossier
    from audit.record.record import read_record
    from audit.report import FOLDER

    if chosen.quick or chosen.policy is not None or chosen.null is not None or chosen.shadow:
        raise ValueError("Expected --dossier alone: it prints an audit that was made, and makes none.")
    say(console, *dossier(read_record(chosen.run / FOLDER / "audit.json")).splitlines())
    return DONE


if __name__ == "__main__":
    sys.exit(main())
