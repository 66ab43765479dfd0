"""Counts of sites' audits, from the question to the page of the centre; asked once, whoever starts again."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Context

from audit.record.record import read_record
from client.app import make_client_app
from federation.journal import Journal
from federation.plan.plan import AggregationPlan, AuditCountsPlan, RunPlan, TrainingPlan
from server.app import run
from server.cli import main
from server.exchanges.audit_counts import FILE, read_audit_counts
from server.holdings import centre_audit
from simulations.engines.in_process import InProcessGrid
from tests.worlds import Hospital, Latents, small_plan

MEMBERS, OTHERS = 50, 130


class Scans(Latents):
    """The first `MEMBERS` patients are trained on; the others are for testing."""

    def __init__(self, site: int) -> None:
        super().__init__([site], MEMBERS + OTHERS)

    def indices(self, split: str) -> list[int]:
        rows = super().indices("train")
        return rows[:MEMBERS] if split == "train" else rows[MEMBERS:] if split == "test" else []


def federation(plan: RunPlan, folder: Path) -> InProcessGrid:
    def open_site(context: Context) -> Hospital:
        index = int(context.node_config["partition-id"])
        name = plan.participants[index]
        return Hospital(folder / "sites" / name, Scans(index), name)

    return InProcessGrid(make_client_app(open_site), len(plan.participants), through_wire=True)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[RunPlan, Path]:
    folder = tmp_path_factory.mktemp("counts") / "run"
    plan = small_plan(
        training=TrainingPlan(rounds=1, steps_per_round=2, batch_size=4, warmup=0.0),
        aggregation=AggregationPlan(deadline_s=300.0),
        audit_counts=AuditCountsPlan(false_alarms=0.5),
    )
    run(federation(plan, folder), plan, folder)
    return plan, folder


def lines(folder: Path, kind: str) -> list[dict[str, Any]]:
    records = [entry.record for entry in Journal(folder / "journal.jsonl").entries()]
    return [record for record in records if record["kind"] == kind]


def test_sites_tell_whole_cells_and_the_centre_shows_pooled_rates(finished: tuple[RunPlan, Path]) -> None:
    plan, folder = finished
    told = read_audit_counts((folder / FILE).read_text())
    assert told.sites == 3 and told.cell == 20 and not told.refused
    assert json.loads((folder / "metrics.json").read_text())["audit_counts"] == dataclasses.asdict(told)
    for site in plan.participants:
        (line,) = lines(folder / "sites" / site, "audit_counts")
        assert line["round"] == 1 and line["ledger"]
    (noted,) = lines(folder, "audit_counts")
    assert noted["sites"] == list(plan.participants)
    for pooled in told.attacks.values():
        assert pooled.members.claimed + pooled.members.missed <= 3 * MEMBERS
    assert main(["audit", str(folder)]) == 1  # so few patients behind the style sums
    record = read_record(folder / "audit" / "centre" / "audit.json")
    rows = {one.attack: one for artefact in record.artefacts for one in artefact.findings if one.pooled}
    assert set(rows) == {"loss", "tracing"} and record.hashes[FILE]
    loss = told.attacks["loss"].members
    assert rows["loss"].pooled is not None and rows["loss"].pooled.members.claimed == loss.claimed
    page = (folder / "audit" / "centre" / "audit.html").read_text()
    assert "Sites tried &#39;loss&#39; on their own patients" in page and "whole cells of 20" in page


def test_a_run_that_is_started_again_asks_nobody_again(finished: tuple[RunPlan, Path]) -> None:
    plan, folder = finished
    before = (folder / FILE).read_bytes()
    run(federation(plan, folder), plan, folder)
    assert (folder / FILE).read_bytes() == before and len(lines(folder, "audit_counts")) == 1
    (folder / FILE).unlink()  # as if killed before it was written: sites give the same answer
    run(federation(plan, folder), plan, folder)
    assert (folder / FILE).read_bytes() == before


def test_counts_that_are_not_those_of_the_journal_are_a_contradiction(finished: tuple[RunPlan, Path]) -> None:
    _, folder = finished
    whole = (folder / FILE).read_text()
    (folder / FILE).write_text(whole.replace('"claimed": ', '"claimed": 2'))
    try:
        audited = centre_audit(folder)[1]
    finally:
        (folder / FILE).write_text(whole)
    said = [one.sentence for one in audited.findings if one.verdict == "contradiction"]
    assert said == [f"{FILE} is not what the journal says that sites told."]
    assert not any(one.pooled for one in audited.findings)
