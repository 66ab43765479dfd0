"""Who is the patient: folders as the field lays them out, and 5,000 drawn ones, with the answer known.

A map is right when scans of one person, and only those, share a patient. It may also be doubted aloud, or a
scan may have no patient; what may not be is a wrong map without a word.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import PurePosixPath

import pytest

from client.scans.names import is_placeholder
from client.scans.patients import PatientMap, Reading, doubts_of, patients_by_path, patients_by_pattern

DRAWS = 5_000


def read(paths: list[str]) -> Reading:
    return patients_by_path([PurePosixPath(path) for path in paths])


def patients(paths: list[str]) -> list[str]:
    return [whose.patient for whose in read(paths).whose]


@dataclass
class Tree:
    """Paths without extension, whose each is, and how it was made."""

    paths: list[str]
    persons: list[str]
    recipe: str


Draw = random.Random


def _ids(draw: Draw, count: int) -> list[str]:
    """Different ids of one make."""
    numbers = draw.sample(range(1, 10 ** draw.choice((3, 4))), count)
    width = draw.choice((0, 4))
    make: Callable[[int], str] = draw.choice(
        [
            lambda n: f"P{n:0{width}d}",
            lambda n: f"sub{n:0{width}d}",
            lambda n: f"CASE_{n:03d}",
            lambda n: f"BraTS20_Training_{n:03d}",
            lambda n: f"{100 + n % 3:03d}_S_{n:04d}",
            lambda n: f"IXI{n:03d}",
            lambda n: f"OAS1_{n:04d}",
            lambda n: f"{100_000 + n}",
            lambda n: f"HUB-{n:03d}",
            lambda n: f"Patient {n}",
            lambda n: f"sub-{n:03d}",
            lambda n: f"sub-HUB-{n:03d}",
            _surname,
        ]
    )
    return [make(number) for number in numbers]


def _surname(number: int) -> str:
    vowels = "aeiou"
    name = f"{'bcdfghklmnp'[number % 11]}{vowels[number % 5]}{'rstvwz'[number % 6]}{vowels[number // 7 % 5]}"
    return f"{name}n{vowels[number // 31 % 5]}r"


def _dates(draw: Draw, count: int) -> list[str]:
    days = [
        (draw.randint(1990, 2030), draw.randint(1, 12), draw.randint(1, 28), index) for index in range(count)
    ]
    form = draw.choice(
        ["{0}-{1:02d}-{2:02d}", "{0}{1:02d}{2:02d}", "{0}_{1:02d}_{2:02d}", "{2:02d}.{1:02d}.{0}",
         "{0}-{1:02d}-{2:02d}_12_31_{3:02d}", "{2:02d}{m}{0}", "{0}-{m}-{2:02d}"]
    )  # fmt: skip
    return [
        form.format(*day, m="JanFebMarAprMayJunJulAugSepOctNovDec"[3 * day[1] - 3 : 3 * day[1]])
        for day in days
    ]


def _visits(draw: Draw, count: int) -> list[str]:
    """Names of a person's visits; different."""
    kind = draw.randrange(12)
    if kind >= 9:
        return {
            9: [
                f"{draw.randint(10, 29)}{n + 1:02d}{draw.randint(1, 28):02d}" for n in range(count)
            ],  # 190304
            10: [f"MR{draw.randint(10_000, 99_999) + n}" for n in range(count)],  # a study's number
            11: [f"{n + 1}" for n in range(count)],
        }[kind]
    if kind == 0:
        dates = list(dict.fromkeys(_dates(draw, count)))
        return dates
    lists = [
        ["baseline", "followup"], ["bl", "m06", "m12", "m24"], [f"ses-{n:02d}" for n in range(1, 5)],
        [f"v{n:02d}" for n in range(1, 5)], [f"visit{n}" for n in range(1, 5)], ["pre", "post"],
        ["scan", "rescan"], ["test", "retest"],
    ]  # fmt: skip
    return lists[kind - 1][:count]


def _contrasts(draw: Draw) -> list[str]:
    return draw.choice(
        [["t1"], ["T1w"], ["t1", "t1ce", "t2", "flair"], ["T1w", "T2w"], ["MPRAGE"], ["t1n", "t2f"]]
    )


def draw_tree(draw: Draw) -> Tree:
    """A data folder of several persons, some with several visits, in one of the ways that people store."""
    persons = _ids(draw, draw.randint(2, 6))
    visits = _visits(draw, draw.randint(1, 4))
    contrasts = _contrasts(draw)
    way = draw.choice(
        ["p/v/c", "v/p/c", "p_v_c", "p/p_v_c", "p/c/v", "c/p_v", "p_v/c", "images/p_v_c", "v/p_c", "p-v-c",
         "group/p/v/c", "p/v/series/c", "site/p/v/c", "c_p_v", "imagesTr/p_channel", "Guys/p/v/c", "pv_c",
         "p_v_odd_c"]
    )  # fmt: skip
    paths, whose = [], []
    for number, person in enumerate(persons):
        own = visits[: draw.randint(1, len(visits))] if len(visits) > 1 else visits
        group = draw.choice(("train", "HC", "control")) if way.startswith("group") else ""
        site = f"site{number % 2 + 1}"
        for visit in own:
            for index, contrast in enumerate(contrasts):
                paths.append(
                    {
                        "p/v/c": f"{person}/{visit}/{contrast}",
                        "v/p/c": f"{visit}/{person}/{contrast}",
                        "p_v_c": f"{person}_{visit}_{contrast}",
                        "p/p_v_c": f"{person}/{person}_{visit}_{contrast}",
                        "p/c/v": f"{person}/{contrast}/{visit}",
                        "c/p_v": f"{contrast}/{person}_{visit}",
                        "p_v/c": f"{person}_{visit}/{contrast}",
                        "images/p_v_c": f"images/{person}_{visit}_{contrast}",
                        "v/p_c": f"{visit}/{person}_{contrast}",
                        "p-v-c": f"{person}-{visit}-{contrast}",
                        "group/p/v/c": f"{group}/{person}/{visit}/{contrast}",
                        "p/v/series/c": f"{person}/{visit}/series_{index}/{contrast}",
                        "site/p/v/c": f"{site}/{person}/{visit}/{contrast}",
                        "Guys/p/v/c": f"{('Guys', 'Hammersmith')[number % 2]}/{person}/{visit}/{contrast}",
                        "pv_c": f"{person}{('BL', 'FU1', 'FU2', 'FU3')[own.index(visit)]}_{contrast}",
                        "p_v_odd_c": f"{person}_{visit}_x{number}y_{contrast}",
                        "c_p_v": f"{contrast}_{person}_{visit}",
                        "imagesTr/p_channel": f"imagesTr/{person}_{visit}_{index:04d}",
                    }[way]
                )
                whose.append(person)
    order = list(range(len(paths)))
    draw.shuffle(order)
    return Tree([paths[i] for i in order], [whose[i] for i in order], way)


def verdict(tree: Tree) -> str:
    """`right`, `refused` (the wrong scans have no patient), `doubted`, or `wrong`."""
    reading = read(tree.paths)
    found = [whose.patient for whose in reading.whose]
    named = [(person, patient) for person, patient in zip(tree.persons, found, strict=True) if patient]
    pairs = set(named)
    whole = len(pairs) == len({person for person, _ in pairs}) == len({patient for _, patient in pairs})
    if whole:
        return "right" if len(named) == len(found) else "refused"
    doubts = reading.doubts + doubts_of(dict(zip(tree.paths, found, strict=True)))
    return "doubted" if doubts else "wrong"


@pytest.mark.parametrize(
    "draws", [range(1000), pytest.param(range(1000, DRAWS), marks=pytest.mark.slow)], ids=["1000", "5000"]
)
def test_in_5000_drawn_folders_no_patient_is_wrong_in_silence(draws: range) -> None:
    counts: dict[str, int] = {}
    for seed in draws:
        tree = draw_tree(random.Random(seed))
        found = verdict(tree)
        shown = sorted(zip(tree.paths, patients(tree.paths), strict=True))[:8] if found == "wrong" else []
        assert found != "wrong", (seed, tree.recipe, shown)
        counts[found] = counts.get(found, 0) + 1
    assert counts["right"] > 0.85 * len(draws), counts  # a rule that doubts everything would pass, too


FIELD = {
    "BIDS with sessions": ["sub-01/ses-1/anat/sub-01_ses-1_T1w", "sub-01/ses-2/anat/sub-01_ses-2_T1w",
                           "sub-02/ses-1/anat/sub-02_ses-1_T1w"],
    "nnU-Net": ["imagesTr/CASE_001_0000", "imagesTr/CASE_001_0001", "imagesTr/CASE_002_0000"],
    "BraTS": ["BraTS20_Training_001/BraTS20_Training_001_t1",
              "BraTS20_Training_001/BraTS20_Training_001_flair",
              "BraTS20_Training_002/BraTS20_Training_002_t1"],
    "BraTS 2023": ["BraTS-GLI-00001-000/BraTS-GLI-00001-000-t1n",
                   "BraTS-GLI-00001-001/BraTS-GLI-00001-001-t1n",
                   "BraTS-GLI-00002-000/BraTS-GLI-00002-000-t1n"],
    "ADNI": ["ADNI/002_S_0413/MPRAGE/2006-05-02_12_31_52.0/S13893/a",
             "ADNI/002_S_0413/MPRAGE/2007-06-01_08_00_00.0/S20111/b",
             "ADNI/011_S_0003/MPRAGE/2005-09-01_10_00_00.0/S9211/c"],
    "OASIS": ["OAS1_0001_MR1/mpr-1", "OAS1_0001_MR2/mpr-1", "OAS1_0002_MR1/mpr-1"],
    "flat with dates": ["P001_20190301_T1w", "P001_20200110_T1w", "P002_20190301_T1w"],
    "visits on top": ["baseline/P001/t1", "followup/P001/t1", "baseline/P002/t1"],
    "visits without a separator": ["P001BL_t1", "P001FU1_t1", "P002BL_t1"],
    "months": ["P001/m06/t1", "P001/m12/t1", "P002/m06/t1"],
    "test and retest": ["test/P001_t1", "retest/P001_t1", "test/P002_t1"],
    "names": ["mueller/04.03.2019/x", "mueller/05.03.2020/x", "meier/04.03.2019/x"],
}  # fmt: skip


@pytest.mark.parametrize("layout", FIELD)
def test_the_fields_own_layouts_have_two_scans_of_the_first_patient_and_one_of_the_second(
    layout: str,
) -> None:
    first, again, second = patients(FIELD[layout])
    assert first and first == again and second and second != first


def test_ids_of_two_sites_are_two_persons() -> None:
    assert patients(["site1/001/t1", "site1/002/t1", "site2/001/t1"]) == [
        "site1/001",
        "site1/002",
        "site2/001",
    ]


@pytest.mark.parametrize(
    "paths", [["baseline/t1", "followup/t1"], ["20190304/t1", "20200110/t1"], ["V01_t1", "V02_t1"]]
)
def test_dates_and_visits_alone_say_nothing_and_are_not_taken_for_patients(paths: list[str]) -> None:
    assert set(patients(paths)) == {""}


def test_persons_below_a_folder_of_an_unknown_name_are_asked_about() -> None:
    reading = read(["Guys/IXI002/t1", "Guys/IXI012/t1", "Hammersmith/IXI013/t1"])
    assert any("studies of one patient, or patients?" in doubt for doubt in reading.doubts)


@pytest.mark.parametrize(
    "patient", ["ANONYMOUS", "anonymized", "***", "", "0000", "Unknown", "^", "xxxx", "Patient"]
)
def test_what_software_writes_for_an_id_is_a_placeholder(patient: str) -> None:
    assert is_placeholder(patient)


@pytest.mark.parametrize("patient", ["P001", "ANON-0113", "mueller", "12", "Patient 7", "NA12878"])
def test_an_id_is_no_placeholder(patient: str) -> None:
    assert not is_placeholder(patient)


def test_one_patient_under_two_spellings_and_one_scan_each_are_doubted() -> None:
    doubts = " ".join(doubts_of({"a": "sub-01", "b": "SUB_1", "c": "P2"}))
    assert "SUB_1 and sub-01" in doubts and "Every scan is a patient of its own (3)" in doubts


def test_a_pattern_tells_and_one_that_matches_nothing_is_an_error() -> None:
    paths = [PurePosixPath("x/a7_t1.nii.gz"), PurePosixPath("x/b8_t1.nii.gz")]
    assert [whose.patient for whose in patients_by_pattern(paths, r"/a(\d)").whose] == ["7", ""]
    with pytest.raises(ValueError, match="matches none of 2"):
        patients_by_pattern(paths, r"c(\d)")


def test_control_characters_in_a_name_reach_no_terminal() -> None:
    found = PatientMap("rule", {"a\x1b[2J/t1.nii": "a\x1b[2J"})
    assert "\x1b" not in found.guess() and "\\x1b" in found.guess()
