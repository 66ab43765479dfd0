"""A process in which some sites of a simulated consortium work; it answers what it reads on standard input.

Sites stay with their process for the whole run: what they have opened stays open, and nobody else writes
their books meanwhile. As many torch threads as the engine says, so that the bits do not depend on where a
site works. Ends at once when its input ends: whoever started it is gone, however that came, and a site that
is stopped in the middle of its work goes on from what it has on disk.

Does not do: say anything on a terminal; what libraries print goes to its log.
"""

import json
import os
import sys
import threading
from queue import SimpleQueue
from typing import IO

import torch
from flwr.app import Context, Message

from client.app import make_client_app
from simulations.consortium import Consortium
from simulations.engines.frames import (
    ASK,
    DONE,
    OPEN,
    PROGRESS,
    READ,
    SITE,
    STEP,
    read_frame,
    write_frame,
)
from simulations.engines.in_process import message_bytes, message_of, site_context, take_part


class SiteProcess:
    """The sites of a consortium that are asked here, and what this process says of them."""

    def __init__(self, consortium: Consortium, said: IO[bytes]) -> None:
        self._consortium, self._said = consortium, said
        self._app = make_client_app(consortium.open_by_context, self._on_step)
        self._contexts: dict[int, Context] = {}
        take_part()

    def read(self, name: str) -> None:
        """Read and encode a hospital's scans, into its cache. What is wrong with them is not said here: who
        opens the hospital next, which is quick then, meets it again."""

        def progress(what: str, done: int, total: int) -> None:
            write_frame(self._said, PROGRESS, json.dumps([what, done, total]).encode())

        try:
            self._consortium.site(name).scans(self._consortium.everyone, progress)
        except (ValueError, OSError):
            return

    def answer(self, site: int, question: Message) -> Message:
        """The answer of site number `site`."""
        num_sites = len(self._consortium.plan.participants)
        context = self._contexts.setdefault(site, site_context(site, num_sites))
        return self._app(question, context)

    def _on_step(self, site: str, step: int, loss: float) -> None:
        write_frame(self._said, STEP, json.dumps([site, step, loss]).encode())


def _listen(heard: IO[bytes], jobs: "SimpleQueue[tuple[bytes, bytes]]") -> None:
    """Put what is asked into `jobs`; end the process when nobody asks any more."""
    while True:
        try:
            jobs.put(read_frame(heard))
        except EOFError:
            os._exit(0)


def main() -> None:
    """Entry point: `python -m simulations.engines.site_process THREADS`."""
    torch.set_num_threads(int(sys.argv[1]))
    said = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what libraries print must not stand between frames
    jobs: SimpleQueue[tuple[bytes, bytes]] = SimpleQueue()
    threading.Thread(target=_listen, args=(sys.stdin.buffer, jobs), daemon=True).start()
    kind, content = jobs.get()
    assert kind == OPEN
    process = SiteProcess(Consortium.from_json(content.decode()), said)
    write_frame(said, DONE)
    while True:
        kind, content = jobs.get()
        answered = b""
        if kind == READ:
            process.read(content.decode())
        else:
            assert kind == ASK
            (site,) = SITE.unpack_from(content)
            answered = message_bytes(process.answer(site, message_of(content[SITE.size :])))
        write_frame(said, DONE, answered)


if __name__ == "__main__":
    main()
