"""`meduet-server audit`: what the centre holds, in numbers, from its own book and no patient."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from audit.record.record import read_record
from federation.journal import Journal
from federation.plan.plan import ProbePlan
from meduet_models.weights import save_weights, sha256_of_tensors
from server.cli import main
from server.holdings import centre_audit
from server.model import MeduetModel
from tests.worlds import protected_plan, public_latents, small_network, small_plan

PLAN = small_plan(network=small_network(code_size=24), probes=ProbePlan(every_rounds=1, folds=3))


def run_folder(folder: Path, patients: int = 60, **ends: Any) -> Path:
    """A run of which the centre knows three answers of a site, and the model."""
    folder.mkdir()
    (folder / "plan.json").write_text(PLAN.to_json())
    shared = MeduetModel(PLAN).start()[0]
    save_weights(folder / "model.safetensors", shared, {"plan_sha256": PLAN.sha256})
    journal = Journal(folder / "journal.jsonl")
    for to, digit, more in (
        ("query.survey", "1", {"num_patients": patients, "num_scans": patients}),
        ("query.probe", "2", {"round": 1}),
        ("query.erasure", "3", {}),
    ):
        line = {"kind": "reply", "to": to, "plan": PLAN.sha256, "site": "oslo", "sha256": digit * 64, **more}
        journal.append(line)
    journal.append({"kind": "end", "plan": PLAN.sha256, "tensors_sha256": sha256_of_tensors(shared), **ends})
    return folder


def verdicts(folder: Path) -> dict[str, str]:
    return {finding.artefact: finding.verdict for finding in centre_audit(folder)[1].findings}


def test_sums_of_few_patients_are_said_to_name_them_and_sums_of_many_are_not(tmp_path: Path) -> None:
    few, many = run_folder(tmp_path / "few"), run_folder(tmp_path / "many", patients=60_000)
    names = ("oslo: survey", "oslo: probe", "oslo: erasure")
    assert {verdicts(few)[name] for name in names} == {"found"}
    assert {verdicts(many)[name] for name in names} == {"not found"}
    (probe,) = [one for one in centre_audit(few)[1].findings if one.artefact == "oslo: probe"]
    assert "over about 20 patients of oslo at a time have at most 20 directions" in probe.sentence


def test_the_command_writes_a_page_and_its_status_follows_the_policy(tmp_path: Path) -> None:
    few, many = run_folder(tmp_path / "few"), run_folder(tmp_path / "many", patients=60_000)
    assert main(["audit", str(few)]) == 1
    record = read_record(few / "audit" / "centre" / "audit.json")
    assert record.status == 1 and (few / "audit" / "centre" / "audit.html").is_file()
    assert main(["audit", str(many)]) == 0
    policy = tmp_path / "privacy_policy.yaml"
    policy.write_text("required_tests: [loss]\n")
    assert main(["audit", str(many), "--policy", str(policy)]) == 2  # the centre has no patient to try it on


def test_another_model_than_the_journals_and_a_second_answer_are_contradictions(tmp_path: Path) -> None:
    other = run_folder(tmp_path / "other", tensors_sha256="0" * 64)
    assert verdicts(other)["centre: books"] == "contradiction"
    twice = run_folder(tmp_path / "twice")
    line = {"kind": "reply", "to": "query.survey", "plan": PLAN.sha256, "site": "oslo", "sha256": "4" * 64}
    Journal(twice / "journal.jsonl").append({**line, "num_patients": 59, "num_scans": 59})
    (books,) = [one for one in centre_audit(twice)[1].findings if one.attack == "books"]
    assert books.sentence == "oslo told 2 different answers to 'query.survey' of round 0."


def test_an_edited_journal_is_said_and_a_folder_without_a_run_refused(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "run")
    lines = (folder / "journal.jsonl").read_text().splitlines()
    changed = json.loads(lines[1])
    changed["record"]["num_patients"] = 600
    (folder / "journal.jsonl").write_text("\n".join([lines[0], json.dumps(changed), *lines[2:]]) + "\n")
    assert verdicts(folder) == {"centre: books": "contradiction"}
    with pytest.raises(ValueError, match="Nothing was audited"):
        centre_audit(tmp_path)


def test_a_style_code_is_held_at_what_its_noise_allows_and_passes(tmp_path: Path) -> None:
    plan = protected_plan(public_latents(), lambda **changes: replace(PLAN, probes=ProbePlan(), **changes))
    folder = run_folder(tmp_path / "run")
    (folder / "plan.json").write_text(plan.to_json())
    (folder / "journal.jsonl").unlink()
    line = {
        "kind": "reply",
        "to": "query.style_code",
        "plan": plan.sha256,
        "site": "oslo",
        "sha256": "1" * 64,
    }
    Journal(folder / "journal.jsonl").append(line)
    (row,) = [one for one in centre_audit(folder)[1].artefacts if one.name == "oslo: style_code"]
    (finding,) = row.findings
    assert finding.value == pytest.approx(0.66, abs=0.1) and finding.low is None and 2.9 < row.epsilon <= 3.0
    assert main(["audit", str(folder)]) == 0  # no tokenizer, no public scans: the numbers alone
