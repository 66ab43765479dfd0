"""The latent cache: each scan is encoded once, and its latents are read from then on.

One file per scan and view, named by a hash of everything the latents depend on: the scan's content, its
label's, the transform, the tokenizer, the view, the format. So a changed scan or transform is encoded again,
an unchanged one never, and an interrupted encoding goes on where it stopped. Files are safetensors, written
whole or not at all, readable by their owner only; they hold no name and no path, and keep the geometry with
which a decoded volume is laid back on the patient. What is read back is `client/latents/latent_set.py`.

Latents are patient data: the tokenizer's decoder is public, so a latent is a scan. They stay at the site.
Differs from MeDUET (arXiv:2602.17901, official code): the posterior's mean is kept, not one random draw, and
augmentations are made before encoding (`views`), because the tokenizer is not flip-equivariant.
"""

import dataclasses
import hashlib
import json
import logging
import math
from collections import deque
from collections.abc import Callable, Generator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import torch

from client.latents.latent_set import (
    LABEL,
    LATENTS,
    DamagedEncoding,
    LatentSet,
    StoredLatent,
    open_stored,
    volume_path,
)
from client.scans.cohort import Cohort, ScanEntry, read_entry
from client.scans.fingerprints import Fingerprints
from client.scans.scans import Reason, UnusableScan
from client.scans.volumes import Prepared, prepare
from federation.plan import VolumePlan
from meduet_models.tokenizer.tokenizer import Tokenizer
from meduet_models.weights import save_weights
from storage.files import private_folder

CACHE_FORMAT = 1
"""Part of every key: raise it when what is stored changes, or what `client/scans/volumes.py` computes."""
VOXELS_AT_ONCE = 2**19
"""Volumes are encoded together up to this many voxels, and up to `SCANS_AT_ONCE`. Measured on a CPU: eight of
32 x 48 x 32 together take a fifth of the time of one by one, eight of 96 cubed more than one by one."""
SCANS_AT_ONCE = 8
PREPARED_AHEAD = 2
"""Scans that one thread reads and prepares while others are encoded. Measured with an encoder that takes
150 ms a scan on its own device: 290 ms a scan instead of 430."""
_NOT_IN_KEY = frozenset(
    {"modality", "modalities", "registered", "views"}
)  # a view's voxels do not depend on it
_WINDOWS = {"mr_percentiles": "mr_percentiles", "ct_hu": "ct_window_hu", "fixed": "fixed_window"}
"""The setting that each window reads; the others are not in the key."""
_log = logging.getLogger(__name__)

Progress = Callable[[int, int], None]
"""Called with scans done and scans in all."""


@dataclass(frozen=True)
class CacheState:
    """What a cache holds of a cohort, in scans."""

    complete: int
    """Scans with every view cached."""
    missing: int
    """Scans with a view to be encoded, damaged ones included."""
    damaged: int
    """Files that are not as they were written (cut short, say)."""
    unused: int
    """Files of other plans, of scans that changed or went, and of writes that were interrupted."""
    bytes_to_write: int
    """About how much the missing views will take."""


@dataclass(frozen=True)
class _Row:
    """A scan and where its views are, or will be."""

    entry: ScanEntry
    paths: tuple[Path, ...]
    stored: tuple[StoredLatent | None, ...]

    @property
    def missing(self) -> list[int]:
        """Views to be encoded."""
        return [view for view, stored in enumerate(self.stored) if stored is None]


class LatentCache:
    """The cache in `folder`, for one tokenizer and one way from scan to volume.

    `folder` is created, open to its owner only. Several plans may share it, and several processes: at worst
    two of them encode the same scan. Raises `ValueError` when the volume's shape does not fit the tokenizer.
    """

    def __init__(self, folder: Path, tokenizer: Tokenizer, volumes: VolumePlan) -> None:
        if any(side % tokenizer.stride for side in volumes.shape):
            raise ValueError(
                f"Expected volumes.shape to be multiples of the tokenizer's stride {tokenizer.stride}; "
                f"got {volumes.shape}."
            )
        if volumes.views < 1:
            raise ValueError(f"Expected volumes.views to be at least 1; got {volumes.views}.")
        private_folder(folder)
        self._folder = folder
        self._tokenizer = tokenizer
        self._volumes = volumes
        self._fingerprints = Fingerprints(folder / "fingerprints.json")

    def encode(
        self,
        cohort: Cohort,
        device: torch.device | str = "cpu",
        progress: Progress | None = None,
        site_index: int = 0,
    ) -> LatentSet:
        """Latents of every scan of `cohort`, encoding on `device` what is not cached yet.

        A scan that cannot be prepared any more moves to the exclusions of the returned set's cohort.
        `site_index` is the site's place in the plan. Whatever interrupts this, finished encodings stay.
        Raises `OSError` (a full disk, say) and `ValueError` when the tokenizer gives numbers that are not
        finite.
        """
        rows, damaged, unusable = self._find(cohort)
        if damaged:
            _log.warning("%d cached encodings were damaged; they are made again.", len(damaged))
        todo = [row for row in rows if row.missing]
        report = progress or (lambda done, total: None)
        done, waiting = len(cohort.scans) - len(todo), 0
        report(done, len(cohort.scans))
        pending: list[tuple[Path, Prepared]] = []
        at_once = max(1, min(SCANS_AT_ONCE, VOXELS_AT_ONCE // math.prod(self._volumes.shape)))
        try:
            with closing(_prepare_ahead(todo, self._volumes)) as ahead:
                for row, prepared in ahead:
                    waiting += 1
                    if isinstance(prepared, UnusableScan):
                        unusable[row.entry.scan_id] = prepared
                    else:
                        pending += [(row.paths[v], one) for v, one in zip(row.missing, prepared, strict=True)]
                    while len(pending) >= at_once:
                        self._encode(pending[:at_once], device)
                        del pending[:at_once]
                    if not pending:
                        done, waiting = done + waiting, 0
                        report(done, len(cohort.scans))
            if pending:
                self._encode(pending, device)
                report(done + waiting, len(cohort.scans))
        finally:
            self._tokenizer.to("cpu")
            self._fingerprints.save()
        if unusable:
            _log.warning("%d scans could not be prepared; exclusions.csv has the reasons.", len(unusable))
        kept = [row for row in rows if row.entry.scan_id not in unusable]
        encoded = [[stored or _written(path) for stored, path in zip(row.stored, row.paths, strict=True)]
                   for row in kept]  # fmt: skip
        return LatentSet(cohort.without(unusable), encoded, [site_index] * len(encoded))

    def state(self, cohort: Cohort) -> CacheState:
        """What is cached of `cohort`; encodes nothing and changes nothing."""
        rows, damaged, _ = self._find(cohort)
        missing = [row for row in rows if row.missing]
        used = {path for row in rows for latents in row.paths for path in (latents, volume_path(latents))}
        stride, shape = self._tokenizer.stride, self._volumes.shape
        latent_bytes = 4 * self._tokenizer.latent_channels * math.prod(side // stride for side in shape)
        bytes_to_write = sum(
            len(row.missing) * (2048 + latent_bytes + math.prod(shape) * (row.entry.label_path is not None))
            for row in missing
        )
        return CacheState(
            complete=len(rows) - len(missing),
            missing=len(missing),
            damaged=len(damaged),
            unused=len(self._all_files() - used),
            bytes_to_write=bytes_to_write,
        )

    def prune(self, keep: LatentSet) -> int:
        """Remove every file that `keep` does not read, left by interrupted writes, too; returns how many.

        For patients who withdrew. Encodings of other plans in this folder go as well, and are made again when
        asked for.
        """
        read = keep.files()
        unused = self._all_files() - read - {volume_path(latents) for latents in read}
        for path in unused:
            path.unlink(missing_ok=True)
        return len(unused)

    def _all_files(self) -> set[Path]:
        return {path for path in self._folder.glob("??/*") if path.is_file()}

    def _find(self, cohort: Cohort) -> tuple[list[_Row], list[Path], dict[str, UnusableScan]]:
        """A row per scan, the damaged files, and the scans whose label cannot be read."""
        left_out = _NOT_IN_KEY | set(_WINDOWS.values()) - {_WINDOWS[self._volumes.window]}
        fixed = {
            "format": CACHE_FORMAT,
            "tokenizer": self._tokenizer.sha256,
            "volumes": {k: v for k, v in dataclasses.asdict(self._volumes).items() if k not in left_out},
        }
        head = hashlib.sha256(json.dumps(fixed, sort_keys=True).encode())
        rows: list[_Row] = []
        damaged: list[Path] = []
        unusable: dict[str, UnusableScan] = {}
        for entry in cohort.scans:
            try:
                label = self._fingerprints.sha256(entry.label_path) if entry.label_path else "none"
            except OSError as error:
                unusable[entry.scan_id] = UnusableScan(Reason.UNREADABLE, f"label, errno {error.errno}")
                continue
            paths, stored = [], []
            for view in range(self._volumes.views):
                key = head.copy()
                key.update(f"/{entry.scan_id}/{label}/{view}".encode())
                name = key.hexdigest()
                paths.append(self._folder / name[:2] / f"{name}.safetensors")
                try:
                    stored.append(open_stored(paths[-1]))
                except DamagedEncoding:
                    damaged.append(paths[-1])
                    stored.append(None)
            rows.append(_Row(entry, tuple(paths), tuple(stored)))
        return rows, damaged, unusable

    @torch.inference_mode()
    def _encode(self, batch: list[tuple[Path, Prepared]], device: torch.device | str) -> None:
        volumes = torch.stack([prepared.volume for _, prepared in batch])
        latents = self._tokenizer.to(device).encode(volumes.to(device)).to("cpu", torch.float32)
        if not latents.isfinite().all():
            raise ValueError(
                f"Expected finite latents; tokenizer {self._tokenizer.name} gave others on {device}. "
                "Check its weights, or try device: cpu."
            )
        for (path, prepared), one in zip(batch, latents, strict=True):
            tensors = {LATENTS: one}
            if prepared.label is not None:
                small = bool(((prepared.label >= 0) & (prepared.label <= 255)).all())
                tensors[LABEL] = prepared.label.to(torch.uint8 if small else torch.int16)
            private_folder(path.parent)
            save_weights(path, tensors, {"geometry": json.dumps(prepared.geometry.to_dict())})


def _written(path: Path) -> StoredLatent:
    stored = open_stored(path)
    if stored is None:
        raise DamagedEncoding(
            f"Expected {path.name[:12]}… to be cached; it was removed while encoding. Run again."
        )
    return stored


def _prepare_ahead(
    rows: list[_Row], plan: VolumePlan
) -> Generator[tuple[_Row, list[Prepared] | UnusableScan], None, None]:
    """Read and prepare the missing views of each row, in order, a few scans ahead of the one asked for."""
    with ThreadPoolExecutor(1, thread_name_prefix="prepare") as thread:
        ahead: deque[tuple[_Row, Future[list[Prepared] | UnusableScan]]] = deque()
        try:
            for row in rows:
                ahead.append((row, thread.submit(_prepare, row, plan)))
                if len(ahead) > PREPARED_AHEAD:
                    first, future = ahead.popleft()
                    yield first, future.result()
            while ahead:
                first, future = ahead.popleft()
                yield first, future.result()
        finally:
            thread.shutdown(wait=True, cancel_futures=True)


def _prepare(row: _Row, plan: VolumePlan) -> list[Prepared] | UnusableScan:
    try:
        scan, label = read_entry(row.entry, plan)
        return [prepare(scan, plan, view, label) for view in row.missing]
    except UnusableScan as error:
        return error
