"""What is going on in a run, in one small file: `status.json`, rewritten whole whenever something happens.

The server application writes it (`StatusFile`), `meduet-server status` and the supervisor of the run read it.
It repeats nothing that `metrics.json` keeps for good: this is the present, that is the record.

Does not do: decide anything; a run goes on if nobody reads it.
"""

import json
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from federation.exchanges.finetuning import FinetunePlan
from federation.plan.plan import RunPlan
from federation.wire.wire import RefusalKind
from server.app import RunObserver, RunResult
from server.run_folder import held
from storage.files import private_folder, write_whole
from strategies.quorum import OutOfReach, refusal

STATUS_NAME = "status.json"
_KEPT = 50
_SUMS = ("bytes_up", "bytes_down")
_PHASES = ("survey", "round", "erasure", "diffusion")
"""States in which a run works; the others are ends."""


class StatusFile(RunObserver):
    """Writes `status.json` in the run's folder; picks up what an earlier process of the run left there."""

    def __init__(self, plan: RunPlan, folder: Path, finetuning: FinetunePlan | None = None) -> None:
        """Of `plan`'s run, or of a `finetuning` of it."""
        self._path = folder / STATUS_NAME
        before = read_status(folder) or {}
        sha256 = plan.sha256 if finetuning is None else finetuning.sha256
        self._last = "erasure" if finetuning is None else "round"
        if before.get("plan") != sha256:
            before = {}
        blank = {"state": "not asked yet", "last_seen": None, "round": 0, **dict.fromkeys(_SUMS, 0)}
        sites = before.get("sites", {})
        self._status: dict[str, Any] = {
            "plan": sha256,
            "name": plan.name,
            "state": "survey" if finetuning is None else "round",
            "reason": "",
            "round": before.get("round", 0),
            "rounds": plan.num_rounds if finetuning is None else finetuning.rounds,
            "started": before.get("started", _now()),
            "since": _now(),
            "resumed": before.get("resumed", -1) + 1,
            "pid": os.getpid(),
            "loss": before.get("loss", {}),
            "sites": {name: sites.get(name, dict(blank)) for name in plan.participants},
            "quarantined": before.get("quarantined", []),
            "put_aside": before.get("put_aside", {}),
            "phase_seconds": before.get("phase_seconds", {}),
        }
        self._counted = time.monotonic()
        private_folder(folder)
        self._write()

    def on_survey(self, summary: Mapping[str, Any], style_bank: Mapping[str, Any]) -> None:
        """The survey is done: who was put aside."""
        refused = summary.get("refused", {})
        for name, site in self._status["sites"].items():
            if name not in refused:
                site |= {"state": "surveyed", "last_seen": _now()}
        self._put_aside(0, refused)
        self._write()

    def on_round_start(self, round_number: int, num_rounds: int) -> None:
        """A round begins: every site is being asked."""
        self._enter("round", round=round_number)
        for site in self._status["sites"].values():
            site["state"] = "asked"
        self._write()

    def on_site_reply(self, round_number: int, site: str, report: Mapping[str, Any]) -> None:
        """A site's valid reply is in."""
        entry = self._status["sites"][site]
        for name in _SUMS:
            entry[name] += int(report.get(name, 0))
        metrics = {name: value for name, value in report.items() if name in ("examples", "seconds", "loss")}
        entry |= {"state": "answered", "last_seen": _now(), "round": round_number, **metrics}
        self._write()

    def on_round_end(
        self, round_number: int, shared: Mapping[str, Any], metrics: Mapping[str, Any]
    ) -> Mapping[str, Any]:
        """A round is aggregated: its mean losses, and whose reply did not count."""
        self._status["loss"] = dict(metrics["loss"])
        self._put_aside(round_number, metrics["refused"])
        if round_number == self._status["rounds"]:
            self._enter(self._last)
        self._write()
        return {}

    def on_diffusion(self, done: int, total: int, loss: float) -> None:
        """The diffusion model is trained on: another phase."""
        if self._status["state"] != "diffusion":
            self._enter("diffusion")
            self._write()

    def on_end(self, result: RunResult) -> Mapping[str, Any]:
        """The run is complete."""
        self.on_complete()
        return {}

    def on_complete(self) -> None:
        """So it is."""
        self._enter("complete", reason="", pid=None)
        self._write()

    def failed(self, reason: str, final: bool) -> None:
        """The run stopped; `final`: it would stop in the same way again."""
        self._enter("refused" if final else "failed", reason=reason, pid=None)
        self._write()

    def _enter(self, state: str, **what: Any) -> None:
        self._count()
        self._status |= {"state": state, "since": _now(), **what}

    def _count(self) -> None:
        """Charge the time since the last look to the phase that the run is in."""
        now, phase = time.monotonic(), self._status["state"]
        if phase in _PHASES:
            seconds = self._status["phase_seconds"]
            seconds[phase] = round(seconds.get(phase, 0.0) + now - self._counted, 3)
        self._counted = now

    def _put_aside(self, round_number: int, refused: Mapping[str, str]) -> None:
        for who, why in refused.items():
            self._status["quarantined"].append(
                {"round": round_number, "site": who, "why": why, "when": _now()}
            )
            kind = _kind(why)
            self._status["put_aside"][kind] = self._status["put_aside"].get(kind, 0) + 1
            if who in self._status["sites"]:
                self._status["sites"][who]["state"] = "put aside"
        self._status["quarantined"] = self._status["quarantined"][-_KEPT:]

    def _write(self) -> None:
        self._count()
        self._status["written"] = _now()
        write_whole(self._path, json.dumps(self._status, indent=1, allow_nan=False) + "\n")


@contextmanager
def kept_status(plan: RunPlan, folder: Path, finetuning: FinetunePlan | None = None) -> Iterator[StatusFile]:
    """Hold the folder, and write down how the run is and how it ended. Raises `FolderBusy`."""
    with held(folder):
        status = StatusFile(plan, folder, finetuning)
        try:
            yield status
        except Exception as error:
            status.failed(" ".join(str(error).split()), final=isinstance(error, ValueError | OutOfReach))
            raise


def read_status(folder: Path) -> dict[str, Any] | None:
    """What `status.json` in `folder` says; None when there is none."""
    path = folder / STATUS_NAME
    if not path.is_file():
        return None
    status: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return status


def _kind(why: str) -> str:
    """Why a reply did not count, as one of few words: a site's own, or the centre's."""
    for kind in RefusalKind:
        if why == refusal(kind):
            return kind.value
    return "no_reply" if why.startswith("no reply") else "invalid_reply"


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
