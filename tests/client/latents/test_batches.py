from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from client.latents.batches import Batches, step_generator
from client.latents.style_moments import own_moments
from federation.exchanges.survey import survey_layout
from federation.plan.plan import RunPlan, TrainingPlan
from meduet_models.style.bank import StyleBank
from meduet_models.style.moments import CohortTooSmall, StyleMoments, restyle
from scans.volume_plan import VolumePlan

CPU = torch.device("cpu")
PATIENTS = [f"p{n}" for n in range(10)]
SECRET = b"1" * 32


def test_a_step_is_replayed_from_secret_run_round_and_step_alone() -> None:
    def first(secret: bytes, *key: int) -> int:
        return int(torch.randint(2**62, (), generator=step_generator(secret, *key)))

    assert first(SECRET, 7, 3, 2) == first(SECRET, 7, 3, 2)
    recorded = 1938080441763482225  # part of what a site's secret means
    assert step_generator(SECRET, 7, 3, 2).initial_seed() == recorded
    keys = [(k, s, r, t) for k in (SECRET, b"2" * 32) for s in (7, 8) for r in (1, 12) for t in (0, 1, 2)]
    assert len({first(*key) for key in keys}) == len(keys)
    assert first(SECRET, 1, 12, 3) != first(SECRET, 11, 2, 3)


def test_a_draw_applied_twice_is_the_same_batch_and_touches_no_global_generator(
    toy_plan: Callable[..., RunPlan], toy_scans: Any, toy_bank: Any
) -> None:
    batches = Batches(toy_scans(PATIENTS), toy_plan(), toy_bank(toy_plan()))
    before = torch.get_rng_state()
    draw = batches.draw(step_generator(SECRET, 7, 1, 0))
    one, two = batches.apply(draw, CPU), batches.apply(draw, CPU)
    assert torch.equal(torch.get_rng_state(), before)
    assert one.restyled is not None and two.restyled is not None
    assert torch.equal(one.latents, two.latents) and torch.equal(one.restyled, two.restyled)
    other = batches.draw(step_generator(SECRET, 7, 1, 1))
    assert not torch.equal(one.latents, batches.apply(other, CPU).latents)


def test_patients_are_drawn_equally_often_however_many_scans_they_have(
    toy_plan: Callable[..., RunPlan], toy_scans: Any
) -> None:
    patients = ["many"] * 20 + PATIENTS[:7]
    batches = Batches(toy_scans(patients), toy_plan(), None)
    counts: Counter[str] = Counter()
    for step in range(800):
        scans = batches.draw(step_generator(SECRET, 7, 1, step)).scans.tolist()
        drawn = [patients[scan] for scan in scans]
        assert len(set(drawn)) == 4  # distinct patients, as there are enough
        counts.update(drawn)
    # 4 of 8 patients a step: each count is Binomial(800, 1/2), sd 14; five sd is a false alarm in 10^6.
    assert all(abs(count - 400) < 71 for count in counts.values())


def test_only_training_scans_are_read(toy_plan: Callable[..., RunPlan], toy_scans: Any) -> None:
    scans = toy_scans(PATIENTS)
    scans.train = [1, 3, 5, 7, 9]
    batches = Batches(scans, toy_plan(), None)
    for step in range(50):
        batches.apply(batches.draw(step_generator(SECRET, 7, 1, step)), CPU)
    assert {scan for scan, _ in scans.asked} == {1, 3, 5, 7, 9}
    assert batches.num_scans == 5


def test_a_second_scan_of_a_patient_comes_before_any_scan_twice(
    toy_plan: Callable[..., RunPlan], toy_scans: Any
) -> None:
    plan = toy_plan(training=TrainingPlan(rounds=1, steps_per_round=1, batch_size=8))
    batches = Batches(toy_scans(["a", "a", "a", "b", "b", "b", "c", "c"]), plan, None)
    assert not batches.is_small
    for step in range(20):
        assert len(batches.draw(step_generator(SECRET, 7, 1, step)).scans.unique()) == 8


def test_a_cohort_below_the_batch_repeats_scans_and_says_so(
    toy_plan: Callable[..., RunPlan], toy_scans: Any
) -> None:
    plan = toy_plan(training=TrainingPlan(rounds=1, steps_per_round=1, batch_size=12))
    batches = Batches(toy_scans(PATIENTS[:5]), plan, None)
    assert batches.is_small
    draw = batches.draw(step_generator(SECRET, 7, 1, 0))
    assert len(draw.scans) == 12 and len(draw.scans.unique()) == 5
    assert max(Counter(draw.scans.tolist()).values()) == 3  # 12 of 5: each twice, two of them three times
    batch = batches.apply(draw, CPU)
    assert batch.subject is not None and len(batch.subject.unique()) == 5


def test_fewer_than_four_training_scans_are_refused(toy_plan: Callable[..., RunPlan], toy_scans: Any) -> None:
    with pytest.raises(CohortTooSmall, match="at least 4 training scans; got 3"):
        Batches(toy_scans(PATIENTS[:3]), toy_plan(), None)


def test_every_target_style_of_the_bank_is_drawn_and_labelled_and_own_style_leaves_a_scan_alone(
    toy_plan: Callable[..., RunPlan], toy_scans: Any, toy_bank: Any
) -> None:
    plan, scans = toy_plan(), toy_scans(PATIENTS, 1)
    bank = toy_bank(plan)
    batches = Batches(scans, plan, bank)
    seen: Counter[int] = Counter()
    for step in range(100):
        draw = batches.draw(step_generator(SECRET, 7, 1, step))
        batch = batches.apply(draw, CPU)
        for row, (scan, site) in enumerate(zip(draw.scans.tolist(), batch.site.tolist(), strict=True)):
            raw = scans.values[scan]  # one view: 1 c d h w
            expected = raw if site == 1 else restyle(raw, _one(bank, 1), _one(bank, site))
            torch.testing.assert_close(batch.latents[row : row + 1], expected)
            seen[site] += 1
    # Uniform over three sites: 400 draws, sd 9.4; five sd is a false alarm in 10^6.
    assert set(seen) == {0, 1, 2} and all(abs(count - 400 / 3) < 47 for count in seen.values())


def test_the_known_answer_of_the_swap_is_the_scan_in_its_partners_style(
    toy_plan: Callable[..., RunPlan], toy_scans: Any, toy_bank: Any
) -> None:
    plan, scans = toy_plan(), toy_scans(PATIENTS, 1)
    bank = toy_bank(plan)
    batches = Batches(scans, plan, bank)
    draw = batches.draw(step_generator(SECRET, 7, 1, 0))
    batch = batches.apply(draw, CPU)
    assert batch.restyled is not None and batch.restyled_site is not None
    assert torch.equal(batch.restyled_site, batch.site[draw.step.partner])
    for row, scan in enumerate(draw.scans.tolist()):
        site, raw = int(batch.restyled_site[row]), scans.values[scan]
        expected = raw if site == 1 else restyle(raw, _one(bank, 1), _one(bank, site))
        torch.testing.assert_close(batch.restyled[row : row + 1], expected)
    assert bool((batch.restyled_site != batch.site).any())


def test_without_a_bank_each_scan_keeps_its_latents_and_its_own_sites_label(
    toy_plan: Callable[..., RunPlan], toy_scans: Any
) -> None:
    scans = toy_scans(PATIENTS)
    scans.site_index = torch.tensor([0, 0, 0, 0, 1, 1, 1, 2, 2, 2])  # the pooled baseline
    batches = Batches(scans, toy_plan(), None)
    draw = batches.draw(step_generator(SECRET, 7, 1, 0))
    batch = batches.apply(draw, CPU)
    assert torch.equal(batch.latents, scans.values[draw.scans, 0])
    assert torch.equal(batch.site, scans.site_index[draw.scans])
    assert batch.restyled is None and draw.step.target_site is None


def test_a_site_that_told_nothing_restyles_its_scans_with_its_own_sums(
    toy_plan: Callable[..., RunPlan], toy_scans: Any, toy_bank: Any
) -> None:
    plan, scans = toy_plan(), toy_scans(PATIENTS, 1)
    bank = toy_bank(plan, present=("north", "west"))
    batches = Batches(scans, plan, bank)
    joined = bank.joined_by("south", own_moments(scans, plan))
    seen = set()
    for step in range(20):
        draw = batches.draw(step_generator(SECRET, 7, 1, step))
        batch = batches.apply(draw, CPU)
        seen |= set(batch.site.tolist())
        row = int((batch.site != 1).nonzero()[0]) if bool((batch.site != 1).any()) else None
        if row is not None:
            raw = scans.values[int(draw.scans[row])]
            expected = restyle(raw, _one(joined, 1), _one(joined, int(batch.site[row])))
            torch.testing.assert_close(batch.latents[row : row + 1], expected)
    assert seen == {0, 1, 2}
    assert "south" not in bank.present  # the bank that came is as it was


def test_a_body_part_that_a_site_did_not_tell_keeps_its_scans_as_they_are(
    toy_plan: Callable[..., RunPlan], toy_scans: Any
) -> None:
    base = toy_plan()
    plan = replace(base, style=replace(base.style, body_parts=("head", "knee")))
    moments = {}
    for index, (site, parts) in enumerate({"north": (0, 1), "south": (0, 1), "west": (0, 0)}.items()):
        other = toy_scans([f"{site}{n}" for n in range(6)], index)
        moments[site] = StyleMoments.of(other.values[:, 0], other.patients, survey_layout(plan), parts * 3)
    scans = toy_scans(PATIENTS, 0)
    scans.covariates = [{"body_part": "knee"}] * 10
    batches = Batches(scans, plan, StyleBank.of(plan.sites, moments))
    seen = set()
    for step in range(40):
        seen |= set(batches.apply(batches.draw(step_generator(SECRET, 7, 1, step)), CPU).site.tolist())
    assert seen == {0, 1}  # west told no knees


def test_views_are_drawn_per_scan_from_those_that_are_cached(
    toy_plan: Callable[..., RunPlan], toy_scans: Any
) -> None:
    plan = toy_plan(volumes=VolumePlan(modality="mr", shape=(16, 24, 16), views=3))
    scans = toy_scans(PATIENTS, views=3)
    batches = Batches(scans, plan, None)
    for step in range(40):
        draw = batches.draw(step_generator(SECRET, 7, 1, step))
        assert torch.equal(batches.apply(draw, CPU).latents, scans.values[draw.scans, draw.views])
    assert {view for _, view in scans.asked} == {0, 1, 2}


def _one(bank: Any, site: int) -> Any:
    return bank.entry(torch.tensor([site]))
