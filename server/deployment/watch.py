"""What the page of the centre shows of a run: the same as `meduet-server status`, from the same files.

Does not do: ask anybody, or serve (`federation/watching.py`). No number of it depends on one patient: losses
are means over sites, and what a site says of its examples is left out.
"""

import shutil
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from federation.keys.certificates import expiry, read_certificate
from federation.keys.key_files import read_file
from federation.plan.plan import RunPlan
from federation.watching import Section, Series, Watched
from server.deployment.config import ServerConfig
from server.deployment.status_screen import OVER, gather
from server.promises import promises_of, sentences

_SHOWN = 12


def watched(folder: Path, config: ServerConfig | None = None) -> Watched:
    """The run in `folder`, and with `config` the centre's processes and certificates; raises `ValueError`
    when there is no run."""
    summary = gather(folder, None if config is None else config.state_dir)
    run, rounds, centre = summary["run"], summary["rounds"], summary["centre"]
    days = {} if config is None else _certificates(config)
    state = "" if run["state"] == "round" else f"{run['state']}, "
    state += f"round {run['round']} of {run['rounds']}"
    awaited = [name for name, site in run["sites"].items() if site["state"] == "asked"]
    if awaited and run["state"] not in OVER:
        state += f"; waiting for {', '.join(awaited)}"
    state += f". {run['reason']}" if run["reason"] else ""
    plan = _plan(folder)
    sections = [
        Section(
            "Sites",
            ("site", "state", "round", "last heard", "received", "sent"),
            [
                (name, one["state"], one["round"] or "", _ago(one["last_seen"]), _size(one["bytes_up"]),
                 _size(one["bytes_down"]))
                for name, one in run["sites"].items()
            ],
        ),
        Section(
            "Rounds",
            ("round", "seconds", "answered", "put aside", "loss"),
            [
                (one["round"], f"{one['seconds']:.1f}", len(one["answered"]), ", ".join(one["refused"]),
                 f"{one['loss']['total']:.3f}" if "total" in one["loss"] else "")
                for one in reversed(rounds[-_SHOWN:])
            ],
        ),
        Section(
            "Put aside",
            ("round", "site", "why"),
            [(one["round"], one["site"], one["why"]) for one in reversed(run["quarantined"][-_SHOWN:])],
        ),
        Section("Promise", ("what leaves a site",), [(line,) for line in sentences(plan)] if plan else []),
    ]  # fmt: skip
    if centre is not None:
        processes = [(n, one["state"], one["restarts"]) for n, one in centre["processes"].items()]
        sections.append(Section("This centre", ("process", "state", "restarts"), processes))
    if days:
        rows = [(name, f"{left:.0f}") for name, left in days.items()]
        sections.append(Section("Certificates", ("whose", "days left"), rows))
    title = f"{run['name']} · plan {run['plan'][:12]}"
    return Watched(title, state, sections, _series(folder, run, rounds, awaited, centre, days, plan))


def _series(
    folder: Path,
    run: Mapping[str, Any],
    rounds: list[dict[str, Any]],
    awaited: list[str],
    centre: Mapping[str, Any] | None,
    days: Mapping[str, float],
    plan: RunPlan | None,
) -> list[Series]:
    sites, disk = run["sites"], shutil.disk_usage(folder)
    heard = {name: _seconds(one["last_seen"]) for name, one in sites.items() if one["last_seen"]}
    made = [
        Series.by("state", "meduet_run_state", "1 for the state that the run is in", {run["state"]: 1.0}),
        Series.of("meduet_run_round", "Round under way, or the last", run["round"]),
        Series.of("meduet_run_rounds", "Rounds of the plan", run["rounds"]),
        Series.of("meduet_run_resumed", "Times that the run was resumed", run["resumed"], "counter"),
        Series.of("meduet_run_alive", "1 while a process writes the run", float(run["running"])),
        Series.of("meduet_run_age_seconds", "Since it was submitted", _seconds(run["started"])),
        Series.of("meduet_run_state_age_seconds", "In this state", _seconds(run["since"])),
        Series.of("meduet_run_status_age_seconds", "Since status.json was written", _seconds(run["written"])),
        Series.of("meduet_sites", "Sites of the plan", len(sites)),
        Series.of("meduet_sites_awaited", "Sites whose reply is awaited", len(awaited)),
        Series.by("site", "meduet_site_heard_age_seconds", "Since a site was last heard", heard),
        Series.by("site", "meduet_site_awaited", "1 for sites that are awaited",
                  {name: float(name in awaited) for name in sites}),
        Series.by("site", "meduet_site_received_bytes", "Received from a site",
                  {name: one["bytes_up"] for name, one in sites.items()}, "counter"),
        Series.by("site", "meduet_site_sent_bytes", "Sent to a site",
                  {name: one["bytes_down"] for name, one in sites.items()}, "counter"),
        Series.by("reason", "meduet_put_aside", "Replies that did not count, by reason", run["put_aside"],
                  "counter"),
        Series.by("phase", "meduet_phase_seconds", "In each phase, over all processes of the run",
                  run["phase_seconds"], "counter"),
        Series.of("meduet_rounds_done", "Rounds that are on disk for good", len(rounds)),
        Series.by("release", "meduet_epsilon", "Of one release of this kind, per patient",
                  {promise.kind: promise.epsilon.upper for promise in (promises_of(plan) if plan else ())}),
        Series.of("meduet_disk_free_bytes", "Where the run is", disk.free),
        Series.of("meduet_disk_size_bytes", "Where the run is", disk.total),
    ]  # fmt: skip
    if rounds:
        last = rounds[-1]
        made += [
            Series.of("meduet_round_seconds", "Of the last round", last["seconds"]),
            Series.of("meduet_round_answered", "Sites whose reply counted in the last round",
                      len(last["answered"])),
            Series.of("meduet_round_put_aside", "Sites put aside in the last round", len(last["refused"])),
            Series.by("term", "meduet_loss", "Mean over sites, last round", last["loss"]),
        ]  # fmt: skip
    if centre is not None:
        processes = centre["processes"]
        made += [
            Series.by("process", "meduet_process_up", "1 while it runs",
                      {name: float(one["state"] == "running") for name, one in processes.items()}),
            Series.by("process", "meduet_process_restarts", "Times that it was started again",
                      {name: one["restarts"] for name, one in processes.items()}, "counter"),
        ]  # fmt: skip
    if days:
        made.append(Series.by("whose", "meduet_certificate_days", "Days until a certificate ends", days))
    return made


def _certificates(config: ServerConfig) -> dict[str, float]:
    """Days left of the authority's and the server's certificate; those that cannot be read are left out."""
    left = {}
    for name, path in (("authority", config.ca), ("server", config.certificate)):
        if path.is_file():
            ends = expiry(read_certificate(read_file(path, f"the {name}'s certificate")))
            left[name] = (ends - datetime.now(UTC)).total_seconds() / 86400
    return left


def _plan(folder: Path) -> RunPlan | None:
    """The run's plan; None of a fine-tuning, whose plan is another."""
    path = folder / "plan.json"
    return RunPlan.from_json(path.read_text(encoding="utf-8")) if path.is_file() else None


def _seconds(when: str) -> float:
    return max(0.0, (datetime.now(UTC) - datetime.fromisoformat(when)).total_seconds())


def _ago(when: str | None) -> str:
    return "never" if when is None else f"{_seconds(when):.0f} s ago"


def _size(count: int) -> str:
    return f"{count / 1e6:.2f} MB"
