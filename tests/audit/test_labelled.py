"""A fine-tuning that learned its patients' answers by heart is found out, by network and by update."""

import copy
from dataclasses import replace

import pytest
import torch

from audit.attacks.by_kind import ATTACKED
from audit.attacks.labelled import attack_finetuned, attack_finetuning_round, name_of
from audit.evidence import Evidence, Finetuning, Labelled, Release
from audit.findings import Finding
from federation.exchanges.finetuning import FinetunePlan, LocalFinetuning
from meduet_models.downstream.networks import PretrainedNetwork
from meduet_models.downstream.tasks import task_of
from meduet_models.meduet import FactorNetwork
from tests.audit.released import latents, toy_plan
from tests.audit.trained import cohort_of

IN, ALL = 12, 60
SCANS = latents(ALL, seed=5)
ANSWERS = torch.randint(2, (ALL,), generator=torch.Generator().manual_seed(1))
PLAN = FinetunePlan(
    run_sha256="0" * 64,
    pretrained_sha256="0" * 64,
    local=LocalFinetuning(task="classification", classes=2),
    rounds=1,
    target="sex",
    target_values=("F", "M"),
)


def started() -> PretrainedNetwork:
    encoder = FactorNetwork(toy_plan().network, seed=1)
    return task_of("classification").network(encoder, 2, trainable=True)


@pytest.fixture(scope="module")
def learned() -> PretrainedNetwork:
    """The network after it learned the coins of the first patients by heart."""
    network, task = started(), task_of("classification")
    optimiser = torch.optim.AdamW(network.parameters(), 1e-2)
    for _ in range(80):
        loss = task.loss(network(SCANS[:IN]), ANSWERS[:IN])
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
    return network.eval()


def told(after: PretrainedNetwork) -> tuple[Evidence, Finetuning]:
    before = started()
    kept = {0: before, 1: after}
    labelled = {"north": Labelled(cohort_of(SCANS, IN), (SCANS,), ANSWERS)}
    finetuning = Finetuning(PLAN, labelled, lambda done: copy.deepcopy(kept.get(done)))
    then, now = dict(before.named_parameters()), dict(after.named_parameters())
    update = {name: IN * (now[name] - then[name]).detach() for name in then}
    record = {"kind": "finetuning", "round": 1, "plan": PLAN.sha256, "weight": float(IN)}
    evidence = Evidence(
        name="toy",
        plan=toy_plan(),
        books={},
        releases=[Release("north", record, update)],
        cohorts={},
        hashes={},
        finetunings={PLAN.sha256: finetuning},
    )
    return evidence, finetuning


def attacked(after: PretrainedNetwork) -> dict[str, Finding]:
    evidence, finetuning = told(after)
    found = [
        *attack_finetuned(finetuning, []),
        *attack_finetuning_round(evidence, evidence.releases[0], []),
    ]
    assert {one.artefact for one in found} == {name_of(finetuning), "north: finetuning"}
    return {one.attack: one for one in found}


def test_coins_that_were_learned_by_heart_are_found_by_network_and_update(learned: PretrainedNetwork) -> None:
    found = attacked(learned)
    assert set(found) == {"loss", "calibrated_loss", "update", "alignment"} and "finetuning" in ATTACKED
    for attack in ("loss", "calibrated_loss", "update"):
        assert found[attack].verdict == "found" and (found[attack].value or 0) > 0.65
    assert "what is to be predicted of it" in found["loss"].sentence


def test_of_a_network_that_learned_nothing_nothing_is_claimed() -> None:
    assert "found" not in {one.verdict for one in attacked(started()).values()}


def test_without_the_weights_or_anybodys_answer_nothing_is_tried(learned: PretrainedNetwork) -> None:
    evidence, finetuning = told(learned)
    gone = replace(finetuning, network_after=lambda done: None)
    assert not list(attack_finetuned(gone, []))
    for other in (gone, replace(finetuning, labelled={})):
        lacking = replace(evidence, finetunings={PLAN.sha256: other})
        assert not list(attack_finetuning_round(lacking, evidence.releases[0], []))
