"""Submission: a run is submitted, watched, and submitted again until its own checkpoints say it is complete.

Flower does not resume: a server application that dies, or a SuperLink that is away for a minute, ends a run.
Ours goes on after its last checkpoint when it is submitted again, and sites answer a round that is asked
twice in the same way; so all that is missing is somebody who submits it. The same command, given twice,
watches the run that is under way.

A run that died is noticed by the lock on its folder, which goes with the process, and not a minute later by
Flower's heartbeat. A run that an operator stopped (`meduet-server stop`) stays stopped; one that would end in
the same way again (another plan's folder, say) is not repeated; neither is one that failed several times in a
row without getting any further.

Does not do: run anything itself.
"""

import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from federation.programs.processes import Say
from meduet_models.anatomy_start import shipped_path
from meduet_models.tokenizer.tokenizer import shipped_tokenizer
from server.checkpoints import Checkpoints
from server.consortium.plans import finetuning_to_run, plan_to_run
from server.deployment.app_folder import write_app_folder
from server.deployment.control import Control, ControlFailed, FlowerRun
from server.deployment.status import read_status
from server.run_folder import is_complete, is_held
from storage.files import private_folder, write_whole

RECORD = "submission.json"
ATTEMPTS = 5
"""Failures in a row without a further round after which a run is given up."""
PAUSE_S = 5.0
"""Seconds before a failed run is submitted again, and between two looks at SuperLink."""
_TICK_S = 0.5


class RunGivenUp(RuntimeError):
    """The run is not complete and is not submitted again; the text says why and what to do."""


@dataclass
class _Record:
    """Which run of Flower's is ours now, and how often it failed without progress."""

    run: str = ""
    failures: int = 0
    progress: str = ""
    submissions: int = 0


class Submission:
    """One run, from `plan_path` to `folder`, seen through to its end."""

    def __init__(
        self,
        control: Control,
        plan_path: Path,
        folder: Path,
        say: Say = lambda line: None,
        pretrained: Path | None = None,
        anatomy: Path | None = None,
        bank_key: Path | None = None,
    ) -> None:
        """Of a fine-tuning, `pretrained` is the folder or the file of the weights that it starts from.
        `anatomy`: file of the start from public anatomy (none: the shipped one, where the plan names one).
        `bank_key`: file of the key of the latent bank (none: beside the run's folder).

        Raises `ValueError` for a file that is no plan, and for one kind of plan run as the other.
        """
        self._control, self._say, self._fresh = control, say, True
        self._trouble = ""
        self._lived = self._died = False  # was the application of the last submission seen at work, and gone?
        self._plan_path, self.folder = plan_path.resolve(), folder.resolve()
        self.plan, finetuning = plan_to_run(plan_path), finetuning_to_run(plan_path)
        if finetuning is not None and pretrained is None:
            raise ValueError(
                f"{plan_path} is a fine-tuning of run {self.plan.sha256[:12]}: name that run's folder, or "
                "its model.safetensors, with --pretrained."
            )
        if finetuning is None and pretrained is not None:
            raise ValueError(f"--pretrained has no effect: {plan_path} is a pretraining, no fine-tuning.")
        start = (finetuning or self.plan).anatomy_start
        if start == "none" and anatomy is not None:
            raise ValueError(f"--anatomy has no effect: {plan_path} starts nothing from public anatomy.")
        self._settings = {
            "plan": str(self._plan_path),
            "folder": str(self.folder),
            "consortium": str(self._control.consortium.resolve()),
        }
        shipped = shipped_tokenizer(self.plan.network.latent_channels)
        if finetuning is None and shipped.exists():  # a bundle carries code only
            self._settings["tokenizer"] = str(shipped.resolve())
        if bank_key is not None:
            self._settings["bank_key"] = str(bank_key.resolve())
        if pretrained is not None:
            self._settings["pretrained"] = str(pretrained.resolve())
        if start != "none":  # a bundle carries code only: the application is told where the weights are
            self._settings["anatomy"] = str((anatomy or shipped_path(start)).resolve())
        self._sha256 = self.plan.sha256 if finetuning is None else finetuning.sha256
        self._kind = "plan" if finetuning is None else "fine-tuning"

    def see_through(self, while_waiting: Callable[[], None] = lambda: None) -> None:
        """Return when the run is complete; `while_waiting` is called twice a second.

        Raises `RunGivenUp`, and `ValueError` when the folder is another plan's.
        """
        next_look = 0.0
        while not is_complete(self.folder, self._sha256):
            while_waiting()
            lives = is_held(self.folder)
            died = self._lived and not lives
            self._lived, self._died = lives, (self._died or died) and not lives
            if died or time.monotonic() >= next_look:
                if died:
                    time.sleep(_TICK_S)  # an end in good order shows in the folder by now
                    if is_complete(self.folder, self._sha256):
                        break
                self._look()
                next_look = time.monotonic() + PAUSE_S
            time.sleep(_TICK_S)
        self._say(f"complete: {self.folder}")

    def _look(self) -> None:
        """Ask SuperLink about our run, and submit it unless it is under way."""
        record = self._read()
        try:
            if is_held(self.folder):
                return  # at work, or it lost its SuperLink and has not noticed yet
            ours = [run for run in self._control.runs() if run.identity == record.run]
            if (ours and not ours[0].finished and not self._died) or is_held(self.folder):
                return  # on its way
            if record.run:
                self._after_an_end(record, ours[0] if ours else None)
            self._fresh = self._lived = self._died = False
            record.run = ""  # its end is reckoned once, whatever comes of the next submission
            self._write(record)
            with tempfile.TemporaryDirectory(prefix="meduet-app-") as parent:
                app = write_app_folder(Path(parent))
                record.run = self._control.start(app, self._settings)
        except (ControlFailed, OSError) as error:  # SuperLink is away, or the disk takes nothing
            if (words := str(error)) != self._trouble:
                self._say(f"{words} Tried again every {PAUSE_S:g} s.")
            self._trouble = words
            return
        self._trouble = ""
        record.submissions += 1
        self._write(record)
        again = "" if record.submissions == 1 else f" again ({record.submissions})"
        self._say(
            f"submitted{again}: {self.plan.name}, {self._kind} {self._sha256[:12]}, Flower's run {record.run}"
        )

    def _after_an_end(self, record: _Record, run: FlowerRun | None) -> None:
        """Decide whether a run that ended is to be submitted again; raises `RunGivenUp` if not."""
        status = read_status(self.folder) or {}
        reason = status.get("reason", "")
        if self._fresh:  # whoever gives the command again has put right what there was
            record.failures = 0
        elif run is not None and run.status == "finished:stopped":
            raise RunGivenUp("An operator stopped the run. The same command goes on with it.")
        elif status.get("state") == "refused":
            raise RunGivenUp(f"The run cannot go on: {reason}")
        progress = self._progress()
        record.failures = record.failures + 1 if progress == record.progress else 1
        record.progress = progress
        self._write(record)
        what = reason or (run.status if run is not None else "SuperLink has forgotten it")
        self._say(f"the run ended after {progress}: {what}")
        if record.failures >= ATTEMPTS:
            raise RunGivenUp(
                f"The run ended {record.failures} times after {progress} without getting further. Last: "
                f"{what} Put this right and give the same command again."
            )
        if run is not None and not run.finished:
            self._control.stop(run.identity)  # the application is gone, SuperLink does not know yet

    def _progress(self) -> str:
        rounds = Checkpoints(self.folder / "checkpoints", self._sha256).rounds()
        if not rounds:
            return "no checkpoint"
        return f"round {rounds[-1]}" if rounds[-1] else "the survey"

    def _read(self) -> _Record:
        path = self.folder / RECORD
        return _Record(**json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else _Record()

    def _write(self, record: _Record) -> None:
        private_folder(self.folder)
        write_whole(self.folder / RECORD, json.dumps(vars(record)) + "\n")
