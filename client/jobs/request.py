"""The two files between the process of a question and its job: what is asked, and what the work came to.

A request holds the message as it came, and of the site's settings what work needs: folders, device, cohort;
no ceiling, nobody's approval, and no key but that of noisy steps, which are taken where scans are read. An
answer holds what the work would let out, or one word of the closed list; it names its request by hash, and
its tensors by theirs. Both are written whole, for their owner alone.

Does not do: let anything out. What a job leaves is an offer until it has passed the gate
(`client/jobs/asking.py`).
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from federation.wire.messages import Ask
from federation.wire.wire import RefusalKind, record_of_bytes, record_to_bytes
from forms.json_text import fingerprint_of
from meduet_models.weights import load_weights, save_weights, sha256_of_tensors

REQUEST, ANSWER, STATE = "request.safetensors", "answer.safetensors", "state.safetensors"
"""Names of the files in a job's folder; the last is the site after a round, as `site_state` writes it."""
_MESSAGE = "message"


class NoAnswer(ValueError):
    """What lies there is not the answer to this request."""


class JobRefused(ValueError):
    """The job says no; `kind` is the word."""

    def __init__(self, kind: RefusalKind) -> None:
        super().__init__(f"Expected an answer of the job; it refused ({kind.value}): see above.")
        self.kind = kind


@dataclass(frozen=True, kw_only=True)
class Request:
    """What a job is given."""

    route: str
    """Which exchange."""
    message: bytes
    """The question, as its record."""
    question: str
    """Hash of everything that is asked."""
    attempt: str
    """Random digits: no two requests are the same, so an answer is to this one alone."""
    settings: str
    """The site's settings that work needs, as JSON (`Launcher.settings`)."""
    threads: int
    """CPU threads for tensor arithmetic: sums of floats depend on their number."""
    noise: str = ""
    """Secret draws and noise of the steps (`StepSecrets.to_text`); empty: no step has any."""

    @property
    def sha256(self) -> str:
        """Hash of all of it, 64 hex digits."""
        return fingerprint_of([self._texts(), sha256_of_tensors(self._tensors())])

    def write(self, folder: Path) -> Path:
        """Write it into `folder`, which must exist; returns the file."""
        save_weights(folder / REQUEST, self._tensors(), self._texts())
        return folder / REQUEST

    @staticmethod
    def read(path: Path) -> "Request":
        """Raises `ValueError` for a file that is not a request."""
        tensors, texts = load_weights(path)
        try:
            message = bytes(tensors[_MESSAGE].numpy())
            return Request(message=message, **{**texts, "threads": int(texts["threads"])})  # type: ignore[arg-type]
        except (KeyError, TypeError) as error:
            raise ValueError(f"Expected a request; {error}.") from None

    def ask(self, kind: type[Ask]) -> Ask:
        """The question. Raises `MessageError`, and `ValueError` where it is not what was asked."""
        ask = kind.from_record(record_of_bytes(self.message))
        if ask.sha256() != self.question:
            raise ValueError(f"Expected question {self.question[:12]}…; the message is another.")
        return ask

    @staticmethod
    def message_of(ask: Ask) -> bytes:
        """A question as it stands in a request."""
        return record_to_bytes(ask.to_record())

    def _texts(self) -> dict[str, str]:
        names = ("route", "question", "attempt", "settings", "noise")
        return {**{name: getattr(self, name) for name in names}, "threads": str(self.threads)}

    def _tensors(self) -> dict[str, Tensor]:
        return {_MESSAGE: torch.frombuffer(bytearray(self.message), dtype=torch.uint8)}


@dataclass(frozen=True, kw_only=True)
class Offer:
    """What the work of an answer would let out: the arguments of `Gate.release`, as plain values."""

    tensors: Mapping[str, Tensor]
    said: Mapping[str, Any]
    """The other arguments, as JSON: `declared`, `weight`, `counts`, ... NaN is kept; the gate refuses it."""
    masked: bool = False
    """Whether the work was told that the gate will mask it."""
    room: str = ""
    """The folder of states to which the file `STATE` beside it belongs; empty: the answer leaves none."""
    noised: int = 0
    """Steps that got their noise."""

    def arguments(self) -> dict[str, Any]:
        """For `Gate.release`; raises `NoAnswer` for what does not have their form."""
        try:
            said = dict(self.said)
            declared = {name: tuple(shape) for name, shape in said.pop("declared").items()}
            covered = {"not_covered": frozenset(said.pop("not_covered"))}
        except (KeyError, TypeError, AttributeError) as error:
            raise NoAnswer(f"Expected an answer of a job; {error!r}.") from None
        return {"tensors": self.tensors, "declared": declared, **covered, **said}


def write_answer(folder: Path, request_sha256: str, answer: Offer | RefusalKind) -> None:
    """Leave what the work came to."""
    offer = Offer(tensors={}, said={}) if isinstance(answer, RefusalKind) else answer
    texts = {
        "request": request_sha256,
        "tensors": sha256_of_tensors(offer.tensors),
        "names": json.dumps(list(offer.tensors)),  # norms and wire are reckoned in this order
        "said": json.dumps(dict(offer.said)),
        "masked": str(int(offer.masked)),
        "room": offer.room,
        "noised": str(offer.noised),
        "refused": answer.value if isinstance(answer, RefusalKind) else "",
    }
    save_weights(folder / ANSWER, offer.tensors, texts)


def read_answer(folder: Path, request_sha256: str) -> Offer:
    """The offer in `folder`, if it is whole and was made for this request.

    Raises `NoAnswer`, also for the answer to another request, and `JobRefused` where the job said no.
    """
    try:
        tensors, texts = load_weights(folder / ANSWER)
    except ValueError as error:
        raise NoAnswer(str(error)) from None
    if texts.get("request") != request_sha256:
        raise NoAnswer("Expected the answer to this request; it is the answer to another.")
    if texts.get("tensors") != sha256_of_tensors(tensors):
        raise NoAnswer("Expected an answer as it was written; its tensors are others.")
    try:
        if texts["refused"]:
            raise JobRefused(RefusalKind(texts["refused"]))
        said, names = json.loads(texts["said"]), json.loads(texts["names"])
        ordered = {name: tensors[name] for name in names}
        masked, noised = texts["masked"] == "1", int(texts["noised"])
        return Offer(tensors=ordered, said=said, masked=masked, room=texts["room"], noised=noised)
    except JobRefused:
        raise
    except (KeyError, ValueError) as error:
        raise NoAnswer(f"Expected an answer of a job; {error}.") from None
