"""How much memory does one whole scan take (`volumes.extent: scan`), from its file to a harmonised one?

A CT of 512 x 512 x 300 voxels (0.78 x 0.78 x 1.5 mm) is made of a real one of 122 x 101 x 30 (3 mm): mirrored
copies on top of each other, amid air, with noise. At 1.5 mm each stage runs in a process of its own; its
highest resident size is told above what the process held before, beside the scan itself as float32.

    python bench/whole_scans.py [CT.nii.gz]      four minutes on a free core

Stages: "read" (the scan alone), "cohort" (read and judged), "encode" (resampled, its foreground encoded and
cached), "batch" (eight crops drawn and read), "survey" (statistics of its foreground), "restyle" (harmonised,
and laid back on its own grid). "encode" holds the scan, the resampled volume and one slab or window of work.

Found, on a busy CPU: 526 MiB to read the scan's 300 MiB, and no more to encode it (525 MiB, 25 s, latents of
60 x 47 x 76); 6 MiB for a batch of eight crops of 24 cubed; 9 MiB for the statistics of 142,386 latent voxels
of foreground; 780 MiB to restyle it and lay it back on 512 x 512 x 300.

Not importable; not shipped.
"""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import nibabel as nib
import numpy as np
import torch
from scipy.ndimage import zoom

from client.latents.cache import LatentCache
from client.latents.style_moments import foreground_latents
from client.latents.whole_scan import draw_start
from client.scans.cohort import open_cohort
from meduet_models.diffusion.conditioner import entries_of_scans
from meduet_models.style.moments import restyle
from meduet_models.tokenizer.tokenizer import TokenizerSpec, load_tokenizer
from meduet_models.tokenizer.whole_scans import decode_whole
from scans.volume_plan import VolumePlan
from scans.volumes import read_scan
from scans.whole_volumes import lay_back_whole

SHAPE, SPACING_MM = (512, 512, 300), (0.78125, 0.78125, 1.5)
VOLUMES = VolumePlan(
    modality="any", window="ct_hu", spacing_mm=(1.5, 1.5, 1.5), shape=(96, 96, 96), extent="scan",
    registered=False,
)  # fmt: skip
CROP = (24, 24, 24)
STAGES = ("read", "cohort", "encode", "batch", "survey", "restyle")
DATA = Path(os.environ.get("FEDMEDUET_DATA", Path(__file__).parents[2] / "shared" / "data"))
FIXTURE = DATA / "nifti_odd" / "totalseg_apache" / "example_ct_sm.nii.gz"


def make(fixture: Path, path: Path) -> None:
    """Write the large CT."""
    small = np.asarray(nib.load(fixture).dataobj, np.float32)
    stack = np.concatenate([small, small[:, :, ::-1]] * 3, axis=2)[:, :, :150]
    around = [(max(0, (133 - n) // 2), max(0, 133 - n - (133 - n) // 2)) for n in stack.shape[:2]]
    padded = np.pad(stack, (*around, (0, 0)), constant_values=-1024.0)
    factors = [n / there for n, there in zip(SHAPE, padded.shape, strict=True)]
    large = zoom(padded, factors, order=1)
    large += np.random.default_rng(0).normal(0, 10, large.shape).astype(np.float32)
    affine = np.diag([*SPACING_MM, 1.0])
    nib.save(nib.Nifti1Image(large.astype(np.int16), affine), path)


def resident(name: str) -> int:
    """`VmRSS` or `VmHWM` of this process, bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def stage(name: str, folder: Path) -> None:
    """One process: print the peak above the start in bytes, the seconds, and what is to be told."""
    torch.set_num_threads(1)
    tokenizer, told = load_tokenizer(TokenizerSpec()), ""
    cohort = scans = None
    if name not in ("read", "cohort"):
        cohort = open_cohort(folder / "scans", plan=VOLUMES, split_salt="bench")
    if name in ("batch", "survey", "restyle"):
        scans = LatentCache(folder / "cache", tokenizer, VOLUMES).encode(cohort)
    warm = torch.nn.functional.conv3d(torch.rand(1, 1, 8, 8, 8), torch.rand(1, 1, 3, 3, 3))  # libraries
    import monai.transforms  # noqa: F401

    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM from here on
    began = time.perf_counter()
    match name:
        case "read":
            told = f"{read_scan(folder / 'scans' / 'p1' / 'ct.nii').array.nbytes / 2**20:.0f} MiB of scan"
        case "cohort":
            open_cohort(folder / "scans", plan=VOLUMES, split_salt="bench")
        case "encode":
            scans = LatentCache(folder / "cache", tokenizer, VOLUMES).encode(cohort)
            told = f"latents of {scans.whole(0).shape[1:]}"
        case "batch":
            draws = torch.Generator().manual_seed(0)
            inside = scans.foreground(0)
            starts = torch.stack([draw_start(inside, CROP, 0.3, draws) for _ in range(8)])
            scans.crops([0] * 8, [0] * 8, starts)
        case "survey":
            told = f"{foreground_latents(scans, 0).shape[1]:,} latent voxels of foreground"
        case "restyle":
            told = restyled(scans, tokenizer)
    seconds, peak = time.perf_counter() - began, resident("VmHWM") - before
    assert warm.isfinite().all()
    sys.stdout.write(f"{peak}\n{seconds}\n{told}\n")


def restyled(scans: Any, tokenizer: Any) -> str:
    """A style that is the scan's own, decoded and laid back."""
    whole = torch.tensor(scans.whole(0))
    own = entries_of_scans(foreground_latents(scans, 0)[None, :, :, None, None], None)
    volume = decode_whole(tokenizer, restyle(whole[None], own, own)[0]).clamp_(0.0, 1.0)
    array, _ = lay_back_whole(volume, scans.whole_geometry(0))
    return f"laid back on {array.shape}"


def main(fixture: Path) -> None:
    """A line for each stage."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "scans" / "p1").mkdir(parents=True)
        make(fixture, Path(folder) / "scans" / "p1" / "ct.nii")
        for name in STAGES:
            done = subprocess.run(
                [sys.executable, __file__, "stage", name, folder], capture_output=True, text=True
            )
            if done.returncode:
                raise RuntimeError(done.stderr)
            peak, seconds, told = done.stdout.split("\n")[:3]
            print(f"{name:8s} {float(peak) / 2**20:6.0f} MiB  {float(seconds):6.1f} s  {told}", flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["stage"]:
        stage(sys.argv[2], Path(sys.argv[3]))
    else:
        main(Path(sys.argv[1]) if sys.argv[1:] else FIXTURE)
