"""A round of noisy steps whose work is done by a job: the key of its draws goes with it, and nothing else."""

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from client.declared import GateRefusal
from client.exchanges.private_rounds import ANSWER
from client.jobs import asking
from client.jobs.asking import by_job
from client.jobs.launcher import Launcher
from client.jobs.program import Offered, OfferingGate
from client.jobs.request import Offer, Request, read_answer, write_answer
from federation.exchanges.private_rounds import PrivateAsk
from federation.plan.plan import RunPlan
from meduet_models.style.bank import StyleBank
from tests.client.exchanges.test_private_rounds import (
    FIRST,
    Killed,
    Site,
    answered,
    hospital,
    key_of,
    killed_after,
    make_noisy,
    question,
)

LAUNCHER = Launcher(("env",), "{}")


@dataclasses.dataclass
class WithJobs(Site):
    launcher: Any = LAUNCHER


@pytest.fixture
def plan(toy_plan: Callable[..., RunPlan]) -> RunPlan:
    return make_noisy(toy_plan)


def job(folder_of_site: Path, plan: RunPlan, change: Callable[[Offer], Offer] = lambda offer: offer) -> Any:
    """In place of the launcher: the work of the request, here."""

    def asked(launcher: Launcher, request: Request, folder: Path, on_step: Any) -> Offer:
        request = Request.read(request.write(folder))
        ask = request.ask(PrivateAsk)
        gate = OfferingGate(ANSWER.exchange.promise(plan, ask), folder, request.noise)
        with pytest.raises(Offered) as offered:
            ANSWER.work(hospital(folder_of_site), ask, plan, gate, on_step)
        write_answer(folder, request.sha256, change(offered.value.offer))
        return read_answer(folder, request.sha256)

    return asked


def with_jobs(folder: Path) -> WithJobs:
    site = hospital(folder)
    return WithJobs(folder, site.held, epsilon_ceiling=3.0)


def test_noisy_steps_of_a_job_are_those_of_the_site_to_the_bit(
    plan: RunPlan, toy_bank: Callable[..., StyleBank], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, there, style = tmp_path / "here", tmp_path / "there", toy_bank(plan)
    with pytest.raises(Killed):
        answered(hospital(here), question(plan, style), plan, on_step=killed_after(1))
    assert key_of(here).is_file()  # both draw with the same one
    shutil.copytree(here, there)
    monkeypatch.setattr(asking, "_asked", job(there, plan))
    local = answered(hospital(here), question(plan, style), plan)
    by_a_job = by_job(ANSWER).once(with_jobs(there), question(plan, style), plan)
    assert all(torch.equal(by_a_job.tensors[name], tensor) for name, tensor in local.tensors.items())
    assert hospital(there).ledger.spent().num_noised == 1
    states = [sorted(p.name for p in f.rglob("round-*.safetensors")) for f in (here, there)]
    assert states[0] == states[1] and states[0]
    assert list(there.rglob("*.secret")) == []


def test_a_job_that_left_steps_without_noise_lets_nothing_out(
    plan: RunPlan, toy_bank: Callable[..., StyleBank], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def one_less(offer: Offer) -> Offer:
        return dataclasses.replace(offer, noised=offer.noised - 1)

    monkeypatch.setattr(asking, "_asked", job(tmp_path, plan, one_less))
    with pytest.raises(GateRefusal, match="Expected noise in each of 2 steps; some had none"):
        by_job(ANSWER).once(with_jobs(tmp_path), question(plan, toy_bank(plan)), plan)
    assert list(tmp_path.rglob(f"round-{FIRST:04d}.safetensors")) == []  # nor is the state the site's
