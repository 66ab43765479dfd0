"""The record is whole or refused, and the page says what stands in it, in words that promise nothing."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from audit.attacks.by_kind import audit
from audit.effort import QUICK
from audit.policy import Policy, decide
from audit.record.dossier import OPEN, dossier
from audit.record.page import page_of
from audit.record.record import Record, read_record, record_of, schema, to_json
from tests.audit.released import Answered, toy_plan

ROOT = Path(__file__).resolve().parents[2]
ABOUT: dict[str, Any] = {
    "audited_utc": "2026-01-01T00:00:00+00:00",
    "command": "meduet-audit runs/toy",
    "versions": {"python": "3"},
    "seconds": 1.0,
}


@pytest.fixture(scope="module")
def record(tmp_path_factory: pytest.TempPathFactory) -> Record:
    answered = Answered(tmp_path_factory.mktemp("toy"), 30, 30, toy_plan())
    evidence = answered.ask("survey", "probe", "erasure").evidence(hashes={"plan.json": "0" * 64})
    audited = audit(evidence, QUICK, lambda text: None)
    charged = {one.name: (one.epsilon, one.delta) for one in audited.artefacts}
    decision = decide(Policy(), audited.findings, charged, audited.behind)
    return record_of(evidence, audited, Policy(), decision, None, ABOUT)


def test_a_record_is_as_the_published_schema_says_and_read_back_whole(record: Record, tmp_path: Path) -> None:
    published = json.loads((ROOT / "docs" / "audit.schema.json").read_text())
    assert published == schema()
    jsonschema.validate(json.loads(to_json(record)), published)
    path = tmp_path / "audit.json"
    path.write_text(to_json(record))
    assert read_record(path) == record


@pytest.mark.parametrize("name", ["hashes", "artefacts", "policy", "status", "alarms"])
def test_a_record_that_lacks_a_field_is_no_record(record: Record, tmp_path: Path, name: str) -> None:
    values = json.loads(to_json(record))
    del values[name]
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(values, schema())
    path = tmp_path / "audit.json"
    path.write_text(json.dumps(values))
    with pytest.raises(ValueError, match=name):
        read_record(path)


def test_every_release_is_bound_to_its_hash(record: Record) -> None:
    rows = {row.name: row for row in record.artefacts}
    assert all(re.fullmatch("[0-9a-f]{64}", sha) for row in record.artefacts for sha in row.sha256)
    assert len(rows["north: survey"].sha256) == rows["north: survey"].releases == 1
    assert rows["north: survey"].epsilon == "infinite" and rows["north: survey"].largest_rate_1 == 1.0


def test_the_page_says_first_who_is_named_and_promises_nothing(record: Record) -> None:
    page = page_of(record)
    body = page.split("</style>")[1]
    assert record.status == 1 and "Not within the policy." in body
    first = body[body.index("What was found") : body.index("What left, row by row")]
    assert "identify each of its 30 patients to whoever holds her scan" in first
    words = set(re.findall(r"[a-z]+", (body + to_json(record)).lower()))
    assert not words & {"anonymous", "anonymised", "anonymized", "compliant", "compliance", "safe", "secure"}


def test_the_page_stands_alone_and_needs_no_script(record: Record) -> None:
    page = page_of(record)
    assert "<script" not in page and "http" not in page.split("</style>")[1]
    assert page.count("<table>") == page.count("<caption>") == page.count("<thead>")


def test_every_number_of_the_page_stands_in_the_record(record: Record) -> None:
    table = page_of(record).split("Every attack")[1].split("</table>")[0]
    said = {f"{f.value:.2f}" for row in record.artefacts for f in row.findings if f.value is not None}
    cells = [re.findall(r'<td class="n">(.*?)</td>', line) for line in table.split("<tr>")[2:]]
    assert cells and {row[0] for row in cells} - {""} <= said


def test_the_dossier_leaves_to_people_what_only_they_know_and_invents_no_number(record: Record) -> None:
    page = dossier(record)
    assert page.count(OPEN) == 7 and page.endswith("Fields left open for a person: 7.\n")
    for name in ("re-identification", "attribute inference", "membership inference", "linkage"):
        assert f"  {name}: " in page
    assert "attribute inference: found (north: probe, measured)" in page
    said, known = (set(re.findall(r"\d+\.\d+|[0-9a-f]{64}", text)) for text in (page, to_json(record)))
    assert said and {one for one in said if one not in known} == set()


def test_text_of_a_run_is_text_on_the_page(record: Record) -> None:
    assert "<b>run" not in page_of(dataclasses.replace(record, run="<b>run"))


def test_a_row_says_its_worst_finding_whatever_was_tried_first(record: Record) -> None:
    (row,) = [one for one in record.artefacts if one.name == "north: erasure"]
    mild, bad = (
        dataclasses.replace(row.findings[0], verdict=verdict, sentence=text)
        for verdict, text in (("not found", "Harmless."), ("found", "She is named."))
    )
    changed = dataclasses.replace(row, findings=(mild, bad))
    table = page_of(dataclasses.replace(record, artefacts=(changed,))).split("What left, row by row")[1]
    assert "She is named." in table.split("</table>")[0] and "Harmless." not in table.split("</table>")[0]
