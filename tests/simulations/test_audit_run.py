"""`meduet-audit` on a whole simulated run: what it finds, what it writes, and what it refuses."""

import json
import shutil
from pathlib import Path

import pytest
from rich.console import Console

from audit.record.record import read_record
from client.cli import main as site_main
from federation.plan.plan import RunPlan
from server.config import compose_config
from simulations.audit_cli import main
from simulations.finished_run import begun_run
from simulations.progress import Live
from simulations.run import run
from tests.small_simulation import small_simulation

SPLIT = ("site.split_fractions=[0.5,0.0,0.5]", "probes.every_rounds=1", "probes.folds=3")
POLICY = "required_tests: [books]\nmin_cell: 2\n"


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("simulation") / "run"
    settings = small_simulation(patients=16, paired=2, rounds=1, steps_per_round=1)
    run(compose_config([*settings, *SPLIT, "+probes.anatomy.age=[15,100]", f"folder={folder}"]))
    return folder


def audited(folder: Path, *more: str) -> tuple[int, str]:
    console = Console(record=True, width=200)
    status = main([str(folder), "--quick", *more], console)
    return status, console.export_text()


def test_the_sums_of_a_run_name_its_patients_and_the_command_fails(finished: Path, tmp_path: Path) -> None:
    policy = tmp_path / "privacy_policy.yaml"
    policy.write_text(POLICY)
    status, said = audited(finished, "--policy", str(policy))
    assert status == 1
    record = json.loads((finished / "audit" / "audit.json").read_text())
    verdicts = {(f["attack"], f["verdict"]) for row in record["artefacts"] for f in row["findings"]}
    assert {("span", "found"), ("measured", "found"), ("pool", "found"), ("books", "not found")} <= verdicts
    assert not any(f["verdict"] == "not audited" for row in record["artefacts"] for f in row["findings"])
    kinds = {row["name"].partition(": ")[2] for row in record["artefacts"]}
    assert {"survey", "round", "probe", "probe_hits", "erasure", "books"} <= kinds
    assert "model.safetensors" in {row["name"] for row in record["artefacts"]}
    assert record["policy"]["min_cell"] == 2 and set(record["hashes"]) >= {"plan.json", "model.safetensors"}
    assert "identify each of its" in said
    assert (finished / "audit" / "audit.html").stat().st_mode & 0o077 == 0


def test_models_are_retrained_once_in_the_runs_place_and_the_page_no_longer_says_that_none_was(
    finished: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    _, said = audited(folder, "--shadow", "1")
    record = json.loads((folder / "audit" / "audit.json").read_text())
    found = [f for row in record["artefacts"] for f in row["findings"] if f["attack"] == "shadow"]
    assert len(found) == 1 and "north: survey" in said and "shadow 1" in record["hashes"]
    assert not [text for text in record["not_tested"] if "--shadow" in text]
    assert [text for text in record["not_tested"] if "gradient inversion" in text]
    model = folder / "audit" / "shadows" / "1" / "model.safetensors"
    trained = model.stat().st_mtime_ns
    _, said = audited(folder, "--shadow", "1")
    assert model.stat().st_mtime_ns == trained and "north: survey: as found before" in said


def test_an_audit_changes_nothing_of_the_run(finished: Path) -> None:
    def books() -> dict[str, bytes]:
        return {str(p): p.read_bytes() for p in finished.rglob("*.jsonl")}

    before = books()
    audited(finished)
    assert books() == before


def test_a_journal_line_that_was_edited_is_said_first(finished: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    ledger = folder / "sites" / "north" / "ledger.jsonl"
    ledger.write_bytes(b"\n".join(ledger.read_bytes().split(b"\n")[:2]) + b"\n")
    status, said = audited(folder)
    assert status == 1
    found = said.split("built in on purpose")[1].split("\n")
    first = next(line for line in found if line.strip())
    assert first.startswith("north: books: ") and "the ledger does not know of it" in first


def test_a_run_that_is_not_finished_is_audited_as_far_as_it_came(finished: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    (folder / "model.safetensors").unlink()
    audited(folder)
    record = json.loads((folder / "audit" / "audit.json").read_text())
    assert record["unfinished"].startswith("The run is not finished (1 of 1 rounds)")
    assert "model.safetensors" not in {row["name"] for row in record["artefacts"]}


def test_a_site_audits_what_left_it_on_its_own_patients(finished: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    plan = RunPlan.from_json((folder / "plan.json").read_text())
    begun = begun_run(folder, Live())
    (config,) = [one for one in begun.consortium.configs if one.name == "north"]
    lines = [f"name: {config.name}", f"data_root: {config.data_root}", f"state_dir: {config.state_dir}"]
    lines += [f"layout: {config.layout}", "modality_names: {'*': t1}", "allow_non_private: true"]
    lines += ["split_fractions: [0.5, 0.0, 0.5]", "plan_approval: implied", "minimum_cohort: 2"]
    (tmp_path / "site.yaml").write_text("\n".join(lines) + "\n")
    console = Console(record=True, width=200)
    asked = ["audit", "--config", str(tmp_path / "site.yaml"), "--plan", str(folder / "plan.json"), "--quick"]
    status = site_main([*asked, "--model", str(folder / "model.safetensors")], console)
    (path,) = config.state_dir.glob("audit/*/audit.json")
    record = read_record(path)
    assert status == record.status == 1 and path.parent.name == plan.sha256[:12]
    verdicts = {row.name: row.verdict for row in record.artefacts}
    assert verdicts["north: survey"] == "found" and verdicts["north: books"] == "not found"
    assert verdicts["north: erasure"] == "not audited"  # its weights are not kept at a site
    assert "harbour" not in path.read_text() and "model.safetensors" in verdicts


def test_bad_input_is_one_line(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path)]) == 2
    assert "has no config.yaml. Nothing was audited." in " ".join(capsys.readouterr().err.split())
    policy = tmp_path / "privacy_policy.yaml"
    policy.write_text("required_tests: [sorcery]\n")
    assert main([str(finished), "--policy", str(policy)]) == 2
    assert "got 'sorcery'" in " ".join(capsys.readouterr().err.split())
    assert main([str(finished), "--null", "0"]) == 2
    assert main([str(finished), "--shadow", "5"]) == 2
