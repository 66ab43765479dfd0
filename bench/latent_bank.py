"""The latent bank: writing and reading against the same bytes plainly on the same disk in the same run.

Records of the small preset's latents (4 x 8 x 12 x 8) and of the paper's (4 x 24 x 24 x 24). Reading is a
random batch at a time, as training reads; plainly means `os.pread` of as many bytes at random places of an
ordinary file, and a memory-mapped numpy array of the same rows. Everything was just written, so both come
from memory where it suffices (`--cold` asks the kernel to drop what it can). Then items without records:
their size, and the seconds to open a source and to find a batch.

    OMP_NUM_THREADS=1 python bench/latent_bank.py                      512 MB of records, an index of 1e6 rows
    OMP_NUM_THREADS=1 python bench/latent_bank.py --megabytes 64 --rows 100000
"""

import argparse
import hashlib
import os
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from federation.exchanges.latents import ToldLatents, items_per_chunk
from federation.plan.diffusion_plan import DiffusionPlan
from federation.plan.plan import AggregationPlan, ReleasePlan, RunPlan, StylePlan, TrainingPlan
from meduet_models.diffusion.conditions import Examples
from meduet_models.diffusion.settings import DiffusionTraining, TransformerShape
from meduet_models.meduet import NetworkConfig
from meduet_models.objective.settings import ObjectiveConfig
from scans.volume_plan import VolumePlan
from server.latent_bank.bank import BANK, LatentBank
from server.latent_bank.tables import Item

MEGABYTE = 2**20
BATCH = 16
GRIDS = {"small": (8, 12, 8), "paper": (24, 24, 24)}


def a_plan(grid: tuple[int, int, int]) -> RunPlan:
    """A plan of one site with latents of this grid."""
    return RunPlan(
        name="bench", seed=0, sites=("site",), tokenizer_sha256="0" * 64,
        volumes=VolumePlan(modality="mr", shape=(4 * grid[0], 4 * grid[1], 4 * grid[2])),
        network=NetworkConfig(
            latent_channels=4, latent_grid=grid, patch_size=2, width=24, depth=1, heads=2,
            decoder_width=12, decoder_depth=1, decoder_heads=2,
        ),
        objective=ObjectiveConfig(), training=TrainingPlan(rounds=1, steps_per_round=1),
        style=StylePlan(), aggregation=AggregationPlan(), release=ReleasePlan(),
        diffusion=DiffusionPlan(
            policy="raw", training=DiffusionTraining(),
            transformer=TransformerShape(patch_size=2, width=24, depth=1, heads=2),
        ),
    )  # fmt: skip


def replies(plan: RunPlan, count: int) -> list[ToldLatents]:
    """Answers of a site, as many items each as a message takes."""
    draws = torch.Generator().manual_seed(0)
    shape = (plan.network.latent_channels, *plan.network.latent_grid)
    collected = []
    for first in range(0, count, items_per_chunk(plan)):
        size = min(items_per_chunk(plan), count - first)
        names = tuple(hashlib.sha256(str(first + n).encode()).hexdigest()[:32] for n in range(size))
        unknown = torch.full((size,), -1)
        examples = Examples(
            latents=torch.randn(size, *shape, generator=draws), site=torch.zeros(size, dtype=torch.long),
            body_part=unknown, spacing=torch.ones(size, 3), category=unknown,
        )  # fmt: skip
        collected.append(
            ToldLatents(
                plan_sha256=plan.sha256, site="site", round=1, first=first, total=count, items=names,
                examples=examples,
            )
        )  # fmt: skip
    return collected


def drop(folder: Path) -> None:
    """Ask the kernel to forget what it holds of these files."""
    for path in folder.rglob("*"):
        if path.is_file():
            handle = os.open(path, os.O_RDONLY)
            os.fsync(handle)
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(handle)


def records(folder: Path, which: str, megabytes: int, cold: bool) -> None:
    """Write and read records of one size."""
    plan = a_plan(GRIDS[which])
    size = 4 * 4 * int(np.prod(GRIDS[which]))
    count = max(BATCH, megabytes * MEGABYTE // size)
    collected = replies(plan, count)
    latent_bank = LatentBank(folder / which)
    begin = time.perf_counter()
    for reply in collected:
        latent_bank.add(reply, plan)
    written = time.perf_counter() - begin
    plain = folder / f"{which}.bin"
    begin = time.perf_counter()
    with plain.open("wb") as file:
        for reply in collected:
            file.write(reply.examples.latents.numpy().tobytes())
            file.flush()
            os.fsync(file.fileno())
    plainly = time.perf_counter() - begin
    megabyte = count * size / MEGABYTE
    print(f"\n{which}: {count} items of {size / 1024:.0f} KiB, {megabyte:.0f} MiB")
    print(f"  write, bank    {count / written:9.0f} items/s {megabyte / written:8.0f} MiB/s")
    print(f"  write, plainly {count / plainly:9.0f} items/s {megabyte / plainly:8.0f} MiB/s"
          f"   bank / plain seconds {written / plainly:.2f}")  # fmt: skip

    batches = torch.randint(count, (max(8, min(count, 4096) // BATCH), BATCH),
                            generator=torch.Generator().manual_seed(1))  # fmt: skip
    read = batches.numel()
    source = latent_bank.source(plan, 1)
    bytes_of = os.open(plain, os.O_RDONLY)
    rows = np.memmap(plain, np.float32, "r").reshape(count, -1)

    def of_bank(chosen: torch.Tensor) -> torch.Tensor:
        return source.read(chosen).latents

    def of_file(chosen: torch.Tensor) -> torch.Tensor:
        parts = [os.pread(bytes_of, size, row * size) for row in chosen.tolist()]
        return torch.frombuffer(bytearray(b"".join(parts)), dtype=torch.float32).reshape(BATCH, -1)

    def of_map(chosen: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(rows[chosen.numpy()])

    seconds: dict[str, float] = {}
    for _ in range(3):
        for name, reader in (("bank", of_bank), ("pread", of_file), ("memmap", of_map)):
            if cold:
                drop(folder)
            begin = time.perf_counter()
            for chosen in batches:
                reader(chosen)
            seconds[name] = min(time.perf_counter() - begin, seconds.get(name, 1e9))
    for name, taken in seconds.items():
        ratio = "" if name == "bank" else f"   bank / {name} seconds {seconds['bank'] / taken:.2f}"
        rate, speed = read / taken, read * size / MEGABYTE / taken
        print(f"  read, {name:8s} {rate:9.0f} items/s {speed:8.0f} MiB/s{ratio}")
    assert torch.equal(of_bank(batches[0]).flatten(1), of_file(batches[0]))
    os.close(bytes_of)
    latent_bank.close()


def index(folder: Path, rows: int) -> None:
    """An index of many rows: what opening a source and finding a batch costs, without any record."""
    plan = a_plan(GRIDS["small"])
    latent_bank = LatentBank(folder / "index")
    latent_bank.add(replies(plan, BATCH)[0], plan)
    origin = next(iter(latent_bank.tables.origins()))
    begin = time.perf_counter()
    with latent_bank.tables.writing():
        for number in range(BATCH, rows):
            digest = hashlib.sha256(str(number).encode()).hexdigest()
            item = Item(
                number=0, origin=origin, name=digest[:32], position=number, sha256=digest, state="kept"
            )
            latent_bank.tables.insert(item)
    filled = time.perf_counter() - begin
    begin = time.perf_counter()
    source = latent_bank.source(plan, 1)
    opened = time.perf_counter() - begin
    draws = np.random.default_rng(0)
    begin, batches = time.perf_counter(), 200
    for _ in range(batches):
        latent_bank.tables.numbered((1 + draws.integers(rows, size=BATCH)).tolist())
    found = (time.perf_counter() - begin) / batches
    begin = time.perf_counter()
    length = len(latent_bank)
    counted = time.perf_counter() - begin
    size = (folder / "index" / BANK).stat().st_size
    print(f"\nindex of {length} rows: {size / MEGABYTE:.0f} MiB, {size / length:.0f} bytes a row")
    print(f"  fill {filled:.1f} s; open a source {opened:.2f} s; count {counted:.2f} s")
    print(f"  find a batch of {BATCH} {1000 * found:.2f} ms")
    assert len(source) == rows
    latent_bank.close()


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--megabytes", type=int, default=512, help="of records of each size")
    parser.add_argument("--rows", type=int, default=1_000_000, help="of the index")
    parser.add_argument("--cold", action="store_true", help="drop the files from memory before each reading")
    given = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        for which in GRIDS:
            records(Path(name), which, given.megabytes, given.cold)
        if given.rows > BATCH:
            index(Path(name), given.rows)


if __name__ == "__main__":
    main()
