"""The program of a job: reads a request, does its work, leaves an answer. It opens no socket, book or key.

It is the same code as the process of a question, checked in the same way when it came, and does the same
work on the same files: scans, encodings, states of training. What the work would let out it writes down
(`Offer`); what goes wrong it says in one word, and the rest to its log, which stays at the site. Before each
step and before it leaves an answer it looks whether its request is still there: one that is gone is no longer
waited for.

Does not do: let anything out, charge, or keep the state after a round: that is the site's once the answer has
passed the gate (`client/jobs/asking.py`).
"""

import json
import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from client.app import exchanges, refusal_kind
from client.exchanges.exchange import OnStep
from client.jobs.asking import STEPS
from client.jobs.request import REQUEST, STATE, Offer, Request, write_answer
from client.release import Gate, Masking
from client.settings import PATHS, SiteConfig
from client.site_scans import SiteScans
from client.training.site_state import Leaving
from federation.plan.plan import WireDtype
from federation.wire.wire import RefusalKind
from forms.form import build
from forms.paths import resolve_paths
from privacy.promise import Promise
from privacy.step_secrets import StepSecrets
from storage.files import keep_to_owner

_log = logging.getLogger(__name__)


class Withdrawn(Exception):
    """Nobody waits for this job any more."""


class Offered(Exception):
    """The work came to the gate; `offer` is what it would let out."""

    def __init__(self, offer: Offer) -> None:
        super().__init__("Expected to end here: a job lets nothing out.")
        self.offer = offer


def _nothing() -> None:
    """Nothing to keep."""


class OfferingGate(Gate):
    """In place of the gate, which stays with the books: takes down what comes to it, and ends the work."""

    def __init__(self, promise: Promise, folder: Path, noise: str = "") -> None:
        self._promise, self._folder = promise, folder
        self._noise = StepSecrets.from_text(noise) if noise else None

    @property
    def promise(self) -> Promise:
        """Under which promise the answer will leave."""
        return self._promise

    def step_secrets(self) -> StepSecrets:
        """As the gate's: its request brought them."""
        assert self._noise is not None, "the request of noisy steps has their key"
        return self._noise

    def release(
        self,
        tensors: Mapping[str, Tensor],
        declared: Mapping[str, tuple[int, ...]],
        *,
        weight: float = 1.0,
        counts: Mapping[str, object] | None = None,
        metrics: Mapping[str, object] | None = None,
        not_covered: frozenset[str] = frozenset(),
        items: Sequence[str] = (),
        wire_dtype: WireDtype = "float32",
        keep: Callable[[], None] = _nothing,
        anew: bool = False,
        masking: Masking | None = None,
    ) -> NoReturn:
        """Raise `Offered` with all of it. What is to be kept is written beside it, if it is the state after a
        round; whatever a masked answer keeps besides, the process that masks it keeps."""
        room = ""
        if isinstance(keep, Leaving):
            room = keep.write(self._folder / STATE)
        elif keep is not _nothing:
            raise TypeError(f"Expected the state after a round to keep; got {keep!r}. A job keeps no other.")
        said = {
            "declared": {name: list(shape) for name, shape in declared.items()},
            "weight": weight,
            "counts": dict(counts or {}),
            "metrics": dict(metrics or {}),
            "not_covered": sorted(not_covered),
            "items": list(items),
            "wire_dtype": wire_dtype,
            "anew": anew,
        }
        noised = 0 if self._noise is None or self._noise.last is None else self._noise.last + 1
        masked = masking is not None
        raise Offered(Offer(tensors=tensors, said=said, masked=masked, room=room, noised=noised))

    def release_text(
        self, text: str, keep: Callable[[], None] = _nothing, said: Mapping[str, Any] | None = None
    ) -> NoReturn:
        """No row of texts reads a scan, so none is a job's."""
        raise TypeError("Expected work on scans; got a text.")


def work(request: Request, folder: Path, on_step: OnStep) -> Offer | RefusalKind:
    """What the work of a request comes to. Raises `Withdrawn`."""
    torch.set_num_threads(request.threads)
    try:
        (row,) = [row for row in exchanges() if row.exchange.route == request.route and row.reads_scans]
        settings = json.loads(request.settings)
        resolve_paths(settings, PATHS, folder, "site")
        site = SiteScans(build(SiteConfig, settings, "site"))
        ask = request.ask(row.exchange.ask)
        plan = ask.plan()
        gate = OfferingGate(row.exchange.promise(plan, ask), folder, request.noise)
        row.work(site, ask, plan, gate, on_step)
        raise TypeError("Expected the work to come to the gate; it ended before.")
    except Offered as offered:
        return offered.offer
    except Withdrawn:
        raise
    except Exception as error:  # noqa: BLE001, the wall of a job: what is said of it stays in the site's log
        _log.exception("The job refuses.")
        return refusal_kind(error)


def main() -> int:
    """Do the job of the request that the first argument names; 0 if an answer was left."""
    keep_to_owner()
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    path = Path(sys.argv[1])
    folder = path.parent
    request = Request.read(path)

    def on_step(step: int, loss: float) -> None:
        _still_there(path)
        with (folder / STEPS).open("a", encoding="ascii") as steps:
            steps.write(f"{step} {loss!r}\n")

    try:
        answer = work(request, folder, on_step)
        _still_there(path)
    except Withdrawn:
        _log.warning("The request was withdrawn; no answer is left.")
        return 1
    write_answer(folder, request.sha256, answer)
    return 0


def _still_there(path: Path) -> None:
    assert path.name == REQUEST, "a job is told its request"
    if not path.is_file():
        raise Withdrawn


if __name__ == "__main__":
    sys.exit(main())
