"""What a federated round costs over TLS: FedMeDUET against Flower's own FedAvg, real processes on loopback.

    python bench/round_overhead.py cell --megabytes 1 --sites 3              FedMeDUET, state in sqlite
    python bench/round_overhead.py cell --megabytes 1 --wire-dtype bfloat16  two bytes per value
    python bench/round_overhead.py cell --megabytes 1 --sites 3 --baseline   FedAvg, all else the same
    python bench/round_overhead.py cell --megabytes 20 --sites 3 --memory    Flower's state in memory
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


def run_all(asked: argparse.Namespace) -> None:
    """Every cell that is not there yet, each in a process of its own with a hard limit."""
    there = {_cell(result) for result in read(asked.results) if "failed" not in result}
    for cell in cells():
        if cell in there or cell.megabytes not in asked.megabytes or cell.sites not in asked.sites:
            continue
        command = [sys.executable, __file__, "cell", "--megabytes", str(cell.megabytes)]
        command += ["--sites", str(cell.sites), "--work", str(asked.work), "--results", str(asked.results)]
        command += ["--baseline"] * (cell.program == "fedavg") + ["--memory"] * (cell.state == "memory")
        process = subprocess.Popen(command, start_new_session=True)
        try:
            process.wait(3 * LIMIT_S[cell.megabytes] + 120)
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
        if cell.program == "fedavg" or theirs is None:
            continue
        words = (
            f"| {_megabytes(ours)} MB, {cell.wire_dtype} | {cell.sites} | {cell.state} | {_spread(ours)} "
            f"| {_spread(theirs)} "
        )
        ratio = statistics.median(overheads(ours)) / statistics.median(overheads(theirs))
        mine, yours = bytes_a_round(ours), bytes_a_round(theirs)
        words += f"| {ratio:.2f} | {mine[0]:.1f}+{mine[1]:.1f} | {yours[0]:.1f}+{yours[1]:.1f} "
        print(words + f"| {sum(mine) / sum(yours):.2f} |")
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
    cell.add_argument("--baseline", action="store_true", help="Flower's FedAvg in place of FedMeDUET")
    cell.add_argument("--wire-dtype", choices=("float32", "bfloat16", "mxint8"), default="mxint8")
    cell.add_argument("--memory", action="store_true", help="Flower's state in memory in place of sqlite")
    cell.add_argument("--rounds", type=int, help="at least 2; the first is not counted")
    cell.add_argument("--limit-s", type=float, help="seconds after which it is stopped")
    every = commands.add_parser("all", help="measure every cell that is not there yet")
    every.add_argument("--megabytes", type=int, nargs="+", default=sorted(NETWORKS))
    every.add_argument("--sites", type=int, nargs="+", default=[2, 3, 4, 8])
    table_command = commands.add_parser("table", help="print the results")
    for one in (cell, every):
        one.add_argument("--work", type=Path, default=WORK, help="where keys, hospitals and logs go")
    for one in (cell, every, table_command):
        one.add_argument("--results", type=Path, default=Path("runs/round_overhead.json"))
    asked = parser.parse_args()
    match asked.command:
        case "cell":
            program, state = "fedavg" if asked.baseline else "ours", "memory" if asked.memory else "sqlite"
            wire_dtype = "float32" if asked.baseline else asked.wire_dtype
            chosen = Cell(program, asked.megabytes, asked.sites, state, wire_dtype)  # type: ignore[arg-type]
            run_cell(chosen, asked.rounds, asked.limit_s, asked.work.resolve(), asked.results)
        case "all":
            run_all(asked)
        case "table":
            table(asked.results)


if __name__ == "__main__":
    main()
