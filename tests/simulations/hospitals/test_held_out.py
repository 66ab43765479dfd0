"""Hospitals held out: they take no part, are asked nothing, and are measured at the end."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from client.exchanges.exchange import AskRefused
from federation.plan.plan import RunPlan
from server.config import compose_config, plain
from simulations.hospitals.held_out import join, own_scans, paired_scans
from simulations.progress import Live
from simulations.run import prepare, run
from tests.small_simulation import small_simulation

SMALL = small_simulation(hospitals=3, steps_per_round=1)


def settings(folder: Path, *more: str) -> Any:
    return compose_config([*SMALL, *more, f"folder={folder}"])


@pytest.fixture(scope="module")
def without_harbour(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("held_out") / "run"
    run(settings(folder, "held_out=[harbour]"))
    return folder


def records(journal: Path) -> list[dict[str, Any]]:
    lines = journal.read_text().splitlines() if journal.is_file() else []
    return [record for line in lines if "sha256" in (record := json.loads(line)["record"])]


def test_a_hospital_held_out_is_not_in_the_plan_and_nothing_ever_left_it(without_harbour: Path) -> None:
    plan = RunPlan.from_json((without_harbour / "plan.json").read_text())
    assert plan.sites == ("north", "valley")
    sites = without_harbour / "sites"
    assert records(sites / "north" / "journal.jsonl") and records(sites / "valley" / "journal.jsonl")
    assert records(sites / "harbour" / "journal.jsonl") == []
    ledger = sites / "harbour" / "ledger.jsonl"
    assert not ledger.is_file() or len(ledger.read_text().splitlines()) <= 1, "nothing was reserved"
    metrics = json.loads((without_harbour / "metrics.json").read_text())
    assert set(metrics["survey"]["sites"]) == set(metrics["erasure"]["sites"]) == {"north", "valley"}


def test_it_is_measured_at_the_end_only_and_the_page_says_who(without_harbour: Path) -> None:
    metrics = json.loads((without_harbour / "metrics.json").read_text())
    assert metrics["final"]["chance_site"] == 0.5
    assert metrics["final"]["with_held_out"]["chance_site"] == pytest.approx(1 / 3)
    assert all("with_held_out" not in entry.get("probes", {}) for entry in metrics["rounds"])
    page = (without_harbour / "report.html").read_text()
    assert "Held out, and never asked anything: harbour." in page
    assert "end, with those held out" in page
    assert (without_harbour / "figures" / "swap-harbour.png").is_file()


def test_it_refuses_the_runs_own_plan_and_is_opened_as_the_last_site(tmp_path: Path) -> None:
    simulation = prepare(plain(settings(tmp_path, "held_out=[north]")), Live())
    consortium = simulation.consortium
    north = consortium.site("north")
    with pytest.raises(AskRefused, match="Expected the plan to list 'north'"):
        north.scans(simulation.plan)
    assert consortium.everyone.sites == ("harbour", "valley", "north")
    scans = north.scans(consortium.everyone)
    assert scans.site_index.tolist() == [2] * 9
    own = own_scans(consortium.everyone, scans, 2, ["train", "validation", "test"])
    paired = paired_scans(consortium.everyone, north, simulation.hospitals[-1], 2)
    assert paired is not None and paired.site == (2, 2, 2) and own.site == (2,) * 9
    both = join([own, paired])
    assert both.latents.shape[0] == 12 and torch.equal(both.latents[9:], paired.latents)
    assert consortium.site("valley").scans(simulation.plan).site_index.unique().tolist() == [1]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ("[nobody]", r"Expected held_out to name hospitals \(north, harbour, valley\); got 'nobody'"),
        ("[north,harbour,valley]", "Expected a hospital that is not held out; held_out names all 3"),
        ("[north,north]", "Expected held_out to name each hospital once"),
    ],
)
def test_names_that_cannot_be_held_out_are_refused(tmp_path: Path, names: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        prepare(
            plain(settings(tmp_path, "hospitals.patients=1", "hospitals.paired=0", f"held_out={names}")),
            Live(),
        )
