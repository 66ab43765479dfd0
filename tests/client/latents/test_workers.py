"""Worker processes: the same as one process, whoever finishes first, and whoever is killed."""

import contextlib
import dataclasses
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from client.latents.cache import LatentCache
from client.latents.workers import Job, WorkerLost, Workers
from client.scans.cohort import Cohort, open_cohort
from client.scans.judgement import Source
from meduet_models.tokenizer.tokenizer import Tokenizer, TokenizerSpec, load_tokenizer
from scans.volume_plan import VolumePlan

PLAN = VolumePlan(modality="t1", shape=(64, 64, 64), spacing_mm=(0.5, 0.5, 0.5), views=2)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    """The shipped one."""
    return load_tokenizer(TokenizerSpec())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Nine scans of which one is there twice, with labels, one of them on another grid; and a wreck."""
    root = tmp_path_factory.mktemp("scans")
    draw = np.random.default_rng(0)
    for number in range(9):
        voxels = draw.gamma(2.0, 100.0, (20, 24, 22)).astype(np.float32)
        nib.save(nib.Nifti1Image(voxels, np.eye(4)), root / f"p{number}.nii.gz")
        if number == 4:
            nib.save(nib.Nifti1Image(voxels, np.diag([-1.0, 1, 1, 1])), root / "p4-again.nii.gz")
        if number > 6:
            place = np.diag([1.0, 1.0, number - 6.0, 1.0])
            label = (voxels > 200).astype(np.uint8)
            nib.save(nib.Nifti1Image(label, place), root / f"p{number}_seg.nii.gz")
    (root / "p9.nii.gz").write_bytes((root / "p0.nii.gz").read_bytes()[:-9])
    return root


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("??/*")}


def passed(root: Path, cache: LatentCache, workers: Workers | None) -> Cohort:
    judges = cache.judges(workers=workers)
    cohort = open_cohort(root, plan=PLAN, split_salt="a", judges=judges)
    assert judges.num_encoded == 10
    cache.encode(cohort, judges=judges)
    return cohort


def job(folder: Path, tokenizer: Tokenizer, encodes: bool = True) -> Job:
    return Job(folder, PLAN, TokenizerSpec(), tokenizer.sha256, encodes)


@pytest.fixture(scope="module")
def alone(
    folder: Path, tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Cohort, dict[str, bytes]]:
    """What one process makes of the folder."""
    cache = LatentCache(tmp_path_factory.mktemp("alone"), tokenizer, PLAN)
    cohort = passed(folder, cache, None)
    assert len(cohort.scans) == 9 and len(files(cache.folder)) == 18
    return cohort, files(cache.folder)


@pytest.mark.parametrize("encodes", [True, False])
def test_two_workers_make_the_same_cohort_and_the_same_files_as_one_process(
    folder: Path,
    tokenizer: Tokenizer,
    alone: tuple[Cohort, dict[str, bytes]],
    tmp_path: Path,
    encodes: bool,
) -> None:
    cache = LatentCache(tmp_path, tokenizer, PLAN)
    with Workers(job(tmp_path, tokenizer, encodes), 2) as workers:
        cohort = passed(folder, cache, workers)
        pids = workers.pids
    assert (cohort, files(tmp_path)) == alone
    assert len(set(pids)) == 2 and not any(running(pid) for pid in pids)


@pytest.mark.parametrize("encodes", [True, False])
def test_a_worker_makes_of_whole_scans_what_one_process_does(
    folder: Path, tokenizer: Tokenizer, tmp_path: Path, encodes: bool
) -> None:
    plan = VolumePlan(modality="t1", shape=(16, 16, 16), extent="scan", registered=False)
    sources = [
        Source((folder / "p7.nii.gz",), folder / "p7_seg.nii.gz"),
        Source((folder / "p1.nii.gz",)),
    ]
    left = []
    for name in ("alone", "worker"):
        cache = LatentCache(tmp_path / name, tokenizer, plan)
        shared = dataclasses.replace(job(cache.folder, tokenizer, encodes), volumes=plan)
        with Workers(shared, 1) as workers:
            judges = cache.judges(workers=workers if name == "worker" else None)
            assert [number for number, _ in judges(sources)] == [0, 1]
        left.append(files(cache.folder))
    assert left[0] == left[1] and len(left[0]) == 2


def test_however_many_scans_are_shared_each_is_answered_once(
    folder: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    sources = [Source((folder / f"p{number % 7}.nii.gz",)) for number in range(45)]
    with Workers(job(tmp_path, tokenizer), 2) as workers:
        answers = list(workers.read(sources))
    assert sorted(answer.number for answer in answers) == list(range(45))
    found = {answer.number % 7: set[str]() for answer in answers}
    for answer in answers:
        assert not isinstance(answer.verdict, Exception)
        found[answer.number % 7].add(answer.verdict.scan_id)
    assert all(map(len, found.values())) and len(set.union(*found.values())) == 7


def test_a_worker_that_is_killed_is_one_line_and_what_was_done_stays(
    folder: Path, tokenizer: Tokenizer, alone: tuple[Cohort, dict[str, bytes]], tmp_path: Path
) -> None:
    sources = [Source((folder / f"p{number}.nii.gz",)) for number in range(7)]
    with Workers(job(tmp_path, tokenizer), 2) as workers:
        workers.start()
        answers = workers.read(sources)
        done = [next(answers)]
        os.kill(workers.pids[0], signal.SIGKILL)  # as the kernel does when memory runs out
        with pytest.raises(WorkerLost) as lost:
            done += answers
    reason = str(lost.value)
    assert reason.startswith("Expected worker 1 of 2 to go on; it was killed while it read scans")
    assert (
        "take fewer workers" in reason
        and "\n" not in reason
        and str(folder) not in reason
        and "nii" not in reason
    )
    assert 1 <= len(done) < len(sources)
    kept = files(tmp_path)
    assert {path.name for answer in done for path in answer.written} <= set(kept)
    cache = LatentCache(tmp_path, tokenizer, PLAN)
    judges = cache.judges()
    cohort = open_cohort(folder, plan=PLAN, split_salt="a", judges=judges)
    scans = cache.encode(cohort, judges=judges)
    assert judges.num_encoded <= 10 - len(done) + 1, "p4 again is encoded anew, since it took no part"
    cache.prune(scans)  # an encoding of p4, where the kill came before anybody knew whose copy it is
    assert files(tmp_path) == alone[1]


def test_a_worker_with_another_tokenizer_says_so(tokenizer: Tokenizer, tmp_path: Path) -> None:
    wrong = dataclasses.replace(job(tmp_path, tokenizer), tokenizer_sha256="f" * 64)
    with Workers(wrong, 1) as workers, pytest.raises(ValueError, match=r"Expected tokenizer ffffffff…"):
        workers.start()


def test_a_disk_that_takes_nothing_is_an_error_of_the_operating_system(
    folder: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    place = tmp_path / "cache"
    place.write_text("a file, not a folder")
    with Workers(job(place, tokenizer), 1) as workers, pytest.raises(OSError, match="directory"):
        list(workers.read([Source((folder / "p0.nii.gz",))]))


def test_workers_end_with_the_process_that_started_them(folder: Path, tmp_path: Path) -> None:
    program = (
        "import sys, time; from pathlib import Path\n"
        "from client.latents.workers import Job, Workers; from scans.volume_plan import VolumePlan\n"
        "from meduet_models.tokenizer.tokenizer import TokenizerSpec\n"
        f"job = Job(Path({str(tmp_path)!r}), VolumePlan(modality='t1'), TokenizerSpec(), '', False)\n"
        "workers = Workers(job, 2); workers.start(); print(*workers.pids, flush=True); time.sleep(600)\n"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) as started:
        assert started.stdout is not None
        pids = list(map(int, started.stdout.readline().split()))
        assert len(pids) == 2 and all(map(running, pids))
        started.kill()  # no chance to say goodbye
    for pid in pids:
        for _ in until(30.0):
            if not running(pid):
                break
        assert not running(pid)


@pytest.mark.parametrize("number", [0, -1, 100_000])
def test_an_impossible_number_of_workers_is_refused(
    tokenizer: Tokenizer, tmp_path: Path, number: int
) -> None:
    with pytest.raises(ValueError, match="Expected 1 to 256 workers"):
        Workers(job(tmp_path, tokenizer), number)


def running(pid: int) -> bool:
    """Whether it is there and no zombie."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def until(seconds: float) -> Iterator[None]:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        yield
        time.sleep(0.05)
