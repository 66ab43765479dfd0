"""Hospitals on disk: reproducible, resumable, opaque, and true to the folders they come from."""

import csv
import itertools
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import affine_transform

from client.scans.cohort import open_cohort
from scans.volume_plan import VolumePlan
from scans.volumes import read_label, read_scan, same_grid
from simulations.hospitals.make import (
    FolderHospitals,
    Hospital,
    PhantomHospitals,
    SplitHospitals,
    hospitals_plan,
    make_hospitals,
)
from simulations.hospitals.phantom import phantom_patient, phantom_scanner
from simulations.hospitals.split import by_intensity, natural_breaks
from simulations.phantoms.atlas import grid_affine, grid_shape
from simulations.phantoms.patients import Population

SMALL = PhantomHospitals(patients=2, resolution_mm=4, population=Population(disease_share=1.0), seed=5)


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def rows_of(hospital: Hospital) -> list[dict[str, str]]:
    with (hospital.root / "manifest.csv").open() as stream:
        return list(csv.DictReader(stream))


@pytest.fixture(scope="module")
def consortium(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Hospital]]:
    folder = tmp_path_factory.mktemp("consortium")
    plan = PhantomHospitals(patients=3, resolution_mm=4, paired=2, population=Population(disease_share=0.7))
    return folder, make_hospitals(plan, folder)


def test_the_default_is_three_named_hospitals_of_fourteen_patients() -> None:
    plan = hospitals_plan({"kind": "phantoms"})
    assert isinstance(plan, PhantomHospitals)
    assert plan.names[: plan.num_hospitals] == ("north", "harbour", "valley")
    assert plan.patients == 14


def test_a_seed_fixes_every_byte_of_a_consortium(tmp_path: Path) -> None:
    for name in ("one", "two"):
        make_hospitals(SMALL, tmp_path / name)
    assert files_of(tmp_path / "one") == files_of(tmp_path / "two")
    make_hospitals(PhantomHospitals(patients=2, resolution_mm=4, seed=6), tmp_path / "three")
    scan = "north/images/P10001.nii.gz"
    assert files_of(tmp_path / "one")[scan] != files_of(tmp_path / "three")[scan]


def test_what_is_there_is_kept_and_what_is_broken_is_made_again(tmp_path: Path) -> None:
    make_hospitals(SMALL, tmp_path)
    before = files_of(tmp_path)
    scans = sorted(tmp_path.rglob("*.nii.gz"))
    stamps = {scan: scan.stat().st_mtime_ns for scan in scans}
    truncated, lost, edited = (tmp_path / name for name in (
        "north/images/P10001.nii.gz", "harbour/labels/P20002.nii.gz", "truth/valley/P30001.json"
    ))  # fmt: skip
    truncated.write_bytes(truncated.read_bytes()[:100])
    lost.unlink()
    edited.write_text("{")
    (tmp_path / "north/images/.P10002.nii.gz.1-partly").write_bytes(b"interrupted")
    make_hospitals(SMALL, tmp_path)
    assert files_of(tmp_path) == before
    remade = {scan.name for scan in scans if scan.stat().st_mtime_ns != stamps[scan]}
    assert remade == {"P10001.nii.gz", "P20002.nii.gz", "P30001.nii.gz"}


def test_another_plan_in_the_same_folder_leaves_no_scan_of_the_first(tmp_path: Path) -> None:
    make_hospitals(SMALL, tmp_path)
    fewer = PhantomHospitals(sizes=(1, 1, 1), resolution_mm=4, seed=6)
    make_hospitals(fewer, tmp_path)
    make_hospitals(fewer, tmp_path / "fresh")
    fresh = files_of(tmp_path / "fresh")
    assert {name: files_of(tmp_path)[name] for name in fresh} == fresh
    assert len(list((tmp_path / "north").rglob("*.nii.gz"))) == 2


def test_another_hospital_or_patient_changes_nobody_else() -> None:
    small, large = (PhantomHospitals(num_hospitals=n, patients=p, skew=0.0) for n, p in ((2, 3), (9, 50)))
    for index, number in itertools.product(range(2), range(3)):
        assert phantom_patient(small, index, number).sha256 == phantom_patient(large, index, number).sha256
        assert phantom_scanner(small, index, "x") == phantom_scanner(large, index, "x")
    everyone = {phantom_patient(large, i, n).sha256 for i in range(9) for n in range(50)}
    assert len(everyone) == 450


def test_skew_makes_populations_differ_and_no_skew_does_not() -> None:
    def ages(skew: float, index: int) -> list[float]:
        plan = PhantomHospitals(skew=skew)
        return [phantom_patient(plan, index, number).age for number in range(80)]

    # Two means of 80 ages of deviation 14 differ by less than 8 years with probability .9997.
    assert abs(np.mean(ages(0.0, 0)) - np.mean(ages(0.0, 2))) < 8
    assert np.mean(ages(1.0, 2)) - np.mean(ages(1.0, 0)) > 14


def test_every_phantom_passes_the_hospitals_own_intake(consortium: tuple[Path, list[Hospital]]) -> None:
    plan = VolumePlan(modality="T1w", spacing_mm=(4.0, 4.0, 4.0), shape=(40, 48, 40))
    for hospital in consortium[1]:
        for root in (hospital.root, hospital.paired):
            assert root is not None
            cohort = open_cohort(root, plan=plan, split_salt="", layout=hospital.layout)
            expected = 3 if root == hospital.root else 2
            assert len(cohort.scans) == expected == sum(s.label_path is not None for s in cohort.scans)
            assert {e.reason for e in cohort.exclusions} == {"table"}
            for scan in cohort.scans:
                assert scan.covariates["sex"] in ("F", "M")
                assert 20 <= float(scan.covariates["age"]) <= 92


def test_a_hospitals_folder_holds_what_a_hospital_has_and_no_truth(
    consortium: tuple[Path, list[Hospital]],
) -> None:
    folder, hospitals = consortium
    for index, hospital in enumerate(hospitals, start=1):
        names = {f"P{index}{n:04d}.nii.gz" for n in (1, 2, 3)}
        expected = {f"{kind}/{name}" for kind in ("images", "labels") for name in names}
        assert set(files_of(hospital.root)) == expected | {"covariates.csv"}
        assert hospital.truth is not None and hospital.truth.is_relative_to(folder / "truth")
        truth = json.loads((hospital.truth / f"P{index}0001.json").read_text())
        assert {"patient", "acquisition", "volumes_ml"} <= set(truth)
        with np.load(hospital.truth / f"P{index}0001.npz") as stored:
            seen = phantom_patient(
                PhantomHospitals(patients=3, population=Population(disease_share=0.7)), index - 1, 0
            )
            assert np.array_equal(stored["velocity"], seen.velocity)


def test_covariates_agree_with_the_labels(consortium: tuple[Path, list[Hospital]]) -> None:
    diseased = 0
    for hospital in consortium[1]:
        with (hospital.root / "covariates.csv").open() as stream:
            for row in csv.DictReader(stream):
                label = read_label(hospital.root / "labels" / f"{row['patient']}.nii.gz")
                has_lesion = float(row["lesion_volume_ml"]) > 0
                assert (row["disease"] == "yes") == has_lesion
                diseased += has_lesion
                assert has_lesion or not (label.array == 4).any()
    assert diseased > 0


def test_paired_patients_are_one_anatomy_seen_by_every_scanner(
    consortium: tuple[Path, list[Hospital]],
) -> None:
    for name in ("P00001", "P00002"):
        labels, scans = [], []
        for hospital in consortium[1]:
            assert hospital.paired is not None
            for store, kind in ((labels, "labels"), (scans, "images")):
                path = hospital.paired / kind / f"{name}.nii.gz"
                read = read_label(path) if kind == "labels" else read_scan(path)
                to_voxel = np.linalg.inv(read.affine) @ grid_affine(4)
                store.append(affine_transform(read.array, to_voxel, output_shape=grid_shape(4), order=0))
        for a, b in itertools.combinations(range(3), 2):
            brain_a, brain_b = labels[a] > 0, labels[b] > 0
            assert 2 * (brain_a & brain_b).sum() / (brain_a.sum() + brain_b.sum()) > 0.93
            assert np.abs(np.log(scans[a].mean() / scans[b].mean())) > 0.05


def test_scanners_can_be_set_by_hand_and_the_rest_is_drawn() -> None:
    plan = hospitals_plan(
        {"kind": "phantoms", "num_hospitals": 2, "scanners": [{}, {"field_t": 7, "oblique_deg": [1, 2, 3]}]}
    )
    assert isinstance(plan, PhantomHospitals)
    drawn = hospitals_plan({"kind": "phantoms", "num_hospitals": 2})
    assert isinstance(drawn, PhantomHospitals)
    assert phantom_scanner(plan, 0, "a") == phantom_scanner(drawn, 0, "a")
    by_hand, as_drawn = phantom_scanner(plan, 1, "b"), phantom_scanner(drawn, 1, "b")
    assert (by_hand.field_t, by_hand.oblique_deg) == (7.0, (1.0, 2.0, 3.0))
    assert by_hand.coil_seed == as_drawn.coil_seed


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"kind": "ghosts"}, "hospitals.kind to be one of phantoms, folders, split"),
        ({"kind": "split"}, "Expected root=FOLDER"),
        ({"kind": "phantoms", "patient": 3}, "has no setting 'patient'"),
        ({"kind": "phantoms", "num_hospitals": 1, "sizes": [3, 4]}, "at most 1 sizes; got 2"),
        ({"kind": "phantoms", "skew": 2.0}, r"skew in \[0, 1\]"),
    ],
)
def test_settings_that_make_no_sense_are_refused(values: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        hospitals_plan(values)


def test_names_that_would_hide_the_truth_are_refused(tmp_path: Path) -> None:
    for names in (("truth",), ("a", "a"), ("../b",)):
        with pytest.raises(ValueError, match="different hospital names"):
            make_hospitals(PhantomHospitals(num_hospitals=len(names), names=names), tmp_path)


def test_real_sites_come_from_participants_tsv_and_no_scan_is_copied(data_root: Path, tmp_path: Path) -> None:
    plan = FolderHospitals(
        root=str(data_root / "gm_challenge"),
        by="Site",
        patient_pattern=r"(sub-\d+)",
        label_pattern="gmseg-.*",
    )
    hospitals = make_hospitals(plan, tmp_path)
    assert {h.name: len(rows_of(h)) for h in hospitals} == {
        "ceitec": 2, "juntendo": 1, "milan": 2, "nwu": 1, "philips": 1, "ucl": 1,
    }  # fmt: skip
    milan = rows_of(next(h for h in hospitals if h.name == "milan"))
    assert {row["patient"] for row in milan} == {"sub-9709"}  # two sessions, one patient, never in two splits
    assert all(row["label"].endswith("gmseg-manual.nii.gz") for row in milan)
    assert not list(tmp_path.rglob("*.nii.gz"))
    volumes = VolumePlan(modality="T2starw")
    for hospital in hospitals:
        cohort = open_cohort(hospital.root, plan=volumes, split_salt="", layout=hospital.layout)
        assert (
            len(cohort.scans) == len(rows_of(hospital)) == sum(s.label_path is not None for s in cohort.scans)
        )


def test_a_bids_data_set_is_not_taken_for_a_folder_of_hospitals(data_root: Path, tmp_path: Path) -> None:
    root = str(data_root / "gm_challenge")
    with pytest.raises(ValueError, match=r"Set hospitals\.by"):
        make_hospitals(FolderHospitals(root=root), tmp_path)
    with pytest.raises(ValueError, match="column 'Town'"):
        make_hospitals(FolderHospitals(root=root, by="Town"), tmp_path)


def test_one_folder_per_hospital_is_taken_as_it_lies(tmp_path: Path) -> None:
    for name in ("St Mary", "harbour", ".cache"):
        (tmp_path / name).mkdir()
    hospitals = make_hospitals(FolderHospitals(root=str(tmp_path)), tmp_path / "unused")
    assert [(h.name, h.root, h.truth) for h in hospitals] == [
        ("st-mary", tmp_path / "St Mary", None),
        ("harbour", tmp_path / "harbour", None),
    ]
    assert not (tmp_path / "unused").exists()


def test_intensity_regimes_of_the_hippocampus_set_become_hospitals(data_root: Path, tmp_path: Path) -> None:
    root = data_root / "msd_hippocampus"
    hospitals = make_hospitals(SplitHospitals(root=str(root)), tmp_path)
    rows = [rows_of(h) for h in hospitals]
    every = [row["path"] for row in itertools.chain(*rows)]
    assert sorted(every) == sorted(str(p.resolve()) for p in (root / "images").glob("*.nii.gz"))
    assert sum(row["label"] != "" for row in itertools.chain(*rows)) == 260
    # the data's README: 55 labelled images of 8 bits, 34 beyond 5,000, one of them only 5,749
    assert [len(r) for r in rows] == [56, 172, 33]
    brightest = [[float(read_scan(Path(row["path"])).array.max()) for row in r[:8]] for r in rows]
    assert max(brightest[0]) <= 255 < min(brightest[1])
    assert max(brightest[1]) < 1e4 < min(brightest[2])
    with (tmp_path / "truth/left_out.csv").open() as stream:
        left_out = {row["path"]: row["reason"] for row in csv.DictReader(stream)}
    assert left_out["labels/hippocampus_281.nii.gz"] == "label_without_image"


@pytest.fixture
def few_crops(data_root: Path, tmp_path: Path) -> Path:
    root = tmp_path / "few"
    for kind in ("images", "labels"):
        (root / kind).mkdir(parents=True)
    for number in (1, 3, 4, 6, 7, 8):
        for kind in ("images", "labels"):
            shutil.copy(
                data_root / "msd_hippocampus" / kind / f"hippocampus_{number:03d}.nii.gz", root / kind
            )
    return root


def test_styles_on_top_leave_anatomy_and_labels_in_place(few_crops: Path, tmp_path: Path) -> None:
    plan = SplitHospitals(root=str(few_crops), by="random", styles_on_top=True, seed=4)
    hospitals = make_hospitals(plan, tmp_path / "out")
    seen = []
    for hospital in hospitals:
        assert hospital.truth is not None
        cohort = open_cohort(
            hospital.root, plan=VolumePlan(modality="T1w"), split_salt="", layout=hospital.layout
        )
        assert len(cohort.scans) == 2
        for scan in cohort.scans:
            assert scan.path.is_relative_to(hospital.root)
            stem = scan.path.name.removesuffix(".nii.gz")
            truth = json.loads((hospital.truth / f"{stem}.json").read_text())
            source = few_crops / truth["source"]
            seen.append(truth["source"])
            original, styled = read_scan(source), read_scan(scan.path)
            assert same_grid(original, styled)
            assert scan.label_path is not None
            label, mine = read_label(few_crops / "labels" / source.name), read_label(scan.label_path)
            assert np.array_equal(np.bincount(label.array.astype(int).ravel()),
                                  np.bincount(mine.array.astype(int).ravel()))  # fmt: skip
            to_voxel = np.linalg.inv(styled.affine) @ original.affine
            there = affine_transform(styled.array, to_voxel, output_shape=original.array.shape, order=1)
            ranks = [v.ravel().argsort().argsort() for v in (original.array, there)]
            assert np.corrcoef(*ranks)[0, 1] > 0.6
            assert scan.scan_id != original.scan_id
    assert sorted(seen) == sorted(f"images/{p.name}" for p in (few_crops / "images").iterdir())


def test_a_restyled_split_is_resumed_and_follows_its_sources(few_crops: Path, tmp_path: Path) -> None:
    plan = SplitHospitals(root=str(few_crops), by="random", styles_on_top=True, num_hospitals=2)
    out = tmp_path / "out"
    make_hospitals(plan, out)
    before = files_of(out)
    stamps = {p: p.stat().st_mtime_ns for p in out.rglob("*.nii.gz")}
    broken = sorted(stamps)[0]
    broken.write_bytes(b"")
    make_hospitals(plan, out)
    assert files_of(out) == before
    assert [p for p in stamps if p.stat().st_mtime_ns != stamps[p]].count(broken) == 1
    gone = sorted((few_crops / "images").iterdir())[0]
    gone.unlink()
    (few_crops / "labels" / gone.name).unlink()
    make_hospitals(plan, out)
    assert not [p for p in out.rglob("*.nii.gz") if p.name.startswith(gone.name.removesuffix(".nii.gz"))]


def test_an_unreadable_scan_goes_to_a_hospital_whose_intake_names_the_reason(
    few_crops: Path, tmp_path: Path
) -> None:
    (few_crops / "images" / "hippocampus_bad.nii.gz").write_bytes(b"\x1f\x8b" + b"0" * 50)
    by_both = (
        SplitHospitals(root=str(few_crops), num_hospitals=2),
        SplitHospitals(root=str(few_crops), num_hospitals=2, by="random", styles_on_top=True),
    )
    for plan in by_both:
        reasons = []
        for hospital in make_hospitals(plan, tmp_path / plan.by):
            cohort = open_cohort(
                hospital.root, plan=VolumePlan(modality="T1w"), split_salt="", layout=hospital.layout
            )
            reasons += [e.reason for e in cohort.exclusions if e.path.name == "hippocampus_bad.nii.gz"]
        assert len(reasons) == 1


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    st.lists(st.floats(0, 6), min_size=4, max_size=11),
    st.integers(1, 3),
    st.integers(1, 2),
    st.integers(0, 99),
)
def test_natural_breaks_are_the_best_of_all_cuts(
    levels: list[float], num_groups: int, smallest: int, seed: int
) -> None:
    ordered = np.sort(np.round(levels, 3))
    n = len(ordered)
    if num_groups * smallest > n:
        return

    def cost(ends: list[int]) -> float:
        groups = [ordered[a:b] for a, b in itertools.pairwise([0, *ends])]
        return float(sum(((g - g.mean()) ** 2).sum() for g in groups))

    every = [
        [*cuts, n]
        for cuts in itertools.combinations(range(1, n), num_groups - 1)
        if min(np.diff([0, *cuts, n])) >= smallest
    ]
    found = natural_breaks(ordered, num_groups, smallest)
    assert found in every
    assert cost(found) == pytest.approx(min(cost(ends) for ends in every), abs=1e-8)
    shuffled = np.random.default_rng(seed).permutation(n)
    groups = by_intensity({f"p{i:02d}": float(ordered[i]) for i in shuffled}, num_groups)
    assert [groups[f"p{i:02d}"] for i in range(n)] == sorted(groups.values())
