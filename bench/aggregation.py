"""Adding up replies: seconds and peak memory of our streaming sum against Flower's FedAvg.

Both take the same Flower messages (serialised arrays, as they come off the wire), from deserialisation to
the next round's ArrayRecord. Flower's FedAvg is given all replies in a list, as its grid gives them; ours are
read one by one. Each measurement is a process of its own. Making the replies is not timed.

    OMP_NUM_THREADS=1 python bench/aggregation.py                   25 million values, 2, 8 and 32 replies
    OMP_NUM_THREADS=1 python bench/aggregation.py --millions 90 --replies 2 8
"""

import argparse
import json
import math
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
from federation.messages import TrainReply
from federation.wire import array_record
from strategies.aggregation import Bounds, StreamingSum

MEGABYTE = 2**20
ROUNDS = 3  # in one process, as in a run: the first pays for fresh memory, the best is reported


def clock() -> float:
    """Seconds of computing, of all threads together: other programs on the machine do not count."""
    return time.process_time()


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


def replies(folder: Path, millions: int, num: int) -> Iterator[Message]:
    """`num` messages, each as received: arrays still serialised."""
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1
    ask = Message(RecordDict(), 2, "train.round")
    for number in range(num):
        arrays = {
            name: Array(
                "float32", shape, "numpy.ndarray", (folder / str(number % 3) / f"{name}.npy").read_bytes()
            )
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


def flower(folder: Path, millions: int, num: int) -> tuple[float, float, ArrayRecord]:
    """Seconds, MB and result of Flower's FedAvg."""
    strategy, best = FedAvg(), math.inf
    with watched() as peak:
        for server_round in range(ROUNDS):
            result = None
            received = list(replies(folder, millions, num))
            start = clock()
            result, _ = strategy.aggregate_train(server_round, received)
            best = min(best, clock() - start)
            del received
    assert result is not None
    return best, peak.above, result


def ours(folder: Path, millions: int, num: int, threads: int) -> tuple[float, float, ArrayRecord]:
    """Seconds, MB and result of the streaming sum."""
    reference = {name: torch.empty(shape, device="meta") for name, shape in shapes(millions).items()}
    total, best = StreamingSum(reference, Bounds(num_replies=num, max_norm=100.0), threads), math.inf
    with watched() as peak:
        for _ in range(ROUNDS):
            seconds, result = 0.0, None
            total.reset()
            for message in replies(folder, millions, num):
                message.content["metrics"] = MetricRecord({})
                start = clock()
                reply = TrainReply.from_record(message.content, copy=False)
                total.fold(reply.site, reply.update, reply.examples)
                seconds += clock() - start
                del message, reply
            start = clock()
            result = array_record(total.mean())
            best = min(best, seconds + clock() - start)
    return best, peak.above, result


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
        if given.one == "flower":
            seconds, megabytes, result = flower(given.folder, given.millions, num)
        else:
            seconds, megabytes, result = ours(given.folder, given.millions, num, given.threads)
        first = float(np.abs(next(iter(result.values())).numpy()).mean())
        print(json.dumps({"seconds": seconds, "megabytes": megabytes, "mean": first}))
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_replies(folder, given.millions)
        model = sum(int(np.prod(s)) for s in shapes(given.millions).values())
        print(f"{model / 1e6:.1f} million values ({4 * model / MEGABYTE:.0f} MB), best of {given.repeats}")
        print("replies   FedAvg s    MB    ours s    MB    seconds ratio   memory ratio")
        for num in given.replies:
            runs = {"flower": [], "ours": []}
            for _ in range(given.repeats):
                for who in runs:
                    runs[who].append(measure(who, folder, given.millions, num, given.threads))
            best = {who: min(r["seconds"] for r in many) for who, many in runs.items()}
            memory = {who: min(r["megabytes"] for r in many) for who, many in runs.items()}
            print(
                f"{num:7d} {best['flower']:10.2f} {memory['flower']:5.0f} {best['ours']:9.2f} "
                f"{memory['ours']:5.0f} {best['ours'] / best['flower']:13.2f} "
                f"{memory['ours'] / memory['flower']:14.2f}"
            )


if __name__ == "__main__":
    main()
