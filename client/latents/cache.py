"""The latent cache: each scan is encoded once, and its latents are read from then on.

One file per scan and view, named by a hash of everything the latents depend on: the scan's content, its
label's, the transform, the tokenizer, the view, the format. So a changed scan or transform is encoded again,
an unchanged one never, and an interrupted encoding goes on where it stopped. Files are safetensors, written
whole or not at all, readable by their owner only, sealed where the site says so (`cache_files.py`); they hold
no name and no path, and keep the geometry with which a decoded volume is laid back on the patient. How they
are made is `client/latents/encoding.py`, what is read back `client/latents/latent_set.py`.

Latents are patient data: the tokenizer's decoder is public, so a latent is a scan. They stay at the site.
Differs from MeDUET (arXiv:2602.17901, official code): the posterior's mean is kept, not one random draw, and
augmentations are made before encoding (`views`), because the tokenizer is not flip-equivariant.
"""

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import torch

from client.latents.cache_files import CacheFiles, ClearFiles, DamagedEncoding
from client.latents.encoding import Encoder, Preparation, encode_each, prepare_each
from client.latents.latent_set import LatentSet, StoredLatent, open_stored
from client.latents.prepared_volumes import volume_path
from client.latents.workers import Workers
from client.scans.cohort import Cohort, ScanEntry
from client.scans.judgement import Source, Verdict
from meduet_models.tokenizer.tokenizer import Tokenizer
from scans.scans import Reason, UnusableScan
from scans.volume_plan import VolumePlan
from storage.files import private_folder

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
    """About how much the missing views will take; of whole scans, as much as those take that are there."""
    at_least: bool
    """Whether that is the least they can take: of whole scans, while none is encoded."""


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
    two of them encode the same scan. `files`: how its files are written and read; None: in clear. Raises
    `ValueError` when the volume's shape does not fit the tokenizer.
    """

    def __init__(
        self, folder: Path, tokenizer: Tokenizer, volumes: VolumePlan, files: CacheFiles | None = None
    ) -> None:
        if any(side % tokenizer.stride for side in volumes.shape):
            raise ValueError(
                f"Expected volumes.shape to be multiples of the tokenizer's stride {tokenizer.stride}; "
                f"got {volumes.shape}."
            )
        if volumes.views < 1:
            raise ValueError(f"Expected volumes.views to be at least 1; got {volumes.views}.")
        private_folder(folder)
        self.folder = folder
        """Where encodings are."""
        self._tokenizer = tokenizer
        self.volumes = volumes
        self._files = files or ClearFiles()
        self._preparation = Preparation(folder, tokenizer.sha256, volumes, self._files)

    def judges(self, device: torch.device | str = "cpu", workers: Workers | None = None) -> "EncodingJudges":
        """Judges (`client/scans/judgement.py`) that encode on `device` what they read and is not cached yet.

        `workers`: processes that read, and encode if their job says so; None: all of it in this process.
        """
        return EncodingJudges(self._preparation, Encoder(self._tokenizer, device, self._preparation), workers)

    def encode(
        self,
        cohort: Cohort,
        device: torch.device | str = "cpu",
        progress: Progress | None = None,
        site_index: int = 0,
        judges: "EncodingJudges | None" = None,
    ) -> LatentSet:
        """Latents of every scan of `cohort`, encoding on `device` what is not cached yet.

        `judges`: those that opened the cohort; what they encoded of scans that then took no part is removed.
        A scan that cannot be prepared any more moves to the exclusions of the returned set's cohort.
        `site_index` is the site's place in the plan. Whatever interrupts this, finished encodings stay.
        Raises `OSError` (a full disk, say), `ValueError` when the tokenizer gives numbers that are not
        finite, and `WorkerLost`.
        """
        rows, damaged, unusable = self._find(cohort)
        if damaged:
            _log.warning("%d cached encodings were damaged; they are made again.", len(damaged))
        todo = [row for row in rows if row.missing]
        done, total = len(cohort.scans) - len(todo), len(cohort.scans)
        report = progress or (lambda done, total: None)
        report(done, total)
        judges = judges or self.judges(device)
        try:
            sources = [Source(row.entry.files, row.entry.label_path) for row in todo]
            for number, verdict in judges(sources):
                if (problem := _changed(todo[number].entry, verdict)) is not None:
                    unusable[todo[number].entry.scan_id] = problem
                done += 1
                report(done, total)
        finally:
            self._preparation.fingerprints.save()
        if unusable:
            _log.warning("%d scans could not be prepared; exclusions.csv has the reasons.", len(unusable))
        kept = [row for row in rows if row.entry.scan_id not in unusable]
        stored = [[one or self._written(path) for one, path in zip(row.stored, row.paths, strict=True)]
                  for row in kept]  # fmt: skip
        crop = self._preparation.crop if self.volumes.extent == "scan" else None
        sites = [site_index] * len(stored)
        latents = LatentSet(cohort.without(unusable), stored, sites, crop=crop, files=self._files)
        for path in judges.written - latents.files():
            path.unlink(missing_ok=True)
        return latents

    def state(self, cohort: Cohort) -> CacheState:
        """What is cached of `cohort`; encodes nothing and changes nothing."""
        rows, damaged, _ = self._find(cohort)
        missing = [row for row in rows if row.missing]
        used = {path for row in rows for latents in row.paths for path in (latents, volume_path(latents))}
        stride, shape = self._tokenizer.stride, self.volumes.shape
        latent_bytes = 4 * self._tokenizer.latent_channels * math.prod(side // stride for side in shape)
        bytes_to_write = sum(
            len(row.missing) * (2048 + latent_bytes + math.prod(shape) * (row.entry.label_path is not None))
            for row in missing
        )
        whole = self.volumes.extent == "scan"
        there = [one.path.stat().st_size for row in rows for one in row.stored if one is not None]
        if whole and there:
            bytes_to_write = round(sum(len(row.missing) for row in missing) * sum(there) / len(there))
        return CacheState(
            complete=len(rows) - len(missing),
            missing=len(missing),
            damaged=len(damaged),
            unused=len(self._all_files() - used),
            bytes_to_write=bytes_to_write,
            at_least=bool(whole and missing and not there),
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
        return {path for path in self.folder.glob("??/*") if path.is_file()}

    def _written(self, path: Path) -> StoredLatent:
        stored = open_stored(path, self._files)
        if stored is None:
            raise DamagedEncoding(
                f"Expected {path.name[:12]}… to be cached; it was removed while encoding. Run again."
            )
        return stored

    def _find(self, cohort: Cohort) -> tuple[list[_Row], list[Path], dict[str, UnusableScan]]:
        """A row per scan, the damaged files, and the scans whose label cannot be read."""
        rows: list[_Row] = []
        damaged: list[Path] = []
        unusable: dict[str, UnusableScan] = {}
        for entry in cohort.scans:
            try:
                paths = self._preparation.paths(entry.scan_id, entry.label_path)
            except OSError as error:
                unusable[entry.scan_id] = UnusableScan(Reason.UNREADABLE, f"label, errno {error.errno}")
                continue
            stored: list[StoredLatent | None] = []
            for path in paths:
                try:
                    stored.append(open_stored(path, self._files))
                except DamagedEncoding:
                    damaged.append(path)
                    stored.append(None)
            rows.append(_Row(entry, tuple(paths), tuple(stored)))
        return rows, damaged, unusable


class EncodingJudges:
    """Judges that leave each scan's encoding in the cache, made while the scan was in memory."""

    def __init__(self, preparation: Preparation, encoder: Encoder, workers: Workers | None) -> None:
        self._preparation, self._encoder, self._workers = preparation, encoder, workers
        self.written: set[Path] = set()
        """Files that were written."""
        self.num_encoded = 0
        """Scans of which something was encoded."""

    def __call__(self, sources: Sequence[Source]) -> Iterator[tuple[int, Verdict]]:
        """Numbers and verdicts of scans, each once its encodings are on the disk."""
        try:
            for number, verdict, paths in self._read(sources):
                self.written.update(paths)
                self.num_encoded += bool(paths)
                yield number, verdict
        finally:
            self._encoder.close()

    def _read(self, sources: Sequence[Source]) -> Iterator[tuple[int, Verdict, list[Path]]]:
        write, at_once = self._encoder.write, self._preparation.at_once
        if self._workers is None:
            yield from encode_each(prepare_each(self._preparation, sources), write, at_once)
        elif self._workers.encode:
            with closing(self._workers.read(sources)) as answers:
                yield from ((answer.number, answer.verdict, answer.written) for answer in answers)
        else:
            answers = self._workers.read(sources)
            scans = ((answer.number, answer.verdict, answer.ready) for answer in answers)
            yield from encode_each(scans, write, at_once)


def _changed(entry: ScanEntry, verdict: Verdict) -> UnusableScan | None:
    """Why what was read now is not the scan of this entry, if so."""
    if isinstance(verdict, UnusableScan):
        return verdict
    if verdict.scan_id != entry.scan_id:
        return UnusableScan(Reason.CORRUPT, "the file changed since the cohort was opened")
    if entry.label_path is not None and verdict.label_reason is not None:
        return UnusableScan(verdict.label_reason, verdict.label_detail)
    return None
