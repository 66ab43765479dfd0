"""Scans per second from files to cached latents, ours against a plain MONAI loop, in the same run.

    OMP_NUM_THREADS=1 python bench/ingest.py --data FOLDER                        hippocampus crops, say
    OMP_NUM_THREADS=1 python bench/ingest.py --scans 8 --size 160 180 160 --shape 96 96 96
    OMP_NUM_THREADS=1 python bench/ingest.py --scans 8 --size 160 180 160 --shape 96 96 96 --spacing-mm 1.5
    OMP_NUM_THREADS=1 python bench/ingest.py --scans 64 --size 160 180 160 --shape 96 96 96 --workers 2

`FOLDER` holds NIfTI files (msd_hippocampus/images, say); without it, files are made. Both sides use the same
tokenizer on the CPU. The plain loop is what one would write: Compose(LoadImaged … ResizeWithPadOrCropd),
encode one by one, np.save. Ours does more: every file is judged and hashed, in the same reading in which it
is prepared and encoded, and written with fsync and its geometry. Files are in the page cache for both.

The floor is what nobody gets around: decompress each file once, find the percentiles once, encode once.
Each line has seconds on the clock (ours prepares while it encodes) and seconds of computing (of all threads
and workers; other programs on the machine do not count); ratios are given for both. With `--workers`, ours is
also run with so many processes; that they take seconds to start is told apart, since it is once.
"""

import argparse
import gzip
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import nibabel as nib
import numpy as np
import torch
from monai.transforms import (
    Compose,
    EnsureChannelFirstd,
    LoadImaged,
    Orientationd,
    ResizeWithPadOrCropd,
    ScaleIntensityRangePercentilesd,
    Spacingd,
)
from scipy.ndimage import gaussian_filter

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from client.latents.cache import LatentCache
from client.latents.cache_files import ClearFiles
from client.latents.encoding import Preparation
from client.latents.workers import Job, Workers
from client.scans.cohort import Cohort, open_cohort
from client.scans.cohort_memo import remembered
from client.scans.fingerprints import SETTLED_S
from client.scans.judgement_memo import JudgementMemo
from meduet_models.tokenizer.tokenizer import Tokenizer, TokenizerSpec, load_tokenizer
from scans.volume_plan import VolumePlan

STARTED = "workers, until they are ready"


class Seconds(NamedTuple):
    """What a measurement took."""

    clock: float
    computing: float


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, help="folder of NIfTI files; made when left out")
    parser.add_argument("--scans", type=int, default=64, help="how many")
    parser.add_argument("--size", type=int, nargs=3, default=(40, 56, 40), help="voxels of a made scan")
    parser.add_argument(
        "--shape", type=int, nargs=3, default=(32, 48, 32), help="voxels of a prepared volume"
    )
    parser.add_argument(
        "--spacing-mm", type=float, default=1.0, help="of a prepared volume; made scans have 1"
    )
    parser.add_argument("--repeats", type=int, default=3, help="how often; the median is printed")
    parser.add_argument("--workers", type=int, default=0, help="also with so many processes")
    chosen = parser.parse_args()
    plan = VolumePlan(modality="t1", shape=tuple(chosen.shape), spacing_mm=(chosen.spacing_mm,) * 3)
    tokenizer = load_tokenizer(TokenizerSpec())
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        files = _copies(chosen.data, work / "scans", chosen.scans) if chosen.data else None
        files = files or _made(work / "scans", chosen.scans, tuple(chosen.size))
        time.sleep(SETTLED_S + 0.1)  # younger files are not remembered
        times: dict[str, list[Seconds]] = {}
        for repeat in range(chosen.repeats):
            ours, plain = work / f"ours{repeat}", work / f"plain{repeat}"
            cold: dict[str, Callable[[], object]] = {
                "ours, cold": lambda ours=ours: _ours(work / "scans", ours, plan, tokenizer),
                "plain loop, cold": lambda plain=plain: _plain(files, plain, plan, tokenizer),
            }
            warm: dict[str, Callable[[], object]] = {
                "ours, warm": lambda ours=ours: _ours(work / "scans", ours, plan, tokenizer),
                "plain loop, np.load of what it saved": lambda plain=plain: _load(plain),
            }
            for what, run in (*sorted(cold.items(), reverse=bool(repeat % 2)), *warm.items()):
                times.setdefault(what, []).append(_seconds(run))
            if chosen.workers:
                job = Job(work / f"shared{repeat}" / "cache", plan, TokenizerSpec(), tokenizer.sha256, True)
                with Workers(job, chosen.workers) as workers:
                    times.setdefault(STARTED, []).append(_seconds(workers.start))
                    shared = work / f"shared{repeat}"
                    run = partial(_ours, work / "scans", shared, plan, tokenizer, workers)
                    times.setdefault("ours, cold, workers", []).append(_seconds(run, workers))
        for what, part in _floor(files, plan, tokenizer).items():
            times[what] = [_seconds(part) for _ in range(chosen.repeats)]
    for kind, name in enumerate(Seconds._fields):
        seconds = {what: statistics.median(one[kind] for one in runs) for what, runs in times.items()}
        _report(name, seconds, len(files))


def _report(kind: str, seconds: dict[str, float], num_scans: int) -> None:
    print(f"by {kind}:")
    for what, taken in seconds.items():
        rate = f"{num_scans / taken:9.1f} scans/s   {1e3 * taken / num_scans:8.2f} ms/scan"
        print(f"  {what:<40} {rate if what != STARTED else f'{taken:9.1f} s'}")
    floor = sum(taken for what, taken in seconds.items() if what.startswith("floor"))
    ours, plain = seconds["ours, cold"], seconds["plain loop, cold"]
    print(f"  cold: ours has {plain / ours:.2f} x the speed of the plain loop")
    if (shared := seconds.get("ours, cold, workers")) is not None:
        print(f"  cold, workers: ours has {plain / shared:.2f} x the speed of the plain loop")
        print(f"  cold, workers: ours takes {shared / floor:.2f} x the floor of one")
    print(f"  warm: ours has {plain / seconds['ours, warm']:.0f} x the speed of running the plain loop again")
    print(f"  cold: ours takes {ours / floor:.2f} x the floor, the plain loop {plain / floor:.2f} x")


def _ours(
    root: Path, state: Path, plan: VolumePlan, tokenizer: Tokenizer, workers: Workers | None = None
) -> None:
    cache = LatentCache(state / "cache", tokenizer, plan)
    judges = cache.judges(workers=workers)

    def opened() -> Cohort:
        memo = JudgementMemo(state / "cohort.judged", {})
        return open_cohort(root, plan=plan, split_salt="bench", judges=memo.judges(judges))

    cohort = remembered(state / "cohort.json", root, {}, opened)
    latents = cache.encode(cohort, judges=judges)
    latents.latents(range(len(latents)))


def _plain(files: list[Path], folder: Path, plan: VolumePlan, tokenizer: Tokenizer) -> None:
    folder.mkdir()
    load = Compose(
        [
            LoadImaged("image"),
            EnsureChannelFirstd("image"),
            Orientationd("image", axcodes="RAS", labels=None),
            Spacingd("image", pixdim=plan.spacing_mm, mode="bilinear"),
            ScaleIntensityRangePercentilesd("image", *plan.mr_percentiles, b_min=0.0, b_max=1.0, clip=True),
            ResizeWithPadOrCropd("image", spatial_size=plan.shape),
        ]
    )
    with torch.inference_mode():
        for number, path in enumerate(files):
            volume = load({"image": str(path)})["image"].as_tensor()
            np.save(folder / f"{number}.npy", tokenizer.encode(volume[None])[0].numpy())


def _load(folder: Path) -> None:
    np.stack([np.load(path) for path in sorted(folder.glob("*.npy"))])


def _floor(files: list[Path], plan: VolumePlan, tokenizer: Tokenizer) -> dict[str, Callable[[], object]]:
    arrays = [np.asarray(nib.load(path).dataobj, np.float32) for path in files]
    at_once = Preparation(Path(), tokenizer.sha256, plan, ClearFiles()).at_once
    volumes = torch.rand(at_once, 1, *plan.shape)
    return {
        "floor: decompress": lambda: [_decompress(path) for path in files],
        "floor: percentiles": lambda: [np.percentile(array, plan.mr_percentiles) for array in arrays],
        "floor: encode": lambda: [
            tokenizer.encode(volumes[: len(files) - first]) for first in range(0, len(files), at_once)
        ],
    }


def _decompress(path: Path) -> bytes:
    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
        return file.read()


def _seconds(run: Callable[[], object], workers: Workers | None = None) -> Seconds:
    clock, computing = time.perf_counter(), _computed_s(workers)
    run()
    return Seconds(time.perf_counter() - clock, _computed_s(workers) - computing)


def _computed_s(workers: Workers | None) -> float:
    """By this process and by workers that are running (Linux)."""
    ticks = 0
    for pid in workers.pids if workers else ():
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return time.process_time() + ticks / os.sysconf("SC_CLK_TCK")


def _copies(source: Path, folder: Path, count: int) -> list[Path]:
    folder.mkdir()
    found = sorted(path for path in source.rglob("*.nii*") if not path.name.startswith("."))[:count]
    return [Path(shutil.copy(path, folder / path.name)) for path in found]


def _made(folder: Path, count: int, size: tuple[int, int, int]) -> list[Path]:
    folder.mkdir(exist_ok=True)
    random = np.random.default_rng(0)
    files = []
    for number in range(count):
        smooth = gaussian_filter(random.standard_normal(size), 2.0)
        voxels = (2000 * (smooth - smooth.min()) + 20 * random.standard_normal(size)).astype(np.int16)
        files.append(folder / f"p{number:03d}.nii.gz")
        nib.save(nib.Nifti1Image(voxels, np.diag([1.0, 1.0, 1.0, 1.0])), files[-1])
    return files


if __name__ == "__main__":
    main()
