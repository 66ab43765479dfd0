import csv
import json
from pathlib import Path

import pytest

from server.run_folder import write_metrics
from storage.files import write_whole

ROUND = {
    "round": 1,
    "seconds": 3.5,
    "sites": {"oslo": {"examples": 20, "seconds": 2.5, "bytes_up": 8, "loss": {"total": 1.0, "mftd": 0.5}}},
    "refused": {"lyon": "late"},
    "loss": {"total": 1.0, "mftd": 0.5},
    "probes": {"site_from_content": 0.4},
}


def test_the_table_has_a_row_per_round_and_site_and_one_for_all(tmp_path: Path) -> None:
    write_metrics(tmp_path, {"rounds": [ROUND]})
    assert json.loads((tmp_path / "metrics.json").read_text())["rounds"][0] == ROUND
    rows = list(csv.DictReader((tmp_path / "metrics.csv").read_text().splitlines()))
    assert [(row["round"], row["site"], row["loss.mftd"]) for row in rows] == [
        ("1", "oslo", "0.5"),
        ("1", "all", "0.5"),
    ]
    assert rows[1]["probe.site_from_content"] == "0.4"
    assert rows[0]["bytes_up"] == "8" and rows[1]["bytes_up"] == ""


def test_metrics_before_the_first_round_are_an_empty_table(tmp_path: Path) -> None:
    write_metrics(tmp_path, {"rounds": [], "survey": {}})
    assert (tmp_path / "metrics.csv").read_text().strip() == "round,site,examples,seconds"


def test_a_number_that_is_not_one_is_refused_and_the_old_file_stays(tmp_path: Path) -> None:
    write_metrics(tmp_path, {"rounds": []})
    with pytest.raises(ValueError):
        write_metrics(tmp_path, {"rounds": [], "loss": float("nan")})
    assert json.loads((tmp_path / "metrics.json").read_text()) == {"rounds": []}


def test_a_write_that_fails_leaves_the_old_file_and_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_whole(tmp_path / "plan.json", "old")

    def full(descriptor: int) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="disk full"):
        write_whole(tmp_path / "plan.json", "new")
    assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]
    assert (tmp_path / "plan.json").read_text() == "old"
