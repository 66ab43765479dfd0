"""Whole runs with privacy: the real client, gate, books, network and centre; only scans are made up."""

import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from flwr.app import Context

from client.app import make_client_app
from federation.exchanges.private_rounds import mechanisms, trained_keys, with_noise
from federation.exchanges.style_code import CODE, StyleCodeReply, code_shapes, style_code
from federation.plan.plan import RunPlan, TrainingPlan
from federation.plan.privacy_plan import NoisySteps
from meduet_models.meduet import MeDUET
from meduet_models.weights import load_weights, save_weights
from privacy.public_axes import COUNT_SHARE
from privacy.worth import signal_to_noise
from server.app import RunObserver, run
from server.coherence import coherence_of
from server.model import MeduetModel
from server.phantom_training import PhantomTraining
from server.protected_styles import ProtectedStyles
from server.public_scans import PUBLIC_SCANS, public_scans
from simulations.engines.in_process import InProcessGrid
from strategies.aggregation import ReplyRefused
from strategies.quorum import RoundFailed
from tests.worlds import Hospital, Latents, protected_plan, public_latents, small_plan

PUBLIC = public_latents()


class Killed(BaseException):
    """As if the process had ended."""


def make(**parts: Any) -> RunPlan:
    training = TrainingPlan(rounds=3, steps_per_round=2, batch_size=4, warmup=0.0, optimiser="muon")
    return small_plan(**parts, training=training)


def the_plan(epsilon: float = 8.0) -> RunPlan:
    plan = protected_plan(PUBLIC, make, epsilon=epsilon)
    return replace(plan, aggregation=replace(plan.aggregation, deadline_s=300.0))


def noisy_plan(level: Literal["adapters", "full"] = "full", **changes: Any) -> RunPlan:
    """The same, with two rounds of noisy steps after it."""
    settings: dict[str, Any] = {
        "steps": 4,
        "steps_per_round": 2,
        "sampling_rate": 0.25,
        "clip_norm": 1.0,
        "epsilon_style": 4.0,
        "although_noise_wins": True,
    }
    plan = the_plan()
    assert plan.privacy is not None
    noisy = NoisySteps(**settings | changes)
    return with_noise(replace(plan, privacy=replace(plan.privacy, level=level, noisy=noisy)))


def grid_of(plan: RunPlan, folder: Path, ceiling: float = 8.0, patients: int = 40) -> InProcessGrid:
    def open_site(context: Context) -> Hospital:
        index = int(context.node_config["partition-id"])
        name = plan.sites[index]
        return Hospital(
            folder / "sites" / name,
            Latents([index], patients),
            name,
            epsilon_ceiling=ceiling,
        )

    return InProcessGrid(make_client_app(open_site), len(plan.sites), through_wire=True)


def started(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    save_weights(folder / PUBLIC_SCANS, {"latents": PUBLIC}, {})
    return folder


class DiesIn(RunObserver):
    """The process of the centre ends in this round."""

    def __init__(self, round_number: int) -> None:
        self.round_number = round_number

    def on_round_end(self, round_number: int, shared: Mapping[str, Any], metrics: Any) -> Mapping[str, Any]:
        if round_number == self.round_number:
            raise Killed
        return {}


def test_a_whole_run_asks_each_site_once_and_charges_what_the_plan_says(tmp_path: Path) -> None:
    plan = the_plan()
    result = run(grid_of(plan, tmp_path), plan, started(tmp_path))
    for site in plan.sites:
        hospital = Hospital(tmp_path / "sites" / site, None, site, epsilon_ceiling=8.0)
        assert [e.record["kind"] for e in hospital.journal.entries()] == ["style_code"]
        spent = hospital.ledger.spent()
        assert (spent.num_noised, spent.num_plain) == (1, 0) and 7.9 < spent.total.upper <= 8.0
    told = result.metrics["survey"]["privacy"]
    assert 7.9 < told["epsilon"][0] <= told["epsilon"][1] <= 8.0 and told["delta"] == 1e-5
    assert [entry["sites"].keys() for entry in result.metrics["rounds"]] == [{"centre"}] * 3
    weights, provenance = load_weights(tmp_path / "model.safetensors")
    start = MeDUET(plan.network, 3, seed=plan.seed).state_dict()
    assert provenance["rounds"] == "3" and "style_head.expand.weight" in weights
    for name in ("embed.weight", "style_head.expand.weight", "latent_mean", "erasure_matrix", "code_matrix"):
        assert not torch.equal(weights[name], start[name])
    assert result.metrics["erasure"]["fitted_on"] == "public scans" and result.metrics["erasure"]["rank"] > 0


def test_the_plans_seed_does_not_give_the_noise_away(tmp_path: Path) -> None:
    plan = the_plan()
    one, other = (run(grid_of(plan, f), plan, started(f)).bank for f in (tmp_path / "1", tmp_path / "2"))
    assert not torch.equal(one["mean"], other["mean"])


@pytest.mark.parametrize("round_number", [1, 2, 3])
def test_a_centre_killed_in_any_round_ends_in_the_same_bits(tmp_path: Path, round_number: int) -> None:
    plan, first = the_plan(), started(tmp_path / "first")
    with pytest.raises(Killed):
        run(grid_of(plan, first), plan, first, observer=DiesIn(1))  # the codes are in
    second = tmp_path / "second"
    shutil.copytree(first, second)
    whole = run(grid_of(plan, first), plan, first)
    with pytest.raises(Killed):
        run(grid_of(plan, second), plan, second, observer=DiesIn(round_number))
    resumed = run(grid_of(plan, second), plan, second)
    assert all(torch.equal(resumed.shared[name], tensor) for name, tensor in whole.shared.items())


def test_a_site_whose_ceiling_is_lower_answers_nothing_and_the_run_says_so(tmp_path: Path) -> None:
    plan = the_plan(epsilon=8.0)
    with pytest.raises(RoundFailed, match="budget"):
        run(grid_of(plan, tmp_path, ceiling=3.0), plan, started(tmp_path))
    for site in plan.sites:
        assert Hospital(tmp_path / "sites" / site, None, site, epsilon_ceiling=3.0).ledger.verify() == 0


def test_a_whole_run_with_noisy_steps_charges_its_epsilon_and_a_centre_killed_among_them_goes_on(
    tmp_path: Path,
) -> None:
    plan, first, second = noisy_plan(), started(tmp_path / "first"), tmp_path / "second"
    with pytest.raises(Killed):
        run(grid_of(plan, first), plan, first, observer=DiesIn(3))  # the codes are in
    shutil.copytree(first, second)
    whole = run(grid_of(plan, first), plan, first)
    for number in (4, 5):  # the sites have answered, the centre has not counted
        with pytest.raises(Killed):
            run(grid_of(plan, second), plan, second, observer=DiesIn(number))
    resumed = run(grid_of(plan, second), plan, second)
    kept = load_weights(second / "checkpoints" / "round-0005.safetensors")[0]
    assert any(name.startswith("home:site_from") for name in kept)
    asked = [entry["sites"].keys() for entry in resumed.metrics["rounds"]]
    assert asked == [{"centre"}] * 3 + [set(plan.sites)] * 2
    assert (
        resumed.metrics["rounds"][2]["signal_to_noise"]
        < whole.metrics["survey"]["privacy"]["signal_to_noise"]
    )
    for folder in (first, second):
        for site in plan.sites:
            hospital = Hospital(folder / "sites" / site, None, site, epsilon_ceiling=8.0)
            spent = hospital.ledger.spent()
            assert (spent.num_noised, spent.num_plain) == (3, 0) and 7.9 < spent.total.upper <= 8.0
            assert list((folder / "sites" / site).rglob("*.secret")) == []
    # Two sites' secrets are not one: the same run elsewhere has other noise, its own goes on in its bits.
    told = load_weights(
        second / "sites" / "oslo" / "answers" / plan.sha256[:12] / "private_round-0004.safetensors"
    )[0]
    other = load_weights(
        first / "sites" / "oslo" / "answers" / plan.sha256[:12] / "private_round-0004.safetensors"
    )[0]
    assert not torch.equal(told["embed.weight"], other["embed.weight"])
    lines = [e.record for e in Hospital(second / "sites" / "oslo", None, "oslo").journal.entries()]
    again = [line["sha256"] for line in lines if line["kind"] == "private_round" and line["round"] == 4]
    assert len(again) == 2 and len(set(again)) == 1


def test_with_adapters_the_output_layer_moves_at_the_centre_and_no_bit_of_what_is_read_from_content(
    tmp_path: Path,
) -> None:
    plan, first, second = noisy_plan("adapters"), started(tmp_path / "first"), tmp_path / "second"
    with pytest.raises(Killed):
        run(grid_of(plan, first), plan, first, observer=DiesIn(4))  # the sites have answered
    shutil.copytree(first, second)
    whole, resumed = (run(grid_of(plan, folder), plan, folder) for folder in (first, second))
    before = load_weights(first / "checkpoints" / "round-0003.safetensors")[0]
    output = {"decoder.predict.weight", "decoder.predict.bias"}
    kept = load_weights(first / "checkpoints" / "round-0004.safetensors")[0]
    told = {n.removeprefix("shared:"): t for n, t in kept.items() if n.startswith("shared:")}
    assert set(told) == set(whole.shared)
    for name, tensor in told.items():
        assert torch.equal(tensor, before[f"shared:{name}"]) != (name in output)
    model = load_weights(first / "model.safetensors")[0]
    only_phantoms = MeduetModel(plan).erased_by_public(
        {n: before[f"shared:{n}"] for n in told},
        {n.removeprefix("bank:"): t for n, t in before.items() if n.startswith("bank:")},
        PUBLIC,
    )[0]
    assert {n for n, t in only_phantoms.items() if not torch.equal(t, model[n])} == output
    # Round 4 left before the copy, round 5 has noise of its own in each of the two.
    differ = {n for n, t in whole.shared.items() if not torch.equal(t, resumed.shared[n])}
    assert differ == output
    for site in plan.sites:
        records = [e.record for e in Hospital(first / "sites" / site, None, site).journal.entries()]
        assert [line["round"] for line in records if line["kind"] == "private_round"] == [4, 4, 5]
        assert len({line["sha256"] for line in records if line["round"] == 4}) == 1
        spent = Hospital(first / "sites" / site, None, site, epsilon_ceiling=8.0).ledger.spent()
        assert (spent.num_noised, spent.num_plain) == (3, 0) and 7.9 < spent.total.upper <= 8.0


def test_a_step_of_the_output_layer_is_worth_more_than_one_of_all_weights() -> None:
    plans, network = [noisy_plan("adapters"), noisy_plan("full")], MeDUET(the_plan().network, 3, seed=0)
    axes, styles = style_code(plans[0], PUBLIC), ProtectedStyles(plans[0], PUBLIC)
    bank = styles.bank(
        {s: replace(reply(plans[0], axes.total([axes.centre] * 20).float()), site=s) for s in plans[0].sites}
    )
    worth = []
    for plan in plans:
        dimensions = sum(network.get_parameter(name).numel() for name in trained_keys(plan, network))
        coherence = coherence_of(network, plan, PUBLIC, bank)
        worth.append(signal_to_noise(mechanisms(plan)[1], [20.0] * 3, dimensions, coherence))
        assert 0 < coherence <= 1
    assert worth[0] > 1.5 * worth[1]


def test_steps_that_noise_drowns_are_refused_before_any_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.protected_pretraining.DROWNED", 0.5)
    plan = noisy_plan(although_noise_wins=False)
    with pytest.raises(ValueError, match=r"at most 0\.\d+ .*expected 0\.5 or more.*although_noise_wins=true"):
        run(grid_of(plan, tmp_path), plan, started(tmp_path))
    for site in plan.sites:
        hospital = Hospital(tmp_path / "sites" / site, None, site, epsilon_ceiling=8.0)
        assert [entry.record["kind"] for entry in hospital.journal.entries()] == ["style_code"]


def reply(plan: RunPlan, code: torch.Tensor) -> StyleCodeReply:
    return StyleCodeReply(plan_sha256=plan.sha256, site=plan.sites[0], code={CODE: code})


@pytest.mark.parametrize(
    ("code", "sentence"),
    [
        (torch.tensor([0.0, 0, 0, 0, 5.1 * COUNT_SHARE]), "6 to 1048576 patients.*got 5.*minimum_cohort"),
        (torch.tensor([0.0, 0, 0, 0, -3.0]), "got -6"),
        (torch.tensor([0.0, 0, 0, 0, 1e9]), "as far as noise lets tell"),
        (torch.tensor([0.0, torch.nan, 0, 0, 20.0]), "finite style code"),
        (torch.zeros(4), "finite style code"),
    ],
)
def test_a_code_that_no_useful_cohort_told_is_put_aside(code: torch.Tensor, sentence: str) -> None:
    plan = the_plan()
    with pytest.raises(ReplyRefused, match=sentence):
        ProtectedStyles(plan, PUBLIC).check(reply(plan, code))


def test_codes_without_noise_give_the_bank_of_the_sites_styles() -> None:
    plan = replace(the_plan(), privacy=replace(the_plan().privacy, style_dimensions=40))  # type: ignore[type-var]
    axes, styles = style_code(plan, PUBLIC), ProtectedStyles(plan, PUBLIC)
    assert code_shapes(plan) == {CODE: (41,)}
    vectors = {site: axes.centre + 0.02 * (n + 1) * axes.back[:, n] for n, site in enumerate(plan.sites)}
    replies = {site: reply(plan, axes.total([u] * 20).float()) for site, u in vectors.items()}
    bank = styles.bank(replies)
    for site, vector in vectors.items():
        row = plan.sites.index(site)
        assert torch.allclose(bank.entries.mean[row, 0].double(), vector[:2], atol=1e-4)
        assert torch.allclose(bank.entries.deviation[row, 0].log().double(), vector[2:4], atol=1e-4)
    assert float(bank.count.min()) == pytest.approx(20.0)


def test_other_public_scans_in_the_folder_are_refused_with_what_to_do(tmp_path: Path) -> None:
    save_weights(tmp_path / PUBLIC_SCANS, {"latents": PUBLIC + 1}, {})
    with pytest.raises(ValueError, match=r"others .*another kind of machine.*meduet-server public-scans"):
        public_scans(the_plan(), tmp_path, None)
    with pytest.raises(ValueError, match="the plan's tokenizer, to draw its public scans"):
        public_scans(the_plan(), tmp_path / "empty", None)


def test_training_that_goes_on_from_its_state_takes_the_same_steps(tmp_path: Path) -> None:
    plan = the_plan()
    axes, styles = style_code(plan, PUBLIC), ProtectedStyles(plan, PUBLIC)
    bank = styles.bank(
        {s: replace(reply(plan, axes.total([axes.centre + n * 0.1] * 20).float()), site=s)
         for n, s in enumerate(plan.sites)}
    )  # fmt: skip
    cpu = torch.device("cpu")
    start = MeDUET(plan.network, 3, seed=plan.seed).state_dict()
    whole = PhantomTraining(plan, PUBLIC, bank, start, {}, cpu)
    whole.round(1)
    path = tmp_path / "state.safetensors"
    save_weights(path, whole.state(), {})
    later = PhantomTraining(plan, PUBLIC, bank, start, load_weights(path)[0], cpu)
    losses = [training.round(2)["loss"] for training in (whole, later)]
    assert losses[0] == losses[1]
    assert all(torch.equal(later.weights()[name], tensor) for name, tensor in whole.weights().items())
