"""Sites side by side: the process engine over several processes, each with sites of its own.

Sites are dealt to the processes in turn and stay there; a process answers one question at a time, the
processes answer at once. Replies are handed over in the order in which they are asked for, which is that of
the sites, so that a run tells the same in the same order, and ends in the same bits, whatever the number of
processes. Up to one reply per site waits here for its turn.

Processes are started fresh (nothing is forked), speak in frames of bytes, and end with this one: when it
leaves the context, is interrupted, or is killed. One that ends by itself, because the system had no memory
left, stops the run in one line; the sites go on from what they have on disk when the run is started again.
What this file does not do: it starts none again.
"""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from flwr.app import Message
from flwr.clientapp import ClientApp

from client.app import OnStep
from client.site_scans import SiteProgress
from federation.terminal import CommandFailed
from simulations.consortium import Consortium
from simulations.engines.frames import ASK, DONE, OPEN, PROGRESS, READ, SITE, STEP, read_frame, write_frame
from simulations.engines.in_process import InProcessGrid, OnTurn, message_bytes, message_of, no_turn
from storage.files import private_folder

_ROOT = Path(__file__).resolve().parents[2]


class SiteProcessEnded(CommandFailed):
    """A process in which sites worked has ended by itself."""


def cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def num_processes(asked: int | str, num_sites: int, threads: int, on_gpu: bool) -> int:
    """How many processes are meant (`engine.workers`): never more than sites.

    "auto": as many as cores allow, each with its threads; one more where the sites do not divide evenly among
    them, as three on two cores take two turns in two processes, and one and a half in three. One on a GPU,
    whose memory several would share.
    """
    if isinstance(asked, int):
        return min(asked, num_sites)
    if on_gpu:
        return 1
    fit = max(1, cores() // threads)
    uneven = fit > 1 and num_sites > fit and num_sites % fit > 0
    return min(num_sites, fit + uneven)


class _Process:
    """One process, and the thread that waits for what it says; jobs are done in their order."""

    def __init__(self, names: Sequence[str], opening: bytes, threads: int, log: Path) -> None:
        self._names, self._log = names, log
        path = os.pathsep.join([str(_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        with log.open("ab") as file:
            self.child = subprocess.Popen(
                [sys.executable, "-m", "simulations.engines.site_process", str(threads)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=file,
                env={**os.environ, "PYTHONPATH": path},
                start_new_session=True,  # Ctrl-C is for the run, which then ends its processes
            )
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="site")
        self._opened = self.submit(lambda: self._say(OPEN, opening))

    def submit(self, job: Callable[[], bytes]) -> "Future[bytes]":
        """Do `job` after those before it."""
        return self._thread.submit(job)

    def ask(
        self,
        kind: bytes,
        content: Callable[[], bytes],
        events: dict[bytes, Callable[[list[object]], None]],
        turn: AbstractContextManager[None],
    ) -> "Future[bytes]":
        """The answer to a job of this kind, some day. `content` is made when the job begins, in `turn`."""

        def job() -> bytes:
            with turn:
                self._opened.result()
                return self._say(kind, content(), events)

        return self.submit(job)

    def _say(
        self,
        kind: bytes,
        content: bytes,
        events: dict[bytes, Callable[[list[object]], None]] | None = None,
    ) -> bytes:
        assert self.child.stdin is not None and self.child.stdout is not None
        try:
            write_frame(self.child.stdin, kind, content)
            while True:
                said, answer = read_frame(self.child.stdout)
                if said == DONE:
                    return answer
                assert events is not None
                events[said](json.loads(answer))
        except (EOFError, BrokenPipeError):
            raise SiteProcessEnded(self._last_words()) from None

    def _last_words(self) -> str:
        status = self.child.wait()
        how = f"signal {signal.Signals(-status).name}" if status < 0 else f"exit {status}"
        why = (
            "most likely the machine had no memory left: engine.workers=1 takes least of it"
            if status == -signal.SIGKILL
            else f"see {self._log}"
        )
        return (
            f"The process of {', '.join(self._names)} ended ({how}); {why}. Nothing that was done is lost: "
            "give the same command again."
        )

    def end(self) -> None:
        """Kill it, as a site survives, and wait until it and its thread are gone."""
        self.child.kill()
        self.child.wait()
        self._thread.shutdown(wait=True, cancel_futures=True)
        for stream in (self.child.stdin, self.child.stdout):
            assert stream is not None
            try:
                stream.close()
            except BrokenPipeError:
                continue


class SideBySide:
    """`number` processes for the sites of a consortium; a context manager, in which none is started before
    it has something to do."""

    def __init__(self, consortium: Consortium, number: int, threads: int, logs: Path) -> None:
        self._consortium, self._number, self._threads, self._logs = consortium, number, threads, logs
        self._started: dict[int, _Process] = {}

    def __enter__(self) -> "SideBySide":
        """Start nothing yet."""
        return self

    def __exit__(self, *raised: object) -> None:
        """Leave none behind."""
        for process in self._started.values():
            process.end()

    @property
    def process_ids(self) -> list[int]:
        """Of the processes that were started."""
        return [process.child.pid for process in self._started.values()]

    def read(
        self, names: Sequence[str], reading: Callable[[str], AbstractContextManager[SiteProgress]]
    ) -> None:
        """Let every hospital of `names` be read and encoded, each where its questions will be answered."""

        @contextmanager
        def turn(name: str, events: dict[bytes, Callable[[list[object]], None]]) -> Iterator[None]:
            with reading(name) as progress:
                events[PROGRESS] = lambda said: progress(*said)  # type: ignore[arg-type]
                yield

        jobs = []
        for number, name in enumerate(names):
            events: dict[bytes, Callable[[list[object]], None]] = {}
            process = self._process(number % self._number)
            jobs.append(process.ask(READ, name.encode, events, turn(name, events)))
        for job in jobs:
            job.result()

    def ask(
        self, site: int, message: Message, on_step: OnStep, turn: AbstractContextManager[None]
    ) -> "Future[bytes]":
        """The reply of site number `site`, some day, as bytes."""
        events: dict[bytes, Callable[[list[object]], None]] = {STEP: lambda said: on_step(*said)}  # type: ignore[arg-type]
        process = self._process(site % self._number)
        return process.ask(ASK, lambda: SITE.pack(site) + message_bytes(message), events, turn)

    def _process(self, number: int) -> _Process:
        if number not in self._started:
            private_folder(self._logs)
            names = self._consortium.plan.participants[number :: self._number]
            opening = self._consortium.to_json().encode()
            log = self._logs / f"sites-{number + 1}.log"
            self._started[number] = _Process(names, opening, self._threads, log)
        return self._started[number]


class SideBySideGrid(InProcessGrid):
    """The sites of `processes`, asked as soon as a question is pushed."""

    def __init__(
        self, processes: SideBySide, num_sites: int, on_step: OnStep, on_turn: OnTurn = no_turn
    ) -> None:
        super().__init__(ClientApp(), num_sites, on_turn=on_turn)
        self._processes, self._on_step = processes, on_step
        self._replies: dict[str, Future[bytes]] = {}

    def _ask(self, identity: str, message: Message) -> None:
        site = self.site_of(message)
        turn = self._turn(site, message.metadata.message_type)
        self._replies[identity] = self._processes.ask(site, message, self._on_step, turn)

    def _reply(self, identity: str) -> Message | None:
        reply = self._replies.pop(identity, None)
        return None if reply is None else message_of(reply.result())
