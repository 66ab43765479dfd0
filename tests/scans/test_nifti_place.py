"""A header that says twice where a scan lies is believed by the stated rule, and contradictions are said."""

import gzip
import io
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from scans.scans import Note, Reason, Scan, UnusableScan, accept, is_hounsfield
from scans.volumes import read_scan

RAMP = np.arange(5 * 6 * 7, dtype=np.int16).reshape(5, 6, 7)
EDGES = np.array([1.5, 2.0, 3.0])
DRAWS, QUICK = 5000, 1500


def turn_of(generator: np.random.Generator, degrees: float = 180.0) -> np.ndarray:
    """A rotation by at most so much, about any axis."""
    axis = generator.normal(size=3)
    axis /= np.linalg.norm(axis)
    angle = np.radians(generator.uniform(0, degrees))
    cross = np.cross(np.eye(3), axis)
    return np.asarray(np.eye(3) + np.sin(angle) * cross + (1 - np.cos(angle)) * cross @ cross)


def affine_of(turn: np.ndarray, edges: np.ndarray = EDGES, mirror: bool = False) -> np.ndarray:
    affine = np.eye(4)
    affine[:3, :3] = turn * (edges * [1, 1, -1 if mirror else 1])
    affine[:3, 3] = [-10.0, 20.0, 5.0]
    return affine


def image_of(
    sform: np.ndarray | None, qform: np.ndarray | None, codes: tuple[int, int] = (1, 1)
) -> nib.Nifti1Image:
    """An image with these two, or one of them; pixdim is the qform's."""
    image = nib.Nifti1Image(RAMP, np.eye(4))
    image.set_qform(qform if qform is not None else sform, code=codes[1] if qform is not None else 0)
    image.set_sform(sform, code=codes[0] if sform is not None else 0)
    return image


def read(image: nib.Nifti1Image, folder: Path, **fields: object) -> Scan:
    content = image.to_bytes()
    header = nib.Nifti1Header.from_fileobj(io.BytesIO(content[:348]), check=False)
    for name, value in fields.items():  # what nibabel itself would not write
        header[name] = value
    (folder / "a.nii").write_bytes(header.binaryblock + content[348:])
    return read_scan(folder / "a.nii")


def test_a_qfac_of_zero_is_one(tmp_path: Path) -> None:
    image = image_of(None, affine_of(np.eye(3)))
    pixdim = image.header["pixdim"].copy()
    pixdim[0] = 0
    scan = read(image, tmp_path, pixdim=pixdim)
    np.testing.assert_allclose(scan.affine, affine_of(np.eye(3)), atol=1e-5)
    assert not scan.notes


@pytest.mark.parametrize(("excess", "fits"), [(6e-7, True), (5e-4, True), (0.05, False), (np.nan, False)])
def test_a_quaternion_may_be_longer_than_one_by_a_rounding(excess: float, fits: bool, tmp_path: Path) -> None:
    image = image_of(None, affine_of(np.eye(3)))
    fields = {"quatern_b": 0.0, "quatern_c": 0.0, "quatern_d": np.sqrt(1 + excess)}
    if not fits:
        with pytest.raises(UnusableScan, match="singular_affine: no valid quaternion"):
            read(image, tmp_path, **fields)
        return
    scan = read(image, tmp_path, **fields)
    np.testing.assert_allclose(scan.affine[:3, :3], np.diag(EDGES * [-1, -1, 1]), atol=1e-5)


@pytest.mark.parametrize(
    ("code", "mm", "noted"), [(0, 1, False), (1, 1000, True), (2, 1, False), (3, 1e-3, True)]
)
@pytest.mark.parametrize("source", ["sform", "qform"])
def test_lengths_are_in_the_headers_unit(
    code: int, mm: float, noted: bool, source: str, tmp_path: Path
) -> None:
    stored = affine_of(np.eye(3), EDGES / mm)
    stored[:3, 3] /= mm
    image = image_of(stored, None) if source == "sform" else image_of(None, stored)
    scan = read(image, tmp_path, xyzt_units=code | 8)
    np.testing.assert_allclose(scan.affine, affine_of(np.eye(3)), rtol=1e-5)
    assert scan.notes == (Note.UNIT,) * noted


def test_a_unit_that_makes_no_sense_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnusableScan, match="implausible_spacing"):
        read(image_of(affine_of(np.eye(3)), None), tmp_path, xyzt_units=1)


@pytest.mark.parametrize("source", ["both", "qform"])
def test_the_sign_of_a_size_mirrors_nothing_and_is_said(source: str, tmp_path: Path) -> None:
    place = affine_of(np.eye(3))
    image = image_of(place if source == "both" else None, place)
    pixdim = image.header["pixdim"].copy()
    pixdim[1] *= -1
    scan = read(image, tmp_path, pixdim=pixdim)
    np.testing.assert_allclose(scan.affine, place, atol=1e-5)
    assert scan.notes == (Note.NEGATIVE_SPACING,)


@pytest.mark.parametrize("codes", [(1, 1), (2, 1), (4, 1)])
def test_a_mirror_between_sform_and_qform_is_an_exclusion(codes: tuple[int, int], tmp_path: Path) -> None:
    for sform, qform in ((True, False), (False, True)):
        image = image_of(affine_of(np.eye(3), mirror=sform), affine_of(np.eye(3), mirror=qform), codes)
        with pytest.raises(UnusableScan, match="left_in_doubt: sform and qform are mirrored"):
            read(image, tmp_path)


def test_a_half_turn_puts_left_in_doubt_too(tmp_path: Path) -> None:
    image = image_of(affine_of(np.diag([-1.0, -1.0, 1.0])), affine_of(np.eye(3)))
    with pytest.raises(UnusableScan, match="left_in_doubt: sform and qform are 180 degrees apart"):
        read(image, tmp_path)


def test_a_sform_without_scale_is_not_believed(tmp_path: Path) -> None:
    turn = turn_of(np.random.default_rng(0), 20)
    scan = read(image_of(affine_of(turn, np.ones(3)), affine_of(turn), (2, 1)), tmp_path)
    np.testing.assert_allclose(scan.affine, affine_of(turn), atol=1e-5)
    assert scan.notes == (Note.SFORM_WITHOUT_SCALE,)


def test_sizes_that_contradict_are_an_exclusion_with_both(tmp_path: Path) -> None:
    image = image_of(affine_of(np.eye(3), EDGES * 2), affine_of(np.eye(3)))
    with pytest.raises(UnusableScan, match=r"sizes_contradict: sform 3 x 4 x 6, pixdim 1\.5 x 2 x 3"):
        read(image, tmp_path)
    alone = image_of(affine_of(np.eye(3), np.ones(3)), None)
    alone.header["pixdim"][1:4] = EDGES
    with pytest.raises(UnusableScan, match="sizes_contradict"):
        read(alone, tmp_path)


def test_a_template_may_scale_and_a_default_pixdim_says_nothing(tmp_path: Path) -> None:
    template = affine_of(turn_of(np.random.default_rng(1), 10), EDGES * 1.1)
    scan = read(image_of(template, affine_of(np.eye(3)), (4, 1)), tmp_path)
    np.testing.assert_allclose(scan.affine, template, atol=1e-5)
    assert scan.notes == (Note.PIXDIM_IGNORED,)
    alone = image_of(affine_of(np.eye(3)), None)
    alone.header["pixdim"][1:4] = 1
    scan = read(alone, tmp_path)
    np.testing.assert_allclose(scan.affine, affine_of(np.eye(3)))
    assert scan.notes == (Note.PIXDIM_IGNORED,)


def test_two_places_in_one_space_are_said_and_in_two_spaces_are_legal(tmp_path: Path) -> None:
    turned = affine_of(turn_of(np.random.default_rng(2), 0) @ np.array(
        [[1, 0, 0], [0, np.cos(0.2), -np.sin(0.2)], [0, np.sin(0.2), np.cos(0.2)]]
    ))  # fmt: skip
    for codes, notes in (((1, 1), (Note.TWO_PLACES,)), ((2, 1), ())):
        scan = read(image_of(turned, affine_of(np.eye(3)), codes), tmp_path)
        np.testing.assert_allclose(scan.affine, turned, atol=1e-5)
        assert scan.notes == notes


@pytest.mark.parametrize(
    "draws", [range(QUICK), pytest.param(range(QUICK, DRAWS), marks=pytest.mark.slow)], ids=["quick", "all"]
)
def test_no_header_is_wrong_in_silence_whatever_is_drawn(tmp_path: Path, draws: range) -> None:
    read_quietly = said = 0
    for seed in draws:
        generator = np.random.default_rng(seed)
        mm = float(generator.choice([1.0, 1.0, 1e3, 1e-3]))
        edges = generator.uniform(0.5, 5, 3)
        truth = affine_of(turn_of(generator), edges, bool(generator.integers(2)))
        stored = truth.copy()
        stored[:3] /= mm
        damage = generator.choice(["none", "none", "mirror", "scale", "turn", "qfac", "length", "sign"])
        image = image_of(stored, stored, (int(generator.choice([0, 1, 2])), 1))
        sform = stored.copy()
        if damage == "mirror":
            sform[:3, int(generator.integers(3))] *= -1
        elif damage == "scale":
            sform[:3, :3] *= float(generator.choice([0.5, 2.0]))
        elif damage == "turn":
            sform[:3, :3] = turn_of(generator) @ sform[:3, :3]
        if image.header["sform_code"] > 0:
            image.set_sform(sform, code=int(image.header["sform_code"]))
        pixdim = image.header["pixdim"].copy()
        if damage == "qfac" and pixdim[0] > 0:
            pixdim[0] = 0
        if damage == "sign":
            pixdim[1] *= -1
        fields: dict[str, object] = {"pixdim": pixdim, "xyzt_units": {1.0: 2, 1e3: 1, 1e-3: 3}[mm]}
        if damage == "length":
            for name in "bcd":
                fields[f"quatern_{name}"] = float(image.header[f"quatern_{name}"]) * (1 + 1e-7)
        try:
            scan = read(image, tmp_path, **fields)
        except UnusableScan as error:
            assert error.reason in (Reason.LEFT_IN_DOUBT, Reason.SIZES_CONTRADICT), (seed, error)
            assert damage in ("mirror", "scale", "turn")
            said += 1
            continue
        right = np.allclose(scan.affine, truth, rtol=1e-3, atol=0.02)
        left_right = np.linalg.det(scan.affine[:3, :3]) * np.linalg.det(truth[:3, :3]) > 0
        assert left_right and (right or set(scan.notes) - {Note.UNIT} or damage == "turn"), (seed, damage)
        if damage == "turn" and not right:
            turned = scan.affine[:3, :3] @ np.linalg.inv(truth[:3, :3])
            degrees = np.degrees(np.arccos(np.clip((np.trace(turned) - 1) / 2, -1, 1)))
            less = degrees < 1.001  # the rule: a degree or a voxel
            assert image.header["sform_code"] == 2 or Note.TWO_PLACES in scan.notes or less, seed
        read_quietly += right and not scan.notes
    assert read_quietly > len(draws) / 5 and said > len(draws) / 10


def test_bytes_after_a_whole_stream_are_said_and_a_damaged_stream_is_refused(tmp_path: Path) -> None:
    path, content = tmp_path / "a.nii.gz", image_of(affine_of(np.eye(3)), None).to_bytes()
    packed = gzip.compress(content)
    path.write_bytes(packed + b"\0" * 512)  # padding of a tape
    assert not read_scan(path).notes
    path.write_bytes(gzip.compress(content[:200]) + gzip.compress(content[200:]))  # two streams, as pigz may
    assert not read_scan(path).notes
    path.write_bytes(packed + b"This file was exported by somebody on a Tuesday.")
    scan = read_scan(path)
    assert scan.notes == (Note.TRAILING_BYTES,)
    np.testing.assert_array_equal(scan.array, RAMP)
    damaged = bytearray(packed + b"text")
    damaged[-10] ^= 255  # in the checksum
    path.write_bytes(damaged)
    with pytest.raises(UnusableScan, match="corrupt: the checksum fails"):
        read_scan(path)


def test_nan_around_the_patient_is_background_and_nan_within_is_damage() -> None:
    array = np.random.default_rng(0).normal(100, 10, (12, 12, 12)).astype(np.float32)
    array[:4] = np.nan
    scan = accept(array.copy(), np.eye(4))
    assert scan.notes == (Note.NAN_BACKGROUND,) and not scan.num_repaired
    assert (scan.array[:4] == 0).all() and (scan.array[4:] == array[4:]).all()
    within = np.random.default_rng(0).normal(100, 10, (12, 12, 12)).astype(np.float32)
    within[2:9, 2:9, 2:9] = np.nan
    with pytest.raises(UnusableScan, match="not_finite"):
        accept(within, np.eye(4))


def test_a_ct_that_cannot_be_in_hounsfield_units_is_told_from_one_that_can() -> None:
    generator = np.random.default_rng(0)
    hu = np.full((30, 30, 30), -1000.0)
    hu[5:25, 5:25, 5:25] = 40
    hu[7:12, 7:12, 7:12] = -100
    hu = (hu + generator.normal(0, 12, hu.shape)).astype(np.float32)
    padded = hu.copy()
    padded[:3] = -3024  # what lies outside the scanner's circle
    assert is_hounsfield(hu) and is_hounsfield(padded) and is_hounsfield(hu[6:24, 6:24, 6:24])
    assert not is_hounsfield(hu + 1100) and not is_hounsfield(np.maximum(hu + 1024, 0))
    assert not is_hounsfield(hu - 1024)
