"""Public scans that a model was trained on, beside fresh ones: found without patients, never forbidden."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from audit.findings import OF_NOBODY
from audit.policy import Policy, decide
from federation.plan.plan import RunPlan
from meduet_models.meduet import FactorNetwork
from meduet_models.weights import save_weights
from server import public_memory as module
from server.model import MeduetModel
from server.public_memory import NAME, public_memory
from server.public_scans import PUBLIC_SCANS
from tests.worlds import protected_plan, public_latents, small_network, small_plan

SEEN, FRESH = public_latents(32, seed=0), public_latents(32, seed=1)


def plan(**changes: Any) -> RunPlan:
    return small_plan(network=small_network(code_size=24), **changes)


PLAN = protected_plan(SEEN, plan)


def run_folder(folder: Path) -> Path:
    """What a finished run leaves of its model and its public scans."""
    save_weights(folder / "model.safetensors", MeduetModel(PLAN).start()[0], {"plan_sha256": PLAN.sha256})
    save_weights(folder / PUBLIC_SCANS, {"latents": SEEN}, {})
    return folder


@pytest.fixture(autouse=True)
def drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fresh scans are at hand, of the same kind."""
    monkeypatch.setattr(module, "plans_tokenizer", lambda plan, path: object())
    monkeypatch.setattr(module, "phantom_latents", lambda plan, tokenizer, number, draws: FRESH)


def test_of_a_model_that_saw_none_of_them_nothing_is_claimed(tmp_path: Path) -> None:
    found = public_memory(run_folder(tmp_path), PLAN)
    assert [one.attack for one in found] == ["public_loss", "public_loss"]
    assert {(one.n_in, one.n_out, one.measure) for one in found} == {(32, 32, OF_NOBODY)}
    assert "found" not in {one.verdict for one in found}


def test_what_was_learned_by_heart_is_found_and_no_policy_forbids_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def learned(network: FactorNetwork, latents: Tensor, draws: int) -> Tensor:
        return torch.linspace(1.0, 1.2, len(latents)).double() - 0.5 * (
            torch.arange(len(latents)) < len(SEEN)
        )

    monkeypatch.setattr(module, "losses", learned)
    plain, less_start = public_memory(run_folder(tmp_path), PLAN)
    assert plain.verdict == "found" and plain.artefact == NAME and plain.epsilon_low is None
    assert less_start.verdict != "found"  # both models have the same losses here
    assert "No patient is in either" in plain.sentence
    policy = Policy(required_tests=("public_loss",), max_tracing_auc=0.5)
    assert not decide(policy, [plain], {NAME: (0.0, 0.0)}, []).failed


def test_without_public_scans_or_a_tokenizer_nothing_is_tried_and_the_latter_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not public_memory(tmp_path, PLAN) and not public_memory(run_folder(tmp_path), plan())
    monkeypatch.setattr(module, "plans_tokenizer", lambda plan, path: None)
    (said,) = public_memory(tmp_path, PLAN)
    assert said.verdict == "under-powered" and "tokenizer is not at hand" in said.sentence
