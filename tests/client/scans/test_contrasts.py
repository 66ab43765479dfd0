"""Several contrasts of one patient: each is what its name says, and none is taken for another."""

import json
from pathlib import Path, PurePosixPath

import nibabel as nib
import numpy as np
import pytest

from client.scans.cohort import Cohort, open_cohort
from client.scans.contrasts import ModalityNames, contrasts_of_bids, contrasts_of_files
from client.scans.names import contrast_in
from scans.volume_plan import VolumePlan


def write(path: Path, seed: int, *, label: bool = False) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(seed)
    array = generator.normal(size=(5, 6, 7)) if not label else generator.integers(0, 3, (5, 6, 7))
    nib.save(nib.Nifti1Image(array.astype(np.uint8 if label else np.float32), np.eye(4)), path)
    return path


def opened(root: Path, plan: VolumePlan, **names: str) -> Cohort:
    return open_cohort(root, plan=plan, split_salt="a", modality_names=names)


def selected(cohort: Cohort) -> list[str]:
    return sorted(scan.path.name.removesuffix(".nii.gz") for scan in cohort.scans)


@pytest.fixture
def brats(tmp_path: Path) -> Path:
    for number in (1, 2, 3):
        folder = tmp_path / f"BraTS20_Training_00{number}"
        for index, contrast in enumerate(("t1", "t1ce", "t2", "flair")):
            write(folder / f"{folder.name}_{contrast}.nii.gz", 10 * number + index)
        write(folder / f"{folder.name}_seg.nii.gz", 10 * number, label=True)
    return tmp_path


@pytest.mark.parametrize("contrast", ["t1", "t1ce", "t2", "flair"])
def test_the_plans_contrast_is_selected_and_the_others_are_listed_as_such(brats: Path, contrast: str) -> None:
    cohort = opened(brats, VolumePlan(modality=contrast))
    assert selected(cohort) == [f"BraTS20_Training_00{number}_{contrast}" for number in (1, 2, 3)]
    assert all(scan.label_path is not None for scan in cohort.scans), (
        "a case's label is that of each contrast"
    )
    assert cohort.summary()["exclusions"] == {"no_such_modality": 9}


def test_several_contrasts_of_a_study_stay_together_in_one_split(brats: Path) -> None:
    cohort = opened(brats, VolumePlan(modality="t1", modalities=("t1", "t2")))
    assert len(cohort.scans) == 6 and len(cohort.patients()) == 3
    assert [sorted(scan.modality for scan in study) for study in cohort.studies().values()] == [
        ["t1", "t2"]
    ] * 3
    assert all(len({scan.split for scan in study}) == 1 for study in cohort.studies().values())
    labels = [scan.label_path for scan in cohort.scans]
    assert None not in labels and len(set(labels)) == 3


def test_a_plan_for_another_contrast_than_all_names_say_finds_nothing(tmp_path: Path) -> None:
    for number in (1, 2):
        write(tmp_path / f"P{number}" / "t1.nii.gz", number)
    assert not opened(tmp_path, VolumePlan(modality="t2")).scans
    assert len(opened(tmp_path, VolumePlan(modality="T1w")).scans) == 2
    assert len(opened(tmp_path, VolumePlan(modality="mr")).scans) == 2, "the name of a whole family"


def test_channels_are_what_dataset_json_calls_them(tmp_path: Path) -> None:
    for number in (1, 2):
        for channel in (0, 1):
            write(tmp_path / "imagesTr" / f"c{number}_000{channel}.nii.gz", 10 * number + channel)
    (tmp_path / "dataset.json").write_text(json.dumps({"channel_names": {"0": "T2", "1": "T1"}}))
    assert selected(opened(tmp_path, VolumePlan(modality="t1"))) == ["c1_0001", "c2_0001"]


def test_parts_echoes_inversions_and_contrast_agents_are_told_apart() -> None:
    stems = [
        "sub-1_part-mag_T1w", "sub-1_part-phase_T1w", "sub-1_echo-1_T2starw", "sub-1_echo-2_T2starw",
        "sub-1_inv-1_MP2RAGE", "sub-1_inv-2_MP2RAGE", "sub-1_ce-gad_T1w", "sub-1_acq-sag_T2w",
    ]  # fmt: skip
    assert contrasts_of_bids(stems) == [
        "T1w", "part-phase_T1w", "echo-1_T2starw", "echo-2_T2starw", "inv-1_MP2RAGE", "inv-2_MP2RAGE",
        "ce-gad_T1w", "T2w",
    ]  # fmt: skip
    assert contrasts_of_bids(["sub-1_echo-1_T2starw", "sub-2_echo-1_T2starw"]) == ["T2starw"] * 2
    names = ModalityNames({}, ("any",))
    assert not any(map(names.takes, ("part-phase_T1w", "part-real_bold", "phase", "imag")))
    assert names.takes("part-phase_T1w") is False and ModalityNames({}, ("part-phase_T1w",)).takes(
        "part-phase_T1w"
    )


def test_a_ct_is_no_mr_and_a_patient_called_pd_is_no_proton_density() -> None:
    assert not ModalityNames({}, ("mr",)).takes("ct") and ModalityNames({}, ("mr",)).takes("flair")
    paths = [PurePosixPath("PD_001_T1w"), PurePosixPath("HC_002_T1w")]
    contrasts = contrasts_of_files(paths, ["PD_001", "HC_002"], ModalityNames({}, ("T1w",)), Path("nowhere"))
    assert contrasts == ["", ""], "one contrast in all names tells nothing apart"


@pytest.mark.parametrize(
    ("name", "contrast"),
    [
        ("P1_T1w", "T1w"),
        ("P1_t1_post", "t1ce"),
        ("x_FLAIR_sag", "FLAIR"),
        ("IXI002-Guys-0828-T1", "T1"),
        ("P1", ""),
    ],
)
def test_a_name_says_its_contrast(name: str, contrast: str) -> None:
    assert contrast_in(name) == contrast
