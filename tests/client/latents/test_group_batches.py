"""Groups of noisy steps: drawn in secret, each patient's by itself, in styles that everybody knows."""

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import pytest
import torch

from client.latents.group_batches import Group, GroupBatches
from federation.plan.plan import RunPlan
from federation.plan.privacy_plan import NoisySteps
from meduet_models.style.bank import StyleBank
from privacy.randomness import SecretSource
from privacy.step_secrets import StepSecrets
from tests.worlds import ViewedScans, protected_plan, public_latents

PUBLIC = public_latents()
CPU = torch.device("cpu")
SITE_SECRET = b"s" * 32


def full_plan(
    make: Callable[..., RunPlan], group_size: int = 2, partners: Literal["public", "private"] = "public"
) -> RunPlan:
    noisy = NoisySteps(
        steps=4,
        steps_per_round=2,
        sampling_rate=0.5,
        clip_norm=1.0,
        group_size=group_size,
        partners=partners,
        epsilon_style=1.0,
    )
    return protected_plan(PUBLIC, make, level="full", noisy=noisy)


@pytest.fixture
def plan(toy_plan: Callable[..., RunPlan]) -> RunPlan:
    return full_plan(toy_plan)


def secret(key: bytes = b"k" * 32) -> StepSecrets:
    return StepSecrets(SecretSource(key), ("line",), 1.0)


def names(number: int) -> list[str]:
    return [f"p{n // 2}" for n in range(2 * number)]  # two scans each


def batches(plan: RunPlan, bank: StyleBank, patients: Sequence[str]) -> GroupBatches:
    return GroupBatches(ViewedScans.of(patients), plan, bank, PUBLIC, "north", SITE_SECRET)


def same(one: Group, other: Group) -> bool:
    return (
        torch.equal(one.public, other.public)
        and torch.equal(one.step.exchanged, other.step.exchanged)
        and torch.equal(one.step.partner, other.step.partner)
        and one.scans == other.scans
    )


def test_each_patient_is_in_a_step_with_the_plans_chance_and_once(
    plan: RunPlan, toy_bank: Callable[..., StyleBank]
) -> None:
    made = batches(plan, toy_bank(plan), names(400))
    groups = made.drawn(secret(), 0)
    assert abs(len(groups) - 200) < 49  # 4.9 deviations: a false alarm in a million
    assert len({group.scans[0][0] // 2 for group in groups}) == len(groups)
    assert {group.scans[0][0] % 2 for group in groups} == {0, 1}


def test_who_is_in_a_step_follows_from_the_secret_and_not_from_the_plan(
    plan: RunPlan, toy_bank: Callable[..., StyleBank]
) -> None:
    made = batches(plan, toy_bank(plan), names(60))
    mine, again, other = (
        [g.scans[0][0] for g in made.drawn(secret(key), 0)] for key in (b"k" * 32, b"k" * 32, b"o" * 32)
    )
    assert mine == again != other


def test_a_patient_who_comes_or_goes_changes_nobody_elses_group(
    plan: RunPlan, toy_bank: Callable[..., StyleBank]
) -> None:
    bank, everybody = toy_bank(plan), names(30)
    whole = batches(plan, bank, everybody).drawn(secret(), 3)
    for gone in (0, 13, 29):
        scans = ViewedScans.of(everybody)
        scans.train = [row for row in scans.train if row // 2 != gone]
        left = GroupBatches(scans, plan, bank, PUBLIC, "north", SITE_SECRET).drawn(secret(), 3)
        expected = [group for group in whole if group.scans[0][0] // 2 != gone]
        assert len(left) == len(expected) and all(map(same, left, expected))


def test_a_group_is_one_scan_of_a_patient_and_public_scans_in_their_target_styles(
    toy_plan: Callable[..., RunPlan], toy_bank: Callable[..., StyleBank]
) -> None:
    plan = full_plan(toy_plan, group_size=4)
    bank, scans = toy_bank(plan), ViewedScans.of(names(12))
    made = GroupBatches(scans, plan, bank, PUBLIC, "north", SITE_SECRET)
    groups = made.drawn(secret(), 0)
    batch, draws = made.apply(groups, "mftd", CPU)
    rows = torch.arange(4 * len(groups))
    assert len(batch.latents) == len(rows) and torch.equal(draws.partner // 4, rows // 4)
    assert draws.target_site is not None and torch.equal(batch.site, draws.target_site)
    for number, group in enumerate(groups):
        row, target = 4 * number, int(batch.site[4 * number])
        hers = scans.values[group.scans[0][0], 0][None]
        wanted = bank.restyle(hers, torch.tensor([0]), torch.tensor([target]))
        assert torch.equal(batch.latents[row : row + 1], wanted)
        assert len(set(batch.subject[row : row + 4].tolist())) == 4  # type: ignore[index]


def test_own_scans_are_never_looked_at_for_a_style(
    plan: RunPlan, toy_bank: Callable[..., StyleBank], monkeypatch: pytest.MonkeyPatch
) -> None:
    def looked(*given: Any) -> None:
        raise AssertionError("own moments are exact")

    monkeypatch.setattr("client.latents.batches.own_moments", looked)
    made = batches(plan, toy_bank(plan), names(12))
    made.apply(made.drawn(secret(), 0), "siqc", CPU)
    with pytest.raises(ValueError, match="this site's own protected style in the bank"):
        batches(plan, toy_bank(plan, ["south", "west"]), names(12))


def test_the_number_of_patients_is_the_banks_and_not_the_sites(
    plan: RunPlan, toy_bank: Callable[..., StyleBank]
) -> None:
    bank = toy_bank(plan)
    assert {batches(plan, bank, names(n)).patients for n in (0, 1, 40)} == {float(bank.count[0, 0])}


# Groups of private patients


@pytest.fixture
def private(toy_plan: Callable[..., RunPlan]) -> RunPlan:
    return full_plan(toy_plan, group_size=4, partners="private")


def members(group: Group) -> tuple[int, ...]:
    """Its patients, of two scans each."""
    return tuple(scan // 2 for scan, _ in group.scans)


def formed(plan: RunPlan, bank: StyleBank, number: int, secret_of_site: bytes = SITE_SECRET) -> set[Any]:
    """All groups, as they show in some steps."""
    made = GroupBatches(ViewedScans.of(names(number)), plan, bank, PUBLIC, "north", secret_of_site)
    return {members(group) for step in range(12) for group in made.drawn(secret(), step)}


def test_private_patients_stay_together_for_the_whole_run_and_nobody_is_left_out(
    private: RunPlan, toy_bank: Callable[..., StyleBank]
) -> None:
    groups = formed(private, toy_bank(private), 10)
    assert sorted(len(group) for group in groups) == [2, 4, 4]
    assert sorted(patient for group in groups for patient in group) == list(range(10))


def test_public_scans_fill_the_last_group_of_private_patients(
    private: RunPlan, toy_bank: Callable[..., StyleBank]
) -> None:
    made = batches(private, toy_bank(private), names(10))
    groups = [group for step in range(8) for group in made.drawn(secret(), step)]
    assert {(len(group.scans), len(group.public)) for group in groups} == {(4, 0), (2, 2)}
    batch, draws = made.apply(groups, "mftd", CPU)
    assert len(batch.latents) == 4 * len(groups) and bool(batch.latents.isfinite().all())
    rows = torch.arange(4 * len(groups))
    assert torch.equal(draws.partner // 4, rows // 4)
    assert batch.subject is not None
    assert all(len(set(own.tolist())) == 4 for own in batch.subject.split(4))
    assert made.expected == pytest.approx(0.5 * max(1.0, made.patients / 4))


def test_other_scans_of_a_patient_move_her_own_group_alone(
    private: RunPlan, toy_bank: Callable[..., StyleBank]
) -> None:
    bank, scans, other = toy_bank(private), ViewedScans.of(names(9)), ViewedScans.of(names(9))
    other.values[6:8] = 100.0
    made, moved = (GroupBatches(s, private, bank, PUBLIC, "north", SITE_SECRET) for s in (scans, other))
    for step in range(6):
        before, after = made.drawn(secret(), step), moved.drawn(secret(), step)
        assert len(before) == len(after) and all(map(same, before, after))
        if before:
            pair = (made.apply(before, "mftd", CPU)[0], moved.apply(after, "mftd", CPU)[0])
            changed = [
                not torch.equal(*both) for both in zip(*(b.latents.split(4) for b in pair), strict=True)
            ]
            assert changed == [3 in members(group) for group in before]


def test_who_is_with_whom_follows_from_the_sites_secret_and_any_two_meet_as_often(
    private: RunPlan, toy_bank: Callable[..., StyleBank]
) -> None:
    bank, trials = toy_bank(private), 100
    scans = ViewedScans.of(names(8))
    met = {pair: 0 for pair in ((0, 1), (2, 7), (5, 6))}
    for trial in range(trials):
        made = GroupBatches(scans, private, bank, PUBLIC, "north", trial.to_bytes(32, "big"))
        for pair in met:
            met[pair] += any(
                {2 * p for p in pair} <= {rows[0] for rows in own} for own in made._members.values()
            )
    chance = 3 / 7
    spread = math.sqrt(trials * chance * (1 - chance))
    assert all(
        abs(count - trials * chance) < 5.2 * spread for count in met.values()
    )  # 1 in 10^6 false alarms
