"""An artefact that has expired says so when it is loaded, and nothing new is made of it."""

import dataclasses
import logging
from datetime import date, timedelta
from pathlib import Path
from typing import Any

import pytest
import torch

import server.app
from client.commands.plan_words import plan_words
from federation.plan.plan import ReleasePlan
from federation.published_plan import PublishedPlan
from meduet_models.diffusion.artefact import load_generative_model, save_generative_model
from meduet_models.published import expiry
from meduet_models.published.expiry import check_unexpired, is_expired, until
from meduet_models.published.pretrained import load_pretrained
from meduet_models.weights import load_weights, save_weights
from server.consortium.plans import make_finetuning
from server.latent_bank.bank import LatentBank
from server.releases import register
from storage.files import write_whole
from tests.generative_models import small_model, small_tokenizer
from tests.published_weights import published
from tests.rounds.noised import bank_of_styles, the_plan
from tests.worlds import small_plan

YESTERDAY = (expiry.today() - timedelta(days=1)).isoformat()


def test_a_day_is_the_last_on_which_use_is_agreed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(expiry, "today", lambda: date(2027, 3, 1))
    assert [is_expired(day) for day in ("", "2027-02-28", "2027-03-01", "2027-03-02")] == [0, 1, 0, 0]
    assert until("2027-02-28") == "2027-02-28 (expired)" and until("") == "no day"
    with pytest.raises(ValueError, match=r"^Expected a plan that may still be used; .* until 2027-02-28"):
        check_unexpired("2027-02-28", "a plan")


@pytest.mark.parametrize("day", ["2027-02-30", "tomorrow", "2027-1-1", "20270101"])
def test_what_is_no_day_makes_no_plan(day: str) -> None:
    with pytest.raises(ValueError, match=r"expires to be .*a day as 2027-12-31"):
        small_plan(release=ReleasePlan(expires=day))


def test_a_hospital_is_told_until_when(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = small_plan(release=ReleasePlan(expires="2031-12-31"))
    said = dict(plan_words(PublishedPlan(plan=plan, bundle_sha256="0" * 64)))
    assert "may be used until 2031-12-31" in said["Until when"]


def test_an_expired_plan_runs_no_more(tmp_path: Path) -> None:
    plan = small_plan(release=ReleasePlan(expires=YESTERDAY))
    with pytest.raises(ValueError, match=r"Expected a plan that may still be used"):
        server.app.run(None, plan, tmp_path)  # type: ignore[arg-type]
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("day", ["", YESTERDAY])
def test_whoever_loads_expired_weights_is_told_and_no_fine_tuning_starts_from_them(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, day: str
) -> None:
    path = published(tmp_path) / "model.safetensors"
    tensors, header = load_weights(path)
    save_weights(path, tensors, header | {"expires": day, "plan_sha256": "a" * 64})
    with caplog.at_level(logging.WARNING):
        load_pretrained(path)
    assert ("has expired" in caplog.text) == bool(day)
    settings = ["local.task=segmentation", "local.classes=2"]
    if day:
        with pytest.raises(ValueError, match="Expected a pretrained encoder that may still be used"):
            make_finetuning(path, settings)
    else:
        assert make_finetuning(path, settings).run_sha256 == "a" * 64


def test_an_expired_diffusion_model_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "diffusion.safetensors"
    save_generative_model(path, small_model(small_tokenizer(), expires=YESTERDAY))
    with caplog.at_level(logging.WARNING):
        assert load_generative_model(path).expires == YESTERDAY
    assert "has expired" in caplog.text


def test_expired_items_of_a_bank_are_not_trained_on_and_the_register_says_when(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from server.exchanges.latent_moments import MOMENTS, DrawnLatents, MomentsReply
    from tests.rounds.noised import PUBLIC

    plan: Any = the_plan("aggregate")
    plan = dataclasses.replace(plan, release=dataclasses.replace(plan.release, expires="2031-12-31"))
    drawn = DrawnLatents(plan, PUBLIC, bank_of_styles(plan))
    moments = {MOMENTS: torch.tensor([0.1] * 6 + [20.0])}
    bank = LatentBank(tmp_path / "bank")
    bank.add(drawn.of_site(MomentsReply(plan_sha256=plan.sha256, site="oslo", moments=moments)), plan)
    assert len(bank.source(plan, 2)) == 7 and bank.terms_of(plan.sha256)["expires"] == "2031-12-31"
    run = published(tmp_path / "run")
    write_whole(run / "plan.json", plan.to_json())
    (run / "journal.jsonl").touch()
    assert {one.expires for one in register(run).made} == {"2031-12-31"}
    monkeypatch.setattr(expiry, "today", lambda: date(2032, 1, 1))
    with pytest.raises(ValueError, match=r"Expected items of the bank .* until 2031-12-31"):
        bank.source(plan, 2)
