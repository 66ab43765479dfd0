"""A round of a secure sum whose work is done by jobs: the gate masks here what was worked out there."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Context

from client.app import make_client_app
from client.exchanges.secure_sum import VECTOR
from client.jobs import asking
from client.jobs.launcher import Launcher
from client.jobs.program import Offered, OfferingGate
from client.jobs.request import Offer, Request, read_answer, write_answer
from federation.exchanges.secure_sum import SUM_MASKED, SumMaskedAsk
from tests.rounds.test_secure_sum import Sites, a_plan, go
from tests.worlds import Hospital, Latents

LAUNCHER = Launcher(("env",), "{}")


@dataclasses.dataclass
class WithJobs(Hospital):
    launcher: Any = LAUNCHER


def test_the_sum_of_masked_jobs_is_that_of_masked_answers_to_the_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, jobs = a_plan(), list[str]()
    here = go(plan, tmp_path / "here", Sites(plan, tmp_path / "here"))

    def open_site(context: Context) -> WithJobs:
        index = int(context.node_config["partition-id"])
        name = plan.sites[index]
        return WithJobs(tmp_path / "jobs" / name, Latents([index], 8 + index), name)

    def asked(launcher: Launcher, request: Request, folder: Path, on_step: Any) -> Offer:
        assert request.route == SUM_MASKED.route
        ask = request.ask(SumMaskedAsk)
        site = WithJobs(folder.parents[1], None, folder.parents[1].name)
        index = plan.sites.index(site.name)
        site.held = Latents([index], 8 + index)
        gate = OfferingGate(VECTOR.exchange.promise(plan, ask), folder)
        with pytest.raises(Offered) as offered:
            VECTOR.work(site, ask, plan, gate, on_step)
        jobs.append(site.name)
        write_answer(folder, request.sha256, offered.value.offer)
        return read_answer(folder, request.sha256)

    monkeypatch.setattr(asking, "_asked", asked)
    sites = Sites(plan, tmp_path / "jobs")
    sites._inner = make_client_app(open_site)
    by_jobs = go(plan, tmp_path / "jobs", sites)
    assert sorted(jobs) == sorted(plan.sites)
    assert all(torch.equal(by_jobs.shared[name], here.shared[name]) for name in here.shared)
    states = sorted(path.name for path in (tmp_path / "jobs" / "oslo" / "state").rglob("*.safetensors"))
    assert states == ["round-0000.safetensors", "round-0001.safetensors"]
