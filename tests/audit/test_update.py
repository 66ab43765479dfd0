"""What is found in a round of one site and in models, and what is not (rows 9 to 11, at toy size)."""

import copy
from dataclasses import replace

import torch

from audit.attacks.membership import attack_model, hidden_error, public_draws
from audit.attacks.update import alignment, attack_round
from audit.findings import Finding
from meduet_models.meduet import MeDUET
from tests.audit.released import latents
from tests.audit.trained import after_round, cohort_of, evidence_of_round, start, training_plan

IN, ALL = 12, 60
SCANS = latents(ALL, seed=5)


def attacked(steps: int) -> dict[str, Finding]:
    plan = training_plan(steps)
    before = start(plan, SCANS)
    after = after_round(plan, before, SCANS[:IN])
    evidence = evidence_of_round(plan, before, after, cohort_of(SCANS, IN))
    found = [*attack_round(evidence, evidence.releases[0], 8, []), *attack_model(evidence, 8, [])]
    return {finding.attack: finding for finding in found}


def test_a_model_that_saw_its_patients_often_is_found_out_by_its_loss_and_by_its_update() -> None:
    found = attacked(steps=200)
    for attack in ("update", "loss", "calibrated_loss"):
        assert found[attack].verdict == "found" and (found[attack].value or 0) > 0.75
    assert found["alignment"].verdict != "found"  # after so many steps the first gradient tells little


def test_of_a_single_step_nothing_is_claimed_and_the_row_says_that_so_few_could_not_have_told() -> None:
    found = attacked(steps=1)
    assert {finding.verdict for finding in found.values()} == {"under-powered"}
    assert "nothing could have been with so few" in found["update"].sentence


def test_a_descent_of_the_members_own_loss_points_to_them_and_one_of_nobody_does_not() -> None:
    plan, few = training_plan(1), 4
    before = start(plan, SCANS)

    def moved(scans: torch.Tensor) -> MeDUET:
        network = copy.deepcopy(before).requires_grad_(True)
        draws = list(public_draws(network, 2))
        loss = torch.stack([hidden_error(network, scans, *draw).mean() for draw in draws]).mean()
        loss.backward()  # type: ignore[no-untyped-call]
        with torch.no_grad():
            for parameter in network.parameters():
                parameter -= 0 if parameter.grad is None else parameter.grad
        return network.requires_grad_(False)

    def area(scans: torch.Tensor) -> float:
        aligned = alignment(before, moved(scans), SCANS)
        inside, outside = aligned[:few], aligned[few:]
        return float((inside[:, None] > outside[None]).double().mean())

    assert area(SCANS[:few]) > 0.9
    assert 0.1 < area(latents(few, seed=9)) < 0.9


def test_in_a_round_that_left_masked_the_sum_is_attacked_and_said_to_be() -> None:
    plan = training_plan(200)
    before = start(plan, SCANS)
    evidence = evidence_of_round(
        plan, before, after_round(plan, before, SCANS[:IN]), cohort_of(SCANS, IN), masked={"attempt": 1}
    )
    (update, _) = attack_round(evidence, evidence.releases[0], 8, [])
    assert update.verdict == "found" and "whoever sees the sum of all sites' updates asks" in update.sentence


def test_members_of_a_round_are_those_whom_its_steps_drew() -> None:
    cohort = cohort_of(SCANS, IN)
    assert cohort.drawn([0, 3]).member.sum() == 2
    plan = training_plan(200)
    before = start(plan, SCANS)
    after = after_round(plan, before, SCANS[: IN // 2])  # as if the others had not been drawn
    evidence = evidence_of_round(plan, before, after, cohort)
    (known,) = (replace(one, rows=tuple(range(IN // 2))) for one in evidence.releases)
    areas = [
        next(iter(attack_round(evidence, one, 8, []))).value or 0 for one in (known, evidence.releases[0])
    ]
    assert areas[0] > areas[1] + 0.1
