"""Noisy steps as secure sums: the noise of all is in what is read, each site's own in what it masks."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Context, Error, Message
from flwr.clientapp import ClientApp

from client.app import make_client_app
from client.commands.plan_words import plan_words
from federation.exchanges.private_rounds import (
    PRIVATE_ROUNDS,
    mechanisms,
    noisy_rounds,
    run_epsilon,
    steps_promise,
    travelling_keys,
    with_noise,
)
from federation.exchanges.secure_sum import SUM_MASKED, SUM_PRIVATE, SUM_UNMASK
from federation.plan.plan import RunPlan, TrainingPlan
from federation.plan.privacy_plan import NoisySteps
from federation.published_plan import PublishedPlan
from federation.summed_noise import (
    check_summed,
    hiding,
    summed_deviation,
    summed_epsilon,
    summed_factor,
    summed_mechanisms,
)
from federation.wire.sum_layout import SumLayout
from meduet_models.meduet import MeDUET
from meduet_models.weights import load_weights
from privacy.accounting import epsilon_of
from privacy.group_gradients import parameters_of_layers
from privacy.randomness import SecretSource
from privacy.secure_sum.party import Party
from privacy.secure_sum.ring import Ring, decode, encode
from privacy.step_secrets import StepSecrets
from server.app import run
from simulations.engines.in_process import InProcessGrid
from tests.rounds.test_protected_pretraining import started
from tests.worlds import Hospital, Latents, protected_plan, public_latents, small_plan

PUBLIC, PATIENTS = public_latents(), 40
Lost = Callable[[str, str, int], bool]
"""Of a site, a route and a round: whether its answer is lost."""


def a_plan(num_sites: int = 3, **aggregation: Any) -> RunPlan:
    """Two rounds at the centre, two of one noisy step."""
    noisy = NoisySteps(
        steps=2, steps_per_round=1, sampling_rate=0.05, clip_norm=1.0, epsilon_style=4.0,
        although_noise_wins=True,
    )  # fmt: skip
    training = TrainingPlan(rounds=2, steps_per_round=1, batch_size=4, warmup=0.0)
    sites = ("oslo", "lyon", "turin", "porto", "north", "south", "east", "west")[:num_sites]
    plan = protected_plan(
        PUBLIC,
        lambda **parts: small_plan(**parts, training=training, sites=sites),
        level="full",
        epsilon=8.0,
        noisy=noisy,
    )
    settings = {"deadline_s": 60.0, "secure_sum": True, "norm_tolerance": 0.0, **aggregation}
    return replace(plan, aggregation=replace(plan.aggregation, **settings))


def nobody(site: str, route: str, round_number: int) -> bool:
    return False


def grid_of(plan: RunPlan, folder: Path, lost: Lost = nobody) -> InProcessGrid:
    def open_site(context: Context) -> Hospital:
        index = int(context.node_config["partition-id"])
        name = plan.sites[index]
        return Hospital(folder / "sites" / name, Latents([index], PATIENTS), name, epsilon_ceiling=8.0)

    class Sites(ClientApp):
        def __call__(self, message: Message, context: Context) -> Message:
            reply = inner(message, context)
            site = plan.sites[int(context.node_config["partition-id"])]
            round_number = int(message.content.config_records["head"].get("round", 0))  # type: ignore[arg-type]
            if lost(site, message.metadata.message_type, round_number):
                return Message(Error(code=5, reason="gone"), reply_to=message)
            return reply

    inner = make_client_app(open_site)
    return InProcessGrid(Sites(), len(plan.sites), through_wire=True)


class Ran:
    """A whole run, and each site's vector of its last round before it was masked."""

    def __init__(self, folder: Path, lost: Lost = nobody) -> None:
        self.plan, self.folder, self.vectors = a_plan(), folder, dict[str, Ring]()
        patched = pytest.MonkeyPatch()
        mask = Party.mask

        def seen(party: Party, vector: Ring) -> None:
            self.vectors[party.site] = vector.copy()
            mask(party, vector)

        with patched.context() as patch:
            patch.setattr(Party, "mask", seen)
            self.result = run(grid_of(self.plan, folder, lost), self.plan, started(folder))

    def hospital(self, site: str) -> Hospital:
        return Hospital(self.folder / "sites" / site, None, site, epsilon_ceiling=8.0)


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Ran:
    return Ran(tmp_path_factory.mktemp("ran"))


def layout_of(plan: RunPlan) -> tuple[SumLayout, torch.Tensor]:
    """The vector's layout, and which of its values are trained."""
    network = MeDUET(plan.network, len(plan.sites), seed=plan.seed)
    whole, trained = network.state_dict(), set(parameters_of_layers(network))
    travels = sorted(travelling_keys(plan, network))
    layout = SumLayout.of(plan, {name: whole[name].shape for name in travels})
    return layout, torch.cat([torch.full((whole[name].numel(),), name in trained) for name in travels])


def test_each_site_is_charged_its_own_noise_and_nothing_leaves_unmasked(ran: Ran) -> None:
    for site in ran.plan.sites:
        hospital = ran.hospital(site)
        lines = [entry.record for entry in hospital.journal.entries()]
        vectors = [line for line in lines if line["kind"] == "private_round"]
        assert [line["round"] for line in vectors] == list(noisy_rounds(ran.plan))
        assert all(line["counts"] == line["metrics"] == {} and "masked" in line for line in vectors)
        assert all(line["noise"].startswith("noise enters steps") for line in vectors)
        assert hospital.ledger.spent().total == run_epsilon(ran.plan)
    told = ran.result.metrics["survey"]["privacy"]
    assert told["epsilon_of_sums"] == [summed_epsilon(ran.plan).lower, summed_epsilon(ran.plan).upper]
    assert told["epsilon_of_sums"][1] < told["epsilon"][1] <= 8.0


def test_the_centre_takes_the_step_along_the_sum_and_no_site_takes_one(ran: Ran) -> None:
    layout, _ = layout_of(ran.plan)
    total = sum(ran.vectors.values(), np.zeros(layout.size, dtype=np.uint32))
    mean = layout.decoded(total, 3).mean
    before = load_weights(ran.folder / "checkpoints" / "round-0003.safetensors")[0]
    after = load_weights(ran.folder / "checkpoints" / "round-0004.safetensors")[0]
    moved = {name: after[f"shared:{name}"] - before[f"shared:{name}"] for name in mean}
    assert all(torch.allclose(moved[name], mean[name], atol=1e-6) for name in mean)
    assert any(float(tensor.abs().max()) > 0 for tensor in moved.values())


def test_the_noise_in_the_sum_has_the_deviation_that_is_claimed(ran: Ran) -> None:
    layout, trained = layout_of(ran.plan)
    each = [
        torch.from_numpy(decode(v[: layout.num_values].copy(), layout.bits)) for v in ran.vectors.values()
    ]
    one = summed_deviation(ran.plan)
    spread = 5.2 / math.sqrt(2 * int(trained.sum()))  # a false alarm in some millions
    for vector in each:
        assert float(vector[~trained].abs().max()) == 0.0
        assert float(vector[trained].square().mean().sqrt()) == pytest.approx(one, rel=spread + 0.01)
    together = float(sum(each)[trained].square().mean().sqrt())  # type: ignore[index]
    assert together == pytest.approx(math.sqrt(3) * one, rel=spread + 0.01)
    hidden = float((each[0] + each[1])[trained].square().mean().sqrt())  # the third told its own
    factor = summed_factor(ran.plan) * steps_promise(ran.plan).bound
    claimed = summed_mechanisms(ran.plan)[1].noise_multiplier * factor
    assert hidden == pytest.approx(claimed, rel=spread + 0.01) and hiding(ran.plan) == 2


def auc(members: torch.Tensor, others: torch.Tensor) -> float:
    return float((members[:, None] > others).double().mean())


@pytest.mark.parametrize("noisy", [True, False])
def test_alignment_with_the_sum_stays_under_the_bound_of_the_noise_of_those_who_do_not_collude(
    noisy: bool,
) -> None:
    """By somebody who knows everybody's gradients but hers, and the vector of one site of three."""
    plan, trials = a_plan(), 600
    layout, _ = layout_of(plan)
    promise, factor = steps_promise(plan), summed_factor(plan)
    hers = torch.randn(40, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    hers *= promise.bound / hers.norm()

    def scores(member: bool) -> torch.Tensor:
        told = []
        for trial in range(trials):
            total = np.zeros(40, dtype=np.uint32)
            for site in range(hiding(plan)):
                key = SecretSource(bytes([site, member]) + trial.to_bytes(30, "big"))
                share = {"a": hers * (member and site == 0)}
                deviation = promise.deviation if noisy else 0.0
                noised = factor * StepSecrets(key, (trial,), deviation).noised(0, share)["a"]
                vector = np.zeros(40, dtype=np.uint32)
                encode(noised.float().numpy(), layout.bits, vector)
                total += vector
            told.append(float(torch.from_numpy(decode(total, layout.bits)) @ hers))
        return torch.tensor(told)

    found = auc(scores(True), scores(False))
    if not noisy:
        assert found == 1.0
        return
    sums = summed_mechanisms(plan)[1].noise_multiplier
    bound = 0.5 * math.erfc(-1 / (2 * sums))  # Phi(1 / (sigma sqrt 2)) of two equally likely worlds
    alone = 0.5 * math.erfc(-1 / (2 * promise.deviation / promise.bound))
    error = 4.9 * math.sqrt(1 / (6 * trials))  # a false alarm in a million
    assert bound - error <= found <= bound + error < 1.0 and bound < alone


def test_a_round_of_which_a_vector_is_lost_is_burnt_and_no_site_sends_a_second(tmp_path: Path) -> None:
    ran = Ran(tmp_path, lambda site, route, n: (site, route, n) == ("lyon", SUM_PRIVATE.route, 3))
    third, fourth = ran.result.metrics["rounds"][2:]
    assert "3 of 3 sites" in third["burnt"] and not fourth["burnt"]
    for site in ran.plan.sites:
        lines = [entry.record for entry in ran.hospital(site).journal.entries()]
        left = {(line["round"], line["sha256"]) for line in lines if line["kind"] == "private_round"}
        assert sorted(number for number, _ in left) == [3, 4]  # asked again, the same bytes left again
        assert ran.hospital(site).ledger.spent().total == run_epsilon(ran.plan)
        opened = [line["round"] for line in lines if line["kind"] == "sum_unmask"]
        assert opened == [4] and SUM_UNMASK.rounds(ran.plan) == noisy_rounds(ran.plan)


@pytest.mark.parametrize(("num_sites", "hides"), [(3, 2), (4, 2), (8, 4)])
def test_the_epsilon_of_sums_counts_who_must_answer_less_who_may_collude(num_sites: int, hides: int) -> None:
    plan = a_plan(num_sites)
    code, steps = mechanisms(plan)
    summed = replace(steps, noise_multiplier=steps.noise_multiplier * math.sqrt(hides))
    assert hiding(plan) == hides and summed_mechanisms(plan) == [code, summed]
    assert epsilon_of([code], 1e-5).upper < summed_epsilon(plan).upper < run_epsilon(plan).upper


def test_sums_whose_grid_or_bound_would_spoil_the_noise_are_refused() -> None:
    plan = a_plan()
    check_summed(plan, layout_of(plan)[0])
    coarse = replace(plan, aggregation=replace(plan.aggregation, weight_cap=1_000_000))
    with pytest.raises(ValueError, match=r"at least 16 steps of the grid .* Lower aggregation.weight_cap"):
        check_summed(coarse, layout_of(coarse)[0])
    short = replace(plan, release=replace(plan.release, update_clip_norm=0.1))
    with pytest.raises(ValueError, match="update_clip_norm of at least twice the length of a step's noise"):
        check_summed(short, layout_of(short)[0])


def test_a_plan_with_sums_of_noisy_steps_has_no_unmasked_round() -> None:
    plan = a_plan()
    assert len(PRIVATE_ROUNDS.rounds(plan)) == len(SUM_MASKED.rounds(plan)) == 0
    alone = replace(plan, aggregation=replace(plan.aggregation, secure_sum=False))
    assert PRIVATE_ROUNDS.rounds(alone) == SUM_PRIVATE.rounds(plan) == noisy_rounds(plan)
    assert len(SUM_PRIVATE.rounds(alone)) == 0


def test_several_steps_in_a_round_are_refused_since_their_noise_does_not_add_up() -> None:
    plan = a_plan()
    assert plan.privacy is not None and plan.privacy.noisy is not None
    noisy = replace(plan.privacy.noisy, steps=4, steps_per_round=2, noise_multiplier=0.0)
    with pytest.raises(ValueError, match=r"steps_per_round=1 with aggregation.secure_sum=true.*got 2"):
        with_noise(replace(plan, privacy=replace(plan.privacy, noisy=noisy)))


def test_the_words_say_both_epsilons_and_against_whom() -> None:
    plan = a_plan()
    text = " ".join(line for _, line in plan_words(PublishedPlan(plan=plan, bundle_sha256="0" * 64)))
    for said in (
        f"epsilon {run_epsilon(plan)} at delta 1e-05 for the whole run",
        f"against the centre, and one other site that works with it, a patient is protected with epsilon "
        f"{summed_epsilon(plan)}",
        "as long as 2 sites, yours among them, add their noise",
        "by your own noise alone",
        "noisy steps as secure sums: 2",
    ):
        assert said in text
