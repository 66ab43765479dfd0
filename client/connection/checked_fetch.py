"""The code of a run is checked where SuperNode fetches it, before SuperNode keeps any of it.

SuperNode fetches a run and its bundle with the run's first message, keeps them, and starts processes that
unpack and import what it kept. `checked` is put around the function of Flower's that does so. What is refused
is not kept, so no process is ever started for it; the site's journal gets a line, its ledger none, and the
centre the answer `bundle_not_approved` to each such message. Other runs go on.

A process unpacks a bundle only where its folder is not there yet, and Flower names folders by 32 bits of the
hash; so the folder of a bundle that passed is removed first, and what is imported is what was checked. The
folder lies in one that only the site's account can open.

Does not do: judge a bundle (`client/connection/arriving_bundle.py`).
Source: flwr 1.41, `flwr/supernode/start_client_internal.py`; a private function, pinned with Flower.
"""

import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from flwr.app import Message
from flwr.common.config import get_project_dir
from flwr.supernode import start_client_internal

from client.connection.arriving_bundle import BundleRefused, InstalledCode
from federation.journal import Journal

Pull = Callable[..., int | None]
_log = logging.getLogger("flwr")


def checked(pull: Pull, state_dir: Path) -> Pull:
    """`pull`, which is Flower's `_pull_and_store_message`, for the site whose books are in `state_dir`."""
    noted: set[tuple[int, str]] = set()

    def pull_checked(**call: Any) -> int | None:
        messages: list[Message] = []
        runs: dict[int, Any] = {}
        sent: dict[int, Any] = {}

        def receive() -> Any:
            received = call["receive"]()
            if received is not None:
                messages.append(received[0])
            return received

        def get_run(run_id: int) -> Any:
            runs[run_id] = call["get_run"](run_id)
            return runs[run_id]

        def get_fab(fab_hash: str, run_id: int) -> Any:
            fab = sent[run_id] = call["get_fab"](fab_hash, run_id)
            InstalledCode.read().check(runs[run_id], fab, run_id)
            _forget(runs[run_id], fab)
            return fab

        try:
            return pull(**{**call, "receive": receive, "get_run": get_run, "get_fab": get_fab})
        except BundleRefused as refusal:
            (message,) = messages
            run_id = message.metadata.run_id
            fab = sent[run_id]
            _log.error("The code of run %s was refused and not unpacked. %s", run_id, refusal)
            if (run_id, fab.hash_str) not in noted:  # a second line would say nothing new
                noted.add((run_id, fab.hash_str))
                _note(state_dir, run_id, refusal)
            _answer(message, call["state"], call["object_store"])
            return run_id

    return pull_checked


def _forget(run: Any, fab: Any) -> None:
    """Remove what lies where this bundle will be unpacked."""
    folder = get_project_dir(run.fab_id, run.fab_version, fab.hash_str)
    if folder.exists():
        shutil.rmtree(folder)


def _note(state_dir: Path, run_id: int, refusal: BundleRefused) -> None:
    """One line in the site's journal."""
    line = {
        "kind": "refusal",
        "reason": "bundle_not_approved",
        "run": str(run_id),
        "bundle": refusal.bundle or "unreadable",
        "installed": InstalledCode.read().bundle,
    }
    Journal(state_dir / "journal.jsonl").append(line)


def _answer(message: Message, state: Any, store: Any) -> None:
    """Let SuperNode send the one word, as it sends the answer of a process."""
    from federation.wire.messages import Refusal, RefusalKind  # with PyTorch, which nothing else here needs

    refusal = Refusal(kind=RefusalKind.BUNDLE_NOT_APPROVED)
    reply = Message(refusal.to_record(), reply_to=message)
    start_client_internal._insert_message(reply, state, store)
