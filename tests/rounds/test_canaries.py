"""A whole audit run: plan, sites, gate, ledger, centre, weights; then its coins are guessed."""

import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from audit.attacks.by_kind import audit
from audit.cohort import Cohort
from audit.effort import QUICK
from audit.evidence import Evidence, Release, SiteBooks
from client.books.answers import ANSWERS, KeptAnswers
from federation.canaries import coins
from federation.journal import read_journal
from federation.plan.canary_plan import AuditCanariesPlan
from meduet_models.published.pretrained import CANARIES, MODEL, load_pretrained
from privacy.ledger import Place
from server.app import run
from tests.rounds.test_protected_pretraining import PUBLIC, grid_of, noisy_plan, started
from tests.worlds import Hospital, Latents

COINS = AuditCanariesPlan(style_code=4, steps=100, inputs=4)


@pytest.mark.slow
def test_an_audit_run_is_charged_as_any_other_marked_and_shows_no_more_than_is_promised(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    plan = replace(noisy_plan("adapters"), audit_canaries=COINS)
    with caplog.at_level(logging.WARNING):
        run(grid_of(plan, tmp_path), plan, started(tmp_path))
        pretrained = load_pretrained(tmp_path / MODEL)
    assert "4 shares of a style code, 100 gradients" in pretrained.provenance[CANARIES]
    assert "was made with canaries" in caplog.text
    assert "Canaries pull as 9 patients do" in caplog.text
    books, releases, cohorts, thrown = {}, [], {}, {}
    for index, name in enumerate(plan.sites):
        state = tmp_path / "sites" / name
        site = Hospital(state, None, name, epsilon_ceiling=8.0)
        spent = site.ledger.spent()
        assert (spent.num_noised, spent.num_plain) == (3, 0) and 7.9 < spent.total.upper <= 8.0
        books[name] = SiteBooks(state / "journal.jsonl", state / "ledger.jsonl")
        kept = KeptAnswers(state / ANSWERS)
        for entry in read_journal(state / "journal.jsonl"):
            line = entry.record
            place = Place(plan_sha256=line["plan"], kind=line["kind"], round=line["round"])
            answer = kept.read(place, line["sha256"])
            assert answer is not None
            releases.append(Release(name, line, dict(answer.tensors)))
        scans = Latents([index], 40)
        cohorts[name] = Cohort(name, scans.values, tuple(scans.patients), (True,) * 40)
        kinds = ("style_code", "steps", "inputs")
        thrown[name] = {kind: coins(site.secret, plan, kind) for kind in kinds}  # type: ignore[arg-type]
    evidence = Evidence("toy", plan, books, releases, cohorts, {}, coins=thrown, public=PUBLIC)
    audited = audit(evidence, QUICK, lambda text: None)
    told = [finding for finding in audited.findings if finding.canaries is not None]
    assert len(told) == 2 * len(plan.sites)
    assert not any(finding.verdict in ("contradiction", "found") for finding in told)
    for finding in told:
        assert finding.canaries is not None and finding.canaries.promised is not None
        assert finding.canaries.epsilon_low < finding.canaries.promised
        assert finding.canaries.releases == (1 if "style_code" in finding.artefact else 2)
    missing = [finding.sentence for finding in audited.findings if finding.verdict == "not audited"]
    assert sum("Input canaries" in sentence for sentence in missing) == 3
    assert all(torch.isfinite(t).all() for t in pretrained.network.state_dict().values())
