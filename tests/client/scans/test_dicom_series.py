"""Whose a DICOM series is: by its headers, else its folders; 1,000 drawn archives with the answer known."""

import random
from pathlib import Path, PurePosixPath

import pytest

from client.scans.dicom_series import _persons, whose_series
from client.scans.layouts import LayoutRules
from client.scans.patients import doubts_of
from scans.dicom import Series

DRAWS, QUICK = 5_000, 1_000


def series(number: int, patient: str, **more: str) -> Series:
    return Series(
        (Path(f"{number}.dcm"),), patient, ("MR",), f"1.2.{number}", frozenset({str(number)}), **more
    )


def patients_and_doubts(
    found: list[Series], paths: list[str], pattern: str = ""
) -> tuple[list[str], list[str]]:
    """Patient of each series, and every doubt."""
    places = [PurePosixPath(path) for path in paths]
    reading = whose_series(found, places, LayoutRules(patient_pattern=pattern))
    patients = [whose.patient for whose in reading.whose]
    doubts = [
        *reading.doubts,
        *_persons(found, reading.whose),
        *doubts_of(dict(zip(paths, patients, strict=True))),
    ]
    return patients, doubts


def test_one_id_of_two_issuers_is_two_patients_and_without_an_issuer_nobody() -> None:
    found = [series(1, "7", issuer="A"), series(2, "7", issuer="B"), series(3, "7"), series(4, "8")]
    assert patients_and_doubts(found, ["a/1", "b/2", "c/3", "d/4"])[0] == ["7 (A)", "7 (B)", "", "8"]


def test_one_id_with_two_birth_dates_or_sexes_stays_one_patient_and_is_said() -> None:
    found = [
        series(1, "7", born="19700101", sex="F"),
        series(2, "7", born="19810203", sex="M"),
        series(3, "8"),
    ]
    patients, doubts = patients_and_doubts(found, ["a/1", "b/2", "c/3"])
    assert patients == ["7", "7", "8"]
    assert "several birth dates" in " ".join(doubts) and "several sexes" in " ".join(doubts)


@pytest.mark.parametrize("folders", [["1.2.840.1.1/x", "1.2.840.1.2/x"], ["2019-03-04/x", "2020-01-10/x"]])
def test_a_placeholder_in_folders_of_uids_or_dates_is_nobody(folders: list[str]) -> None:
    assert patients_and_doubts([series(1, "ANONYMOUS"), series(2, "***")], folders)[0] == ["", ""]


def test_the_pattern_wins_over_the_header() -> None:
    assert patients_and_doubts([series(1, "7"), series(2, "7")], ["S1/a", "S2/a"], r"S(\d)")[0] == ["1", "2"]


def draw_archive(draw: random.Random) -> tuple[list[Series], list[str], list[str]]:
    """Series, paths and the person of each."""
    persons = draw.sample(range(100, 999), draw.randint(2, 5))
    header = draw.choice(["id", "placeholder", "blank", "id and issuer", "some blank", "one id for all"])
    way = draw.choice(
        ["P{p}/{s}/1.dcm", "P{p}/2019030{v}/{s}/1.dcm", "{s}/1.dcm", "2019030{v}/P{p}/{s}/1.dcm"]
    )
    found, paths, whose = [], [], []
    for person in persons:
        born, issuer = f"1{person}0101", f"H{person % 2}"
        for visit in range(1, draw.randint(2, 4)):
            number = len(found)
            patient = {
                "id": f"{person}", "placeholder": "ANONYMOUS", "blank": "", "id and issuer": f"A-{person}",
                "some blank": draw.choice([f"P{person}", ""]), "one id for all": "1",
            }[header]  # fmt: skip
            uid = f"1.2.840.{person}.{visit}.{number}"
            found.append(series(number, patient, born=born, issuer=issuer if "issuer" in header else ""))
            paths.append(way.format(p=person, v=visit, s=uid))
            whose.append(f"{person}")
    return found, paths, whose


@pytest.mark.parametrize(
    "draws", [range(QUICK), pytest.param(range(QUICK, DRAWS), marks=pytest.mark.slow)], ids=["quick", "all"]
)
def test_in_drawn_archives_no_patient_is_wrong_in_silence(draws: range) -> None:
    right = 0
    for seed in draws:
        found, paths, persons = draw_archive(random.Random(seed))
        patients, doubts = patients_and_doubts(found, paths)
        named = {(person, patient) for person, patient in zip(persons, patients, strict=True) if patient}
        whole = len(named) == len({person for person, _ in named}) == len({patient for _, patient in named})
        assert whole or doubts, (seed, paths, patients)
        right += whole and "" not in patients
    assert right > 0.5 * len(draws)
