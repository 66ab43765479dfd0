"""Checkpoints: everything the centre needs to go on, in one file per round, written whole or not at all.

`checkpoints/round-0003.safetensors` holds the shared weights after round 3, the server optimiser's moments,
the style bank and, where there are any, the weights' moving average and weights that sites are to keep; its
header holds the round, the hash of the plan, the run's metrics so far, and a hash of the tensors. Round 0 is
the state after the survey. The last three are kept, and the early ones that the run was told to keep. A
damaged file is said aloud, in the run's journal too, and the one before it is taken: sites keep enough of the
past to repeat a round. What this file does not do: it keeps nothing of a site's.
"""

import json
import logging
import re
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from forms.json_text import read_json
from forms.ranges import shown
from meduet_models.weights import LONGEST_HEADER, load_weights, save_weights, sha256_of_tensors
from storage.files import private_folder

KEPT = 3
_NAME = re.compile(r"round-([0-9]{4,9})\.safetensors")
_GROUPS = ("shared", "optimiser", "bank", "average", "home")

_log = logging.getLogger(__name__)


def early_rounds(rounds: int) -> tuple[int, int]:
    """What `checkpoints.keep_early` keeps of a run of so many rounds: its start, and its middle."""
    return 0, rounds // 2


class OtherPlan(ValueError):
    """The folder holds a run of another plan."""


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """The centre after a round."""

    plan_sha256: str
    round: int
    """Rounds done; 0 after the survey."""
    shared: dict[str, Tensor]
    optimiser: dict[str, Tensor]
    bank: dict[str, Tensor] = field(default_factory=dict)
    average: dict[str, Tensor] = field(default_factory=dict)
    """Moving average of the shared weights, where one is kept."""
    home: dict[str, Tensor] = field(default_factory=dict)
    """Weights that do not travel, as the centre trained them: where noisy steps at the sites begin."""
    metrics: dict[str, Any] = field(default_factory=dict)
    """What `metrics.json` holds so far; JSON values."""


class Checkpoints:
    """The checkpoints of one run, in `folder`."""

    def __init__(self, folder: Path, plan_sha256: str, early: Collection[int] = ()) -> None:
        """`early`: rounds that are kept to the end, for whoever compares with them; none resumes there."""
        self._folder, self._plan_sha256, self._early = folder, plan_sha256, early
        self.damaged: list[int] = []
        """Rounds whose file the last look at the folder found damaged."""

    def save(self, checkpoint: Checkpoint) -> Path:
        """Write a checkpoint (temporary file, fsync, rename, fsync of the folder) and drop old ones."""
        private_folder(self._folder)
        tensors = {
            f"{group}:{name}": tensor
            for group in _GROUPS
            for name, tensor in getattr(checkpoint, group).items()
        }
        path = self._path(checkpoint.round)
        save_weights(
            path,
            tensors,
            {
                "plan_sha256": checkpoint.plan_sha256,
                "round": str(checkpoint.round),
                "metrics": json.dumps(checkpoint.metrics, allow_nan=False),
                "tensors_sha256": sha256_of_tensors(tensors),
            },
        )
        for later in (round_number for round_number in self.rounds() if round_number > checkpoint.round):
            self._path(later).unlink()  # of a run that went back
        for old in self.rounds()[:-KEPT]:
            if old not in self._early:
                self._path(old).unlink()
        return path

    def latest(self) -> Checkpoint | None:
        """The last whole checkpoint, or None when there is none.

        Raises `OtherPlan` for a checkpoint of another plan, and `ValueError` when there are checkpoints and
        none of them is whole.
        """
        rounds, self.damaged = self.rounds()[-KEPT:], []
        for round_number in reversed(rounds):
            try:
                return self.load(round_number)
            except OtherPlan:
                raise
            except ValueError as error:
                self.damaged.append(round_number)
                _log.warning(
                    "Checkpoint of round %d is damaged; the one before it is taken. %s", round_number, error
                )
        if rounds:
            raise ValueError(
                f"Expected a whole checkpoint in {self._folder}; all {len(rounds)} are damaged. "
                "Start the run in a new folder."
            )
        return None

    def rounds(self) -> list[int]:
        """Rounds with a file, ascending; what else lies in the folder is none of ours."""
        named = (_NAME.fullmatch(path.name) for path in self._folder.glob("round-*") if path.is_file())
        rounds = {int(match[1]) for match in named if match is not None}
        return sorted(round_number for round_number in rounds if self._path(round_number).is_file())

    def _path(self, round_number: int) -> Path:
        return self._folder / f"round-{round_number:04d}.safetensors"

    def load(self, round_number: int) -> Checkpoint:
        """The checkpoint of a round. Raises `OtherPlan`, and `ValueError` for a damaged file."""
        path = self._path(round_number)
        tensors, provenance = load_weights(path)
        if missing := {"plan_sha256", "round", "metrics", "tensors_sha256"} - set(provenance):
            raise ValueError(f"Expected a checkpoint in {path}; its header lacks {min(missing)!r}.")
        if provenance["tensors_sha256"] != sha256_of_tensors(tensors) or provenance["round"] != str(
            round_number
        ):
            raise ValueError(f"Expected {path} to be as it was written; its hash is another.")
        if provenance["plan_sha256"] != self._plan_sha256:
            raise OtherPlan(
                f"Expected checkpoints of plan {self._plan_sha256[:12]} in {self._folder}; they are of plan "
                f"{provenance['plan_sha256'][:12]}. Give the run another name, or remove its folder."
            )
        groups: dict[str, dict[str, Tensor]] = {group: {} for group in _GROUPS}
        for key, tensor in tensors.items():
            group, _, name = key.partition(":")
            if group not in groups:
                raise ValueError(f"Expected the parts of a checkpoint in {path}; got {key!r}.")
            groups[group][name] = tensor
        metrics = read_json(provenance["metrics"], f"metrics in {path}", longest=LONGEST_HEADER)
        if not isinstance(metrics, dict):
            raise ValueError(f"Expected metrics in {path} to be a mapping; got {shown(metrics)}.")
        return Checkpoint(plan_sha256=self._plan_sha256, round=round_number, metrics=metrics, **groups)
