"""The one pass over scans: each is read once, and judged, prepared and encoded while it is in memory.

Files are named by a hash of everything that the latents depend on: the scan's content, its label's, the
transform, the tokenizer, the view, the format; what is there is not made again. A judgement is handed on only
when its encodings are on the disk, so that whoever remembers judgements (`client/scans/judgement_memo.py`)
remembers work that is done.

Bits: on a CPU one thread encodes, and always as many volumes at once, filled up with zeros. Both change the
last bit of a latent, and a latent may depend neither on the machine nor on what was encoded beside it.

Does not do: say what takes part (`client/scans/cohort.py`), or start processes (`client/latents/workers.py`).
"""

import dataclasses
import hashlib
import json
import math
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from client.latents.cache_files import CacheFiles, DamagedEncoding
from client.latents.latent_set import LABEL, LATENTS, open_stored
from client.latents.whole_scan import encoded
from client.scans.fingerprints import Fingerprints
from client.scans.judgement import Read, Source, Verdict, read
from meduet_models.threads import fixed_threads
from meduet_models.tokenizer.tokenizer import STRIDE, Tokenizer
from scans.scans import Reason, UnusableScan
from scans.volume_plan import VolumePlan
from scans.volumes import Prepared, prepare
from scans.whole_volumes import WholeVolume, prepare_whole
from storage.files import private_folder

CACHE_FORMAT = 1
"""Part of every key: raise it when what is stored changes, or what `scans/volumes.py` computes."""
FINGERPRINTS = "fingerprints.json"
"""The memo of hashes of label files, in the cache's folder."""
VOXELS_AT_ONCE = 2**19
"""Volumes are encoded together up to this many voxels, and up to `SCANS_AT_ONCE`. Measured on a CPU: eight of
32 x 48 x 32 together take a third of the time of one by one, eight of 96 cubed more than one by one."""
SCANS_AT_ONCE = 8
PREPARED_AHEAD = 2
"""Scans that one thread reads and prepares while others are encoded. Measured with an encoder that takes
150 ms a scan on its own device: 290 ms a scan instead of 430."""
_NOT_IN_KEY = frozenset(
    {"modality", "modalities", "registered", "views", "crop_foreground"}
)  # a view's voxels do not depend on it
_WINDOWS = {"mr_percentiles": "mr_percentiles", "ct_hu": "ct_window_hu", "fixed": "fixed_window"}
"""The setting that each window reads; the others are not in the key."""


@dataclass(frozen=True)
class Ready:
    """A view of a scan, to be encoded into `path`."""

    path: Path
    prepared: Prepared
    scan_id: str


class Preparation:
    """From files to volumes that are ready to be encoded, for one tokenizer (by its hash) and one plan;
    `files`: how encodings are written and read."""

    def __init__(self, folder: Path, tokenizer_sha256: str, volumes: VolumePlan, files: CacheFiles) -> None:
        self.folder, self.volumes, self.files = folder, volumes, files
        self.fingerprints = Fingerprints(folder / FINGERPRINTS, files.read_text, files.write_text)
        """Hashes of label files."""
        left_out = _NOT_IN_KEY | set(_WINDOWS.values()) - {_WINDOWS[volumes.window]}
        if volumes.extent == "crop":
            left_out |= {"extent"}  # as when there was no other
        fixed = {
            "format": CACHE_FORMAT,
            "tokenizer": tokenizer_sha256,
            "volumes": {k: v for k, v in dataclasses.asdict(volumes).items() if k not in left_out},
        }
        self._head = hashlib.sha256(json.dumps(fixed, sort_keys=True).encode())

    @property
    def at_once(self) -> int:
        """Volumes that are encoded together; whole scans are large, and each of another size."""
        if self.volumes.extent == "scan":
            return 1
        return max(1, min(SCANS_AT_ONCE, VOXELS_AT_ONCE // math.prod(self.volumes.shape)))

    @property
    def crop(self) -> tuple[int, int, int]:
        """The network's grid, in cells."""
        d, h, w = (side // STRIDE for side in self.volumes.shape)
        return d, h, w

    def paths(self, scan_id: str, label: Path | None) -> list[Path]:
        """Where the views of a scan with this label are, or will be. Raises `OSError` for a label."""
        label_sha256 = "none" if label is None else self.fingerprints.sha256(label)
        found = []
        for view in range(self.volumes.views):
            key = self._head.copy()
            key.update(f"/{scan_id}/{label_sha256}/{view}".encode())
            name = key.hexdigest()
            found.append(self.folder / name[:2] / f"{name}.safetensors")
        return found

    def read(self, source: Source) -> tuple[Verdict, list[Ready]]:
        """Read a scan, once: what it is worth, and those of its views that are not on the disk."""
        try:
            found = read(source, self.volumes)
            if found.judgement.is_label_map:
                return found.judgement, []
            paths = self._paths(found, source.label)
            ready = [
                Ready(path, self._volume(found, view), found.judgement.scan_id)
                for view, path in enumerate(paths)
                if not self._is_whole(path)
            ]
            return found.judgement, ready
        except UnusableScan as error:
            return error, []

    def _volume(self, found: Read, view: int) -> Prepared:
        if self.volumes.extent == "scan":
            return prepare_whole(found.scan, self.volumes, STRIDE, view, found.label)
        return prepare(found.scan, self.volumes, view, found.label)

    def _is_whole(self, path: Path) -> bool:
        try:
            return open_stored(path, self.files) is not None
        except DamagedEncoding:
            return False

    def _paths(self, found: Read, label: Path | None) -> list[Path]:
        try:
            return self.paths(found.judgement.scan_id, label if found.label is not None else None)
        except OSError as error:  # it was there a moment ago
            raise UnusableScan(Reason.UNREADABLE, f"label, errno {error.errno}") from error


class Encoder:
    """From volumes to files of latents."""

    def __init__(self, tokenizer: Tokenizer, device: torch.device | str, preparation: Preparation) -> None:
        self._tokenizer, self._device = tokenizer, torch.device(device)
        self._at_once, self._crop, self._files = preparation.at_once, preparation.crop, preparation.files

    @torch.inference_mode()
    def write(self, batch: Sequence[Ready]) -> None:
        """Encode up to `at_once` views and write each, whole, for its owner alone.

        Raises `OSError` (a full disk, say), and `ValueError` when the tokenizer gives numbers that are not
        finite.
        """
        if isinstance(batch[0].prepared, WholeVolume):
            for ready in batch:
                self._write_whole(ready)
            return
        volumes = torch.stack([ready.prepared.volume for ready in batch])
        if len(batch) < self._at_once:
            volumes = torch.cat([volumes, volumes.new_zeros(self._at_once - len(batch), *volumes.shape[1:])])
        with fixed_threads(1):
            latents = self._tokenizer.to(self._device).encode(volumes.to(self._device))
        latents = latents.to("cpu", torch.float32)[: len(batch)]
        self._check(latents)
        for ready, one in zip(batch, latents, strict=True):
            said = {"geometry": json.dumps(ready.prepared.geometry.to_dict())}
            self._keep(ready, {LATENTS: one}, said)

    def _write_whole(self, ready: Ready) -> None:
        assert isinstance(ready.prepared, WholeVolume)
        with fixed_threads(1):
            tokenizer = self._tokenizer.to(self._device)
            tensors, said = encoded(ready.prepared, tokenizer, self._crop, self._device)
        self._check(tensors[LATENTS])
        self._keep(ready, tensors, said)

    def _keep(self, ready: Ready, tensors: dict[str, Tensor], said: dict[str, str]) -> None:
        """Write a view, and of which scan it is: so it is found when a patient is to be forgotten."""
        label = ready.prepared.label
        if label is not None:
            small = bool(((label >= 0) & (label <= 255)).all())
            tensors = {**tensors, LABEL: label.to(torch.uint8 if small else torch.int16)}
        private_folder(ready.path.parent)
        self._files.write(ready.path, tensors, {**said, "scan_id": ready.scan_id})

    def close(self) -> None:
        """Give the device's memory back."""
        self._tokenizer.to("cpu")

    def _check(self, latents: Tensor) -> None:
        if not latents.isfinite().all():
            raise ValueError(
                f"Expected finite latents; tokenizer {self._tokenizer.name} gave others on {self._device}. "
                "Check its weights, or try device: cpu."
            )


Scanned = tuple[int, Verdict, list[Ready]]
"""A scan that was read: its number, what it is worth, and its views that are to be encoded."""


def prepare_each(
    preparation: Preparation, sources: Sequence[Source], ahead: int = PREPARED_AHEAD
) -> Generator[Scanned, None, None]:
    """Read the scans in order; a thread is `ahead` scans ahead of the one asked for. At 0 nothing runs
    beside, nor for whole scans, of which one is to be in memory at a time."""
    if not ahead or preparation.volumes.extent == "scan":
        for number, source in enumerate(sources):
            yield number, *preparation.read(source)
        return
    with ThreadPoolExecutor(1, thread_name_prefix="prepare") as thread:
        futures: deque[tuple[int, Future[tuple[Verdict, list[Ready]]]]] = deque()
        try:
            for number, source in enumerate(sources):
                futures.append((number, thread.submit(preparation.read, source)))
                if len(futures) > ahead:
                    first, future = futures.popleft()
                    yield first, *future.result()
            while futures:
                first, future = futures.popleft()
                yield first, *future.result()
        finally:
            thread.shutdown(wait=True, cancel_futures=True)


def encode_each(
    scans: Generator[Scanned, None, None], write: Callable[[Sequence[Ready]], None], at_once: int
) -> Iterator[tuple[int, Verdict, list[Path]]]:
    """`write` the views of each scan, `at_once` together; gives each scan's number and verdict, and which
    files were written, once they are."""
    pending: list[Ready] = []
    waiting: deque[tuple[int, int, Verdict, list[Path]]] = deque()
    num_given = num_written = 0
    with closing(scans):
        for number, verdict, ready in scans:
            pending += ready
            num_given += len(ready)
            waiting.append((num_given, number, verdict, [one.path for one in ready]))
            while len(pending) >= at_once:
                write(pending[:at_once])
                num_written += at_once
                del pending[:at_once]
            while waiting and waiting[0][0] <= num_written:
                yield waiting.popleft()[1:]
    if pending:
        write(pending)
    yield from (one[1:] for one in waiting)
