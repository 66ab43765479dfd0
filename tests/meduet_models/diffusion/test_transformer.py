"""The diffusion transformer: what it starts as, what it can be told, and that it is told nothing else."""

import dataclasses

import pytest
import torch

from meduet_models.diffusion.conditions import CONDITIONS, Condition, Conditions, ConditionSizes
from meduet_models.diffusion.settings import TransformerShape
from meduet_models.diffusion.transformer import DiffusionConfig, DiffusionTransformer, regrid
from server.config import CONF
from tests.meduet_models.diffusion.small_models import (
    awake_transformer,
    generator,
    small_conditioner,
    small_config,
    small_examples,
)

TIME = torch.tensor([0.1, 0.5, 0.9])


def noisy(count: int = 3) -> torch.Tensor:
    return torch.randn(count, 2, 4, 6, 4, generator=generator(9))


def conditions(names: tuple[Condition, ...] = CONDITIONS) -> Conditions:
    return small_conditioner().conditions(small_examples(3), names)


def test_it_starts_with_no_velocity_and_blocks_that_change_nothing() -> None:
    model = DiffusionTransformer(small_config())
    velocity, hidden = model.velocity_and_hidden(noisy(), TIME, conditions())
    assert not velocity.any()
    other = model.velocity_and_hidden(noisy(), 1 - TIME, Conditions())[1]
    torch.testing.assert_close(hidden, other)  # zero gates, and zero maps of what is laid over the tokens


def test_every_parameter_is_learned_once_the_first_step_is_taken() -> None:
    model = awake_transformer().requires_grad_(True)
    half = conditions()
    half = dataclasses.replace(
        half, dropped={name: torch.tensor([False, True, False]) for name in CONDITIONS}
    )
    model(noisy(), TIME, half).square().sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


@pytest.mark.parametrize("name", CONDITIONS)
def test_each_condition_changes_the_velocity_and_dropping_it_is_never_having_told_it(name: Condition) -> None:
    model, everything = awake_transformer(), conditions()
    plain = model(noisy(), TIME, everything)
    without = model(noisy(), TIME, everything.only(*(n for n in CONDITIONS if n != name)))
    assert (plain - without).abs().max() > 1e-3
    dropped = dataclasses.replace(everything, dropped={name: torch.tensor([True, False, True])})
    mixed = model(noisy(), TIME, dropped)
    torch.testing.assert_close(mixed[[0, 2]], without[[0, 2]])
    torch.testing.assert_close(mixed[1], plain[1])


def test_what_is_unknown_is_as_if_it_were_not_told() -> None:
    model, everything = awake_transformer(), conditions()
    assert everything.spacing is not None and everything.label_map is not None
    unknown = dataclasses.replace(
        everything,
        body_part=torch.full((3,), -1),
        category=torch.full((3,), -1),
        spacing=everything.spacing * torch.nan,
        label_map=everything.label_map * torch.nan,
    )
    torch.testing.assert_close(
        model(noisy(), TIME, unknown), model(noisy(), TIME, everything.only("content", "style"))
    )


def test_gradients_stay_finite_where_something_is_unknown() -> None:
    model = awake_transformer().requires_grad_(True)
    unknown = dataclasses.replace(conditions(), spacing=torch.full((3, 3), torch.nan))
    model(noisy(), TIME, unknown).sum().backward()
    assert all(bool(torch.isfinite(p.grad).all()) for p in model.parameters() if p.grad is not None)


def test_samples_do_not_see_each_other() -> None:
    model, everything = awake_transformer(), conditions()
    alone = model(noisy()[1:2], TIME[1:2], everything.each(lambda tensor: tensor[1:2]))
    torch.testing.assert_close(model(noisy(), TIME, everything)[1:2], alone)


def test_content_of_another_grid_is_laid_over_the_tokens_at_its_places() -> None:
    tokens = torch.arange(2.0).reshape(1, 2, 1)  # two tokens along w
    assert regrid(tokens, (1, 1, 2), (1, 1, 4)).flatten().tolist() == [0.0, 0.25, 0.75, 1.0]
    config = small_config(("content",), shape=TransformerShape(patch_size=1, width=24, depth=1, heads=2))
    assert DiffusionTransformer(config)(noisy(), TIME, conditions(("content",))).shape == (3, 2, 4, 6, 4)


def test_standardising_is_undone() -> None:
    model, latents = awake_transformer(), small_examples(2).latents
    torch.testing.assert_close(model.to_latents(model.standardise(latents)), latents)


def test_activations_computed_again_give_the_same_gradients() -> None:
    gradients = []
    for again in (False, True):
        model = awake_transformer().requires_grad_(True)
        model.checkpoint_blocks = again
        model(noisy(), TIME, conditions()).square().sum().backward()
        gradients.append([p.grad for p in model.parameters()])
    for kept, computed in zip(*gradients, strict=True):
        torch.testing.assert_close(kept, computed)


def test_what_it_cannot_be_told_is_refused() -> None:
    model = awake_transformer(("content",))
    with pytest.raises(ValueError, match="cannot be told style"):
        model(noisy(), TIME, conditions())
    with pytest.raises(ValueError, match=r"Expected content of \(3, 12, 24\); got \(3, 12, 10\)"):
        model(noisy(), TIME, Conditions(content=torch.zeros(3, 12, 10)))


def test_its_description_comes_back_and_a_strange_one_is_refused() -> None:
    config = small_config()
    assert DiffusionConfig.from_json(config.to_json()) == config
    with pytest.raises(ValueError, match="of this version"):
        DiffusionConfig.from_json(config.to_json().replace("latent_grid", "latent_cube"))
    with pytest.raises(ValueError, match="multiples of the patch"):
        dataclasses.replace(config, latent_grid=(4, 5, 4))


@pytest.mark.parametrize(
    ("preset", "millions"), [("small", 33), ("base", 130), ("large", 458), ("xlarge", 675)]
)
def test_presets_are_of_the_sizes_of_dit(preset: str, millions: int) -> None:
    values = dict(
        line.split(": ")
        for line in (CONF / f"diffusion/transformer/{preset}.yaml").read_text().split("\n")
        if line
    )
    shape = TransformerShape(**{name: int(value) for name, value in values.items()})
    config = DiffusionConfig(
        latent_channels=4,
        latent_grid=(24, 24, 24),
        shape=shape,
        sizes=ConditionSizes(style=104),
        path="linear",
    )
    with torch.device("meta"):
        model = DiffusionTransformer(config)
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, rel=0.03)
