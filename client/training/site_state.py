"""A site's place in a round, on its own disk: where the round begins, how far it has come, what it leaves.

`StateFolder.enter` says where a round begins: from the state after the round before, or after the last one
taken part in, and anchored to the common start. A state is home weights, teacher and the optimiser's moments
(`client/training/trainee.py` says why those), one file per round, `state/<plan>/round-0003.safetensors`,
written whole or not at all; round 0 is the common start. A state is never changed, so a round delivered
twice, or after the centre went back to its last checkpoint, begins from the same. Kept are the last three: a
site may be done with a round that the centre never counted, and the centre may then find its last checkpoint
damaged and go back by one.

Losing state costs time only. A damaged state is passed over for the one before. A site that lost its states
or its start raises `StateMissing`; the centre then asks again with the start, in the same round. Where it had
answered that round already, and has lost the answer too, it answers anew (`privacy/ledger.py`).

While a round trains, all that its steps change is written every so often beside the states,
`round-0003.partial.safetensors`. When the same question comes again (same plan, round, weights and bank that
came, state and cohort to begin from), the round goes on after the last step that was written, and ends in the
bits it would have had. Anything else that lies there is removed, and the round begins anew.

Does not do: steps (`client/training/pretraining.py`, `client/exchanges/diffusion.py`), keep what left
(`client/books/answers.py`), leave the site, ever. Rounds of fine-tuning keep nothing: they are short.
"""

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from client.latents.batches import TrainingScans
from forms.json_text import fingerprint_of
from meduet_models.weights import StoredWeights, open_weights, save_weights, sha256_of_tensors
from storage.files import move_whole, private_folder

KEPT = 3
"""States of rounds that a site keeps, beside the common start."""
SHARE_OF_TIME = 0.05
"""Of a round's time, the most that is spent writing it down; a large network is written less often."""
PARTIAL = ".partial.safetensors"
"""How the file of a round under way ends."""
ROOMS = ("state", "diffusion")
"""Folders of states, in the site's state folder: of pretraining, of the diffusion model."""
_PARTS = ("home", "teacher", "optimiser")
_STEPS, _SECONDS, _ROUND = "partial/steps", "partial/seconds", "round/"

_log = logging.getLogger(__name__)


class StateMissing(ValueError):
    """This site has no state from which the round could start; the centre asks again with the start, or must
    offer an earlier round."""


class StateDamaged(ValueError):
    """A file is not what was written, or belongs to another round or question."""


@dataclass(frozen=True, kw_only=True)
class SiteState:
    """A site after a round: tensors by name. As read from disk, each is read when it is asked for."""

    round: int
    """After which round; 0 is the common start."""
    began_from: int = 0
    """From the state after which round it began: the one before, unless the site sat out rounds."""
    home: Mapping[str, Tensor]
    """Weights that stay at the site."""
    teacher: Mapping[str, Tensor] = field(default_factory=dict)
    """The moving-average teacher; empty at the start, where it equals the student."""
    optimiser: Mapping[str, Tensor] = field(default_factory=dict)
    """The optimiser's moments and step counts, `<moment>/<parameter>`; empty at the start."""
    sha256: str = ""
    """Hash of all its tensors, as they were read from disk; empty before."""

    def named(self) -> dict[str, Tensor]:
        """All its tensors, by part and name."""
        return {f"{part}:{name}": tensor for part in _PARTS for name, tensor in getattr(self, part).items()}


@dataclass(frozen=True, kw_only=True)
class RoundResult:
    """What a round gives: still inside the site."""

    update: dict[str, Tensor]
    """Shared weights after minus before, by name; float32 on the CPU."""
    metrics: dict[str, float]
    """What the steps told: means of loss terms and gradient norm, last learning rate, seconds (those before
    an interruption, as far as they were written down, included)."""
    examples: int
    """Training scans of this site: the weight of its update."""


class StateFolder:
    """The states of one site in one run, `folder/<first 12 digits of the plan's hash>/`."""

    def __init__(self, folder: Path, plan_sha256: str) -> None:
        self._folder = folder / plan_sha256[:12]
        self._plan_sha256 = plan_sha256
        self.room = folder.name
        """Which of `ROOMS` it is."""

    def enter(
        self, round_number: int, start: Callable[[], Mapping[str, Tensor]] | None = None
    ) -> "SiteRound":
        """This site's place in a round.

        `start` makes the common start, where it came with the question. In round 1 a start that is another
        begins anew: states of an earlier attempt at the same plan go. Later it is taken by a site that has
        none to read. Raises `StateMissing` when the site has nothing to begin from, or the centre goes back
        further than it keeps.
        """
        if start is not None and round_number == 1:
            self._begin(start())
        elif start is not None and self._whole(0) is None:
            private_folder(self._folder)
            self._write(SiteState(round=0, home=start()), "")
        start_state, before = self.start(), self.before(round_number)
        return SiteRound(self, round_number, start_state, before, self._whole(round_number) is None)

    def start(self) -> SiteState:
        """The common start. Raises `StateMissing` if it never came, was lost or is damaged."""
        if (start := self._whole(0)) is None:
            raise StateMissing("Expected the common start of round 1; this site does not have it.")
        return start

    def before(self, round_number: int) -> SiteState:
        """The state from which `round` starts: after `round - 1`, or after the last round taken part in; the
        one before that where it is damaged.

        Raises `StateMissing` when there is none, or the centre goes back further than this site keeps.
        """
        kept = self.rounds()
        earlier, later = [r for r in kept if r < round_number], [r for r in kept if r >= round_number]
        # Unless it is the very last round: a later state knows from which one it began; if that is another,
        # the one asked for was dropped.
        if (
            earlier
            and earlier[-1] != round_number - 1
            and later
            and (after := self._whole(later[0])) is not None
        ):
            if after.began_from != earlier[-1]:
                raise StateMissing(
                    f"Expected a state after round {round_number - 1}; this site keeps "
                    f"{', '.join(map(str, kept))}. Restart the run from round 1."
                )
        for one in reversed(earlier):
            if (state := self._whole(one)) is not None:
                return state
        raise StateMissing(
            f"Expected a state before round {round_number}; this site has none that can be read."
        )

    def save(self, state: SiteState, shared_sha256: str) -> None:
        """Keep the state after a round; later rounds (of a run that went back) and old ones go, and so does
        what any round left behind on its way.

        `shared_sha256`: hash of the shared weights with which the round began.
        """
        self._write(state, shared_sha256)
        self._tidy(state.round)

    def take(self, path: Path, round_number: int) -> None:
        """Keep the state after a round that a job left at `path` (`Leaving.write`), as `save` keeps one.

        Raises `StateDamaged` for a file that is not that, which stays where it is.
        """
        _read(path, {"plan_sha256": self._plan_sha256, "round": str(round_number)})
        move_whole(path, self._path(round_number))
        self._tidy(round_number)

    def _tidy(self, last: int) -> None:
        for left in (f"round-*{PARTIAL}", ".round-*"):  # a write that a kill cut short
            for path in self._folder.glob(left):
                path.unlink(missing_ok=True)
        rounds = self.rounds()
        kept = {0, *[round_number for round_number in rounds if round_number <= last][-KEPT:]}
        for round_number in set(rounds) - kept:
            self._path(round_number).unlink()

    def rounds(self) -> list[int]:
        """Rounds whose state is on disk, ascending."""
        names = (path.stem.removeprefix("round-") for path in self._folder.glob("round-*.safetensors"))
        return sorted(int(name) for name in names if name.isdigit())  # others are rounds under way

    def partial(self, round_number: int) -> Path:
        """Where a round under way is kept."""
        return self._path(round_number).with_suffix(PARTIAL)

    def question(self, round_number: int, began_from: SiteState) -> dict[str, str]:
        """On what a round depends of all that this site has, as short texts."""
        return {
            "plan_sha256": self._plan_sha256,
            "round": str(round_number),
            "began_from": f"{began_from.round} {began_from.sha256}",
        }

    def _begin(self, home: Mapping[str, Tensor]) -> None:
        """Keep the common start, and nothing else; when it is round 1 that is asked again, all is there and
        stays."""
        private_folder(self._folder)
        state, there = SiteState(round=0, home=dict(home)), self._whole(0)
        same = there is not None and there.sha256 == sha256_of_tensors(state.named())
        if same and self.rounds() in ([0], [0, 1]):
            return
        if not same:
            self._write(state, "")
        for round_number in self.rounds():
            if round_number > 0:
                self._path(round_number).unlink()

    def _path(self, round_number: int) -> Path:
        return self._folder / f"round-{round_number:04d}.safetensors"

    def _write(self, state: SiteState, shared_sha256: str) -> None:
        self.write_at(self._path(state.round), state, shared_sha256)

    def write_at(self, path: Path, state: SiteState, shared_sha256: str) -> None:
        """Write a state to `path`, where it is not kept yet."""
        facts = {
            "plan_sha256": self._plan_sha256,
            "round": str(state.round),
            "began_from": str(state.began_from),
            "shared_sha256": shared_sha256,
        }
        _write(path, state.named(), facts)

    def _whole(self, round_number: int) -> SiteState | None:
        """The state after a round as it was written; None, and a line in the site's log, if it is not."""
        path = self._path(round_number)
        if not path.is_file():
            return None
        try:
            tensors, provenance = _read(path, {"plan_sha256": self._plan_sha256, "round": str(round_number)})
            began_from = int(provenance["began_from"])
        except (ValueError, KeyError) as error:
            _log.warning("%s is passed over: %s", path.name, error)
            return None
        return SiteState(
            round=round_number,
            began_from=began_from,
            sha256=provenance["tensors_sha256"],
            **{part: tensors.part(f"{part}:") for part in _PARTS},
        )


class SiteRound:
    """A site's place in one round: made by `StateFolder.enter`."""

    def __init__(
        self, states: StateFolder, round_number: int, start: SiteState, kept: SiteState, anew: bool
    ) -> None:
        self._states, self.round = states, round_number
        self.start = start
        """The common start, to which a style branch that stays home is anchored."""
        self.kept = kept
        """What the round begins from."""
        self.anew = anew
        """Whether no state after this round is kept: it was never taken part in, or what it left is lost."""

    def under_way(
        self, question: Mapping[str, str], every_s: float, clock: Callable[[], float] = time.monotonic
    ) -> "UnderWay":
        """How far the round has come. `question` names whatever else it depends on, as short texts."""
        whole = {**self._states.question(self.round, self.kept), **question}
        return UnderWay(self._states.partial(self.round), whole, every_s, clock)

    def leaving(
        self, after: Callable[[], SiteState], shared_sha256: str, also: Callable[[], None] = lambda: None
    ) -> "Leaving":
        """What is to be kept when the answer leaves: the site after the round, which began with shared
        weights of this hash; and whatever `also` keeps."""
        return Leaving(self._states, after, shared_sha256, also)


@dataclass(frozen=True)
class Leaving:
    """A site after a round whose answer has not left yet: kept when it is called, or left for whoever lets
    the answer out (`client/jobs/asking.py`)."""

    states: StateFolder
    after: Callable[[], SiteState]
    shared_sha256: str
    also: Callable[[], None]

    def __call__(self) -> None:
        """Keep all of it."""
        self.states.save(self.after(), self.shared_sha256)
        self.also()

    def write(self, path: Path) -> str:
        """Write the state to `path`, for `StateFolder.take`; returns its room."""
        self.states.write_at(path, self.after(), self.shared_sha256)
        return self.states.room


class UnderWay:
    """One round under way at one site, as far as it is on disk: whole or not at all, for its owner only.

    `question`: everything on which the round depends, by name, as short texts (hashes); kept in the file's
    header. `every_s`: seconds between two writes, or more if writing takes long (`SHARE_OF_TIME`); 0 for
    after each step, whatever that takes. A shorter round writes nothing.
    """

    def __init__(
        self,
        path: Path,
        question: Mapping[str, str],
        every_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._path, self._question, self._every_s, self._clock = path, dict(question), every_s, clock
        self._last, self._pause_s = clock(), every_s

    def resume(self, load: Callable[[StoredWeights], None]) -> tuple[int, float]:
        """Steps already done and seconds already spent, once `load` took the tensors; (0, 0.0) when there is
        nothing that this question could go on from.

        `load` raises `ValueError` before it changes anything when the tensors are not what it wants.
        """
        self._last = self._clock()
        if not self._path.is_file():
            return 0, 0.0
        try:
            tensors, _ = _read(self._path, self._question)
            steps, seconds = int(tensors[_STEPS]), float(tensors[_SECONDS])
            load(tensors.part(_ROUND))
        except (ValueError, KeyError) as error:
            self._path.unlink(missing_ok=True)
            _log.warning("%s is removed, and the round begins anew: %s", self._path.name, error)
            return 0, 0.0
        _log.warning("The round was interrupted after step %d or later; it goes on from there.", steps)
        return steps, seconds

    def offer(self, steps: int, seconds: float, tensors: Callable[[], Mapping[str, Tensor]]) -> None:
        """Write what `tensors` gives, if it is time to: the round after `steps` steps and `seconds` seconds.

        A disk that takes nothing costs this safety, not the round: it is said in the log.
        """
        began = self._clock()
        if began - self._last < self._pause_s:
            return
        counted = {_STEPS: torch.tensor(steps), _SECONDS: torch.tensor(seconds, dtype=torch.float64)}
        whole = {f"{_ROUND}{name}": tensor for name, tensor in tensors().items()} | counted
        try:
            _write(self._path, whole, self._question)
        except OSError as error:
            _log.warning("%s could not be written after step %d: %s", self._path.name, steps, error)
        self._last = self._clock()
        if self._every_s > 0:
            self._pause_s = max(self._every_s, (self._last - began) / SHARE_OF_TIME)


def cohort_sha256(scans: TrainingScans) -> str:
    """Hash of who trains, scan by scan: a cohort that changed begins its round anew. Stays at the site."""
    people = [scans.patients[row] for row in scans.indices("train")]
    return fingerprint_of(people)


def _write(path: Path, tensors: Mapping[str, Tensor], facts: Mapping[str, str]) -> None:
    """Tensors and facts, under hashes of both."""
    whole = {**facts, "tensors_sha256": sha256_of_tensors(tensors)}
    save_weights(path, tensors, whole | {"facts_sha256": fingerprint_of(whole)})


def _read(path: Path, expected: Mapping[str, str]) -> tuple[StoredWeights, dict[str, str]]:
    """Tensors and facts that are as they were written; raises `ValueError` if not, or unless the facts hold
    what is expected."""
    tensors, facts = open_weights(path)
    noted = facts.pop("facts_sha256", "")
    wanted = {**expected, "tensors_sha256": sha256_of_tensors(tensors)}
    wrong = sorted(name for name, value in wanted.items() if facts.get(name) != value)
    if wrong or noted != fingerprint_of(facts):
        what = wrong[0] if wrong else "header"
        raise StateDamaged(f"Expected it as it was written for this round; its {what} is another.")
    return tensors, facts
