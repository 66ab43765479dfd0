"""The latent set: rows, splits, labels, merging, and what happens when a file is lost while in use."""

from pathlib import Path

import pytest
import torch

from client.latents.cache_files import ClearFiles, DamagedEncoding
from client.latents.latent_set import LatentSet, StoredLatent, open_stored
from client.scans.cohort import Cohort, Exclusion, ScanEntry
from meduet_models.weights import save_weights
from scans.scans import Reason


def stored(path: Path, value: float, label: int | None = None) -> StoredLatent:
    tensors = {"latents": torch.full((2, 3, 4, 5), float(value))}
    if label is not None:
        tensors["label"] = torch.full(
            (1, 12, 16, 20), label, dtype=torch.uint8 if label < 256 else torch.int16
        )
    save_weights(path, tensors, {"geometry": "{}"})
    found = open_stored(path, ClearFiles())
    assert found is not None
    return found


def latent_set(folder: Path, patients: str, labels: list[int | None], site: int = 0) -> LatentSet:
    folder.mkdir(exist_ok=True)
    splits = ("train", "validation", "test")
    entries = tuple(
        ScanEntry(
            f"{number:064x}",
            name,
            Path("x"),
            (Path("x"),),
            "t1",
            splits[number % 3],
            None,
            {"age": float(number)},
        )
        for number, name in enumerate(patients)
    )
    rows = [
        [stored(folder / f"{name}{number}.safetensors", number, label)]
        for number, (name, label) in enumerate(zip(patients, labels, strict=True))
    ]
    cohort = Cohort(folder, entries, (Exclusion(folder / "bad", Reason.EMPTY),))
    return LatentSet(cohort, rows, [site] * len(rows))


def test_rows_come_in_the_order_asked_for_and_may_repeat(tmp_path: Path) -> None:
    scans = latent_set(tmp_path, "abcd", [None] * 4, site=2)
    read = scans.latents([3, 0, 3])
    assert read.shape == (3, 2, 3, 4, 5) and read.dtype == torch.float32
    assert read[:, 0, 0, 0, 0].tolist() == [3.0, 0.0, 3.0]
    read.zero_()  # a copy: the cache is not written through
    assert scans.latents([3]).min() == 3.0
    assert scans.indices("train") == [0, 3] and scans.indices("test") == [2]
    assert scans.site_index.tolist() == [2, 2, 2, 2]
    assert [known["age"] for known in scans.covariates] == [0, 1, 2, 3]


def test_labels_are_all_or_none(tmp_path: Path) -> None:
    scans = latent_set(tmp_path, "abc", [1, None, 300])
    assert scans.has_label == [True, False, True]
    labels = scans.labels([0, 2])
    assert labels is not None and labels.dtype == torch.int64
    assert labels.amax((1, 2, 3, 4)).tolist() == [1, 300]
    assert scans.labels([1]) is None
    with pytest.raises(ValueError, match=r"2 have\. Choose rows by has_label"):
        scans.labels([0, 1, 2])


@pytest.mark.parametrize(("row", "view"), [(3, 0), (-1, 0), (0, 1), (0, -1)])
def test_a_row_or_view_that_is_not_there_is_an_index_error(tmp_path: Path, row: int, view: int) -> None:
    with pytest.raises(IndexError, match="Expected a row below 3 and a view below 1"):
        latent_set(tmp_path, "abc", [None] * 3).latents([row], view)


def test_merged_sets_keep_rows_apart_and_two_hospitals_patients_of_one_name_too(tmp_path: Path) -> None:
    one = latent_set(tmp_path / "one", "ab", [None, 1], site=5)
    two = latent_set(tmp_path / "two", "bbc", [1, 1, None], site=7)
    merged = LatentSet.merge([one, two])
    assert merged.site_index.tolist() == [0, 0, 1, 1, 1]
    assert merged.patients == ["0/a", "0/b", "1/b", "1/b", "1/c"]
    assert torch.equal(merged.latents(range(5)), torch.cat([one.latents([0, 1]), two.latents([0, 1, 2])]))
    assert merged.indices("train") == [0, 2]
    assert merged.has_label == [False, True, True, True, False]
    assert len(merged.cohort.exclusions) == 2 and len(merged.entries) == 5
    assert merged.files() == one.files() | two.files()


def test_sets_of_other_shapes_do_not_merge(tmp_path: Path) -> None:
    one = latent_set(tmp_path, "a", [None])
    save_weights(tmp_path / "other", {"latents": torch.zeros(2, 3, 4, 6)}, {"geometry": "{}"})
    other = open_stored(tmp_path / "other", ClearFiles())
    assert other is not None
    with pytest.raises(ValueError, match="Expected rows of one shape"):
        LatentSet.merge([one, LatentSet(one.cohort, [[other]], [0])])


def test_a_file_lost_or_cut_after_opening_is_an_error_and_not_a_crash(tmp_path: Path) -> None:
    scans = latent_set(tmp_path, "ab", [None, None])
    lost, cut = sorted(scans.files())
    lost.unlink()
    cut.write_bytes(cut.read_bytes()[:-4])
    for row in (0, 1):
        with pytest.raises(
            DamagedEncoding, match=r"(is gone|was cut short)\. Run `meduet-site prepare` again"
        ):
            scans.latents([row])
    assert open_stored(lost, ClearFiles()) is None
    with pytest.raises(DamagedEncoding, match="was cut short"):
        open_stored(cut, ClearFiles())
