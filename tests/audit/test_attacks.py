"""What a row says beyond single attacks: no attack, a broken promise, nothing at hand; models and latents."""

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from audit.attacks.by_kind import ATTACKED, audit
from audit.attacks.linkage import attack_latents, found_again, psnr
from audit.attacks.membership import attack_model, losses
from audit.effort import QUICK
from audit.evidence import Evidence, Release, SiteBooks
from audit.findings import worst
from audit.policy import UNDECIDED, Policy, decide
from federation.journal import Journal
from meduet_models.meduet import MeDUET
from privacy.chain import Chain
from tests.audit.released import Answered, latents, toy_plan
from tests.generative_models import small_tokenizer
from tests.worlds import small_network

ROOT = Path(__file__).resolve().parents[2]


def charged(folder: Path, kind: str, epsilon: float | str) -> SiteBooks:
    """Books with one release, charged at this epsilon."""
    books = SiteBooks(folder / "journal.jsonl", folder / "ledger.jsonl")
    ledger, journal = Chain(books.ledger, "ledger"), Journal(books.journal)
    place = {"plan": "0" * 64, "kind": kind, "round": 0, "question": "a"}
    held = ledger.append({"event": "reserve", **place, "epsilon": epsilon})
    sha = "1" * 64
    settled = {"event": "settle", "reservation": held, "epsilon": epsilon, "released": sha, "delta": 1e-6}
    journal.append({**place, "sha256": sha, "ledger": ledger.append(settled), "weight": 30.0})
    return books


def test_every_kind_of_which_something_is_promised_has_an_attack() -> None:
    texts = [path.read_text() for path in (ROOT / "federation").rglob("*.py")]
    kinds = {kind for text in texts for kind in re.findall(r'Promise\(\s*kind="(\w+)"', text)}
    assert {"round", "diffusion", "finetuning", "style_code", "private_round"} <= kinds <= ATTACKED


def test_a_kind_without_an_attack_is_not_audited_and_at_best_undecided(tmp_path: Path) -> None:
    evidence = Answered(tmp_path / "site", 20, 20, toy_plan()).evidence(
        books={"north": charged(tmp_path, "of another version", "inf")}
    )
    audited = audit(evidence, QUICK, lambda text: None)
    (row,) = [one for one in audited.artefacts if one.name == "north: of another version"]
    assert worst(list(row.findings)) == "not audited"
    decision = decide(Policy(required_tests=("books",)), audited.findings, {}, [])
    assert decision.status == UNDECIDED and "Not audited" in decision.undecided[0]


def test_a_kind_whose_releases_are_not_kept_is_not_audited(tmp_path: Path) -> None:
    answered = Answered(tmp_path, 20, 20, toy_plan()).ask("survey")
    gone = [replace(one, tensors=None, missing="The answer is not kept.") for one in answered.releases]
    audited = audit(answered.evidence(releases=gone), QUICK, lambda text: None)
    (row,) = [one for one in audited.artefacts if one.name == "north: survey"]
    assert [f.sentence for f in row.findings] == ["Not audited. The answer is not kept."]


@pytest.mark.parametrize(("epsilon", "holds"), [(0.05, False), (8.0, True), ("inf", True)])
def test_a_lower_bound_above_the_promise_is_a_contradiction(
    tmp_path: Path, epsilon: float | str, holds: bool
) -> None:
    answered = Answered(tmp_path / "site", 40, 40, toy_plan(72)).ask("survey")
    evidence = answered.evidence(books={"north": charged(tmp_path, "survey", epsilon)})
    audited = audit(evidence, QUICK, lambda text: None)
    (row,) = [one for one in audited.artefacts if one.name == "north: survey"]
    assert row.epsilon_low is not None and row.epsilon_low > 0.05
    contradictions = [f for f in row.findings if f.verdict == "contradiction"]
    assert bool(contradictions) is not holds
    assert row.largest_rate(0.01) == (1.0 if epsilon == "inf" else pytest.approx(row.largest_rate(0.01)))


def overtrained(scans: torch.Tensor, network: MeDUET, steps: int) -> None:
    """Learn some scans by heart."""
    network.set_latent_scale(scans.mean(0), scans.std((0, 2, 3, 4)))
    optimiser = torch.optim.Adam(network.parameters(), 5e-3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        hidden = torch.rand(network.config.num_tokens, generator=generator) < 0.5
        visible = (~hidden).expand(len(scans), -1)
        mixed = torch.where(hidden[None, :, None], 0.0, network.embed_latents(scans))
        made = network.predict_tokens(network.factors(scans, network.encoder(mixed)), visible)
        loss = (made - network.target_tokens(scans)).square()[:, hidden].mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()


@pytest.mark.parametrize("steps", [200, 0])
def test_a_model_that_learned_few_scans_by_heart_is_found_out_and_a_start_is_not(
    tmp_path: Path, steps: int
) -> None:
    answered = Answered(tmp_path, 10, 60, toy_plan())
    cohort = answered.cohort
    model, start = (MeDUET(small_network(width=48, decoder_width=48), 3, seed=1) for _ in range(2))
    overtrained(cohort.latents[:10], model, steps)
    start.set_latent_scale(model.latent_mean, model.latent_deviation)
    evidence: Evidence = answered.evidence(model=model.eval(), earlier={"the common start": start.eval()})
    found = {finding.attack: finding for finding in attack_model(evidence, 8, [])}
    if steps:
        assert found["loss"].verdict == "found"
        assert set(found) == {"loss", "calibrated_loss", "invariance", "parts"}  # too few to weigh them
    else:
        assert found["loss"].verdict != "found"


def test_losses_have_the_same_draws_for_everybody() -> None:
    network = MeDUET(toy_plan().network, 3, seed=1).eval()
    scans = latents(6, seed=0)
    together = losses(network, scans, draws=3)
    alone = torch.cat([losses(network, one[None], draws=3) for one in scans])
    assert torch.allclose(together, alone, atol=1e-5)


# Released latents


def test_released_latents_are_the_images_and_found_again(tmp_path: Path) -> None:
    answered, tokenizer = Answered(tmp_path, 20, 20, toy_plan()), small_tokenizer()
    own = answered.cohort.latents
    again = own + 0.3 * latents(40, seed=9)
    record = {"kind": "latents", "round": 1}
    release = Release("north", record, {"latents": own[:20].clone()}, rows=tuple(range(20)))
    evidence = answered.evidence(tokenizer=tokenizer, acquired_again=lambda site: again)
    decoded, recognised = attack_latents(evidence, release)
    assert decoded.verdict == recognised.verdict == "found"
    assert (
        decoded.value is not None and decoded.baseline is not None and decoded.value > decoded.baseline + 10
    )
    assert recognised.value == 1.0 and recognised.baseline == 1 / 40
    noise = Release("north", record, {"latents": latents(20, seed=11)}, rows=tuple(range(20)))
    assert {one.verdict for one in attack_latents(evidence, noise)} == {"not found"}


def test_similarity_is_that_of_scans_and_not_of_scanners() -> None:
    own = latents(10, seed=0)
    similar = found_again(own, 1.5 * own + 2.0)
    assert np.array_equal(similar.argmax(1).numpy(), np.arange(10))
    assert float(psnr(torch.zeros(1, 1, 2, 2, 2), torch.full((1, 1, 2, 2, 2), 0.1))) == pytest.approx(20.0)
