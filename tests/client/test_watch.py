"""A site's page: what left, under which promise; nothing of it is a patient's."""

import re
from pathlib import Path

import pytest

from client.books.refusals import note_refusal
from client.settings import SiteConfig
from client.watch import watched
from federation.journal import Journal
from federation.watching import openmetrics, page, serving
from federation.wire.wire import RefusalKind
from privacy.ledger import Ledger, Place
from privacy.promise import Promise
from tests.scraping import needs_prometheus, scraped

NON_FINITE = RefusalKind.NON_FINITE
PROMISE = Promise(kind="round", bound=20.0, unit="site update", enforcement="clip")


@pytest.fixture
def config(tmp_path: Path) -> SiteConfig:
    (tmp_path / "patients_of_doctor_x").mkdir()
    return SiteConfig(name="north", data_root=tmp_path / "patients_of_doctor_x", state_dir=tmp_path / "state")


def released(config: SiteConfig, number: int) -> None:
    """One release, as the gate writes it into both books."""
    ledger, journal = Ledger(config.state_dir / "ledger.jsonl"), Journal(config.state_dir / "journal.jsonl")
    place = Place(plan_sha256="a" * 64, kind="round", round=number)
    ledger.reserve(place, f"{number}" * 64, PROMISE)
    journal.append(
        {"kind": "round", "plan": "a" * 64, "round": number, "bytes": 1000, "clipped": number == 2,
         "promise": PROMISE.sentence()}
    )  # fmt: skip


def test_the_page_says_what_left_and_under_which_promise(config: SiteConfig) -> None:
    config.state_dir.mkdir()
    assert "nothing has left" in page(watched(config))
    for number in (1, 2, 3):
        released(config, number)
    text = page(watched(config))
    assert text.count("bounded, not differentially private") == 3
    assert "something last left" in text and "doctor" not in text


def test_the_numbers_count_releases_bytes_and_what_the_gate_scaled(config: SiteConfig) -> None:
    config.state_dir.mkdir()
    for number in (1, 2, 3):
        released(config, number)
    note_refusal(Journal(config.state_dir / "journal.jsonl"), {"kind": "round", "reserved": "x"}, NON_FINITE)
    text = openmetrics(watched(config).series)
    assert len(set(re.findall(r"^# TYPE (\S+)", text, re.MULTILINE))) >= 20
    assert 'meduet_refusals_total{reason="not_answered"} 1.0' in text and "non_finite" not in text
    assert "meduet_reserved 3.0" in text and 'meduet_charged{noise="without"} 3.0' in text
    assert 'meduet_released_total{kind="round"} 3.0' in text
    assert 'meduet_released_bytes_total{kind="round"} 3000.0' in text
    assert "meduet_released_clipped_total 1.0" in text
    assert 'meduet_ledger_lines_total{event="reserve"} 3.0' in text
    assert "meduet_last_release_round 3.0" in text and "meduet_epsilon +Inf" in text


@needs_prometheus
def test_prometheus_scrapes_the_same_numbers(config: SiteConfig, tmp_path: Path) -> None:
    config.state_dir.mkdir()
    released(config, 1)
    with serving(lambda: watched(config), tmp_path) as address:
        found = scraped(address, tmp_path)
    assert found["meduet_released_bytes_total", (("kind", "round"),)] == 1000
    assert found["meduet_epsilon", ()] == float("inf") and found["meduet_epsilon_ceiling", ()] == 0
    samples = {(one.name, labels) for one in watched(config).series for labels in one.samples}
    assert {(name.removesuffix("_total"), labels) for name, labels in found} == samples


def test_books_that_were_changed_are_said_and_not_shown(config: SiteConfig) -> None:
    config.state_dir.mkdir()
    released(config, 1)
    path = config.state_dir / "journal.jsonl"
    path.write_text(path.read_text().replace('"bytes":1000', '"bytes":1'))
    with pytest.raises(ValueError, match="journal"):
        watched(config)


def test_each_plan_has_a_row_and_a_count_of_its_own(config: SiteConfig) -> None:
    config.state_dir.mkdir()
    for number in (1, 2, 3):
        released(config, number)
    other = Journal(config.state_dir / "journal.jsonl")
    other.append(
        {"kind": "round", "plan": "b" * 64, "round": 7, "bytes": 1, "promise": "p", "clipped": False}
    )
    for question in range(3):
        other.append({"kind": "refusal", "plan": "c" * 64, "told": "not_answered", "question": f"{question}",
                      "reserved": "x"})  # fmt: skip
    seen = watched(config)
    (plans,) = [section for section in seen.sections if section.title == "Plans"]
    assert [(row[1], row[3][:8], row[4], row[5]) for row in plans.rows] == [
        ("a" * 12, "answered", 3, 3),
        ("b" * 12, "answered", 7, 1),
        ("c" * 12, "stopped:", "", 0),
    ]
    text = openmetrics(seen.series)
    assert f'meduet_plan_released_total{{plan="{"a" * 12}"}} 3.0' in text
    assert f'meduet_plan_released_total{{plan="{"b" * 12}"}} 1.0' in text
