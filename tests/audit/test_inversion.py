"""A gradient of one pair names its patients (row 17, at toy size); a search that fails says so."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from audit.attacks.by_kind import audit
from audit.attacks.inversion import GROUP, Named, attack_gradient, named
from audit.effort import QUICK
from audit.findings import Finding
from audit.statistics.intervals import ONE_SIDE
from client.latents.batches import step_generator
from meduet_models.objective.objective import draw_step
from tests.audit.released import latents
from tests.audit.test_attacks import charged
from tests.audit.trained import after_round, cohort_of, evidence_of_round, start, training_plan
from tests.generative_models import small_tokenizer

IN, ALL = 12, 60


def inverted(iterations: int, **more: Any) -> dict[str, Finding]:
    scans, plan = latents(ALL, seed=5), training_plan(1)
    before = start(plan, scans)
    after = after_round(plan, before, scans[:IN])
    evidence = replace(evidence_of_round(plan, before, after, cohort_of(scans, IN)), **more)
    found = attack_gradient(evidence, evidence.releases[0], iterations, restarts=1)
    return {finding.attack: finding for finding in found}


def test_who_knows_every_draw_names_both_and_who_guesses_ranks_them_high() -> None:
    found = inverted(200)
    known, guessed = found["inversion"], found["blind_inversion"]
    assert (known.verdict, known.value, known.baseline) == ("found", 1.0, 0.0)
    assert "who guesses the draws" in guessed.sentence, "the draws' secret is no defence"
    assert guessed.verdict == "found" and guessed.value < known.value, guessed.sentence


def test_a_search_that_was_stopped_early_is_inconclusive_and_never_evidence_of_safety() -> None:
    known = inverted(2)["inversion"]
    assert known.verdict == "under-powered"
    assert known.sentence.endswith(
        "Inconclusive: the search did not converge, which is no evidence of safety."
    )
    assert known.pictures == ()


def test_where_there_is_a_decoder_a_person_is_shown_what_was_found() -> None:
    known = inverted(2, tokenizer=small_tokenizer())["inversion"]
    assert "Decoded: " in known.sentence and " dB, SSIM " in known.sentence and len(known.pictures) == 1


def test_the_average_scan_and_another_patients_name_nobody() -> None:
    cohort = cohort_of(latents(ALL, seed=5), IN)
    average = cohort.latents.mean(0, keepdim=True).expand(2, -1, -1, -1, -1)
    assert named(average, [0, 1], cohort).hits == 0
    assert named(cohort.latents[[20, 21]], [0, 1], cohort).hits == 0
    truth = named(cohort.latents[[1, 0]], [0, 1], cohort)
    assert truth.hits == 2 and truth.decibels > 100  # whichever of the two it calls the first


def test_how_often_guesses_rank_as_well() -> None:
    assert Named((1, 2), 0.0).by_guessing(6) == pytest.approx(
        2 * 3 / 36
    )  # (1, 1), (1, 2), (2, 1), either way
    assert Named((6, 6), 0.0).by_guessing(6) == 1.0
    cohort = cohort_of(latents(ALL, seed=5), IN)
    noise = torch.Generator().manual_seed(2)
    made = [torch.randn(2, *cohort.latents.shape[1:], generator=noise) for _ in range(400)]
    alarms = sum(named(one, [0, 1], cohort).by_guessing(ALL) < ONE_SIDE for one in made)
    assert alarms <= 19, "2.5% of 400, and three deviations"


def test_decibels_below_the_average_scans_may_still_name_a_patient() -> None:
    cohort = cohort_of(latents(ALL, seed=5), IN)
    noise = torch.randn(2, *cohort.latents.shape[1:], generator=torch.Generator().manual_seed(1))
    blurred = cohort.latents[[0, 1]] + 1.2 * noise
    average = cohort.latents.mean(0, keepdim=True).expand(2, -1, -1, -1, -1)
    found, mean = named(blurred, [0, 1], cohort), named(average, [0, 1], cohort)
    assert found.hits == 2 and found.decibels < mean.decibels


def test_who_has_the_plan_but_not_the_sites_secret_does_not_know_the_draws() -> None:
    plan = training_plan(1)
    draws = [
        draw_step(step_generator(secret, plan.seed, 1, 0), GROUP, plan.network.num_tokens, plan.objective)
        for secret in (b"1" * 32, b"1" * 32, b"2" * 32)
    ]
    assert torch.equal(draws[0].exchanged, draws[1].exchanged)
    assert not torch.equal(draws[0].exchanged, draws[2].exchanged)


def test_an_audit_turns_the_newest_rounds_gradient_back_and_a_quick_one_does_not(tmp_path: Path) -> None:
    scans, plan = latents(ALL, seed=5), training_plan(1)
    before = start(plan, scans)
    evidence = evidence_of_round(plan, before, after_round(plan, before, scans[:IN]), cohort_of(scans, IN))
    evidence = replace(
        evidence,
        books={"north": charged(tmp_path, "round", "inf")},
        releases=[
            replace(one, record={**one.record, "round": n, "sha256": f"{n}" * 64}, tensors={})
            for one in evidence.releases
            for n in (1, 2)
        ],
        model=None,
    )
    for effort, tried in ((QUICK, []), (replace(QUICK, iterations=1, restarts=1), [2, 2])):
        found = audit(evidence, effort, lambda text: None).findings
        rounds = [
            int(f.sentence.split(":")[0].removeprefix("Round ")) for f in found if "inversion" in f.attack
        ]
        assert rounds == tried
