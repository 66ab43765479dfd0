"""Whatever is shuffled in a folder of slices, each volume is one of the folder, or excluded: never a mix.

The generator draws volumes whose voxels say which volume and which place they belong to, writes them as a
scanner, a PACS and a USB stick might (names, numbers, echoes, parts, times, copies, scouts, screenshots), and
knows the right answer by construction.
"""

import shutil
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.sequence import Sequence
from pydicom.uid import (
    CTImageStorage,
    EnhancedMRImageStorage,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    MRImageStorage,
    SecondaryCaptureImageStorage,
)

from scans.dicom import find_series
from scans.scans import Note, Reason, Scan, UnusableScan
from scans.volumes import read_files, read_scan

SIZE = 5
DRAWS = 5000
DRAWS_QUICK = 60


def header_of(place: float, code: int, **changes: object) -> Dataset:
    """A slice at `place` (mm) whose voxels are `code` and more."""
    header = Dataset()
    header.file_meta = FileMetaDataset()
    header.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    header.SOPClassUID = changes.pop("SOPClassUID", MRImageStorage)
    header.SOPInstanceUID = pydicom.uid.generate_uid()
    header.SeriesInstanceUID, header.PatientID, header.Modality = "1.2.3", "p1", "MR"
    header.ImageType = ["ORIGINAL", "PRIMARY", "M"]
    header.Rows = header.Columns = SIZE
    header.ImagePositionPatient = [0, 0, place]
    header.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
    header.PixelSpacing = [1.5, 1.5]
    header.SamplesPerPixel, header.PhotometricInterpretation = 1, "MONOCHROME2"
    header.BitsAllocated = header.BitsStored = 16
    header.HighBit, header.PixelRepresentation = 15, 0
    for tag, value in changes.items():
        setattr(header, tag, value)
    header.file_meta.MediaStorageSOPClassUID = header.SOPClassUID
    header.file_meta.MediaStorageSOPInstanceUID = header.SOPInstanceUID
    pixels = code + np.arange(SIZE * SIZE) % 7
    header.PixelData = pixels.astype("<u2").tobytes()
    return header


def write(folder: Path, headers: list[Dataset], order: np.ndarray | None = None) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, index in enumerate(order if order is not None else range(len(headers))):
        paths.append(folder / f"{name:03d}")
        headers[index].save_as(paths[-1], enforce_file_format=True)
    return paths


def stack(volume: int, count: int = 6, step: float = 3.0, **changes: object) -> list[Dataset]:
    return [header_of(k * step, 1000 * volume + 10 * k, **changes) for k in range(count)]


def volume_of(scan: Scan) -> int:
    """Which volume a scan is; every slice must be of it, and at its own place."""
    codes = scan.array[0, 0]
    volumes = set(map(int, codes // 1000))
    assert len(volumes) == 1, f"slices of volumes {volumes}"
    z = scan.affine[2, 2] * np.arange(len(codes)) + scan.affine[2, 3]
    np.testing.assert_allclose(codes % 1000, 10 * np.argsort(np.argsort(z)))
    return volumes.pop()


def outcome(folder: Path) -> tuple[list[int], list[Reason]]:
    """The volumes that are read from a folder, and why the rest is not."""
    series, left_over = find_series(sorted(folder.iterdir()))
    volumes, reasons = [], [one.reason for one in left_over]
    accounted = [one.path for one in left_over] + [path for one in series for path in one.files]
    assert sorted(accounted) == sorted(folder.iterdir()), "every file has one place"
    for one in series:
        try:
            volumes.append(volume_of(read_files(one.files)))
        except UnusableScan as error:
            reasons.append(error.reason)
    return sorted(volumes), reasons


KINDS = {
    "echo": lambda v: {"EchoTime": 10.0 * v},
    "echo number": lambda v: {"EchoNumbers": v},
    "part": lambda v: {"ImageType": ["ORIGINAL", "PRIMARY", "M" if v == 1 else "P"]},
    "patient": lambda v: {"PatientID": f"p{v}"},
    "person": lambda v: {"PatientBirthDate": f"19{50 + v}0101"},
    "inversion": lambda v: {"InversionTime": 500.0 * v},
    "kernel": lambda v: {"ConvolutionKernel": f"B{v}0f"},
    "size": lambda v: {"PixelSpacing": [1.5 * v, 1.5]},
    "side": lambda v: {"ImageOrientationPatient": [1, 0, 0, 0, 1, 0] if v == 1 else [0, 1, 0, -1, 0, 0]},
}
TIMES = {
    "temporal index": lambda v: {"TemporalPositionIdentifier": v},
    "acquisition": lambda v: {"AcquisitionNumber": v},
    "b-value": lambda v: {"DiffusionBValue": 500.0 * v},
    "trigger": lambda v: {"TriggerTime": 40.0 * v},
    "clock": lambda v: {"AcquisitionTime": f"1000{v:02d}"},
}


@dataclass
class Drawn:
    """A folder, and what may come of it."""

    headers: list[Dataset] = field(default_factory=list)
    several: list[int] = field(default_factory=list)
    """Volumes that must all be scans; or, of volumes over time, only the first."""
    extra: set[Reason] = field(default_factory=set)
    may_refuse: bool = False


def draw(generator: np.random.Generator) -> Drawn:
    drawn = Drawn(several=[1])
    attribute = generator.choice(["none", "kind", "time", "nothing"])
    count = int(generator.integers(2, 4))
    values: list[dict[str, object]] = [{} for _ in range(count)]
    if attribute == "none":
        values = values[:1]
    elif attribute == "kind":
        split = generator.choice(list(KINDS))
        values = [KINDS[split](v) for v in (1, 2)]
        drawn.several = [1, 2]
    elif attribute == "time":
        name = generator.choice(list(TIMES))
        values = [TIMES[name](v + 1) for v in range(count)]
    else:  # nothing says which is which
        drawn.may_refuse = True
    for volume, changes in enumerate(values, start=1):
        drawn.headers += stack(volume, **changes)
    match generator.integers(4):
        case 0:  # numbers that mean nothing
            numbers = generator.permutation(len(drawn.headers)) + 1
        case 1:  # that restart
            numbers = np.arange(len(drawn.headers)) % 6 + 1
        case 2:  # in order
            numbers = np.arange(len(drawn.headers)) + 1
        case _:
            numbers = np.zeros(len(drawn.headers), int)
    for header, number in zip(drawn.headers, numbers, strict=True):
        header.InstanceNumber = int(number)
    if generator.random() < 0.3:  # a slice is sent again
        again = drawn.headers[int(generator.integers(len(drawn.headers)))]
        copy = Dataset(again)
        copy.file_meta = FileMetaDataset(again.file_meta)
        copy.SOPInstanceUID = copy.file_meta.MediaStorageSOPInstanceUID = pydicom.uid.generate_uid()
        drawn.headers.append(copy)
        drawn.extra.add(Reason.DUPLICATE)
    if generator.random() < 0.3:
        scout = header_of(30.0, 9000, ImageOrientationPatient=[1, 0, 0, 0, 0, -1])
        if generator.random() < 0.5:
            scout.ImageType = ["ORIGINAL", "PRIMARY", "LOCALIZER"]
        drawn.headers.append(scout)
        drawn.extra |= {Reason.LOCALIZER, Reason.MIXED_ORIENTATION}
    if generator.random() < 0.3:
        screenshot = header_of(3.0, 8000, SOPClassUID=SecondaryCaptureImageStorage)
        if generator.random() < 0.5:
            del screenshot.ImagePositionPatient
        drawn.headers.append(screenshot)
        drawn.extra.add(Reason.SECONDARY_CAPTURE)
    return drawn


PARTS = [range(n * DRAWS // 4, (n + 1) * DRAWS // 4) for n in range(4)]
"""All of them, in parts that processes share."""


@pytest.mark.parametrize(
    "seeds", [range(DRAWS_QUICK), *(pytest.param(part, marks=pytest.mark.slow) for part in PARTS)], ids=str
)
def test_no_volume_is_mixed_in_silence_whatever_is_shuffled(seeds: range) -> None:
    read = refused = 0
    for seed in seeds:
        generator = np.random.default_rng(seed)
        drawn = draw(generator)
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name) / "s"
            write(folder, drawn.headers, generator.permutation(len(drawn.headers)))
            volumes, reasons = outcome(folder)  # which says when slices are mixed
        if drawn.may_refuse and not volumes:
            assert set(reasons) <= drawn.extra | {Reason.AMBIGUOUS_FRAMES, Reason.UNEVEN_SLICES}
            refused += 1
        else:
            assert volumes == drawn.several, (seed, volumes, reasons)
            assert set(reasons) <= drawn.extra, (seed, reasons)
            read += 1
    assert read > len(seeds) / 2 and refused > len(seeds) / 20


@pytest.mark.parametrize("kind", KINDS)
def test_two_kinds_at_the_same_places_are_two_scans(kind: str, tmp_path: Path) -> None:
    write(tmp_path / "s", stack(1, **KINDS[kind](1)) + stack(2, **KINDS[kind](2)))
    assert outcome(tmp_path / "s") == ([1, 2], [])


@pytest.mark.parametrize("time", TIMES)
def test_volumes_over_time_are_one_scan_of_several(time: str, tmp_path: Path) -> None:
    paths = write(tmp_path / "s", stack(2, **TIMES[time](2)) + stack(1, **TIMES[time](1)))
    scan = read_files(paths)
    assert volume_of(scan) == 1 and scan.num_volumes == 2 and not scan.notes


def test_attributes_that_contradict_each_other_are_ambiguous_by_name(tmp_path: Path) -> None:
    headers = stack(1, TemporalPositionIdentifier=1) + stack(2, TemporalPositionIdentifier=2)
    for k, header in enumerate(headers):
        header.AcquisitionNumber = 1 + (k % 6 + k // 6) % 2
    with pytest.raises(
        UnusableScan, match="ambiguous_frames: TemporalPositionIdentifier and AcquisitionNumb"
    ):
        read_files(write(tmp_path, headers))


def test_instance_numbers_alone_order_only_whole_blocks_and_that_is_said(tmp_path: Path) -> None:
    headers = stack(1) + stack(2)
    for number, header in enumerate(headers, start=1):
        header.InstanceNumber = number
    scan = read_files(write(tmp_path / "blocks", headers))
    assert scan.notes == (Note.ORDER_BY_NUMBER,) and volume_of(scan) == 1
    headers[2].InstanceNumber, headers[7].InstanceNumber = 8, 3  # would exchange two slices
    with pytest.raises(UnusableScan, match=r"ambiguous_frames: .*only InstanceNumber"):
        read_files(write(tmp_path / "swapped", headers))


def test_slices_of_two_acquisitions_between_each_other_are_no_finer_volume(tmp_path: Path) -> None:
    headers = [header_of(k * 3.0, 10 * k, AcquisitionNumber=1 + k % 2) for k in range(8)]
    with pytest.raises(UnusableScan, match="ambiguous_frames: AcquisitionNumber"):
        read_files(write(tmp_path / "between", headers))
    blocks = [header_of(k * 3.0, 10 * k, AcquisitionNumber=1 + k // 4) for k in range(8)]  # couch positions
    assert volume_of(read_files(write(tmp_path / "blocks", blocks))) == 0


def test_frames_side_by_side_in_one_plane_are_no_series_over_time(tmp_path: Path) -> None:
    headers = stack(1) + stack(2)
    for header in headers[6:]:
        header.ImagePositionPatient = [40.0, 0, header.ImagePositionPatient[2]]
    with pytest.raises(UnusableScan, match="ambiguous_frames: ImagePositionPatient"):
        read_files(write(tmp_path, headers))


def test_one_uid_for_all_slices_is_not_one_slice(tmp_path: Path) -> None:
    write(tmp_path / "s", stack(1, SOPInstanceUID="1.2.9"))
    assert outcome(tmp_path / "s") == ([1], [])


@pytest.mark.parametrize("spacing_mm", [0.625, 1.33, 2.97])
def test_positions_rounded_to_a_tenth_pass_and_are_said(spacing_mm: float, tmp_path: Path) -> None:
    places = [round(k * spacing_mm + 0.03, 1) for k in range(40)]
    headers = [header_of(place, 10 * k) for k, place in enumerate(places)]
    scan = read_files(write(tmp_path, headers))
    assert abs(np.linalg.norm(scan.affine[:3, 2]) - spacing_mm) < 0.01
    assert set(scan.notes) <= {Note.ROUNDED_POSITIONS} and volume_of(scan) == 0
    assert spacing_mm > 2 or scan.notes


@pytest.mark.parametrize("missing", [[3], [3, 7], [1]])
def test_a_gap_is_refused_with_its_place(missing: list[int], tmp_path: Path) -> None:
    headers = [header for k, header in enumerate(stack(1, 12)) if k not in missing]
    with pytest.raises(UnusableScan, match=rf"uneven_slices: gaps of 6\.000 mm after slice {missing[0]}\b"):
        read_files(write(tmp_path, headers))


@pytest.mark.parametrize("implicit", [True, False])
def test_dicom_without_preamble_is_dicom(implicit: bool, tmp_path: Path) -> None:
    for k, header in enumerate(stack(1)):
        header.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian if implicit else ExplicitVRLittleEndian
        bare = Dataset(header)
        pydicom.dcmwrite(
            tmp_path / f"{k}", bare, implicit_vr=implicit, little_endian=True, enforce_file_format=False
        )
        assert (tmp_path / f"{k}").read_bytes()[128:132] != b"DICM"
    assert volume_of(read_scan(tmp_path)) == 1


def enhanced(volumes: list[dict[str, object]], generator: np.random.Generator) -> Dataset:
    """One object of several volumes; its frames in any order, told by their own indices."""
    frames = [(v, k) for v in range(len(volumes)) for k in range(6)]
    header = header_of(0, 0, SOPClassUID=EnhancedMRImageStorage, NumberOfFrames=len(frames))
    for tag in ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing"):
        delattr(header, tag)
    shared, per_frame, pixels = Dataset(), [], []
    shared.PlaneOrientationSequence, shared.PixelMeasuresSequence = (
        Sequence([Dataset()]),
        Sequence([Dataset()]),
    )
    shared.PlaneOrientationSequence[0].ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
    shared.PixelMeasuresSequence[0].PixelSpacing = [1.5, 1.5]
    for v, k in [frames[i] for i in generator.permutation(len(frames))]:
        frame = Dataset()
        frame.PlanePositionSequence, frame.FrameContentSequence = Sequence([Dataset()]), Sequence([Dataset()])
        frame.PlanePositionSequence[0].ImagePositionPatient = [0, 0, 3.0 * k]
        for tag, value in volumes[v].items():
            if tag == "EffectiveEchoTime":
                frame.MREchoSequence = Sequence([Dataset()])
                frame.MREchoSequence[0].EffectiveEchoTime = value
            else:
                setattr(frame.FrameContentSequence[0], tag, value)
        if "DimensionIndexValues" in volumes[v]:
            frame.FrameContentSequence[0].DimensionIndexValues = [k + 1, volumes[v]["DimensionIndexValues"]]
        per_frame.append(frame)
        pixels.append((1000 * (v + 1) + 10 * k + np.arange(SIZE * SIZE) % 7).astype("<u2"))
    if any("DimensionIndexValues" in one for one in volumes):
        pointers = [Dataset(), Dataset()]
        pointers[0].DimensionIndexPointer = 0x00209057  # InStackPositionNumber
        pointers[1].DimensionIndexPointer = 0x00189087  # DiffusionBValue
        header.DimensionIndexSequence = Sequence(pointers)
    header.SharedFunctionalGroupsSequence = Sequence([shared])
    header.PerFrameFunctionalGroupsSequence = Sequence(per_frame)
    header.PixelData = np.concatenate(pixels).tobytes()
    return header


@pytest.mark.parametrize(
    "frames",
    [
        [{"TemporalPositionIndex": 1}, {"TemporalPositionIndex": 2}],
        [{"DimensionIndexValues": 1}, {"DimensionIndexValues": 2}, {"DimensionIndexValues": 3}],
    ],
)
def test_an_enhanced_object_is_read_by_its_own_indices(
    frames: list[dict[str, object]], tmp_path: Path
) -> None:
    for seed in range(3):
        (path,) = write(tmp_path, [enhanced(frames, np.random.default_rng(seed))])
        scan = read_files([path])
        assert volume_of(scan) == 1 and scan.num_volumes == len(frames) and not scan.notes


def test_an_enhanced_object_of_two_echoes_is_excluded_by_name(tmp_path: Path) -> None:
    frames = [{"EffectiveEchoTime": 10.0}, {"EffectiveEchoTime": 20.0}]
    write(tmp_path / "s", [enhanced(frames, np.random.default_rng(0))])
    series, left_over = find_series(sorted((tmp_path / "s").iterdir()))
    assert not left_over
    with pytest.raises(UnusableScan, match="ambiguous_frames: 6 frames differ in EchoTime"):
        read_files(series[0].files)


def test_parts_and_echoes_have_names_of_their_own(tmp_path: Path) -> None:
    headers = stack(1, EchoTime=10.0) + stack(2, EchoTime=20.0)
    headers += stack(3, EchoTime=10.0, ImageType=["ORIGINAL", "PRIMARY", "P"])
    series, _ = find_series(write(tmp_path, headers))
    assert [one.names for one in series] == [("echo-1_MR",), ("echo-2_MR",), ("echo-1_part-phase_MR",)]


def test_a_series_of_localizers_or_of_screenshots_is_no_scan(tmp_path: Path) -> None:
    scouts = [header_of(3.0 * k, 10, ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"]) for k in range(5)]
    write(tmp_path / "scouts", scouts)
    assert outcome(tmp_path / "scouts") == ([], [Reason.LOCALIZER])
    shots = [header_of(3.0 * k, 10, SOPClassUID=SecondaryCaptureImageStorage) for k in range(5)]
    for shot in shots:
        del shot.ImagePositionPatient
    write(tmp_path / "shots", shots)
    assert outcome(tmp_path / "shots") == ([], [Reason.SECONDARY_CAPTURE])
    ct = stack(1, SOPClassUID=CTImageStorage)
    shutil.rmtree(tmp_path / "scouts")
    write(tmp_path / "scouts", ct + scouts[:2])
    assert outcome(tmp_path / "scouts") == ([1], [Reason.LOCALIZER] * 2)
