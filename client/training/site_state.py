"""What a site keeps between rounds on its own disk: home weights, teacher, optimiser's moments.

One file per round, `state/<plan>/round-0003.safetensors`, written whole or not at all; round 0 is the common
start that came with the first round and stays for good: the style branch is anchored to it. Round r starts
from the state after round r - 1 and never changes it, so a round delivered twice, or after the centre went
back to its last checkpoint, gives the same answer. Kept are the last three: a site may be done with a round
that the centre never counted, and the centre may then find its last checkpoint damaged and go back by one.

A site that sat out a round goes on from the last state it has. A round under way lies beside the states
(`client/partial_round.py`); what left lies elsewhere (`client/answers.py`). Does not do: leave the site,
ever. AdamW's moments of the shared weights stay here, too (`client/training/trainee.py` says why).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from client.partial_round import SUFFIX as PARTIAL
from client.partial_round import PartialRound
from meduet_models.weights import open_weights, save_weights, sha256_of_tensors

KEPT = 3
"""States of rounds that a site keeps, beside the common start."""
_PARTS = ("home", "teacher", "optimiser")


class StateMissing(ValueError):
    """This site has no state from which the round could start; the centre must offer an earlier round."""


class StateDamaged(ValueError):
    """A state file is not what was written."""


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
    """AdamW's moments and step counts, `<moment>/<parameter>`; empty at the start."""
    sha256: str = ""
    """Hash of all its tensors, as they were read from disk; empty before."""


class StateFolder:
    """The states of one site in one run, `folder/<first 12 digits of the plan's hash>/`."""

    def __init__(self, folder: Path, plan_sha256: str) -> None:
        self._folder = folder / plan_sha256[:12]
        self._plan_sha256 = plan_sha256

    def begin(self, home: Mapping[str, Tensor]) -> None:
        """Keep the common start; states of an earlier attempt at the same plan go. When it is round 1 that is
        asked again, all is there and stays."""
        self._folder.mkdir(parents=True, exist_ok=True)
        if self.rounds() == [0, 1] and self._is_start(home):
            return
        self._write(SiteState(round=0, home=dict(home)), shared_sha256="")
        for round in self.rounds():
            if round > 0:
                self._path(round).unlink()

    def start(self) -> SiteState:
        """The common start; raises `StateMissing` if it never came."""
        if not self._path(0).is_file():
            raise StateMissing("Expected the common start of round 1; this site never received it.")
        return self._read(0)

    def before(self, round: int) -> SiteState:
        """The state from which `round` starts: after `round - 1`, or after the last round taken part in.

        Raises `StateMissing` when the centre goes back further than this site keeps, and `StateDamaged`.
        """
        kept = self.rounds()
        earlier, later = [r for r in kept if r < round], [r for r in kept if r >= round]
        if not earlier:
            raise StateMissing("Expected the common start of round 1; this site never received it.")
        # Unless it is the very last round: a later state knows from which one it began; if that is another,
        # the one asked for was dropped.
        if earlier[-1] != round - 1 and later and self._read(later[0]).began_from != earlier[-1]:
            raise StateMissing(
                f"Expected a state after round {round - 1}; this site keeps {', '.join(map(str, kept))}. "
                "Restart the run from round 1."
            )
        return self._read(earlier[-1])

    def save(self, state: SiteState, shared_sha256: str) -> None:
        """Keep the state after a round; later rounds (of a run that went back) and old ones go, and so does
        what any round left behind on its way.

        `shared_sha256`: hash of the shared weights with which the round began.
        """
        self._write(state, shared_sha256)
        for left in (f"round-*{PARTIAL}", ".round-*"):  # a write that a kill cut short
            for path in self._folder.glob(left):
                path.unlink(missing_ok=True)
        rounds = self.rounds()
        kept = {0, *[round for round in rounds if round <= state.round][-KEPT:]}
        for round in set(rounds) - kept:
            self._path(round).unlink()

    def partial(
        self, round: int, began_from: SiteState, question: Mapping[str, str], every_s: float
    ) -> PartialRound:
        """The round under way that begins from `began_from`; `question`: what else it depends on."""
        whole = self._question(round, began_from, question)
        return PartialRound(self._path(round).with_suffix(PARTIAL), whole, every_s)

    def _question(self, round: int, began_from: SiteState, more: Mapping[str, str]) -> dict[str, str]:
        return {
            "plan_sha256": self._plan_sha256,
            "round": str(round),
            "began_from": f"{began_from.round} {began_from.sha256}",
            **more,
        }

    def _is_start(self, home: Mapping[str, Tensor]) -> bool:
        try:
            return self._read(0).sha256 == sha256_of_tensors(_named(SiteState(round=0, home=home)))
        except StateDamaged:
            return False

    def rounds(self) -> list[int]:
        """Rounds whose state is on disk, ascending."""
        names = (path.stem.removeprefix("round-") for path in self._folder.glob("round-*.safetensors"))
        return sorted(int(name) for name in names if name.isdigit())  # others are rounds under way

    def _path(self, round: int) -> Path:
        return self._folder / f"round-{round:04d}.safetensors"

    def _write(self, state: SiteState, shared_sha256: str) -> None:
        tensors = _named(state)
        provenance = {
            "plan_sha256": self._plan_sha256,
            "round": str(state.round),
            "began_from": str(state.began_from),
            "shared_sha256": shared_sha256,
            "tensors_sha256": sha256_of_tensors(tensors),
        }
        save_weights(self._path(state.round), tensors, provenance)

    def _read(self, round: int) -> SiteState:
        path = self._path(round)
        try:
            tensors, provenance = open_weights(path)
            expected = {
                "plan_sha256": self._plan_sha256,
                "round": str(round),
                "tensors_sha256": sha256_of_tensors(tensors),
            }
        except ValueError as error:
            raise StateDamaged(str(error)) from error
        if wrong := [name for name, value in expected.items() if provenance.get(name) != value]:
            raise StateDamaged(
                f"Expected {path} to be as it was written; its {wrong[0]} is another. Restart the run."
            )
        return SiteState(
            round=round,
            began_from=int(provenance["began_from"]),
            sha256=provenance["tensors_sha256"],
            **{part: tensors.part(f"{part}:") for part in _PARTS},
        )


def _named(state: SiteState) -> dict[str, Tensor]:
    """The tensors of a state, by part and name."""
    return {f"{part}:{name}": tensor for part in _PARTS for name, tensor in getattr(state, part).items()}
