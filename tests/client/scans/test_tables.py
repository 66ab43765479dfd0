"""Tables as spreadsheets save them: read where there is one way to, else named with row and cure."""

import random
from pathlib import Path

import pytest

from client.scans.tables import Join, join_covariates, read_table

DRAWS, QUICK = 5_000, 1_000


def saved(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


TEXT = "patient,age,note\nP1,61,Müller\nP2,62,x\n"
SAVED = {
    "UTF-8": TEXT.encode(),
    "a mark": TEXT.encode("utf-8-sig"),
    "UTF-16": TEXT.encode("utf-16"),
    "UTF-16 without a mark": TEXT.encode("utf-16-le"),
    "Latin-1": TEXT.encode("latin-1"),
    "semicolons": TEXT.replace(",", ";").encode(),
    "tabs": TEXT.replace(",", "\t").encode(),
    "bars": TEXT.replace(",", "|").encode(),
    "Windows' line ends": TEXT.replace("\n", "\r\n").encode(),
    "commas at the ends": TEXT.replace("\n", ",,\n").encode(),
    "empty rows": (TEXT + ",,\n\n").encode(),
    "Excel's own first line": ("sep=;\n" + TEXT.replace(",", ";")).encode(),
    "blanks around cells": TEXT.replace(",", " , ").encode(),
    "quotes": TEXT.replace("x", '"x, y; z"').replace("Müller", "Müller").encode(),
}


@pytest.mark.parametrize("how", SAVED)
def test_a_table_is_read_however_it_was_saved(tmp_path: Path, how: str) -> None:
    table = read_table(saved(tmp_path / "t.csv", SAVED[how]))
    assert table.columns == ("patient", "age", "note")
    assert [row["patient"] for row in table.rows] == ["P1", "P2"]
    assert table.rows[0]["note"] == "Müller" and table.rows[0]["age"] == "61"


REFUSED = {
    "a letter of an old code page": (b"patient,name\nP1,M\x81ller\n", "row 2 .*Save it as CSV UTF-8"),
    "a row that is too long": (b"patient,age\nP1,1,2\n", "as in row 1; got 3"),
    "a row that is too short": (b"patient,age,sex\nP1,1\n", "as in row 1; got 2"),
    "one header twice": (b"patient,age,AGE\nP1,1,2\n", "'age' stands there twice"),
    "a column without a header": (b"patient,,sex\nP1,1,F\n", "column 2 has none"),
    "two separators": (b"patient;a,b\nP1;1,2\n", "commas and semicolons"),
    "nothing": (b"\n\n", "it is empty"),
}  # fmt: skip


@pytest.mark.parametrize("how", REFUSED)
def test_a_table_with_two_readings_is_refused_with_file_row_and_cure(tmp_path: Path, how: str) -> None:
    content, message = REFUSED[how]
    with pytest.raises(ValueError, match=rf"t\.csv.*{message}"):
        read_table(saved(tmp_path / "t.csv", content))


def test_a_number_with_a_comma_is_one_where_semicolons_separate(tmp_path: Path) -> None:
    path = saved(tmp_path / "t.csv", b"patient;age\nP1;61,5\n")
    assert join_covariates(path, [("P1", "a")])[0] == [{"age": 61.5}]


@pytest.mark.parametrize(
    "header", ["patient", "Patient", "PATIENT_ID", "Participant ID", "participant_id", "Subject"]
)
def test_the_column_of_patients_is_found_whatever_its_case(tmp_path: Path, header: str) -> None:
    path = saved(tmp_path / "t.csv", f"{header},Age,SEX\n01,61,F\n".encode())
    found, join = join_covariates(path, [("sub-01", "sub-01_T1w")])
    assert found == [{"age": 61.0, "sex": "F"}] and join.complete


def test_rows_that_name_files_are_joined_by_file_and_said_so(tmp_path: Path) -> None:
    path = saved(tmp_path / "t.csv", b"patient,age\nscans\\a_T1.nii.gz,1\nb_T1.nii,2\n")
    found, join = join_covariates(path, [("a", "a_T1"), ("b", "b_T1"), ("c", "c_T1")])
    assert found == [{"age": 1.0}, {"age": 2.0}, {}]
    assert join.note == "its cells are file names" and join.scans_without_row == 1


def test_a_join_that_fails_is_said_with_counts(tmp_path: Path) -> None:
    path = saved(tmp_path / "t.csv", b"patient,age\n" + b"".join(b"MR_%d,1\n" % n for n in range(6)))
    found, join = join_covariates(path, [(f"P_{n}", f"P_{n}_T1") for n in range(6)])
    assert found == [{}] * 6
    assert join.summary == (
        "column patient: 0 of 6 rows have scans, 0 of 6 scans have a row; no row names a patient of the"
        " scans: compare it with cohort.csv"
    )


def test_two_rows_of_one_patient_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"one row per patient .*'P1' has two \(rows 2 and 4\)"):
        join_covariates(saved(tmp_path / "t.csv", b"patient,age\nP1,1\nP2,1\nP1,2\n"), [("P1", "a")])


def _drawn(
    draw: random.Random, path: Path
) -> tuple[list[tuple[str, str]], dict[str, float], Join, list[float | None]]:
    """Scans, the age that each patient has by construction, the join, and the age that was joined."""
    numbers = draw.sample(range(1, 2000), draw.randint(1, 8))
    patient = draw.choice(["sub-{:04d}", "P{}", "{:04d}", "IXI{:03d}", "site1/{}", "Müller {}"]).format
    row = draw.choice([patient, lambda n: patient(n).removeprefix("sub-"), lambda n: patient(n).upper(),
                       lambda n: f"{patient(n)}_T1.nii.gz", lambda n: f"MR{n}", str])  # fmt: skip
    ages = {patient(number): float(draw.randint(20, 90)) for number in numbers}
    rows = [f"{row(number)}\x00{ages[patient(number)]:g}" for number in numbers if draw.random() < 0.8]
    draw.shuffle(rows)
    separator, encoding = draw.choice(",;\t|"), draw.choice(["utf-8", "utf-8-sig", "utf-16", "latin-1"])
    header = (
        draw.choice(["patient", "Participant_ID", "SUBJECT"]) + "\x00" + draw.choice(["age", "Age", "AGE"])
    )
    tail = draw.choice(["", separator * 2])
    lines = [line.replace("\x00", separator) + tail for line in [header, *rows]]
    path.write_bytes(draw.choice(["\n", "\r\n"]).join([*lines, ""]).encode(encoding))
    scans = [(patient(number), f"{patient(number).replace('/', '_')}_T1") for number in numbers]
    found, join = join_covariates(path, scans)
    return scans, ages, join, [covariates.get("age") for covariates in found]  # type: ignore[misc]


@pytest.mark.parametrize(
    "draws", [range(QUICK), pytest.param(range(QUICK, DRAWS), marks=pytest.mark.slow)], ids=["quick", "all"]
)
def test_in_drawn_tables_a_scan_gets_its_own_patients_age_or_none_and_the_counts_say_so(
    tmp_path: Path, draws: range
) -> None:
    joined = 0
    for seed in draws:
        scans, ages, join, expected = _drawn(random.Random(seed), tmp_path / "t.csv")
        for (patient, _), age in zip(scans, expected, strict=True):
            assert age in (None, ages[patient]), seed
        assert join.scans_without_row == expected.count(None), seed
        assert join.num_rows - join.rows_without_scan == len(expected) - expected.count(None), seed
        joined += any(age is not None for age in expected)
    assert joined > 0.5 * len(draws)
