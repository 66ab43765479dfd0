"""Adding up replies: seconds and peak memory of our streaming sum against Flower's FedAvg.

Both take the same Flower messages (serialised arrays, as they come off the wire), from deserialisation to
the next round's ArrayRecord. Flower's FedAvg is given all replies in a list, as its grid gives them; ours are
read one by one. Each measurement is a process of its own. Making the replies is not timed.

    OMP_NUM_THREADS=1 python bench/aggregation.py                   25 million values, 2, 8 and 32 replies
    OMP_NUM_THREADS=1 python bench/aggregation.py --millions 90 --replies 2 8
"""

import argparse
import gc
import json
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAvg
from flwr.supercore.task_identity import TaskIdentity

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from federation.exchanges.pretraining import TrainReply
from federation.wire.wire import array_record
from strategies.aggregation import Bounds, StreamingSum

MEGABYTE = 2**20
BOUNDS = Bounds(num_replies=32, max_norm=100.0)
ROUNDS = 3  # in one process, as in a run: the first pays for fresh memory, the best is reported


class Stopwatch:
    """Seconds on the wall and of computing (all threads together), while it runs."""

    def __init__(self) -> None:
        self.wall = self.cpu = 0.0

    @contextmanager
    def running(self) -> Iterator[None]:
        """Count until the block ends."""
        wall, cpu = time.perf_counter(), time.process_time()
        yield
        self.wall += time.perf_counter() - wall
        self.cpu += time.process_time() - cpu


def shapes(millions: int) -> dict[str, tuple[int, ...]]:
    """Tensors of a vision transformer of about that many million values."""
    width = 768 if millions > 40 else 512
    blocks = round(millions * 1e6 / (12 * width**2))
    named: dict[str, tuple[int, ...]] = {}
    for block in range(blocks):
        named |= {
            f"blocks.{block}.qkv.weight": (3 * width, width),
            f"blocks.{block}.out.weight": (width, width),
            f"blocks.{block}.up.weight": (4 * width, width),
            f"blocks.{block}.down.weight": (width, 4 * width),
            f"blocks.{block}.norm.weight": (width,),
        }
    return named


def write_replies(folder: Path, millions: int) -> None:
    """Three different updates as numpy files; replies take them in turn."""
    generator = np.random.default_rng(0)
    for reply in range(3):
        (folder / str(reply)).mkdir()
        for name, shape in shapes(millions).items():
            values = generator.standard_normal(shape, dtype=np.float32) * np.float32(1e-3)
            np.save(folder / str(reply) / f"{name}.npy", values)


def replies(folder: Path, millions: int, num: int, packed: bool) -> Iterator[Message]:
    """`num` messages, each as received: arrays still serialised; one per tensor, or `packed` as ours."""
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1
    ask = Message(RecordDict(), 2, "train.round")
    for number in range(num):
        files = {name: folder / str(number % 3) / f"{name}.npy" for name in shapes(millions)}
        if packed:
            arrays = dict(array_record({name: torch.from_numpy(np.load(f)) for name, f in files.items()}))
        else:
            arrays = {
                name: Array("float32", shape, "numpy.ndarray", files[name].read_bytes())
                for name, shape in shapes(millions).items()
            }
        record = TrainReply(
            plan_sha256="", site=str(number), round=1, examples=number + 1, update={}
        ).to_record()
        record["update"] = ArrayRecord(arrays)
        record["metrics"] = MetricRecord({"num-examples": float(number + 1)})
        message = Message(record, reply_to=ask)
        del arrays, record
        yield message
        del message


def resident() -> float:
    """Memory of this process now, in MB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / MEGABYTE


@dataclass
class Peak:
    """Highest memory of this process, above what it was at the start, in MB."""

    above: float = 0.0


@contextmanager
def watched() -> Iterator[Peak]:
    """Watch this process's memory, every two milliseconds."""
    peak, before, done = Peak(), resident(), threading.Event()

    def watch() -> None:
        while not done.wait(0.002):
            peak.above = max(peak.above, resident() - before)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield peak
    finally:
        done.set()
        thread.join()


def flower(folder: Path, millions: int, num: int) -> tuple[list[Stopwatch], float]:
    """Time of each round, and MB, of Flower's FedAvg."""
    strategy, times, result = FedAvg(), list[Stopwatch](), None
    with watched() as peak:
        for server_round in range(ROUNDS):
            times.append(Stopwatch())
            result = None
            received = list(replies(folder, millions, num, packed=False))
            with times[-1].running():
                result, _ = strategy.aggregate_train(server_round, received)
            assert result is not None
            del received
            gc.collect()
    return times, peak.above


def ours(folder: Path, millions: int, num: int, threads: int) -> tuple[list[Stopwatch], float]:
    """Time of each round, and MB, of the streaming sum."""
    reference = {name: torch.empty(shape, device="meta") for name, shape in shapes(millions).items()}
    total, times, result = StreamingSum(reference, BOUNDS, threads), list[Stopwatch](), None
    with watched() as peak:
        for _ in range(ROUNDS):
            times.append(Stopwatch())
            result = None
            for message in replies(folder, millions, num, packed=True):
                message.content["metrics"] = MetricRecord({})
                with times[-1].running():
                    reply = TrainReply.from_record(message.content, copy=False)
                    total.fold(reply.site, reply.update, reply.examples)
                del message, reply
            with times[-1].running():
                result = array_record(total.mean())
            assert len(result) == 2  # an index and a row
            gc.collect()
    return times, peak.above


def measure(who: str, folder: Path, millions: int, num: int, threads: int) -> dict[str, float]:
    """One measurement in a process of its own."""
    command = [sys.executable, __file__, "--one", who, "--folder", str(folder), "--millions", str(millions)]
    command += ["--replies", str(num), "--threads", str(threads)]
    answer: dict[str, float] = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
    return answer


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--millions", type=int, default=25)
    parser.add_argument("--replies", type=int, nargs="+", default=[2, 8, 32])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--one", choices=["flower", "ours"])
    parser.add_argument("--folder", type=Path)
    given = parser.parse_args()
    if given.one:
        num = given.replies[0]
        gc.disable()  # else chance decides during whose seconds the garbage of making replies is collected
        if given.one == "flower":
            times, megabytes = flower(given.folder, given.millions, num)
        else:
            times, megabytes = ours(given.folder, given.millions, num, given.threads)
        best = {"wall": min(t.wall for t in times), "cpu": min(t.cpu for t in times)}
        print(json.dumps({**best, "megabytes": megabytes}))
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_replies(folder, given.millions)
        values = sum(int(np.prod(s)) for s in shapes(given.millions).values())
        print(f"{values / 1e6:.1f} million values ({4 * values / MEGABYTE:.0f} MB), {given.threads} threads")
        print("          FedAvg                    ours                     ours / FedAvg")
        print("replies   wall s   cpu s     MB     wall s   cpu s     MB    wall    cpu     MB")
        for num in given.replies:
            best: dict[str, dict[str, float]] = {}
            for _ in range(given.repeats):
                for who in ("flower", "ours"):
                    now = measure(who, folder, given.millions, num, given.threads)
                    best[who] = {what: min(value, best.get(who, now)[what]) for what, value in now.items()}
            theirs, our = best["flower"], best["ours"]
            ratios = [our[what] / theirs[what] for what in ("wall", "cpu", "megabytes")]
            print(f"{num:7d}", *(_columns(b) for b in (theirs, our)), *(f"{r:7.2f}" for r in ratios))


def _columns(best: dict[str, float]) -> str:
    return f"{best['wall']:8.2f} {best['cpu']:7.2f} {best['megabytes']:6.0f}   "


if __name__ == "__main__":
    main()
