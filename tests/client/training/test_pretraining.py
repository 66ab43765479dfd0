import logging
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from client.latents.batches import Batches, step_generator
from client.training.pretraining import train_round
from client.training.site_state import RoundResult, SiteState, StateFolder
from client.training.trainee import Trainee, WrongWeights, student_of
from federation.plan.optimisation import NotFinite, learning_rate_at
from federation.plan.plan import AggregationPlan, RunPlan, StylePlan, TrainingPlan
from federation.wire.messages import METRIC_NAMES
from meduet_models.meduet import MeDUET
from meduet_models.objective.settings import LossWeights, ObjectiveConfig
from meduet_models.objective.teacher import momentum_at
from meduet_models.sharing import home_keys, shared_keys, style_keys
from meduet_models.weights import open_weights, save_weights
from privacy.clipping import joint_norm

SECRET = b"1" * 32
CPU = torch.device("cpu")
PATIENTS = [f"p{n}" for n in range(10)]
Tensors = dict[str, torch.Tensor]


def fresh(plan: RunPlan) -> tuple[Tensors, SiteState]:
    """Shared weights and common start of a run."""
    model = MeDUET(plan.network, len(plan.sites), seed=plan.seed)
    weights = model.state_dict()
    shared = shared_keys(model, plan.style.head, plan.aggregation.method)
    home = home_keys(model, plan.style.head, plan.aggregation.method)
    return {n: weights[n] for n in shared}, SiteState(round=0, home={n: weights[n] for n in home})


class Site:
    """A site in a federation of one: the centre adds its update to the shared weights."""

    def __init__(self, plan: RunPlan, batches: Batches) -> None:
        self.plan, self.batches = plan, batches
        self.shared, self.kept = fresh(plan)
        self.start = self.kept.home
        self.losses: list[float] = []

    def round(self, number: int) -> RoundResult:
        trainee = Trainee.of(self.plan, self.shared, self.kept, CPU)
        result = train_round(
            trainee,
            self.batches,
            self.plan,
            number,
            SECRET,
            self.start,
            lambda step, loss: self.losses.append(loss),
        )
        self.shared = {name: tensor + result.update[name] for name, tensor in self.shared.items()}
        self.kept = trainee.state(self.plan, number, number - 1)
        return result


@pytest.fixture
def site(toy_plan: Callable[..., RunPlan], toy_scans: Any, toy_bank: Any) -> Callable[..., Site]:
    def make(**changes: Any) -> Site:
        plan = toy_plan(**changes)
        bank = None if plan.style.exchange == "none" else toy_bank(plan)
        return Site(plan, Batches(toy_scans(PATIENTS), plan, bank))

    return make


def same(one: Tensors, other: Tensors) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def moved(result: RoundResult) -> set[str]:
    return {name for name, tensor in result.update.items() if bool(tensor.any())}


def test_a_run_resumed_from_disk_equals_one_that_never_stopped_bit_for_bit(
    site: Callable[..., Site], tmp_path: Path
) -> None:
    whole, resumed = site(), site()
    for number in (1, 2, 3):
        last = whole.round(number)
    folder = StateFolder(tmp_path, resumed.plan.sha256)
    folder.enter(1, lambda: resumed.kept.home)
    for number in (1, 2, 3):
        shared = resumed.shared
        torch.manual_seed(number)  # no global generator may matter
        resumed = site()
        resumed.shared, resumed.kept = shared, folder.before(number)
        again = resumed.round(number)
        folder.save(resumed.kept, "aa")
    assert same(last.update, again.update)
    for part in ("home", "teacher", "optimiser"):
        assert same(getattr(whole.kept, part), getattr(resumed.kept, part)), part
    assert whole.losses[-2:] == resumed.losses


def test_a_round_done_twice_from_the_same_state_gives_the_same_update(site: Callable[..., Site]) -> None:
    one = site()
    one.round(1)
    shared, kept = one.shared, one.kept
    first = one.round(2)
    one.shared, one.kept = shared, kept
    assert same(first.update, one.round(2).update)


def test_the_update_is_after_minus_before_of_exactly_the_shared_tensors(site: Callable[..., Site]) -> None:
    one = site()
    shared, kept = one.shared, one.kept
    trainee = Trainee.of(one.plan, shared, kept, CPU)
    result = train_round(trainee, one.batches, one.plan, 1, SECRET, one.start)
    after = trainee.student.state_dict()
    assert result.update.keys() == shared.keys()
    assert not set(result.update) & set(style_keys(trainee.student))
    for name, tensor in result.update.items():
        assert torch.equal(tensor, after[name] - shared[name])
    assert "embed.weight" in moved(result) and "latent_mean" not in moved(result)
    assert result.examples == len(PATIENTS)


def test_the_style_branch_and_classifiers_learn_at_home(site: Callable[..., Site]) -> None:
    one = site()
    one.round(1)
    changed = {name for name, tensor in one.kept.home.items() if not torch.equal(tensor, one.start[name])}
    learned = set(one.start) & {name for name, _ in MeDUET(one.plan.network, 3).named_parameters()}
    assert changed == learned  # every weight of the style branch and of both classifiers
    one = site(aggregation=AggregationPlan(method="fedavg"), style=StylePlan(head="shared", anchor=0.0))
    assert one.round(1).update.keys() >= set(style_keys(MeDUET(one.plan.network, 3)))
    assert one.kept.home == {}


def test_a_site_that_trains_alone_shares_nothing_and_keeps_everything(
    alone_plan: RunPlan, toy_scans: Any
) -> None:
    one = Site(alone_plan, Batches(toy_scans(PATIENTS), alone_plan, None))
    result = one.round(1)
    assert result.update == {} and result.metrics["update_norm"] == 0.0
    assert one.kept.home.keys() == MeDUET(alone_plan.network, 3).state_dict().keys()
    one.round(2)


def test_the_loss_of_a_site_falls(site: Callable[..., Site]) -> None:
    # SiQC and the adversary are contrasts whose level moves with the others; reconstruction must go down.
    weights = LossWeights(site_adversary=0.0, mftd=0.0, siqc=0.0, invariance=0.0, restyled_reconstruction=0.0)
    training = TrainingPlan(rounds=2, steps_per_round=90, batch_size=4, learning_rate=1e-2)
    one = site(objective=ObjectiveConfig(weights=weights), training=training)
    first, last = one.round(1), one.round(2)
    assert last.metrics["loss.reconstruction"] < 0.9 * first.metrics["loss.reconstruction"]


def test_every_number_of_a_round_is_finite_and_has_an_agreed_name(site: Callable[..., Site]) -> None:
    one = site()
    metrics = [one.round(number).metrics for number in (1, 2, 3)]
    assert all(set(m) <= METRIC_NAMES and all(map(math.isfinite, m.values())) for m in metrics)
    assert all(type(value) is float for m in metrics for value in m.values())
    assert metrics[0]["loss.total"] == pytest.approx(sum(one.losses[:2]) / 2)
    assert metrics[0]["steps"] == 2.0 and metrics[0]["seconds"] > 0
    # MFTD is off for the first fifth of six steps: it is averaged over the steps that had it, not over all.
    assert "loss.mftd" not in metrics[0] and metrics[1]["loss.mftd"] > 0
    assert "loss.anchor" in metrics[0] and "loss.proximal" not in metrics[0]


def test_a_loss_that_is_not_finite_is_raised_before_the_weights_are_touched(
    site: Callable[..., Site],
) -> None:
    one = site()
    trainee = Trainee.of(one.plan, one.shared, one.kept, CPU)
    with torch.no_grad():
        trainee.student.decoder.predict.bias[0] = math.nan
    student = {name: tensor.clone() for name, tensor in trainee.student.state_dict().items()}
    teacher = {name: tensor.clone() for name, tensor in trainee.teacher.state_dict().items()}
    with pytest.raises(NotFinite, match="finite loss at step 2 of the run; got nan"):
        train_round(trainee, one.batches, one.plan, 2, SECRET, one.start)
    for before, now in ((student, trainee.student.state_dict()), (teacher, trainee.teacher.state_dict())):
        assert all(torch.equal(before[n].nan_to_num(7.0), now[n].nan_to_num(7.0)) for n in before)
    assert len(trainee.optimiser.state) == 0


def test_a_gradient_that_is_not_finite_is_raised_before_the_weights_are_touched(
    site: Callable[..., Site],
) -> None:
    one = site()
    trainee = Trainee.of(one.plan, one.shared, one.kept, CPU)
    before = trainee.student.embed.weight.detach().clone()
    trainee.student.embed.bias.register_hook(lambda gradient: gradient * math.inf)  # type: ignore[no-untyped-call]
    with pytest.raises(NotFinite, match="finite gradient at step 0"):
        train_round(trainee, one.batches, one.plan, 1, SECRET, one.start)
    assert torch.equal(trainee.student.embed.weight, before)


def test_each_step_draws_from_the_generator_of_its_sites_secret_round_and_step(
    site: Callable[..., Site], monkeypatch: pytest.MonkeyPatch
) -> None:
    one = site()
    seeds: list[int] = []
    draw = one.batches.draw
    monkeypatch.setattr(one.batches, "draw", lambda g: (seeds.append(g.initial_seed()), draw(g))[1])
    trainee = Trainee.of(one.plan, one.shared, one.kept, CPU)
    train_round(trainee, one.batches, one.plan, 2, SECRET, one.start)
    assert seeds == [step_generator(SECRET, one.plan.seed, 2, step).initial_seed() for step in (0, 1)]


def test_the_last_step_has_the_scheduled_rate_and_a_clipped_gradient(site: Callable[..., Site]) -> None:
    training = TrainingPlan(rounds=3, steps_per_round=2, batch_size=4, gradient_clip_norm=0.01)
    one = site(training=training)
    trainee = Trainee.of(one.plan, one.shared, one.kept, CPU)
    norms: list[float] = []

    def measure(*given: Any) -> None:
        gradients = {n: p.grad for n, p in trainee.student.named_parameters() if p.grad is not None}
        norms.append(joint_norm(gradients))

    trainee.optimiser.register_step_pre_hook(measure)
    result = train_round(trainee, one.batches, one.plan, 2, SECRET, one.start)
    rates = {group["lr"] for group in trainee.optimiser.param_groups}
    assert rates == {learning_rate_at(3, one.plan)} == {result.metrics["learning_rate"]}
    assert norms == pytest.approx([0.01, 0.01], rel=1e-3)
    assert result.metrics["grad_norm"] > 0.1  # what came, before it was cut


def test_no_gradient_is_held_through_a_forward_pass_or_after_the_round(site: Callable[..., Site]) -> None:
    one = site()
    trainee, held = Trainee.of(one.plan, one.shared, one.kept, CPU), list[bool]()
    came = {name: tensor.clone() for name, tensor in one.shared.items()}

    def look(*given: Any) -> None:
        held.append(any(p.grad is not None for p in trainee.student.parameters()))

    trainee.student.encoder.register_forward_pre_hook(look)
    train_round(trainee, one.batches, one.plan, 1, SECRET, one.start, lambda step, loss: look())
    look()
    assert len(held) > 5 and not any(held)
    assert same(came, dict(trainee.shared)) and all(trainee.shared[n] is one.shared[n] for n in came)


def test_a_round_begins_with_the_teacher_that_was_kept(site: Callable[..., Site]) -> None:
    one = site()
    one.round(1)
    begun = Trainee.of(one.plan, one.shared, one.kept, CPU).teacher.network.state_dict()
    assert same(dict(begun), one.kept.teacher)
    assert not torch.equal(begun["embed.weight"], one.shared["embed.weight"])


def test_the_proximal_term_and_the_anchor_hold_the_weights_that_they_name(site: Callable[..., Site]) -> None:
    def norm(tensors: Tensors) -> float:
        return math.sqrt(sum(float(t.square().sum()) for t in tensors.values()))

    training = TrainingPlan(rounds=3, steps_per_round=6, batch_size=4)
    free = site(training=training, style=StylePlan(anchor=0.0))
    held = site(training=replace(training, proximal=1e3), style=StylePlan(anchor=0.0))
    anchored = site(training=training, style=StylePlan(anchor=1e3))
    far, near = free.round(1), held.round(1)
    anchored.round(1)

    def wandered(one: Site) -> float:
        names = style_keys(MeDUET(one.plan.network, 3))
        return norm({name: one.kept.home[name] - one.start[name] for name in names})

    assert norm(near.update) < 0.5 * norm(far.update)
    assert near.metrics["loss.proximal"] > 0
    assert wandered(anchored) < 0.5 * wandered(free)


def test_terms_of_the_loss_add_up_with_their_weights(site: Callable[..., Site]) -> None:
    training = TrainingPlan(rounds=2, steps_per_round=1, batch_size=4, proximal=0.3)
    one = site(training=training, objective=ObjectiveConfig(mftd_warmup=0.0))
    one.round(1)
    metrics = one.round(2).metrics
    weights = vars(one.plan.objective.weights) | {"proximal": 0.3, "anchor": one.plan.style.anchor}
    total = sum(
        weights[n.removeprefix("loss.")] * v
        for n, v in metrics.items()
        if n.startswith("loss.") and n != "loss.total"
    )
    assert total == pytest.approx(metrics["loss.total"], rel=1e-5)


def test_the_learning_rate_rises_then_falls_along_a_cosine_to_its_last_value(toy_plan: Any) -> None:
    plan = toy_plan(training=TrainingPlan(rounds=10, steps_per_round=10, warmup=0.1))
    rates = [learning_rate_at(number, plan) for number in range(100)]
    assert rates[0] > 0 and rates[:10] == sorted(rates[:10])
    assert rates[10] == max(rates) == plan.training.learning_rate
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[99] == pytest.approx(plan.training.final_learning_rate)
    middle = (plan.training.learning_rate + plan.training.final_learning_rate) / 2
    assert (rates[54] + rates[55]) / 2 == pytest.approx(middle)


def test_the_teacher_follows_by_one_minus_its_momentum_per_step(site: Callable[..., Site]) -> None:
    one = site(training=TrainingPlan(rounds=2, steps_per_round=1, batch_size=4, teacher_momentum=(0.75, 0.9)))
    start = one.shared["embed.weight"].clone()
    result = one.round(1)
    momentum = momentum_at(0.0, 0.75, 0.9)
    expected = torch.lerp(start, start + result.update["embed.weight"], 1 - momentum)
    torch.testing.assert_close(one.kept.teacher["embed.weight"], expected)
    assert result.metrics["teacher_momentum"] == momentum == 0.75


def test_norms_biases_and_the_mask_token_are_not_decayed(site: Callable[..., Site]) -> None:
    one = site()
    trainee = Trainee.of(one.plan, one.shared, one.kept, CPU)
    named = {id(parameter): name for name, parameter in trainee.student.named_parameters()}
    decayed, free = ({named[id(p)] for p in group["params"]} for group in trainee.optimiser.param_groups)
    assert trainee.optimiser.param_groups[0]["weight_decay"] == one.plan.training.weight_decay
    assert trainee.optimiser.param_groups[1]["weight_decay"] == 0.0
    assert decayed | free == set(named.values()) and not decayed & free
    assert {"decoder.mask_token", "embed.bias", "encoder.norm.weight"} <= free
    assert {"embed.weight", "encoder.blocks.0.qkv.weight"} <= decayed


def test_muon_keeps_one_moment_of_a_matrix_and_two_of_everything_else(site: Callable[..., Site]) -> None:
    one = site(training=TrainingPlan(rounds=2, steps_per_round=2, batch_size=4, optimiser="muon"))
    one.round(1)
    kept = one.kept.optimiser
    assert kept["exp_avg/encoder.blocks.0.qkv.weight"].any()
    assert "exp_avg_sq/encoder.blocks.0.qkv.weight" not in kept
    assert {"step/embed.weight", "exp_avg/embed.weight", "exp_avg_sq/embed.weight"} <= set(kept)
    shared, forgot = one.shared, replace(one.kept, optimiser={})
    first = one.round(2)
    one.shared, one.kept = shared, forgot
    assert not same(first.update, one.round(2).update)


@pytest.mark.parametrize("lost", ["exp_avg_sq/embed.weight", "exp_avg/embed.weight", "step/embed.bias"])
def test_muons_moments_are_taken_whole_or_not_at_all(
    site: Callable[..., Site], lost: str, tmp_path: Path
) -> None:
    one = site(training=TrainingPlan(rounds=2, steps_per_round=1, batch_size=4, optimiser="muon"))
    one.round(1)
    trainee = Trainee.of(one.plan, one.shared, one.kept, CPU)
    whole = {name: tensor.clone() for name, tensor in trainee.tensors().items()}
    save_weights(tmp_path / "whole", whole, {})
    trainee.load(open_weights(tmp_path / "whole")[0])
    save_weights(tmp_path / "less", {name: t for name, t in whole.items() if name != lost}, {})
    with pytest.raises(WrongWeights, match="the optimiser's"):
        trainee.load(open_weights(tmp_path / "less")[0])


def test_the_first_steps_of_a_run_are_masked_and_the_terms_come_after_them(site: Callable[..., Site]) -> None:
    one = site(
        objective=ObjectiveConfig(masked_share=0.5),
        training=TrainingPlan(rounds=2, steps_per_round=2, batch_size=4),
    )
    early, late = one.round(1).metrics, one.round(2).metrics
    assert {name for name in early if name.startswith("loss.")} == {
        "loss.total", "loss.reconstruction", "loss.visible_reconstruction", "loss.anchor",
    }  # fmt: skip
    assert {"loss.siqc", "loss.invariance", "loss.restyled_reconstruction"} <= set(late)


def test_compiling_is_asked_of_encoder_and_decoder_of_both_networks_and_of_nothing_by_default(
    site: Callable[..., Site], monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled: list[torch.nn.Module] = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module: compiled.append(module))
    one = site()
    Trainee.of(one.plan, one.shared, one.kept, CPU)
    assert compiled == []
    trainee = Trainee.of(one.plan, one.shared, one.kept, CPU, compile=True)
    student, teacher = trainee.student, trainee.teacher.network
    assert compiled == [student.encoder, student.decoder, teacher.encoder, teacher.decoder]


def test_an_optimiser_that_was_kept_goes_on_instead_of_starting_again(site: Callable[..., Site]) -> None:
    one = site()
    one.round(1)
    forgot = replace(one.kept, optimiser={})
    shared = one.shared
    first = one.round(2)
    one.shared, one.kept = shared, forgot
    assert not same(first.update, one.round(2).update)
    assert float(one.kept.optimiser["step/embed.weight"]) == 2.0


def test_a_cohort_below_the_batch_is_said_aloud(
    toy_plan: Any, toy_scans: Any, toy_bank: Any, caplog: Any
) -> None:
    plan = toy_plan(training=TrainingPlan(rounds=1, steps_per_round=1, batch_size=8))
    one = Site(plan, Batches(toy_scans(PATIENTS[:5]), plan, toy_bank(plan)))
    with caplog.at_level(logging.WARNING):
        result = one.round(1)
    assert "5 training scans fill batches of 8" in caplog.text
    assert result.examples == 5


def test_weights_of_another_network_are_refused_by_name(site: Callable[..., Site]) -> None:
    one = site()
    without = {name: tensor for name, tensor in one.shared.items() if name != "fuse.weight"}
    missing = next(iter(set(one.shared) - set(without)), sorted(one.shared)[0])
    without.pop(missing, None)
    with pytest.raises(WrongWeights, match=missing):
        student_of(one.plan, without, one.kept)
    with pytest.raises(WrongWeights, match="'extra' is missing or not one of them"):
        student_of(one.plan, one.shared | {"extra": torch.zeros(1)}, one.kept)
    with pytest.raises(WrongWeights, match=r"'embed.bias' is \(3,\) and should be \(16,\)"):
        student_of(one.plan, one.shared | {"embed.bias": torch.zeros(3)}, one.kept)
    with pytest.raises(WrongWeights, match="is missing and should be"):
        student_of(one.plan, one.shared, SiteState(round=0, home={}))


def test_bfloat16_runs_and_stays_near_float32(site: Callable[..., Site]) -> None:
    training = TrainingPlan(rounds=3, steps_per_round=2, batch_size=4)
    exact = site(training=training).round(1).metrics
    rough = site(training=replace(training, precision="bf16")).round(1).metrics
    assert rough["loss.reconstruction"] != exact["loss.reconstruction"]
    assert rough["loss.reconstruction"] == pytest.approx(exact["loss.reconstruction"], rel=0.05)
