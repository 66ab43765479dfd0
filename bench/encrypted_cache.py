"""The encrypted cache: reading a batch against the same batch mapped in clear, in the same run.

Latents of the paper (4 x 24 x 24 x 24, a file of 216 KiB), of 96-cell crops of large scans (4 x 48 x 48 x 48)
and crops of the paper's grid out of whole scans (4 x 96 x 96 x 96, of which a chunk of 1 MiB is the least
that opens). Files were just written, so both come from memory: the worst case for the seal, which a slow disk
hides. Read are random batches of 8, alternately by both; beside the ratio of the medians stands the floor:
the decryption alone, of bytes that lie in memory.

    OMP_NUM_THREADS=1 python bench/encrypted_cache.py
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import numpy as np
import torch
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from client.latents.cache_files import CacheFiles, ClearFiles, SealedFiles
from client.latents.latent_set import LATENTS, LatentSet, open_stored
from client.scans.cohort import Cohort, ScanEntry
from storage.sealed_files import CHUNK_BYTES, SealingKeys

BATCH, CROP = 8, (24, 24, 24)
SIDES = {"paper": (24, False), "large crops": (48, False), "crops of whole scans": (96, True)}


def latent_set(folder: Path, side: int, files: CacheFiles, count: int, crops: bool) -> LatentSet:
    """`count` scans of random numbers, the same for either kind of files."""
    folder.mkdir()
    random, rows = np.random.default_rng(0), []
    for number in range(count):
        values = torch.from_numpy(random.standard_normal((4, side, side, side), np.float32))
        path = folder / f"{number}.safetensors"
        files.write(path, {LATENTS: values}, {"geometry": "{}"})
        stored = open_stored(path, files)
        assert stored is not None
        rows.append([stored])
    nowhere = Path("x")
    entries = [ScanEntry(f"{n:064x}", str(n), nowhere, (nowhere,), "mr", "train") for n in range(count)]
    return LatentSet(Cohort(folder, tuple(entries), ()), rows, [0] * count, crop=CROP if crops else None)


def floor_s(num_bytes: int, repeats: int) -> float:
    """Seconds to decrypt so many bytes, in chunks, from memory into memory."""
    cipher, sizes = AESGCM(bytes(32)), [CHUNK_BYTES] * (num_bytes // CHUNK_BYTES) + [num_bytes % CHUNK_BYTES]
    sealed = [cipher.encrypt(bytes(12), bytes(size), None) for size in sizes if size]
    into = memoryview(bytearray(CHUNK_BYTES))
    taken = []
    for _ in range(repeats):
        begin = time.perf_counter()
        for part in sealed:
            cipher.decrypt_into(bytes(12), part, None, into[: len(part) - 16])
        taken.append(time.perf_counter() - begin)
    return median(taken)


def compare(folder: Path, name: str, count: int, batches: int) -> None:
    """One line of the table."""
    side, crops = SIDES[name]
    sets = {
        kind: latent_set(folder / f"{name} {kind}", side, files, count, crops)
        for kind, files in (("clear", ClearFiles()), ("sealed", SealedFiles(SealingKeys(bytes(32)))))
    }
    random, taken = np.random.default_rng(1), {kind: [] for kind in sets}
    for _ in range(batches):
        rows = random.choice(count, BATCH, replace=False).tolist()
        starts = torch.from_numpy(random.integers(0, max(1, side - CROP[0]), (BATCH, 3)))
        read = {}
        for kind, scans in sets.items():
            begin = time.perf_counter()
            read[kind] = scans.crops(rows, [0] * BATCH, starts) if crops else scans.latents(rows)
            taken[kind].append(time.perf_counter() - begin)
        assert torch.equal(read["clear"], read["sealed"])
    clear, sealed = median(taken["clear"]), median(taken["sealed"])
    print(
        f"{name:20s} clear {1e3 * clear:6.2f} ms  sealed {1e3 * sealed:6.2f} ms  ratio {sealed / clear:5.2f}",
        "" if crops else f"  decryption alone {1e3 * floor_s(BATCH * 16 * side**3, 20):6.2f} ms",
    )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batches", type=int, default=60)
    given = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        for which, count in (("paper", 128), ("large crops", 24), ("crops of whole scans", 12)):
            compare(Path(name), which, count, given.batches)


if __name__ == "__main__":
    main()
