"""The federated diffusion model through messages: the real client, the real networks, latents in memory."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Context

from client.app import make_client_app
from client.latents.examples import SiteExamples
from client.secrets.site_secret import seed_of
from federation.exchanges.diffusion import encoder_of, transformer_of
from federation.journal import Journal
from federation.plan.diffusion_plan import DiffusionPlan
from federation.plan.plan import RunPlan
from federation.reply_book import ReplyBook
from meduet_models.diffusion.conditioner import Conditioner
from meduet_models.diffusion.settings import DiffusionTraining, TransformerShape
from meduet_models.diffusion.training import DiffusionTrainee
from meduet_models.meduet import FactorNetwork
from meduet_models.style.bank import StyleBank
from meduet_models.style.moments import StyleLayout, StyleMoments
from meduet_models.weights import load_weights
from privacy.ledger import Ledger
from server.exchanges.federated_diffusion import round_momentum, run_diffusion_rounds
from simulations.engines.in_process import InProcessGrid
from strategies.quorum import Roster, RoundFailed
from tests.worlds import Hospital, KnownScans, unanswered_places

TRAINING = DiffusionTraining(batch_size=4, learning_rate=1e-3, ema=0.9, alignment=0.5)


class Killed(BaseException):
    """As if the process had ended."""


def ten_patients(site: int) -> KnownScans:
    """Eight for training."""
    return KnownScans(site, 10, held_out=2)


@pytest.fixture
def plan(miniature: Any) -> RunPlan:
    return with_diffusion(miniature.plan(deadline_s=60.0))


def with_diffusion(plan: RunPlan, **changes: Any) -> RunPlan:
    values = {
        "policy": "federated",
        "transformer": TransformerShape(patch_size=2, width=12, depth=1, heads=2),
        "training": TRAINING,
        "rounds": 3,
        "steps_per_round": 2,
    }
    return dataclasses.replace(plan, diffusion=DiffusionPlan(**{**values, **changes}))


def shared(plan: RunPlan) -> dict[str, torch.Tensor]:
    return FactorNetwork(plan.network, seed=5).state_dict()


def bank(plan: RunPlan) -> dict[str, torch.Tensor]:
    layout = StyleLayout(
        channels=2, latent_grid=plan.network.latent_grid, map_grid=plan.style.map_grid, bound=1e3
    )
    moments = {
        site: StyleMoments.of(ten_patients(i).values, ten_patients(i).patients, layout)
        for i, site in enumerate(plan.sites)
    }
    return StyleBank.of(plan.sites, moments).to_tensors()


def grid_of(
    plan: RunPlan, folder: Path, on_step: Callable[[str, int, float], None] = lambda site, step, loss: None
) -> InProcessGrid:
    def open_site(context: Context) -> Any:
        index = int(context.node_config["partition-id"])
        own = folder / "sites" / plan.sites[index]
        own.mkdir(parents=True, exist_ok=True)
        return Hospital(own, ten_patients(index), plan.sites[index])

    return InProcessGrid(make_client_app(open_site, on_step), len(plan.sites), through_wire=True)


def run(plan: RunPlan, folder: Path, **on: Any) -> Any:
    grid = grid_of(plan, folder, **on)
    return ask(grid, plan, shared(plan), bank(plan), folder)


def ask(grid: InProcessGrid, plan: RunPlan, shared: Any, bank: Any, folder: Path) -> Any:
    book = ReplyBook(Journal(folder / "diffusion" / "journal.jsonl"))
    return run_diffusion_rounds(
        grid, Roster(plan.participants), plan, shared, bank, folder / "diffusion", book
    )


def test_the_sites_train_it_and_every_release_is_in_the_books(plan: RunPlan, tmp_path: Path) -> None:
    done = run(plan, tmp_path)
    transformer, reports = done.transformer, done.reports
    assert [report["round"] for report in reports] == [1, 2, 3]
    assert all(set(report["sites"]) == set(plan.sites) and not report["refused"] for report in reports)
    start = transformer_of(plan, encoder_of(plan, shared(plan)))
    changed = {n for n, p in transformer.named_parameters() if not torch.equal(p, start.state_dict()[n])}
    assert {"embed.weight", "predict.weight", "embed_condition.content.weight"} <= changed
    for site in plan.sites:
        folder = tmp_path / "sites" / site
        assert unanswered_places(folder / "ledger.jsonl") == []
        records = [json.loads(line)["record"] for line in (folder / "journal.jsonl").read_text().splitlines()]
        assert [(r["kind"], r["round"]) for r in records] == [
            ("diffusion", round_number) for round_number in (1, 2, 3)
        ]
        assert all(r["norm_after"] <= r["bound"] for r in records)
    parameters = dict(start.named_parameters())
    assert {r["tensors"] for r in records} == {len(parameters)}, "no latent, no projector, no constant leaves"


def test_one_site_in_a_federation_is_the_loop_alone(miniature: Any, tmp_path: Path) -> None:
    plan = with_diffusion(
        miniature.plan(sites=("oslo", "lyon"), deadline_s=60.0), update_clip_norm=1e4, rounds=1
    )
    diffusion = plan.diffusion
    assert diffusion is not None
    alone = dataclasses.replace(plan, sites=("oslo",))
    transformer = run(alone, tmp_path).transformer
    encoder = encoder_of(alone, shared(alone))
    trainee = DiffusionTrainee(
        transformer_of(alone, encoder),
        Conditioner(encoder, maps=True),
        diffusion.training,
        total_steps=2,
        seed=seed_of(b"1" * 32, "diffusion", alone.seed),
        style_bank=StyleBank.from_tensors(bank(alone), alone.sites),
    )
    source = SiteExamples(ten_patients(0), alone)
    average = {n: p.detach().clone() for n, p in trainee.transformer.named_parameters()}
    for step in (0, 1):
        trainee.step(source, step)
    momentum = round_momentum(0.9, 1, 2)
    average = {
        n: average[n].lerp(p.detach(), 1 - momentum) for n, p in trainee.transformer.named_parameters()
    }
    for name, parameter in transformer.named_parameters():  # the sum of updates is kept in steps of 2^-q
        torch.testing.assert_close(parameter.detach(), average[name], rtol=0, atol=2.0**-20)


def test_stopped_anywhere_and_resumed_is_never_stopped(plan: RunPlan, tmp_path: Path) -> None:
    whole = run(plan, tmp_path / "a").transformer
    calls = 0

    def kill(site: str, step: int, loss: float) -> None:
        nonlocal calls
        calls += 1
        if calls == 10:  # in round 2, at the second site
            raise Killed

    with pytest.raises(Killed):
        run(plan, tmp_path / "b", on_step=kill)
    done = run(plan, tmp_path / "b")
    resumed, reports = done.transformer, done.reports
    again = run(plan, tmp_path / "b").transformer
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name])
        assert torch.equal(tensor, again.state_dict()[name])
    assert len(reports) == 3


def test_killed_after_any_step_a_site_goes_on_where_it_was(
    plan: RunPlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Hospital, "progress_every_s", 0.0)
    alone = dataclasses.replace(with_diffusion(plan, rounds=2, steps_per_round=3), sites=("oslo",))
    expected = run(alone, tmp_path / "a")
    steps: list[int] = []

    def kill(site: str, step: int, loss: float) -> None:
        steps.append(step)
        if len(steps) <= 3:
            raise Killed

    for _ in range(3):
        with pytest.raises(Killed):
            run(alone, tmp_path / "b", on_step=kill)
    done = run(alone, tmp_path / "b", on_step=kill)
    assert steps == [1, 2, 3, 1, 2, 3]  # each once, though the process ended after each of the first three
    for name, tensor in expected.transformer.state_dict().items():
        assert torch.equal(tensor, done.transformer.state_dict()[name])
    books, kept = [], []
    for folder in (tmp_path / "a", tmp_path / "b"):
        own = folder / "sites" / "oslo"
        records = [entry.record for entry in Journal(own / "journal.jsonl").entries()]
        books.append([(r["sha256"], {**r["metrics"], "seconds": 0.0}) for r in records])
        states = sorted((own / "diffusion").rglob("*.*"))
        kept.append({path.name: load_weights(path)[0] for path in states})
    assert books[0] == books[1] and len(books[0]) == 2  # the gate was passed once a round
    names = [f"round-000{n}.safetensors" for n in (0, 1, 2)]
    assert set(kept[0]) == set(kept[1]) == set(names)
    for name, tensors in kept[0].items():
        assert tensors.keys() == kept[1][name].keys()
        assert all(torch.equal(tensor, kept[1][name][key]) for key, tensor in tensors.items())


def test_asked_again_for_a_round_that_is_over_a_site_answers_without_training(
    plan: RunPlan, tmp_path: Path
) -> None:
    alone = dataclasses.replace(with_diffusion(plan, rounds=2, steps_per_round=3), sites=("oslo",))
    steps: list[int] = []
    first = run(alone, tmp_path, on_step=lambda site, step, loss: steps.append(step))
    own = tmp_path / "sites" / "oslo"
    charged = Ledger(own / "ledger.jsonl").verify()
    (last,) = [path for path in (tmp_path).rglob("round-0002.safetensors") if own not in path.parents]
    last.unlink()  # the centre never had the answer to round 2
    again = run(alone, tmp_path, on_step=lambda site, step, loss: steps.append(step))
    assert steps == [1, 2, 3, 1, 2, 3]
    assert Ledger(own / "ledger.jsonl").verify() == charged
    for name, tensor in first.transformer.state_dict().items():
        assert torch.equal(tensor, again.transformer.state_dict()[name])


def test_the_average_follows_every_step_of_a_round() -> None:
    product = 1.0
    for step in (4, 5):
        product *= (1 + step) / (10 + step)
    assert round_momentum(0.999, 3, 2) == pytest.approx(product)
    assert round_momentum(0.5, 40, 3) == pytest.approx(0.125)


def test_a_plan_without_it_is_refused_at_the_site(plan: RunPlan, tmp_path: Path) -> None:
    grid = grid_of(dataclasses.replace(plan, diffusion=None), tmp_path)
    with pytest.raises(ValueError, match="policy=federated"):
        ask(grid, dataclasses.replace(plan, diffusion=None), {}, {}, tmp_path)
    tampered = shared(plan)
    tampered["embed.weight"] = torch.zeros(3, 3)
    with pytest.raises(ValueError, match=r"embed\.weight"):
        ask(grid, plan, tampered, bank(plan), tmp_path)


def test_an_encoder_of_another_size_is_malformed_at_the_site(
    plan: RunPlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.exchanges.federated_diffusion.encoder_keys", lambda network: ["embed.bias"])
    with pytest.raises(RoundFailed, match="not_answered"):
        run(plan, tmp_path)
    assert "among the encoder's weights" in (tmp_path / "sites" / "oslo" / "site.log").read_text()
