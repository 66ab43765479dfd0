"""Worker processes that read scans, and encode them where the device is the CPU, each scan in one of them.

A worker is a program of its own (`client/latents/worker.py`), started afresh, not forked: it inherits no open
book, no mapped file and no thread. Questions and answers are lines of JSON on its standard input and output;
on another device than the CPU, prepared volumes follow an answer as raw numbers and this process encodes
them. A worker encodes on one thread and reads the next scan on another, so that its core is not idle while a
file is synced. When this process ends, however it ends, its workers' input ends, and so do they; when a
worker ends before its input, that is one line here, and what it wrote stays.
"""

import contextlib
import dataclasses
import errno
import json
import math
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from client.latents.cache_files import CacheFiles, ClearFiles, SealedFiles
from client.latents.encoding import Preparation, Ready
from client.scans.judgement import Source, Verdict, verdict_from_json, verdict_to_json
from forms.form import build
from meduet_models.tokenizer.tokenizer import TokenizerSpec
from scans.volume_plan import VolumePlan
from scans.volumes import Geometry, Prepared
from scans.whole_volumes import WholeVolume
from storage.sealed_files import SealingKeys

MOST_WORKERS = 256
MOST_BATCHES = 8
"""Batches that a worker is given at most before it is asked again."""
STOP_S = 10.0
"""How long a worker may take to end when asked to, before it is killed."""
_ROOT = Path(__file__).resolve().parents[2]


class WorkerLost(ChildProcessError):
    """A worker ended before its work did."""


@dataclass(frozen=True)
class Job:
    """All that a worker is told before its first scan."""

    folder: Path
    """The cache's."""
    volumes: VolumePlan
    tokenizer: TokenizerSpec
    tokenizer_sha256: str
    encodes: bool
    """Whether the worker encodes, on the CPU; otherwise it sends what it prepared."""
    files: CacheFiles = field(default_factory=ClearFiles)
    """How it writes encodings and reads them. A key goes to it as the scans do, on its standard input."""

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        key = self.files.keys.current.hex() if isinstance(self.files, SealedFiles) else ""
        return {
            "folder": str(self.folder),
            "volumes": dataclasses.asdict(self.volumes),
            "tokenizer": dataclasses.asdict(self.tokenizer),
            "tokenizer_sha256": self.tokenizer_sha256,
            "encodes": self.encodes,
            "key": key,
        }

    @staticmethod
    def from_json(values: dict[str, Any]) -> "Job":
        """The inverse of `to_json`."""
        return Job(
            Path(values["folder"]),
            build(VolumePlan, values["volumes"], "volumes"),
            build(TokenizerSpec, values["tokenizer"], "tokenizer"),
            values["tokenizer_sha256"],
            values["encodes"],
            SealedFiles(SealingKeys(bytes.fromhex(values["key"]))) if values["key"] else ClearFiles(),
        )

    def preparation(self) -> Preparation:
        """How scans are read for it."""
        return Preparation(self.folder, self.tokenizer_sha256, self.volumes, self.files)


@dataclass(frozen=True)
class Answer:
    """What a worker says of a scan."""

    number: int
    verdict: Verdict
    written: list[Path]
    """Files that the worker wrote."""
    ready: list[Ready]
    """Views that this process is to encode."""


class Workers:
    """Processes that share the scans given to them; started by `start`, ended on leaving the context."""

    def __init__(self, job: Job, num_workers: int) -> None:
        """Raises `ValueError` for an impossible number."""
        if not 1 <= num_workers <= MOST_WORKERS:
            raise ValueError(f"Expected 1 to {MOST_WORKERS} workers; got {num_workers}.")
        self._job, self._num = job, num_workers
        self._workers: list[subprocess.Popen[bytes]] = []

    @property
    def encode(self) -> bool:
        """Whether they encode what they read."""
        return self._job.encodes

    @property
    def pids(self) -> tuple[int, ...]:
        """Of the processes that were started."""
        return tuple(worker.pid for worker in self._workers)

    def __enter__(self) -> "Workers":
        """Nothing yet: processes start when there is something to read."""
        return self

    def __exit__(self, *raised: object) -> None:
        """End them."""
        for worker in self._workers:
            worker.terminate()  # a file that is being written is removed, not left half
        for worker in self._workers:
            try:
                worker.wait(STOP_S)
            except subprocess.TimeoutExpired:
                worker.kill()
                worker.wait()
            for stream in (worker.stdin, worker.stdout):
                if stream is not None:
                    with contextlib.suppress(OSError):
                        stream.close()
        self._workers = []

    def start(self) -> None:
        """Start the processes and wait until all are ready. Raises `WorkerLost` and what a worker raises."""
        if self._workers:
            return
        paths = os.pathsep.join([str(_ROOT), *(path for path in sys.path if path)])
        environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        for _ in range(self._num):
            self._workers.append(
                subprocess.Popen(
                    [sys.executable, "-P", "-m", "client.latents.worker"],
                    stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment,
                )
            )  # fmt: skip
        for number, worker in enumerate(self._workers):
            try:
                _send(worker, self._job.to_json())
                reply = _line(worker)
            except OSError:
                reply = None
            if reply is None:
                raise self._lost(number, "was starting")
            _raise(reply)

    def read(self, sources: Sequence[Source]) -> Generator[Answer, None, None]:
        """Answers in the order in which they come. Raises `WorkerLost`, and `OSError` or `ValueError` as the
        worker did; whatever was answered by then is given first."""
        if not sources:
            return
        self.start()
        shares = self._shares(len(sources))
        lock = threading.Lock()
        answers: queue.Queue[Answer | Exception | None] = queue.Queue(maxsize=2 * self._num)
        stopped = threading.Event()

        def put(answer: Answer | Exception | None) -> None:
            while not stopped.is_set():
                with contextlib.suppress(queue.Full):
                    answers.put(answer, timeout=0.2)
                    return

        def ask(number: int) -> None:
            try:
                while not stopped.is_set():
                    with lock:
                        chunk = next(shares, None)
                    if chunk is None:
                        break
                    for answer in self._answers(number, chunk, sources):
                        put(answer)
            except (OSError, ValueError) as error:
                with lock:
                    for _ in shares:  # the others finish what they have and take no more
                        pass
                put(error)
            finally:
                put(None)

        threads = [threading.Thread(target=ask, args=(n,), daemon=True) for n in range(len(self._workers))]
        for thread in threads:
            thread.start()
        failed: Exception | None = None
        try:
            running, num_answers = len(threads), 0
            while running:
                answer = answers.get()
                if answer is None:
                    running -= 1
                elif isinstance(answer, Exception):
                    failed = failed or answer
                else:
                    num_answers += 1
                    yield answer
        finally:
            stopped.set()
        if failed is not None:
            raise failed
        assert num_answers == len(sources), "an answer that cannot be read"

    def _shares(self, count: int) -> Iterator[range]:
        """Scans that a worker is given together, within which it reads ahead; fewer towards the end, so that
        no worker is left alone with many."""
        at_once, first = self._job.preparation().at_once, 0
        while first < count:
            batches = max(1, min(MOST_BATCHES, (count - first) // (4 * self._num * at_once)))
            share = range(first, min(first + batches * at_once, count))
            yield share
            first = share.stop

    def _answers(self, number: int, chunk: range, sources: Sequence[Source]) -> Iterator[Answer]:
        worker = self._workers[number]
        doing = f"read scans {chunk[0] + 1} to {chunk[-1] + 1} of {len(sources)}"
        try:
            _send(worker, [sources[place].to_json() for place in chunk])
            for _ in chunk:
                reply = _line(worker)
                if reply is None:
                    raise self._lost(number, doing)
                _raise(reply)
                ready = [_ready(one, worker) for one in reply["ready"]]
                yield Answer(
                    chunk[reply["number"]],
                    verdict_from_json(reply["verdict"]),
                    list(map(Path, reply["written"])),
                    ready,
                )
        except (BrokenPipeError, EOFError):
            raise self._lost(number, doing) from None

    def _lost(self, number: int, doing: str) -> WorkerLost:
        try:
            status = self._workers[number].wait(STOP_S)
        except subprocess.TimeoutExpired:
            status = 0
        if status == -signal.SIGKILL:
            how, advice = "was killed", "most likely for want of memory: take fewer workers (--workers)"
        else:
            how = f"was ended by signal {-status}" if status < 0 else f"ended with status {status}"
            advice = "see what it printed above"
        return WorkerLost(
            f"Expected worker {number + 1} of {len(self._workers)} to go on; it {how} while it {doing}, "
            f"{advice}."
        )


def answer_lines(
    number: int, verdict: Verdict, written: Sequence[Path], ready: Sequence[Ready]
) -> Iterator[bytes]:
    """A worker's answer, as `Workers` reads it."""
    listed = [
        {
            "path": str(one.path),
            "scan_id": one.scan_id,
            "geometry": one.prepared.geometry.to_dict(),
            "volume": list(one.prepared.volume.shape),
            "label": None if one.prepared.label is None else list(one.prepared.label.shape),
            "foreground": list(one.prepared.foreground.shape)
            if isinstance(one.prepared, WholeVolume)
            else None,
        }
        for one in ready
    ]
    reply = {"number": number, "verdict": verdict_to_json(verdict), "written": list(map(str, written))}
    yield json.dumps({**reply, "ready": listed}).encode() + b"\n"
    for one in ready:
        yield one.prepared.volume.contiguous().numpy().tobytes()
        if one.prepared.label is not None:
            yield one.prepared.label.contiguous().numpy().tobytes()
        if isinstance(one.prepared, WholeVolume):
            yield one.prepared.foreground.contiguous().numpy().tobytes()


def error_line(error: OSError | ValueError | MemoryError) -> bytes:
    """What a worker cannot go on after, as `Workers` reads it."""
    number = error.errno if isinstance(error, OSError) else None
    number = errno.ENOMEM if isinstance(error, MemoryError) else number
    text = os.strerror(number) if number else str(error)
    return json.dumps({"error": text, "errno": number}).encode() + b"\n"


def _raise(reply: dict[str, Any]) -> None:
    if "error" in reply:
        if reply["errno"] is not None:
            raise OSError(reply["errno"], reply["error"])
        raise ValueError(reply["error"])


def _send(worker: "subprocess.Popen[bytes]", value: object) -> None:
    assert worker.stdin is not None
    worker.stdin.write(json.dumps(value).encode() + b"\n")
    worker.stdin.flush()


def _line(worker: "subprocess.Popen[bytes]") -> dict[str, Any] | None:
    assert worker.stdout is not None
    line = worker.stdout.readline()
    if not line.endswith(b"\n"):
        return None
    reply: dict[str, Any] = json.loads(line)
    return reply


def _ready(reply: dict[str, Any], worker: "subprocess.Popen[bytes]") -> Ready:
    assert worker.stdout is not None
    volume = _tensor(worker.stdout, reply["volume"], np.dtype(np.float32))
    label = None if reply["label"] is None else _tensor(worker.stdout, reply["label"], np.dtype(np.int16))
    path, geometry = Path(reply["path"]), Geometry.from_dict(reply["geometry"])
    if reply["foreground"] is None:
        return Ready(path, Prepared(volume, label, geometry), reply["scan_id"])
    foreground = _tensor(worker.stdout, reply["foreground"], np.dtype(np.bool_))
    return Ready(path, WholeVolume(volume, label, geometry, foreground), reply["scan_id"])


def _tensor(stream: IO[bytes], shape: list[int], dtype: "np.dtype[Any]") -> Tensor:
    content = bytearray(math.prod(shape) * dtype.itemsize)
    filled = 0
    while filled < len(content):
        piece = stream.read(len(content) - filled)
        if not piece:
            raise EOFError
        content[filled : filled + len(piece)] = piece
        filled += len(piece)
    return torch.from_numpy(np.frombuffer(content, dtype).reshape(shape))
