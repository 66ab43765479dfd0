"""The one pass: each scan is read once, and its latents depend on nothing but itself."""

import dataclasses
import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

import client.scans.judgement
import client.scans.judgement_memo
from client.latents.cache import LatentCache
from client.latents.cache_files import ClearFiles
from client.latents.encoding import Encoder, Preparation, Ready, encode_each, prepare_each
from client.latents.latent_set import LATENTS, LatentSet
from client.scans.cohort import Cohort, open_cohort, read_entry
from client.scans.judgement import Source, Verdict, judge
from client.scans.judgement_memo import JudgementMemo
from meduet_models.tokenizer.tokenizer import TokenizerSpec, load_tokenizer
from meduet_models.weights import load_weights
from scans.volume_plan import VolumePlan
from scans.volumes import prepare, read_scan

PLAN = VolumePlan(modality="t1", shape=(16, 16, 16), spacing_mm=(2.0, 2.0, 2.0))


@pytest.fixture(autouse=True)
def settled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files just written count as settled."""
    monkeypatch.setattr(client.scans.judgement_memo, "SETTLED_S", -1.0)


def write(path: Path, seed: int, affine: np.ndarray | None = None, label: bool = False) -> Path:
    draw = np.random.default_rng(seed)
    shape = (20 + seed % 3, 18, 22)
    values = (draw.random(shape) > 0.5).astype(np.uint8) if label else draw.gamma(2.0, 100.0, shape)
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(values.astype(np.uint8 if label else np.float32), affine, dtype=None), path)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Eleven scans and what else lies in a folder: labels, a copy turned around, a wreck, a mask."""
    root = tmp_path / "scans"
    for number in range(10):
        write(root / f"p{number:02d}.nii.gz", number, np.diag([1.5, 1.0, 1.0, 1.0]))
    for number in (2, 5):
        write(root / f"p{number:02d}_seg.nii.gz", number, np.diag([1.5, 1.0, 1.0, 1.0]), label=True)
    write(root / "p06_seg.nii.gz", 6, np.diag([1.5, 1.0, 2.0, 1.0]), label=True)  # on another grid
    write(root / "p10.nii.gz", 3, np.diag([-1.5, 1.0, 1.0, 1.0]))  # p03 again, turned around
    regions = np.random.default_rng(11).integers(0, 4, (20, 18, 22)).astype(np.uint8)
    nib.save(nib.Nifti1Image(regions, np.eye(4)), root / "p11.nii.gz")
    (root / "p12.nii.gz").write_bytes((root / "p01.nii.gz").read_bytes()[:-50])
    return root


def opened(root: Path, cache: LatentCache, memo: Path, **named: object) -> tuple[Cohort, LatentSet]:
    judges = cache.judges()
    remembered = JudgementMemo(memo, {}).judges(judges)
    cohort = open_cohort(root, plan=cache.volumes, split_salt="a", judges=remembered, **named)  # type: ignore[arg-type]
    return cohort, cache.encode(cohort, judges=judges)


def files(cache: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in cache.glob("??/*")}


def test_each_scan_is_read_once_and_its_latents_are_those_of_two_readings(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = dataclasses.replace(PLAN, views=2)
    tokenizer = load_tokenizer(TokenizerSpec())
    before = open_cohort(folder, plan=plan, split_salt="a")  # reads all, encodes nothing
    read_files, read = client.scans.judgement.read_files, []
    monkeypatch.setattr(
        client.scans.judgement, "read_files", lambda *asked: read.append(asked) or read_files(*asked)
    )
    cohort, latents = opened(folder, LatentCache(tmp_path / "cache", tokenizer, plan), tmp_path / "memo")
    assert len(read) == 13 and cohort == before and latents.num_scans == 10
    again = LatentCache(tmp_path / "again", tokenizer, plan)
    again.encode(before)
    assert len(read) == 13 + 10
    assert files(tmp_path / "cache") == files(tmp_path / "again")
    for row, entry in enumerate(latents.entries):
        scan, label = read_entry(entry, plan)
        views = [prepare(scan, plan, view, label) for view in range(2)]
        expected = tokenizer.encode(torch.stack([one.volume for one in views]))
        for view in range(2):
            assert torch.equal(latents.latents([row], view)[0], expected[view])


def test_latents_of_a_scan_depend_on_no_other_scan_and_not_on_how_many_threads_there_are(
    folder: Path, tmp_path: Path
) -> None:
    tokenizer = load_tokenizer(TokenizerSpec())
    sources = [Source((folder / f"p{number:02d}.nii.gz",)) for number in range(8)]
    stored = []
    before = torch.get_num_threads()
    for name, count, threads in (("alone", 1, 1), ("three", 3, 4), ("eight", 8, 1)):
        preparation = Preparation(tmp_path / name, tokenizer.sha256, PLAN, ClearFiles())
        encoder = Encoder(tokenizer, "cpu", preparation)
        torch.set_num_threads(threads)
        try:
            found = list(
                encode_each(prepare_each(preparation, sources[:count]), encoder.write, preparation.at_once)
            )
            assert torch.get_num_threads() == threads
        finally:
            torch.set_num_threads(before)
        stored.append(load_weights(found[0][2][0])[0][LATENTS])
    assert preparation.at_once == 8
    assert torch.equal(stored[0], stored[1]) and torch.equal(stored[0], stored[2])
    volume = prepare(read_scan(sources[0].files[0]), PLAN).volume
    alone, beside = tokenizer.encode(volume[None]), tokenizer.encode(torch.stack([volume] * 8))[:1]
    assert not torch.equal(alone, beside), "or filling up were needless"


def test_the_cohort_does_not_depend_on_the_order_in_which_scans_are_judged(folder: Path) -> None:
    def shuffled(seed: int) -> object:
        def judges(sources: Sequence[Source]) -> Iterator[tuple[int, Verdict]]:
            for number in random.Random(seed).sample(range(len(sources)), len(sources)):
                yield number, judge(sources[number], PLAN)

        return judges

    cohorts = [
        open_cohort(folder, plan=PLAN, split_salt="a", judges=judges)  # type: ignore[arg-type]
        for judges in (None, shuffled(1), shuffled(2), shuffled(3))
    ]
    assert all(cohort == cohorts[0] for cohort in cohorts)
    reasons = {one.path.name: one.reason.value for one in cohorts[0].exclusions}
    assert reasons == {
        "p06_seg.nii.gz": "label_mismatch",
        "p10.nii.gz": "duplicate",
        "p11.nii.gz": "label_map",
        "p12.nii.gz": "truncated",
    }


def test_what_was_encoded_of_a_scan_that_takes_no_part_is_removed(folder: Path, tmp_path: Path) -> None:
    cache = LatentCache(tmp_path / "cache", load_tokenizer(TokenizerSpec()), PLAN)
    cohort, latents = opened(folder, cache, tmp_path / "memo")
    assert len(cohort.scans) == 10
    assert {path.name for path in latents.files()} == set(files(cache.folder)), "p10's are gone"
    assert cache.state(cohort).unused == 0


def test_a_pass_that_was_killed_goes_on_where_it_stopped_and_ends_as_if_undisturbed(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = load_tokenizer(TokenizerSpec())
    whole = LatentCache(tmp_path / "whole", tokenizer, PLAN)
    undisturbed, _ = opened(folder, whole, tmp_path / "whole.judged")
    write_batch, num_batches = Encoder.write, 0

    def killed(encoder: Encoder, batch: Sequence[Ready]) -> None:
        nonlocal num_batches
        num_batches += 1
        if num_batches > 1:
            raise KeyboardInterrupt
        write_batch(encoder, batch)

    cache = LatentCache(tmp_path / "cache", tokenizer, PLAN)
    with monkeypatch.context() as patch:
        patch.setattr(Encoder, "write", killed)
        with pytest.raises(KeyboardInterrupt):
            opened(folder, cache, tmp_path / "memo")
    assert len(files(cache.folder)) == 8
    read_files, read = client.scans.judgement.read_files, []
    monkeypatch.setattr(
        client.scans.judgement,
        "read_files",
        lambda sources, *rest: read.append(sources[0].name) or read_files(sources, *rest),
    )
    cohort, _ = opened(folder, cache, tmp_path / "memo")
    assert read == ["p08.nii.gz", "p09.nii.gz", "p10.nii.gz", "p11.nii.gz", "p12.nii.gz"]
    assert cohort == undisturbed and files(cache.folder) == files(whole.folder)
    assert (tmp_path / "memo").read_bytes() == (tmp_path / "whole.judged").read_bytes()


def test_a_scan_that_came_is_read_and_the_others_are_not(folder: Path, tmp_path: Path) -> None:
    cache = LatentCache(tmp_path / "cache", load_tokenizer(TokenizerSpec()), PLAN)
    opened(folder, cache, tmp_path / "memo")
    write(folder / "p20.nii.gz", 20, np.eye(4))
    judges = cache.judges()
    asked: list[Source] = []

    def counted(sources: Sequence[Source]) -> Iterator[tuple[int, Verdict]]:
        asked.extend(sources)
        return judges(sources)

    memo = JudgementMemo(tmp_path / "memo", {}).judges(counted)
    cohort = open_cohort(folder, plan=PLAN, split_salt="a", judges=memo)
    assert [source.files[0].name for source in asked] == ["p20.nii.gz"] and len(cohort.scans) == 11
    assert json.dumps(cohort.summary()).count("label_map") == 1
