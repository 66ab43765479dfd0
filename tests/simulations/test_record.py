"""A record and a card say what the run says: ages in bands, losses by site, the audit; no name of a site."""

import json
from pathlib import Path

import pytest

from federation.exchanges.demographics import AGES, SEXES
from federation.plan.plan import RunPlan
from meduet_models.weights import load_weights, sha256_of_file
from server.cli import main
from server.config import compose_config
from simulations import audit_cli
from simulations.run import run
from tests.small_simulation import small_simulation

LEAST = 2  # small_simulation's minimum cohort


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("record") / "run"
    run(compose_config([*small_simulation(), "demographics={age_edges:[20,40,60]}", f"folder={folder}"]))
    return folder


def crate_of(folder: Path) -> dict[str, dict[str, object]]:
    crate = json.loads((folder / "ro-crate-metadata.json").read_text())
    return {one["@id"]: one for one in crate["@graph"]}


def card_of(folder: Path) -> str:
    out = folder.with_name(f"{folder.name}-out")
    assert main(["export", str(folder), "--form", "folder", "--licence", "CC0-1.0", "-o", str(out)]) == 0
    return (out / "README.md").read_text()


def test_a_runs_folder_lists_what_the_centre_wrote_by_its_hash_and_no_simulated_site(finished: Path) -> None:
    entities = crate_of(finished)
    parts = {one["@id"] for one in entities["./"]["hasPart"]}  # type: ignore[attr-defined]
    assert {"plan.json", "metrics.json", "journal.jsonl", "model.safetensors", "report.html"} <= parts
    assert "figures/swap-north.png" in parts
    assert not [part for part in parts if part.startswith(("sites", "hospitals", "checkpoints", "watch"))]
    for part in parts:
        assert entities[part]["identifier"] == f"sha256:{sha256_of_file(finished / part)}"
    plan = RunPlan.from_json((finished / "plan.json").read_text())
    assert entities["./"]["identifier"] == plan.sha256
    assert "meduet-server export --licence" in str(entities["./"]["license"])


def test_sites_tell_whole_cohorts_through_gate_ledger_and_journal(finished: Path) -> None:
    told = json.loads((finished / "metrics.json").read_text())["demographics"]
    assert told["sites"] == 2 and not told["refused"]
    assert json.loads(load_weights(finished / "model.safetensors")[1]["demographics"]) == told
    counts = [*told[AGES].values(), *told[SEXES].values()]
    assert sum(told[SEXES].values()) > 0 and all(count % LEAST == 0 for count in counts)
    for site in ("north", "harbour"):
        books = finished / "sites" / site
        lines = [json.loads(line)["record"] for line in (books / "journal.jsonl").read_text().splitlines()]
        (line,) = [one for one in lines if one["kind"] == "demographics"]
        assert "not differentially private" in line["promise"] and line["ledger"]
        assert '"kind":"demographics"' in (books / "ledger.jsonl").read_text()


def test_the_card_says_patients_losses_and_the_audit_and_names_no_site(finished: Path) -> None:
    before = card_of(finished)
    assert "No audit lies in the run" in before
    told = json.loads((finished / "metrics.json").read_text())
    for band, count in told["demographics"][AGES].items():
        assert f"| ages | {band} | {count or 'fewer than 2'}" in before
    losses = sorted(one["loss"]["total"] for one in told["rounds"][-1]["sites"].values())
    assert all(f"{loss:.4g}" in before for loss in losses)
    audit_cli.main([str(finished), "--quick"])
    assert "audit/audit.json" in crate_of(finished)
    finished_again = finished.with_name("again")
    finished.rename(finished_again)
    after = card_of(finished_again)
    finished_again.rename(finished)
    assert "| survey | pool |" in after and "Not tried by it" in after
    for text in (before, after):
        assert "north" not in text and "harbour" not in text
