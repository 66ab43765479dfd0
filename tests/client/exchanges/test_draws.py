"""Who is drawn is a site's own affair: neither a plan nor the patients' names tell it."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from client.exchanges import finetuning, latents
from client.exchanges.exchange import Answer
from client.exchanges.pretraining import train_mail
from client.latents.labelled import LabelledScans, labelled_scans
from federation.exchanges.finetuning import FINETUNING, FinetuneAsk, FinetunePlan, LocalFinetuning
from federation.plan.diffusion_plan import DiffusionPlan
from federation.plan.plan import RunPlan
from meduet_models.diffusion.settings import DiffusionTraining, TransformerShape
from meduet_models.downstream.networks import trained_keys
from meduet_models.downstream.tasks import task_of
from meduet_models.meduet import FactorNetwork
from server.exchanges.finetuning import pretrained_sha256
from tests.worlds import Hospital, KnownScans

COUNT = 16


class Aged(KnownScans):
    """Sixteen patients of known ages, each with a scan."""

    def __init__(self) -> None:
        super().__init__(0, COUNT)
        self.covariates = [{"age": 30.0 + n} for n in range(COUNT)]


def test_whose_labels_a_site_uses_is_not_told_by_the_plan(
    toy_plan: Callable[..., RunPlan], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    used: list[tuple[str, ...]] = []
    finetune = finetuning.finetune

    def watched(network: Any, scans: LabelledScans, *given: Any, **named: Any) -> Any:
        used.append(scans.patients)
        return finetune(network, scans, *given, **named)

    monkeypatch.setattr(finetuning, "finetune", watched)
    plan, local = toy_plan(), LocalFinetuning(task="regression", classes=1, steps=1, encoder="frozen")
    pretrained = FactorNetwork(plan.network, seed=5)
    agreed = FinetunePlan(
        run_sha256=plan.sha256, pretrained_sha256=pretrained_sha256(pretrained), local=local, rounds=1,
        target="age", target_values=("20", "90"), label_share=0.5,
    )  # fmt: skip
    network = task_of("regression").network(pretrained, 1, trainable=False, seed=0)
    tensors, trained = network.state_dict(), trained_keys(network)
    ask = FinetuneAsk(
        plan_json=plan.to_json(), finetuning_json=agreed.to_json(), round=1,
        shared={n: tensors[n] for n in trained}, fixed={n: t for n, t in tensors.items() if n not in trained},
    )  # fmt: skip
    row = Answer(FINETUNING, finetuning.answer_finetuning, train_mail)
    for folder, secret in (("a", b"1"), ("b", b"1"), ("c", b"2")):
        row.once(Hospital(tmp_path / folder, Aged(), secret=secret * 32), ask, plan)
    one, again, other = used
    scans = Aged()
    guess = labelled_scans(scans, range(COUNT), local, "age", ("20", "90")).share(0.5, agreed.seed).patients
    assert len(one) == len(guess) == COUNT // 2
    assert one == again and one not in (other, guess) and other != guess


def test_in_which_order_latents_leave_is_not_told_by_the_plan(toy_plan: Callable[..., RunPlan]) -> None:
    raw = DiffusionPlan(
        policy="raw",
        transformer=TransformerShape(patch_size=2, width=12, depth=1, heads=2),
        training=DiffusionTraining(),
    )
    plan, scans = toy_plan(diffusion=raw), Aged()
    one, again, other = (latents.raw_items(scans, plan, 1, secret * 32) for secret in (b"1", b"1", b"2"))
    assert one == again != other and sorted(one) == sorted(other) == list(range(COUNT))
    assert latents.raw_items(scans, replace(plan, seed=plan.seed + 1), 1, b"1" * 32) != one
