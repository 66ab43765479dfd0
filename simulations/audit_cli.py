"""`meduet-audit`: attack what a simulated run released, and say what was found; one line per error.

Does not do: open the run (`audit_run.py`), attack (`audit/`).
"""

import argparse
import importlib.metadata
import platform
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from rich.console import Console

from federation.terminal import ended, say, terminal
from storage.files import keep_to_owner, private_folder, write_whole

_ABOUT = """\
Attacks everything that a run of meduet-simulate released, as the coordinating centre could, and writes
audit.html and audit.json into the run's folder `audit`. Nothing leaves this machine.
"""
_EXAMPLES = """\
examples:
  meduet-audit runs/demo --quick                      minutes
  meduet-audit runs/demo --policy privacy_policy.yaml against what your board allows

exit status: 0 within the policy; 1 not, or the run cannot be read; 2 undecided, or wrong usage;
             130 interrupted
"""


def main(arguments: Sequence[str] | None = None, console: Console | None = None) -> int:
    """Entry point of `meduet-audit`; returns the exit status."""
    keep_to_owner()
    parser = argparse.ArgumentParser(
        prog="meduet-audit",
        description=_ABOUT,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", type=Path, help="folder of a run of meduet-simulate")
    parser.add_argument("--quick", action="store_true", help="fewer draws, the newest release of each kind")
    parser.add_argument("--policy", type=Path, help="what is allowed, as YAML; left out: the defaults")
    parser.add_argument(
        "--null", type=int, metavar="N", help="draws of nobody's membership (1000; quick: 100)"
    )
    chosen = parser.parse_args(arguments)
    return ended(
        lambda: _audit(chosen, console or terminal()),
        console or terminal(stderr=True),
        interrupted="Interrupted. Nothing was written.",
    )


def _audit(chosen: argparse.Namespace, console: Console) -> int:
    began = time.monotonic()
    from audit.policy import Policy, read_policy

    policy = Policy() if chosen.policy is None else read_policy(chosen.policy)
    say(console, "loading PyTorch and the run")
    import dataclasses

    from audit.attacks import QUICK, Effort, audit
    from audit.page import first_sentences, page_of
    from audit.planted import planted
    from audit.policy import decide
    from audit.record import record_of, to_json
    from meduet_models.threads import fixed_threads
    from simulations.audit_run import evidence_of
    from simulations.progress import Live

    effort = QUICK if chosen.quick else Effort()
    if chosen.null is not None:
        if not 1 <= chosen.null <= 100_000:
            raise ValueError(f"Expected --null of 1 to 100000 draws; got {chosen.null}.")
        effort = dataclasses.replace(effort, null_draws=chosen.null)
    with fixed_threads(1):
        with Live() as live:
            evidence = evidence_of(chosen.run, live)
        audited = audit(evidence, effort, lambda text: say(console, text))
    say(console, "faults that are built in on purpose")
    faults = planted()
    charged = {one.name: (one.epsilon, one.delta) for one in audited.artefacts}
    decision = decide(policy, audited.findings, charged, audited.behind)
    about = {
        "audited_utc": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": " ".join(["meduet-audit", *sys.argv[1:]]),
        "versions": {
            "python": platform.python_version(),
            **{n: importlib.metadata.version(n) for n in _LIBRARIES},
        },
        "seconds": time.monotonic() - began,
    }
    record = record_of(evidence, audited, policy, decision, faults, about)
    folder = chosen.run / "audit"
    private_folder(folder)
    write_whole(folder / "audit.json", to_json(record))
    write_whole(folder / "audit.html", page_of(record))
    found = [f"{where}: {text}" for where, text in first_sentences(record)]
    say(console, "", *found, "", *decision.undecided)
    say(console, "", f"Exit status {decision.status}. The page: {(folder / 'audit.html').resolve()}")
    return decision.status


_LIBRARIES = ("fedmeduet", "torch", "numpy", "scipy")


if __name__ == "__main__":
    sys.exit(main())
