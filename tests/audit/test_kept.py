"""An audit that was stopped goes on to the same report; what changed is looked for again."""

import hashlib
from dataclasses import replace
from pathlib import Path

import pytest

from audit.attacks.by_kind import audit
from audit.effort import QUICK
from audit.record.artefacts import Audited
from audit.record.kept import KeptFindings, code_sha256
from tests.audit.released import Answered, toy_plan


class Stopped(Exception):
    """The plug was pulled."""


@pytest.fixture(scope="module")
def answered(tmp_path_factory: pytest.TempPathFactory) -> Answered:
    return Answered(tmp_path_factory.mktemp("toy"), 24, 24, toy_plan()).ask("survey", "probe", "erasure")


def told(answered: Answered, folder: Path, draws: int = 4, **changes: object) -> tuple[Audited, list[str]]:
    """What was found, and what was said meanwhile."""
    said: list[str] = []
    evidence = answered.evidence(**changes)
    return audit(evidence, replace(QUICK, draws=draws), said.append, KeptFindings(folder)), said


def without_seconds(audited: Audited) -> list[object]:
    return [replace(finding, seconds=0.0) for finding in audited.findings]


def test_an_audit_that_was_stopped_goes_on_to_the_same_report(answered: Answered, tmp_path: Path) -> None:
    def stop(text: str) -> None:
        if text == "north: erasure":
            raise Stopped

    with pytest.raises(Stopped):
        audit(answered.evidence(), QUICK, stop, KeptFindings(tmp_path))
    resumed, said = told(answered, tmp_path)
    assert "north: survey: as found before" in said and "north: erasure" in said
    whole, _ = told(answered, tmp_path / "fresh")
    assert without_seconds(resumed) == without_seconds(whole)
    assert (resumed.alarms, resumed.tried) == (whole.alarms, whole.tried)


def test_other_options_other_scans_and_another_file_are_looked_at_again(
    answered: Answered, tmp_path: Path
) -> None:
    first, _ = told(answered, tmp_path)
    changed = replace(answered.cohort, latents=answered.cohort.latents + 1)
    for more in ({"draws": 5}, {"hashes": {"plan.json": "1" * 64}}, {"cohorts": {"north": changed}}):
        _, said = told(answered, tmp_path / "copy", **more)  # type: ignore[arg-type]
        assert "north: survey" in said
    again, said = told(answered, tmp_path)
    assert [one for one in said if one.endswith("as found before")]
    assert again.findings == first.findings


def test_a_file_of_findings_that_was_cut_is_not_believed(answered: Answered, tmp_path: Path) -> None:
    told(answered, tmp_path)
    for path in tmp_path.glob("*.json"):
        path.write_text(path.read_text()[:-20])
        assert path.stat().st_mode & 0o077 == 0
    _, said = told(answered, tmp_path)
    assert not [one for one in said if one.endswith("as found before")]


def test_findings_are_kept_under_the_code_of_every_room() -> None:
    files = sorted((Path(__file__).resolve().parents[2] / "audit").rglob("*.py"))
    assert {"audit", "attacks", "statistics", "record"} == {path.parent.name for path in files}
    assert code_sha256() == hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()
