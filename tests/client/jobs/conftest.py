"""The hospital of these tests, made once for a file of them, and jobs without a process of their own."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from client.jobs import asking
from client.jobs.launcher import Launcher
from client.jobs.program import main
from federation.exchanges.survey import survey_layout
from federation.plan.plan import AggregationPlan, RunPlan, TrainingPlan
from meduet_models.style.bank import StyleBank
from meduet_models.style.moments import StyleMoments
from scans.volume_plan import VolumePlan
from tests.client.conftest import make_plan
from tests.client.jobs.hospital import World, write_scans
from tests.worlds import small_network


def a_bank(plan: RunPlan) -> dict[str, torch.Tensor]:
    draws = torch.Generator().manual_seed(0)
    moments = {}
    for index, name in enumerate(plan.sites):
        values = torch.randn(6, 8, 4, 6, 4, generator=draws) * (1 + index) + index
        moments[name] = StyleMoments.of(values, [f"{name}{n}" for n in range(6)], survey_layout(plan))
    return StyleBank.of(plan.sites, moments).to_tensors()


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("jobs")
    write_scans(folder / "scans")
    volumes = VolumePlan(modality="mr", shape=(16, 24, 16), spacing_mm=(2.0, 2.0, 2.0))
    plan = make_plan(
        network=small_network(latent_channels=8, width=16, style_map_grid=(2, 3, 2)),
        volumes=volumes,
        training=TrainingPlan(rounds=2, steps_per_round=4, batch_size=4),
        aggregation=AggregationPlan(deadline_s=300.0),
    )
    made = World(folder, plan, {})
    site = made.hospital("first").site()
    made.plan = RunPlan.from_json(plan.to_json().replace("0" * 64, site.tokenizer.sha256))
    made.bank = a_bank(made.plan)
    site.scans(made.plan)  # encodes
    return made


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[Path], int]], None]:
    """Jobs that are done by a function in this process; None: by the program itself. No pauses."""

    def install(job: Callable[[Path], int] | None = None) -> None:
        def run(self: Launcher, request: Path, look: Callable[[], None]) -> int:
            look()
            if job is not None:
                status = job(request)
            else:
                with pytest.MonkeyPatch.context() as inner:
                    inner.setattr(sys, "argv", ["program", str(request)])
                    status = main()
            look()
            return status

        monkeypatch.setattr(Launcher, "run", run)

    monkeypatch.setattr(asking, "PAUSE_S", 0.0)
    monkeypatch.setattr(asking, "APPEARS_S", 0.0)
    return install
