"""A step of training, and that a trainee put away and loaded again goes on as if nothing had happened."""

import dataclasses
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from meduet_models.diffusion.conditions import Condition, Examples
from meduet_models.diffusion.draws import draw_step
from meduet_models.diffusion.initialisation import first_transformer
from meduet_models.diffusion.path import PathName
from meduet_models.diffusion.settings import DiffusionTraining
from meduet_models.diffusion.site_styles import SiteStyles, restyled_examples
from meduet_models.diffusion.training import DiffusionTrainee, LossNotFinite, validation_loss
from meduet_models.style.bank import StyleBank
from meduet_models.style.moments import StyleLayout, StyleMoments
from tests.meduet_models.diffusion.small_models import (
    NETWORK,
    awake_transformer,
    small_conditioner,
    small_config,
    small_encoder,
    small_examples,
    small_latents,
)

BOTH: tuple[Condition, ...] = ("content", "style")
SETTINGS = DiffusionTraining(batch_size=8, learning_rate=3e-3, ema=0.9)


@dataclass
class Held:
    examples: Examples

    def __len__(self) -> int:
        return len(self.examples)

    def read(self, rows: torch.Tensor) -> Examples:
        return self.examples.rows(rows)


def bank() -> StyleBank:
    layout = StyleLayout(channels=2, latent_grid=(4, 6, 4), map_grid=NETWORK.style_map_grid, bound=1e3)
    moments = {s: StyleMoments.of(small_latents(3, seed), list("xyz"), layout) for seed, s in enumerate("ab")}
    return StyleBank.of(("a", "b", "c"), moments)


def trainee(
    settings: DiffusionTraining = SETTINGS, names: tuple[Condition, ...] = BOTH, path: PathName = "linear"
) -> DiffusionTrainee:
    transformer = first_transformer(small_config(names, path), small_encoder(), settings, seed=1)
    return DiffusionTrainee(
        transformer, small_conditioner(), settings, total_steps=20, seed=7, style_bank=bank()
    )


@pytest.mark.parametrize(
    "settings",
    [SETTINGS, dataclasses.replace(SETTINGS, alignment=0.5, times="logit_normal", checkpoint_blocks=True)],
    ids=["plain", "aligned"],
)
def test_a_resumed_trainee_equals_one_that_never_stopped(settings: DiffusionTraining) -> None:
    source, straight, first = Held(small_examples(12)), trainee(settings), trainee(settings)
    for step in range(4):
        straight.step(source, step)
    for step in range(2):
        first.step(source, step)
    kept = first.state()
    first.step(source, 2)  # what was put away does not change with the one that goes on
    resumed = trainee(settings)
    resumed.load(kept)
    for step in range(2, 4):
        resumed.step(source, step)
    ended = resumed.state()
    assert ended.keys() == straight.state().keys()
    assert [name for name, tensor in straight.state().items() if not torch.equal(tensor, ended[name])] == []


def test_a_state_before_the_first_step_is_a_state() -> None:
    fresh, other = trainee(), trainee()
    other.step(Held(small_examples(4)), 0)
    other.load(fresh.state())
    assert all(torch.equal(t, other.state()[n]) for n, t in fresh.state().items())


def test_a_state_of_another_model_is_refused_and_changes_nothing() -> None:
    mine = trainee()
    before = mine.state()
    other = trainee(names=("content",))
    with pytest.raises(ValueError, match=r"embed_condition\.style.*missing"):
        mine.load(other.state())
    aligned = trainee(dataclasses.replace(SETTINGS, alignment=1.0))
    with pytest.raises(ValueError, match="should be absent"):
        mine.load(aligned.state())
    assert all(torch.equal(t, mine.state()[n]) for n, t in before.items())


@pytest.mark.parametrize("path", ["linear", "variance_preserving"])
@pytest.mark.parametrize("start", ["scratch", "encoder"])
def test_training_lowers_the_loss_of_the_moving_average(path: PathName, start: str) -> None:
    examples = small_examples(8)
    mine = trainee(dataclasses.replace(SETTINGS, start=start), path=path)  # type: ignore[arg-type]
    before = validation_loss(mine.ema, small_conditioner(), examples, BOTH).mean()
    for step in range(40):
        mine.step(Held(examples), step)
    after = validation_loss(mine.ema, small_conditioner(), examples, BOTH).mean()
    assert after < 0.9 * before


def test_alignment_brings_the_middle_layer_near_the_encoders_content() -> None:
    mine = trainee(dataclasses.replace(SETTINGS, alignment=1.0))
    source = Held(small_examples(8))
    values = [mine.step(source, step) for step in range(30)]
    assert values[-1]["alignment"] < values[0]["alignment"] - 0.2
    assert all(v["loss"] == pytest.approx(v["velocity"] + v["alignment"], rel=1e-4) for v in values)
    assert not any(name.startswith("projector") for name in mine.ema.state_dict())


def test_the_learning_rate_rises_and_stays() -> None:
    mine = trainee(dataclasses.replace(SETTINGS, warmup=0.2))
    rates = [mine.learning_rate_at(step) / SETTINGS.learning_rate for step in (0, 1, 3, 4, 19)]
    assert rates == pytest.approx([0.2, 0.4, 0.8, 1.0, 1.0])


def test_the_moving_average_follows_the_weights() -> None:
    mine = trainee()
    before = mine.state()
    mine.step(Held(small_examples(4)), 0)
    after = mine.state()
    for name in ("embed.weight", "predict.weight"):
        expected = 0.1 * before[f"ema/{name}"] + 0.9 * after[f"transformer/{name}"]  # (1 + 0) / (10 + 0)
        torch.testing.assert_close(after[f"ema/{name}"], expected)


def test_a_step_is_the_same_whatever_came_before_and_another_step_is_another() -> None:
    one, other = draw_step(SETTINGS, BOTH, 100, 7, 3), draw_step(SETTINGS, BOTH, 100, 7, 3)
    assert torch.equal(one.rows, other.rows) and torch.equal(one.time, other.time)
    assert one.noise_seed == other.noise_seed
    next_one = draw_step(SETTINGS, BOTH, 100, 7, 4)
    assert not torch.equal(one.rows, next_one.rows) and one.noise_seed != next_one.noise_seed


def test_a_batch_holds_distinct_examples_and_a_time_in_each_share() -> None:
    draw = draw_step(SETTINGS, BOTH, 9, 7, 0)
    assert len(set(draw.rows.tolist())) == 8
    assert (draw.time * 8).floor().tolist() == list(range(8))
    assert len(draw_step(SETTINGS, BOTH, 3, 7, 0).rows) == 8  # fewer than a batch: they repeat


def test_logit_normal_times_gather_in_the_middle() -> None:
    settings = DiffusionTraining(batch_size=4000, times="logit_normal")
    logits = draw_step(settings, (), 1, 0, 0).time.logit()
    assert float(logits.mean()) == pytest.approx(0.0, abs=0.01)
    assert float(logits.std()) == pytest.approx(1.0, abs=0.01)


def test_shares_of_dropped_and_of_sites_styles_are_those_asked_for() -> None:
    settings = DiffusionTraining(batch_size=4000, drop=0.2, site_style=0.7)
    draw = draw_step(settings, BOTH, 1, 0, 0)
    for name in BOTH:  # five standard deviations: one false alarm in a million
        assert float(draw.dropped[name].float().mean()) == pytest.approx(0.2, abs=0.032)
    assert float((draw.dropped["content"] & draw.dropped["style"]).float().mean()) == pytest.approx(
        0.04, abs=0.016
    )
    assert float(draw.as_site.float().mean()) == pytest.approx(0.7, abs=0.037)


def test_a_sample_is_told_its_sites_style_where_there_is_one() -> None:
    conditioner, examples = small_conditioner(), small_examples(3)  # of sites a, b, c; c told none
    codes = SiteStyles.of(conditioner, bank()).codes(examples, torch.tensor([True, False, True]))
    own = conditioner.style(examples.latents)
    assert torch.equal(codes[1:], own[1:])
    torch.testing.assert_close(codes[0], conditioner.style_of(bank().entry(torch.tensor([0])))[0])
    unknown = dataclasses.replace(examples, site=torch.tensor([-1, 5, 0]))
    known = SiteStyles.of(conditioner, bank()).codes(unknown, torch.ones(3, dtype=torch.bool))
    assert torch.equal(known[:2], own[:2])


def test_sites_styles_without_a_bank_are_refused() -> None:
    with pytest.raises(ValueError, match="site_style needs the styles of the sites"):
        DiffusionTrainee(
            awake_transformer(BOTH), small_conditioner(), SETTINGS, total_steps=1, seed=0, style_bank=None
        )
    alone = dataclasses.replace(SETTINGS, site_style=0.0)
    DiffusionTrainee(
        awake_transformer(BOTH), small_conditioner(), alone, total_steps=1, seed=0, style_bank=None
    )


def test_content_is_told_from_the_scan_in_another_sites_style_and_the_scan_stays() -> None:
    conditioner, examples, styles = small_conditioner(), small_examples(3), bank()  # c told no style
    everyone, choice = torch.ones(3, dtype=torch.bool), torch.tensor([0.0, 0.99, 0.5])
    restyled = restyled_examples(styles, examples, everyone, choice)
    others = styles.restyle(examples.latents, torch.tensor([0, 1, 2]), torch.tensor([1, 0, 2]))
    assert torch.equal(restyled.latents, others) and torch.equal(restyled.latents[2], examples.latents[2])
    assert restyled.site.tolist() == [1, 0, 2]
    assert torch.equal(restyled_examples(styles, examples, ~everyone, choice).latents, examples.latents)
    settings = dataclasses.replace(SETTINGS, restyled_content=1.0)
    mine = DiffusionTrainee(
        awake_transformer(BOTH), conditioner, settings, total_steps=1, seed=0, style_bank=styles
    )
    draw = draw_step(settings, BOTH, 3, 0, 0)
    chosen = small_examples(3).rows(draw.rows)
    conditions = mine._told(chosen, draw, torch.device("cpu"))
    seen = restyled_examples(styles, chosen, draw.restyled, draw.content_target).latents
    assert conditions.content is not None and bool(draw.restyled.all())
    torch.testing.assert_close(conditions.content, conditioner.content(seen))
    assert not torch.equal(conditions.content, conditioner.content(chosen.latents))


def test_a_scan_is_learned_as_another_site_would_render_it_and_told_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    settings = dataclasses.replace(SETTINGS, restyled_scans=1.0, site_style=1.0)
    mine, learned = trainee(settings), list[Examples]()
    conditions_of = mine._told

    def noted(examples: Examples, draw: Any, device: torch.device) -> Any:
        learned.append(examples)
        return conditions_of(examples, draw, device)

    monkeypatch.setattr(mine, "_told", noted)
    mine.step(Held(small_examples(3)), 0)
    draw = draw_step(settings, BOTH, 3, mine.seed, 0)
    chosen = small_examples(3).rows(draw.rows)
    expected = restyled_examples(bank(), chosen, draw.moved, draw.scan_target)
    assert bool(draw.moved.all()) and not torch.equal(expected.latents, chosen.latents)
    assert torch.equal(learned[0].latents, expected.latents)
    assert torch.equal(learned[0].site, expected.site) and not torch.equal(expected.site, chosen.site)


@pytest.mark.parametrize("name", ["restyled_content", "restyled_scans"])
def test_restyling_without_target_styles_is_refused(name: str) -> None:
    settings = dataclasses.replace(SETTINGS, **{name: 0.5}, site_style=0.0)
    with pytest.raises(ValueError, match=f"{name} needs the styles of two sites"):
        DiffusionTrainee(
            awake_transformer(BOTH), small_conditioner(), settings, total_steps=1, seed=0, style_bank=None
        )


def test_an_empty_source_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one example"):
        trainee().step(Held(small_examples(1).rows(torch.zeros(0, dtype=torch.long))), 0)


def test_a_scan_out_of_range_stops_before_the_weights_are_touched() -> None:
    mine, examples = trainee(), small_examples(8)
    before = mine.state()
    bad = dataclasses.replace(examples, latents=examples.latents * torch.inf)
    with pytest.raises(LossNotFinite, match="step 0"):
        mine.step(Held(bad), 0)
    assert all(torch.equal(t, mine.state()[n]) for n, t in before.items())


def test_the_validation_loss_draws_the_same_whatever_is_told_and_beside_whomever() -> None:
    model, conditioner, examples = awake_transformer(BOTH), small_conditioner(), small_examples(4)
    blind = model.requires_grad_(False)
    for name in BOTH:  # a model that reads nothing loses the same, told or not
        for parameter in blind.embed_condition[name].parameters():
            parameter.zero_()
        blind.null[name].zero_()
    plain = validation_loss(blind, conditioner, examples, ())
    torch.testing.assert_close(plain, validation_loss(blind, conditioner, examples, BOTH))
    few = validation_loss(blind, conditioner, examples.rows(torch.arange(2)), ())
    torch.testing.assert_close(plain[:2], few)
    assert not torch.equal(plain, validation_loss(blind, conditioner, examples, (), seed=1))


def test_bf16_trains_too() -> None:
    mine = trainee(dataclasses.replace(SETTINGS, precision="bf16"))
    values = mine.step(Held(small_examples(4)), 0)
    plain = trainee().step(Held(small_examples(4)), 0)
    assert values["loss"] == pytest.approx(plain["loss"], rel=0.02)
    assert all(t.dtype == torch.float32 for n, t in mine.state().items())
