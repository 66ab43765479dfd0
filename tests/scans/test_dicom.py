"""DICOM series of several vendors agree with their ground truth; what is no volume is refused by name."""

import shutil
import warnings
from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, MRImageStorage
from scipy.ndimage import gaussian_filter, map_coordinates

from client.scans.contrasts import ModalityNames
from scans.dicom import find_series
from scans.scans import Note, Reason, UnusableScan
from scans.volumes import read_files, read_scan

SERIES = "dicom_small/dicom2nifti_tests/tests/data"
WITH_TRUTH = (
    "siemens/anatomical/001", "ge/anatomical/001", "philips/anatomical/001", "hitachi/anatomical/001",
    "generic/anatomical/002_non_isotropic", "siemens_multiframe/anatomical/001",
    "philips_enhanced/anatomical/001", "hyperfine/anatomical/001",
)  # fmt: skip


def write_slices(
    folder: Path, volume: np.ndarray, lps: np.ndarray, series: str = "1.2.3", first: int = 0
) -> list[Path]:
    """One uncompressed file per slice of `volume` (x y z), placed by an LPS affine."""
    folder.mkdir(parents=True, exist_ok=True)
    edges = np.linalg.norm(lps[:3, :3], axis=0)
    paths = []
    for index in range(volume.shape[2]):
        header = Dataset()
        header.file_meta = FileMetaDataset()
        header.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        header.file_meta.MediaStorageSOPClassUID = header.SOPClassUID = MRImageStorage
        header.file_meta.MediaStorageSOPInstanceUID = header.SOPInstanceUID = f"{series}.{first + index + 1}"
        header.SeriesInstanceUID, header.PatientID, header.Modality = series, "p1", "MR"
        header.InstanceNumber = first + index + 1
        header.Rows, header.Columns = volume.shape[1], volume.shape[0]
        header.ImagePositionPatient = [round(float(v), 6) for v in (lps @ [0, 0, index, 1])[:3]]
        header.ImageOrientationPatient = [round(float(v), 8) for v in (lps[:3, :2] / edges[:2]).T.ravel()]
        header.PixelSpacing = [round(float(edges[1]), 6), round(float(edges[0]), 6)]
        header.SamplesPerPixel, header.PhotometricInterpretation = 1, "MONOCHROME2"
        header.BitsAllocated = header.BitsStored = 16
        header.HighBit, header.PixelRepresentation = 15, 0
        header.RescaleSlope, header.RescaleIntercept = 2, -1024
        header.PixelData = volume[:, :, index].T.astype("<u2").tobytes()
        paths.append(folder / f"{first + index}.dcm")
        header.save_as(paths[-1], enforce_file_format=True)
    return paths


RAMP = np.arange(4 * 5 * 6).reshape(4, 5, 6)
STRAIGHT = np.diag([2.0, 3.0, 4.0, 1.0])


@pytest.mark.parametrize("series", WITH_TRUTH)
def test_voxels_and_affine_are_those_of_the_ground_truth(series: str, data_root: Path) -> None:
    scan = read_scan(data_root / SERIES / series)
    truth = nib.load(data_root / SERIES / f"{series}_ground_truth.nii.gz")
    truth = nib.Nifti1Image(np.asarray(truth.dataobj).reshape(truth.shape[:3]), truth.affine)
    ours, theirs = (nib.as_closest_canonical(i) for i in (nib.Nifti1Image(scan.array, scan.affine), truth))
    assert ours.shape == theirs.shape
    np.testing.assert_allclose(ours.affine, theirs.affine, atol=2e-3)
    np.testing.assert_allclose(ours.get_fdata(), theirs.get_fdata(), rtol=1e-5, atol=1e-3)


def test_four_ways_to_compress_give_the_same_voxels(data_root: Path) -> None:
    kinds = ("rle", "jpeg", "jpegls", "j2k")
    scans = [read_scan(data_root / SERIES / f"generic/compressed_{kind}/001") for kind in kinds]
    assert len({scan.scan_id for scan in scans}) == 1


def test_a_diffusion_series_becomes_its_first_volume_its_mean_or_an_exclusion(data_root: Path) -> None:
    folder = data_root / SERIES / "ge/dti/002"
    first, mean = read_scan(folder, "first"), read_scan(folder, "mean")
    singles = [read_files([folder / f"{time}0{z}" for z in (1, 2, 3, 4)]).array for time in range(4)]
    np.testing.assert_array_equal(first.array, singles[0])
    np.testing.assert_allclose(mean.array, np.mean(singles, axis=0), rtol=1e-6)
    assert first.num_volumes == 4
    with pytest.raises(UnusableScan, match="four_d"):
        read_scan(folder, "refuse")


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 10_000))
def test_any_oblique_stack_lies_where_its_slices_say(seed: int, tmp_path: Path) -> None:
    generator = np.random.default_rng(seed)
    turn = np.linalg.qr(generator.normal(size=(3, 3)))[0]
    turn[:, 2] = np.cross(turn[:, 0], turn[:, 1]) * generator.choice([-1, 1])  # stacked either way
    lps = np.eye(4)
    lps[:3, :3] = turn * generator.uniform(0.5, 5.0, 3)
    lps[:3, 3] = generator.uniform(-100, 100, 3)
    folder = tmp_path / str(seed)
    paths = write_slices(folder, RAMP, lps)
    scan = read_files([paths[i] for i in generator.permutation(len(paths))])
    index = np.argwhere(np.ones(RAMP.shape))
    world = index @ scan.affine[:3, :3].T + scan.affine[:3, 3]
    stored = ((world * [-1, -1, 1]) - lps[:3, 3]) @ np.linalg.inv(lps[:3, :3]).T
    np.testing.assert_allclose(stored, np.rint(stored), atol=1e-3)
    np.testing.assert_array_equal(scan.array.ravel(), RAMP[tuple(np.rint(stored).astype(int).T)] * 2.0 - 1024)
    shutil.rmtree(folder)


def test_a_missing_slice_is_a_gap_not_a_thicker_slice(tmp_path: Path) -> None:
    paths = write_slices(tmp_path, RAMP, STRAIGHT)
    with pytest.raises(UnusableScan, match="uneven_slices"):
        read_files([*paths[:3], *paths[4:]])


def test_a_missing_slice_of_one_time_point_is_a_gap(tmp_path: Path) -> None:
    paths = write_slices(tmp_path, RAMP, STRAIGHT) + write_slices(tmp_path, RAMP + 1, STRAIGHT, first=6)
    assert read_files(paths).num_volumes == 2
    with pytest.raises(UnusableScan, match="uneven_slices"):
        read_files(paths[:-1])


def blob(world: np.ndarray) -> np.ndarray:
    """A smooth phantom: HU at places in mm (LPS)."""
    values = np.full(world.shape[:-1], -1000.0)
    for centre, radius_mm, height in (((0, 0, 0), 30, 1040), ((12, -8, 5), 9, 400), ((-10, 10, -8), 7, -300)):
        away = np.linalg.norm((world - centre) / radius_mm, axis=-1)
        values += height / (1 + np.exp((away - 1) * 8))
    return values


def tilted(degrees: float, sideways: float = 0.0) -> np.ndarray:
    """The LPS affine of a head scan whose gantry tilts: the table moves along z, not along the normal."""
    turn = np.radians(degrees)
    lps = np.eye(4)
    lps[:3, 0] = [1.5, 0, 0]
    lps[:3, 1] = [0, 1.5 * np.cos(turn), -1.5 * np.sin(turn)]
    lps[:3, 2] = [sideways, 0, 4]
    lps[:3, 3] = -(lps[:3, :3] @ [31, 31, 9.5])
    return lps


@pytest.mark.parametrize(("degrees", "sideways"), [(18.5, 0.0), (-16.5, 0.0), (30.0, 0.0), (9.0, 1.0)])
def test_a_tilted_gantry_is_resampled_to_the_straight_stack(
    degrees: float, sideways: float, tmp_path: Path
) -> None:
    lps = tilted(degrees, sideways)
    index = np.stack(np.meshgrid(range(62), range(62), range(20), indexing="ij"), axis=-1)
    stored = (np.rint(blob(index @ lps[:3, :3].T + lps[:3, 3])) + 1024) / 2
    scan = read_files(write_slices(tmp_path, np.maximum(stored, 0).astype(int), lps))
    assert scan.notes == (Note.TILTED,)
    axes = scan.affine[:3, :3] / np.linalg.norm(scan.affine[:3, :3], axis=0)
    np.testing.assert_allclose(axes.T @ axes, np.eye(3), atol=1e-6)
    index = np.stack(np.meshgrid(*map(range, scan.array.shape), indexing="ij"), axis=-1)
    truth = blob((index @ scan.affine[:3, :3].T + scan.affine[:3, 3]) * [-1, -1, 1])
    assert np.corrcoef(truth.ravel(), scan.array.ravel())[0, 1] >= 0.999
    assert np.abs(truth - scan.array).mean() < 10  # HU
    # the attack: the same slices taken for a straight stack lie centimetres away
    straight = stored * 2 - 1024
    normal = np.cross(lps[:3, 0], lps[:3, 1]) / 1.5**2
    places = np.stack(np.meshgrid(range(62), range(62), range(20), indexing="ij"), axis=-1)
    box = np.column_stack([lps[:3, :2], normal * (lps[:3, 2] @ normal)])
    wrong = blob(places @ box.T + lps[:3, 3])
    assert np.corrcoef(wrong.ravel(), straight.ravel())[0, 1] < 0.99


def test_a_real_tilted_head_lies_where_each_slice_says(data_root: Path) -> None:
    folder = data_root / SERIES / "failing/gantrytilting/001"
    scan = read_scan(folder)
    assert scan.notes == (Note.TILTED,)
    to_index = np.linalg.inv(scan.affine)
    for path in sorted(folder.iterdir()):
        header = pydicom.dcmread(path)
        x, y = np.meshgrid(range(16, 500, 16), range(16, 500, 16), indexing="ij")
        across, down = np.array(header.ImageOrientationPatient, float).reshape(2, 3)
        edges = [float(edge) for edge in header.PixelSpacing]
        world = np.array(header.ImagePositionPatient, float) + x[..., None] * across * edges[1]
        world = (world + y[..., None] * down * edges[0]) * [-1, -1, 1]
        place = world @ to_index[:3, :3].T + to_index[:3, 3]
        z = int(np.rint(place[..., 2].mean()))
        np.testing.assert_allclose(place[..., 2], z, atol=0.02)
        smooth = gaussian_filter(scan.array[:, :, z], 1.5)  # its makers replaced the head by noise
        read = map_coordinates(smooth, [place[..., 0], place[..., 1]], order=3)
        stored = header.pixel_array.T * float(header.RescaleSlope) + float(header.RescaleIntercept)
        truth = gaussian_filter(stored, 1.5)[x, y]
        assert np.corrcoef(read.ravel(), truth.ravel())[0, 1] >= 0.99


def test_a_stack_that_leans_more_than_a_gantry_can_is_refused(tmp_path: Path) -> None:
    sheared = STRAIGHT.copy()
    sheared[1, 2] = 4.0 * np.tan(np.radians(50))
    with pytest.raises(UnusableScan, match=r"gantry_tilt: 50\.0 degrees"):
        read_files(write_slices(tmp_path, RAMP, sheared))


def test_slices_of_another_size_are_refused(tmp_path: Path) -> None:
    paths = write_slices(tmp_path, RAMP, STRAIGHT)[:3]
    moved = STRAIGHT.copy()
    moved[2, 3] = 12.0
    paths += write_slices(tmp_path, RAMP[:, :4, :3], moved, first=6)
    with pytest.raises(UnusableScan, match="mixed_sizes"):
        read_files(paths)


def test_two_series_in_a_folder_are_two_scans_and_neither_is_guessed(tmp_path: Path) -> None:
    write_slices(tmp_path, RAMP, STRAIGHT)
    write_slices(tmp_path, RAMP + 5, STRAIGHT, series="1.2.4", first=6)
    found, left_over = find_series(sorted(tmp_path.iterdir()))
    assert [len(series.files) for series in found] == [6, 6] and not left_over
    with pytest.raises(UnusableScan, match="several_series"):
        read_scan(tmp_path)


def test_a_second_copy_of_a_slice_is_left_over_as_a_duplicate(tmp_path: Path) -> None:
    paths = write_slices(tmp_path, RAMP, STRAIGHT)
    copy = tmp_path / "copy of 3.dcm"
    shutil.copy(paths[3], copy)
    found, left_over = find_series([*paths, copy])
    assert found[0].files == tuple(paths)
    assert [one.path for one in left_over] == [copy]
    assert left_over[0].reason is Reason.DUPLICATE


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"ImageType": ["ORIGINAL", "PRIMARY", "M", "MOSAIC"]}, Reason.MOSAIC),
        ({"NumberOfFrames": 30}, Reason.MULTIFRAME),
        ({"SamplesPerPixel": 3, "PhotometricInterpretation": "RGB"}, Reason.RGB),
        ({"PhotometricInterpretation": "PALETTE COLOR"}, Reason.RGB),
        ({"ImagePositionPatient": None}, Reason.NO_ORIENTATION),
        ({"ImageOrientationPatient": [1, 0, 0, 1, 0, 0]}, Reason.SINGULAR_AFFINE),
        ({"PixelSpacing": [0, 0]}, Reason.ZERO_SPACING),
        ({"PixelSpacing": [1]}, Reason.CORRUPT),
        ({"PixelData": b"\0\0"}, Reason.TRUNCATED),
        ({"RescaleSlope": 0}, Reason.CONSTANT),
    ],
)
def test_a_series_that_is_no_volume_is_refused_by_name(
    change: dict[str, object], reason: Reason, tmp_path: Path
) -> None:
    paths = write_slices(tmp_path, RAMP, STRAIGHT)
    for path in paths:
        header = pydicom.dcmread(path)
        for tag, value in change.items():
            setattr(header, tag, value)
        header.save_as(path)
    with pytest.raises(UnusableScan) as caught:
        read_files(paths)
    assert caught.value.reason is reason and "p1" not in str(caught.value)


def test_a_report_and_a_broken_header_are_left_over_with_their_reasons(tmp_path: Path) -> None:
    (path,) = write_slices(tmp_path, RAMP[..., :1], STRAIGHT)
    report = pydicom.dcmread(path)
    del report.Rows, report.PixelData
    report.save_as(path)
    (tmp_path / "broken.dcm").write_bytes(b"\0" * 128 + b"DICM" + b"\xff" * 60)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pydicom's, of the broken one
        _, left_over = find_series(sorted(tmp_path.iterdir()))
    reasons = {one.path: one.reason for one in left_over}
    assert reasons == {path: Reason.NOT_AN_IMAGE, tmp_path / "broken.dcm": Reason.CORRUPT}


def test_the_most_specific_name_the_map_knows_decides_the_modality() -> None:
    names = ("t1_mprage_sag", "MPRAGE", "MR")
    assert ModalityNames({"MR": "other", "t1_mprage_sag": "T1w"}).of_series(names) == "T1w"
    assert ModalityNames({"MR": "T1w"}).of_series(names) == "T1w"
    assert ModalityNames({}).of_series(names) == "MR"


def test_a_value_that_cannot_be_read_is_the_files_reason(tmp_path: Path) -> None:
    paths = write_slices(tmp_path / "s", RAMP, STRAIGHT)
    content = paths[2].read_bytes()
    place = content.index(b"\x20\x00\x0e\x00UI")  # SeriesInstanceUID
    paths[2].write_bytes(content[: place + 5] + b"\0" + content[place + 6 :])  # of no kind that there is
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pydicom's, of what it reads
        _, left_over = find_series(paths)
    assert [(one.path, one.reason) for one in left_over] == [(paths[2], Reason.CORRUPT)]


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(where=st.lists(st.integers(132, 700), min_size=1, max_size=4), value=st.integers(0, 255))
def test_flipped_bytes_give_a_scan_or_a_reason_and_nothing_else(
    where: list[int], value: int, tmp_path: Path
) -> None:
    paths = write_slices(tmp_path / "s", RAMP, STRAIGHT)
    content = bytearray(paths[2].read_bytes())
    for offset in where:
        content[min(offset, len(content) - 1)] = value
    paths[2].write_bytes(bytes(content))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pydicom's, of what it reads
        find_series(paths)
        try:
            assert np.isfinite(read_files(paths).array).all()
        except UnusableScan as error:
            assert error.reason in Reason
