"""Odd NIfTI files end with the right reason, good ones with nibabel's values."""

import gzip
import tracemalloc
import warnings
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from scans.scans import Reason, UnusableScan
from scans.volumes import read_label, read_scan

RAMP = np.arange(5 * 6 * 7, dtype=np.int16).reshape(5, 6, 7)


def image_bytes(array: np.ndarray, affine: np.ndarray | None = None, **header: object) -> bytes:
    image = nib.Nifti1Image(array, np.eye(4) if affine is None else affine)
    for field, value in header.items():
        image.header[field] = value
    return bytes(image.to_bytes())


def patched(content: bytes, offset: int, kind: str, *values: float) -> bytes:
    patch = np.array(values, dtype=kind).tobytes()
    return content[:offset] + patch + content[offset + len(patch) :]


def nans(count: int) -> np.ndarray:
    array = RAMP.astype(np.float32)
    array.flat[:count] = np.nan
    return array


def rgb() -> np.ndarray:
    return np.zeros((5, 6, 7), dtype=[("R", "u1"), ("G", "u1"), ("B", "u1")])


GOOD = image_bytes(RAMP)
DIM, PIXDIM, QFORM_CODE, SFORM_CODE, SROW, DATATYPE, VOX_OFFSET = 40, 76, 252, 254, 280, 70, 108
FLAT = (1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0)
FOLDED = np.array([[1.0, 1, 0, 0], [0, 0, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])

ODD: dict[str, tuple[str, Callable[[], bytes], Reason]] = {
    "no bytes": ("a.nii", lambda: b"", Reason.EMPTY),
    "no bytes, gzipped name": ("a.nii.gz", lambda: b"", Reason.EMPTY),
    "no voxels": ("a.nii", lambda: patched(GOOD, DIM, "<i2", 3, 5, 0, 7), Reason.EMPTY),
    "text": ("a.nii", lambda: b"not a scan " * 99, Reason.NOT_A_SCAN),
    "text, gzipped": ("a.nii.gz", lambda: gzip.compress(b"not a scan " * 99), Reason.NOT_A_SCAN),
    "gzipped but plain name": ("a.nii", lambda: gzip.compress(GOOD), Reason.WRONG_EXTENSION),
    "plain but gzipped name": ("a.nii.gz", lambda: GOOD, Reason.WRONG_EXTENSION),
    "another name": ("a.dat", lambda: GOOD, Reason.WRONG_EXTENSION),
    "DICOM inside": ("a.nii", lambda: b"\0" * 128 + b"DICM" + b"\0" * 300, Reason.WRONG_EXTENSION),
    "half a header": ("a.nii", lambda: GOOD[:200], Reason.TRUNCATED),
    "half the voxels": ("a.nii", lambda: GOOD[:500], Reason.TRUNCATED),
    "half the voxels, gzipped": ("a.nii.gz", lambda: gzip.compress(GOOD[:500]), Reason.TRUNCATED),
    "half a gzip stream": ("a.nii.gz", lambda: gzip.compress(GOOD)[:-100], Reason.TRUNCATED),
    "no checksum": ("a.nii.gz", lambda: gzip.compress(GOOD)[:-8], Reason.TRUNCATED),
    "wrong checksum": ("a.nii.gz", lambda: patched(gzip.compress(GOOD), -8, "<u4", 7), Reason.CORRUPT),
    "negative size": ("a.nii", lambda: patched(GOOD, DIM, "<i2", 3, 5, -6, 7), Reason.CORRUPT),
    "impossible type": ("a.nii", lambda: patched(GOOD, DATATYPE, "<i2", 999), Reason.CORRUPT),
    "impossible offset": ("a.nii", lambda: patched(GOOD, VOX_OFFSET, "<f4", -1e9), Reason.CORRUPT),
    "offset beyond sense": ("a.nii", lambda: patched(GOOD, VOX_OFFSET, "<f4", 1e12), Reason.CORRUPT),
    "RGB": ("a.nii", lambda: image_bytes(rgb()), Reason.RGB),
    "complex": ("a.nii", lambda: image_bytes(RAMP.astype(np.complex64)), Reason.COMPLEX),
    "constant": ("a.nii", lambda: image_bytes(np.ones((5, 6, 7), np.int16)), Reason.CONSTANT),
    "a mask": ("a.nii", lambda: image_bytes((RAMP > 50).astype(np.uint8)), Reason.TWO_VALUED),
    "all NaN": ("a.nii", lambda: image_bytes(nans(RAMP.size)), Reason.NOT_FINITE),
    "3 of 210 NaN": ("a.nii", lambda: image_bytes(nans(3)), Reason.NOT_FINITE),
    "a slice": ("a.nii", lambda: image_bytes(RAMP[..., 0]), Reason.TWO_D),
    "a slice as a volume": ("a.nii", lambda: image_bytes(RAMP[:, :1]), Reason.TWO_D),
    "two slices": ("a.nii", lambda: image_bytes(RAMP[..., :2]), Reason.TOO_FEW_SLICES),
    "5-D": ("a.nii", lambda: image_bytes(np.zeros((5, 6, 7, 1, 3), np.int16)), Reason.TOO_MANY_DIMS),
    "zero spacing": ("a.nii", lambda: patched(GOOD, SROW, "<f4", *FLAT), Reason.ZERO_SPACING),
    "no orientation, zero spacing": (
        "a.nii",
        lambda: patched(patched(GOOD, QFORM_CODE, "<i2", 0, 0), PIXDIM, "<f4", 1, 1, 0, 1),
        Reason.ZERO_SPACING,
    ),
    "metres for millimetres": ("a.nii", lambda: image_bytes(RAMP, np.diag([1e-3, 1e-3, 1e-3, 1])),
                               Reason.IMPLAUSIBLE_SPACING),
    "singular affine": ("a.nii", lambda: image_bytes(RAMP, FOLDED), Reason.SINGULAR_AFFINE),
    "affine of NaN": ("a.nii", lambda: patched(GOOD, SROW, "<f4", np.nan), Reason.SINGULAR_AFFINE),
    "no orientation": ("a.nii", lambda: patched(GOOD, QFORM_CODE, "<i2", 0, 0), Reason.NO_ORIENTATION),
    "huge header": ("a.nii", lambda: patched(GOOD, DIM, "<i2", 3, 32767, 32767, 32767), Reason.TOO_LARGE),
    "huge header, gzipped": (
        "a.nii.gz",
        lambda: gzip.compress(patched(GOOD, DIM, "<i2", 3, 32767, 32767, 32767)),
        Reason.TOO_LARGE,
    ),
    "more than gzip can hold": (
        "a.nii.gz",
        lambda: gzip.compress(patched(GOOD, DIM, "<i2", 3, 800, 800, 800)),
        Reason.TRUNCATED,
    ),
    "a long series that is not there": (
        "a.nii",
        lambda: patched(GOOD, DIM, "<i2", 4, 5, 6, 7, 30000),
        Reason.TRUNCATED,
    ),
}  # fmt: skip


def reason_for(path: Path) -> UnusableScan:
    with pytest.raises(UnusableScan) as caught:
        read_scan(path)
    return caught.value


@pytest.mark.parametrize("case", ODD)
def test_an_odd_file_is_refused_for_its_own_reason(case: str, tmp_path: Path) -> None:
    name, content, reason = ODD[case]
    (tmp_path / name).write_bytes(content())
    error = reason_for(tmp_path / name)
    assert error.reason is reason
    assert str(tmp_path) not in str(error) and name not in str(error)


def test_a_huge_header_is_refused_before_memory_is_allocated(tmp_path: Path) -> None:
    path = tmp_path / "a.nii"
    for content in (
        patched(GOOD, DIM, "<i2", 3, 32767, 32767, 32767),
        patched(GOOD, DIM, "<i2", 3, 800, 800, 800),
    ):
        path.write_bytes(content)
        tracemalloc.start()
        reason_for(path)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 2**21


def test_a_missing_file_is_unreadable_not_an_exception_of_another_kind(tmp_path: Path) -> None:
    assert reason_for(tmp_path / "gone.nii.gz").reason is Reason.UNREADABLE


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    dtype=st.sampled_from(["u1", "<i2", ">i2", "<u2", "<i4", "<i8", "<f4", ">f4", "<f8"]),
    scaling=st.sampled_from([(np.nan, np.nan), (0.0, 5.0), (1.0, 0.0), (2.5, -1024.0), (-0.25, 3.0)]),
    version=st.sampled_from([nib.Nifti1Image, nib.Nifti2Image]),
    name=st.sampled_from(["a.nii", "a.nii.gz"]),
    seed=st.integers(0, 999),
)
def test_values_and_affine_are_those_nibabel_reads(
    dtype: str, scaling: tuple[float, float], version: type, name: str, seed: int, tmp_path: Path
) -> None:
    generator = np.random.default_rng(seed)
    affine = np.eye(4)
    affine[:3] = generator.normal(size=(3, 4)) + 3 * np.eye(3, 4)
    array = generator.integers(0, 200, (4, 5, 6)).astype(dtype)
    image = version(array, affine, dtype=array.dtype)
    if dtype.startswith(">"):
        image = version(array, affine, header=image.header.as_byteswapped(">"))
    image.header.set_data_dtype(dtype)
    content = bytearray(image.to_bytes())
    order = ">" if dtype.startswith(">") else "<"
    where, kind = (112, "f4") if version is nib.Nifti1Image else (176, "f8")
    content = bytearray(patched(bytes(content), where, order + kind, *scaling))
    path = tmp_path / name
    path.write_bytes(gzip.compress(bytes(content)) if name.endswith("gz") else bytes(content))
    scan, wanted = read_scan(path), nib.load(path)
    np.testing.assert_allclose(scan.array, wanted.get_fdata(), rtol=1e-6)
    np.testing.assert_allclose(scan.affine, wanted.affine)


def test_a_series_becomes_its_first_volume_its_mean_or_an_exclusion(tmp_path: Path) -> None:
    series = np.stack([RAMP, 3 * RAMP, 5 * RAMP], axis=-1)
    nib.save(nib.Nifti1Image(series, np.eye(4)), tmp_path / "a.nii.gz")
    first, mean = read_scan(tmp_path / "a.nii.gz", "first"), read_scan(tmp_path / "a.nii.gz", "mean")
    np.testing.assert_array_equal(first.array, RAMP)
    np.testing.assert_array_equal(mean.array, 3 * RAMP)
    assert first.num_volumes == mean.num_volumes == 3
    with pytest.raises(UnusableScan, match="four_d"):
        read_scan(tmp_path / "a.nii.gz", "refuse")


def test_a_series_cut_off_after_its_first_volume_is_still_truncated(tmp_path: Path) -> None:
    content = image_bytes(np.stack([RAMP, RAMP], axis=-1))
    (tmp_path / "a.nii.gz").write_bytes(gzip.compress(content[:-4]))
    assert reason_for(tmp_path / "a.nii.gz").reason is Reason.TRUNCATED


def test_a_few_nan_become_the_lowest_value_and_are_counted(tmp_path: Path) -> None:
    array = RAMP.astype(np.float32) - 7
    array[4, 5, 6], array[0, 0, 1] = np.nan, np.inf
    nib.save(nib.Nifti1Image(array, np.eye(4)), tmp_path / "a.nii")
    scan = read_scan(tmp_path / "a.nii")
    assert scan.num_repaired == 2
    assert scan.array[4, 5, 6] == scan.array[0, 0, 1] == -7


def test_the_same_voxels_in_another_header_are_the_same_voxels_but_another_scan(tmp_path: Path) -> None:
    nib.save(nib.Nifti1Image(RAMP, np.eye(4)), tmp_path / "a.nii")
    nib.save(nib.Nifti1Image(RAMP.astype(np.float64), np.eye(4)), tmp_path / "b.nii.gz")
    nib.save(nib.Nifti1Image(RAMP, np.diag([-1.0, 1, 1, 1])), tmp_path / "c.nii")
    a, b, c = (read_scan(tmp_path / name) for name in ("a.nii", "b.nii.gz", "c.nii"))
    assert a.voxels_sha256 == b.voxels_sha256 == c.voxels_sha256
    assert a.scan_id == b.scan_id != c.scan_id


def test_a_label_may_be_constant_but_not_fractional(tmp_path: Path) -> None:
    nib.save(nib.Nifti1Image(np.zeros((5, 6, 7), np.uint8), np.eye(4)), tmp_path / "none.nii")
    assert read_label(tmp_path / "none.nii").array.max() == 0
    for odd in (0.5, np.nan, 1e6):
        array = RAMP.astype(np.float32)
        array[1, 1, 1] = odd
        nib.save(nib.Nifti1Image(array, np.eye(4)), tmp_path / "odd.nii")
        with pytest.raises(UnusableScan, match="label_not_integer"):
            read_label(tmp_path / "odd.nii")


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    where=st.lists(st.integers(0, 400), min_size=1, max_size=6),
    values=st.lists(st.integers(0, 255), min_size=6, max_size=6),
    gzipped=st.booleans(),
)
def test_flipped_bytes_give_a_scan_or_a_reason_and_nothing_else(
    where: list[int], values: list[int], gzipped: bool, tmp_path: Path
) -> None:
    content = bytearray(GOOD)
    for offset, value in zip(where, values, strict=False):
        content[offset] = value
    path = tmp_path / ("a.nii.gz" if gzipped else "a.nii")
    path.write_bytes(gzip.compress(bytes(content)) if gzipped else bytes(content))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # numpy's, of absurd numbers
        try:
            assert np.isfinite(read_scan(path).array).all()
        except UnusableScan as error:
            assert error.reason in Reason
