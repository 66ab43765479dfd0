"""What a federated round costs over TLS: FedMeDUET against Flower's own FedAvg, real processes on loopback.

    python bench/round_overhead.py cell --megabytes 1 --sites 3              FedMeDUET, state in sqlite
    python bench/round_overhead.py cell --megabytes 1 --wire-dtype bfloat16  two bytes per value
    python bench/round_overhead.py cell --megabytes 1 --sites 3 --baseline   FedAvg, all else the same
    python bench/round_overhead.py cell --megabytes 20 --sites 3 --memory    Flower's state in memory
    python bench/round_overhead.py cell --megabytes 1 --sites 3 --secure-sum  a round as a secure sum
    python bench/round_overhead.py sums [--megabytes 1 20] [--sites 3 8]     each beside plain rounds
    python bench/round_overhead.py all [--megabytes 1 20] [--sites 3]        every cell that is not there yet
    python bench/round_overhead.py table                                     the results so far, with ratios

Overhead: from the end of a round to the end of the next, minus the slowest site's training (FedMeDUET:
forward, backward, AdamW, as the sites report it; FedAvg: the little noise that stands for training). So all
else counts: starting a process for the question, loading libraries, reading and writing what the site keeps,
bounding, journal, TLS, waiting, averaging, the checkpoint. Rounds from the second on; median and range.

Same for both: machine, processes, TLS, proxy, SuperLink's settings, one thread for each process, the network.
What differs: FedMeDUET sends the content branch as MXINT8 (or bfloat16) both ways, keeps teacher and
optimiser at the site's disk, a journal, a ledger and a checkpoint, and validates; FedAvg
(fraction_evaluate=0, as it comes from Flower 1.41) sends the whole network as float32 both ways and does none
of that. How the server application waits for replies is part of the difference: FedAvg looks every 3 s, ours
every .01 to .5 s.

Secure sums are compared with FedMeDUET's plain rounds in the same type (float32, as masks do not compress),
one after the other: whole rounds, training included, since nobody tells its seconds in a masked round; the
bytes of arrays in a round; of the run, survey and erasure included, all bytes that Flower counted, and CPU
seconds (on a busy machine the better measure; both runs must be of as many rounds).

Memory: VmHWM of each process. Not importable; not shipped. Keys and logs are in --work, outside of git.
"""

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")  # read when Flower is imported
os.environ.setdefault("FLWR_DISABLE_UPDATE_CHECK", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

from round_overhead_cell import NETWORKS, Cell, measure
from round_overhead_processes import CENTRE

from storage.files import write_whole

ROUNDS = {1: 5, 20: 4, 180: 3}
LIMIT_S = {1: 240.0, 20: 300.0, 180: 600.0}
"""Rounds of a cell, and seconds after which it is stopped, by megabytes; eight sites get twice the time."""
WORK = Path(tempfile.gettempdir()) / "meduet-round-overhead"


def cells() -> list[Cell]:
    """The whole table, the quick ones first."""
    asked = [(size, 3, "sqlite") for size in NETWORKS]
    asked += [(1, sites, "sqlite") for sites in (2, 4, 8)]
    asked += [(20, 3, "memory"), (180, 3, "memory")]
    asked += [(20, sites, "sqlite") for sites in (2, 4, 8)]
    whose = (("ours", "mxint8"), ("fedavg", "float32"))
    both = [Cell(who, size, n, state, dtype) for size, n, state in asked for who, dtype in whose]  # type: ignore[arg-type]
    return sorted(both, key=lambda cell: (cell.megabytes, cell.sites))


def run_cell(cell: Cell, rounds: int | None, limit_s: float | None, work: Path, results: Path) -> None:
    """Measure a cell in this process, and append it to the results."""
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(143))  # as an exception: all is stopped
    slower = 2 if cell.sites > 4 else 1
    limit_s = limit_s or slower * LIMIT_S[cell.megabytes]
    print(f"{cell}: at most {limit_s:.0f} s", flush=True)
    result = measure(cell, rounds or ROUNDS[cell.megabytes], limit_s, work)
    write_whole(results, json.dumps([*read(results), result], indent=1) + "\n")
    if result["left_over"]:
        print(f"  left over, killed: {result['left_over']}")
    print(f"  {result.get('failed') or summary(result)}; {result['seconds']:.0f} s", flush=True)


def sum_cells() -> list[Cell]:
    """Secure sums and plain rounds of the same type, one after the other."""
    return [
        Cell(program, size, sites, "sqlite", "float32")
        for sites, size in ((3, 1), (3, 20), (8, 1), (8, 20))
        for program in ("ours", "summed")
    ]


def run_all(wanted: Sequence[Cell], asked: argparse.Namespace) -> None:
    """Every cell that is not there yet, each in a process of its own with a hard limit."""
    there = {_cell(result) for result in read(asked.results) if "failed" not in result}
    for cell in wanted:
        if cell in there or cell.megabytes not in asked.megabytes or cell.sites not in asked.sites:
            continue
        command = [sys.executable, __file__, "cell", "--megabytes", str(cell.megabytes)]
        command += ["--sites", str(cell.sites), "--work", str(asked.work), "--results", str(asked.results)]
        command += ["--baseline"] * (cell.program == "fedavg") + ["--memory"] * (cell.state == "memory")
        command += ["--secure-sum"] * (cell.program == "summed") + ["--wire-dtype", cell.wire_dtype]
        command += ["--rounds", str(asked.rounds)] * (asked.rounds is not None)
        command += ["--limit-s", str(asked.limit_s)] * (asked.limit_s is not None)
        process = subprocess.Popen(command, start_new_session=True)
        try:
            process.wait(3 * (asked.limit_s or LIMIT_S[cell.megabytes]) + 120)
        except subprocess.TimeoutExpired:
            print(f"{cell}: hangs, and is stopped", flush=True)
        finally:
            _stop(process)
    table(asked.results)


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End a cell that still runs: it stops what it started; what outlives it is ended by the kernel."""
    if process.poll() is not None:
        return
    process.terminate()
    try:
        process.wait(90)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def read(results: Path) -> list[dict[str, Any]]:
    """Results so far."""
    found: list[dict[str, Any]] = json.loads(results.read_text("utf-8")) if results.is_file() else []
    return found


def overheads(result: dict[str, Any]) -> list[float]:
    """Seconds of each round from the second on, without the slowest site's training."""
    pairs = zip(result["rounds"], result["rounds"][1:], strict=False)
    return [after["end"] - before["end"] - after["training_s"] for before, after in pairs]


def bytes_a_round(result: dict[str, Any]) -> tuple[float, float]:
    """Megabytes down and up in a round after the first, over all sites."""
    last = result["rounds"][-1]
    return last["down"] / 1e6, last["up"] / 1e6


def summary(result: dict[str, Any]) -> str:
    """A cell in a line."""
    over, (down, up) = overheads(result), bytes_a_round(result)
    training = statistics.median(one["training_s"] for one in result["rounds"][1:])
    inside = [one["round_s"] - one["training_s"] for one in result["rounds"][1:]]
    return (
        f"overhead {statistics.median(over):.1f} s ({min(over):.1f} to {max(over):.1f}; without checkpoint "
        f"{statistics.median(inside):.1f}), training {training:.1f} s, {down:.1f} MB down, {up:.1f} MB up, "
        f"centre's memory {centre_mb(result):.0f} MB, everybody's {result['together_mb'] / 1e3:.1f} GB"
    )


def centre_mb(result: dict[str, Any]) -> float:
    """Sum of the largest peaks at the centre."""
    return float(sum(result["processes"].get(role, {"peak_mb": 0.0})["peak_mb"] for role in CENTRE))


def table(results: Path) -> None:
    """Print what was measured, FedMeDUET beside FedAvg, with ratios; the latest of each cell."""
    done = [result for result in read(results) if "failed" not in result]
    latest = {
        _cell(result): result for result in sorted(done, key=lambda one: (one["megabytes"], one["sites"]))
    }
    failed = {_cell(result): result["failed"] for result in read(results) if _cell(result) not in latest}
    print("| in bfloat16 | sites | state | overhead, s | FedAvg's | ratio | MB down+up | FedAvg's | ratio |")
    print("|---|---|---|---|---|---|---|---|---|")
    for cell, ours in latest.items():
        theirs = latest.get(Cell("fedavg", cell.megabytes, cell.sites, cell.state, "float32"))
        if cell.program != "ours" or theirs is None:
            continue
        words = (
            f"| {_megabytes(ours)} MB, {cell.wire_dtype} | {cell.sites} | {cell.state} | {_spread(ours)} "
            f"| {_spread(theirs)} "
        )
        ratio = statistics.median(overheads(ours)) / statistics.median(overheads(theirs))
        mine, yours = bytes_a_round(ours), bytes_a_round(theirs)
        words += f"| {ratio:.2f} | {mine[0]:.1f}+{mine[1]:.1f} | {yours[0]:.1f}+{yours[1]:.1f} "
        print(words + f"| {sum(mine) / sum(yours):.2f} |")
    _table_of_sums(latest)
    print("\nPeak memory, MB (largest process of its kind); CPU seconds of all of its kind over the run\n")
    roles = sorted({role for result in latest.values() for role in result["processes"]} - {"other"})
    print("| cell | " + " | ".join(roles) + " | centre | everybody at once | load before | locks |")
    print("|---" * (len(roles) + 5) + "|")
    for cell, result in latest.items():
        found = [result["processes"].get(role, {"peak_mb": 0.0, "cpu_s": 0.0}) for role in roles]
        words = " | ".join(f"{one['peak_mb']:.0f}; {one['cpu_s']:.0f} s" for one in found)
        words += f" | {centre_mb(result):.0f} | {result['together_mb']:.0f} | {result['load_before']:.1f} "
        words += f"| {result['locked']} |"
        print(f"| {cell} | {words}")
    for failure, why in failed.items():
        print(f"\nfailed: {failure}: {why}")


def _table_of_sums(latest: dict[Cell, dict[str, Any]]) -> None:
    """Secure sums beside plain rounds of the same type."""
    print("\n(secure sum, plain, ratio)")
    print("| float32 | sites | a round, s | its arrays, MB | the run, MB | the run, CPU s of all processes |")
    print("|---|---|---|---|---|---|")
    for cell, summed in latest.items():
        plain = latest.get(replace(cell, program="ours"))
        if cell.program != "summed" or plain is None:
            continue
        measures: list[Callable[[dict[str, Any]], float]] = [
            _round_s,
            lambda result: sum(bytes_a_round(result)),
            lambda result: result["traffic"]["total-bytes"] / 1e6,
            lambda result: sum(role["cpu_s"] for role in result["processes"].values()),
        ]
        words = [f"{of(summed):.1f}, {of(plain):.1f}, **{of(summed) / of(plain):.2f}**" for of in measures]
        size = f"{4 * summed['values_shared'] / 1e6:.3g} MB"
        print(f"| {size} | {cell.sites} | {' | '.join(words)} |")


def _round_s(result: dict[str, Any]) -> float:
    """Seconds of a round from the second on, training included; the median."""
    ends = [one["end"] for one in result["rounds"]]
    return statistics.median(after - before for before, after in pairwise(ends))


def _spread(result: dict[str, Any]) -> str:
    over = overheads(result)
    return f"{statistics.median(over):.1f} ({min(over):.1f} to {max(over):.1f})"


def _megabytes(result: dict[str, Any]) -> str:
    return f"{2 * result['values_shared'] / 1e6:.3g}"


def _cell(result: dict[str, Any]) -> Cell:
    return Cell(
        result["program"], result["megabytes"], result["sites"], result["state"], result["wire_dtype"]
    )


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    cell = commands.add_parser("cell", help="measure one cell")
    cell.add_argument("--megabytes", type=int, choices=sorted(NETWORKS), default=1)
    cell.add_argument("--sites", type=int, default=3)
    program = cell.add_mutually_exclusive_group()
    program.add_argument("--baseline", action="store_true", help="Flower's FedAvg in place of FedMeDUET")
    program.add_argument("--secure-sum", action="store_true", help="rounds as secure sums")
    cell.add_argument("--wire-dtype", choices=("float32", "bfloat16", "mxint8"), default="mxint8")
    cell.add_argument("--memory", action="store_true", help="Flower's state in memory in place of sqlite")
    every = commands.add_parser("all", help="measure every cell that is not there yet")
    sums = commands.add_parser("sums", help="the same of secure sums and plain rounds")
    for one, sites in ((every, [2, 3, 4, 8]), (sums, [3, 8])):
        one.add_argument("--megabytes", type=int, nargs="+", default=sorted(NETWORKS))
        one.add_argument("--sites", type=int, nargs="+", default=sites)
    table_command = commands.add_parser("table", help="print the results")
    for one in (cell, every, sums):
        one.add_argument("--work", type=Path, default=WORK, help="where keys, hospitals and logs go")
        one.add_argument("--rounds", type=int, help="at least 2; the first is not counted")
        one.add_argument("--limit-s", type=float, help="seconds after which it is stopped")
    for one in (cell, every, sums, table_command):
        one.add_argument("--results", type=Path, default=Path("runs/round_overhead.json"))
    asked = parser.parse_args()
    match asked.command:
        case "cell":
            program = "fedavg" if asked.baseline else "summed" if asked.secure_sum else "ours"
            state = "memory" if asked.memory else "sqlite"
            wire_dtype = "float32" if asked.baseline else asked.wire_dtype
            chosen = Cell(program, asked.megabytes, asked.sites, state, wire_dtype)  # type: ignore[arg-type]
            run_cell(chosen, asked.rounds, asked.limit_s, asked.work.resolve(), asked.results)
        case "all":
            run_all(cells(), asked)
        case "sums":
            run_all(sum_cells(), asked)
        case "table":
            table(asked.results)


if __name__ == "__main__":
    main()
