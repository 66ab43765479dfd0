"""The local loop: it learns, it reproduces, it keeps the best weights, and frozen stays frozen."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from client.latents.labelled import LabelledScans, NoLabels
from client.training.finetuning import MovingAverage, finetune, learning_rate_at, validation_score
from federation.exchanges.finetuning import LocalFinetuning
from federation.plan.optimisation import NotFinite
from meduet_models.downstream.networks import PretrainedNetwork, predict
from meduet_models.downstream.tasks import task_of
from meduet_models.downstream.unet import SmallUNet
from meduet_models.downstream.volume_networks import VolumeSegmenter
from meduet_models.meduet import FactorNetwork
from meduet_models.volume_unet import VolumeUNet
from tests.worlds import small_network

GRID = (4, 6, 4)
SEGMENTATION = LocalFinetuning(task="segmentation", classes=2, steps=40, batch_size=6, learning_rate=5e-3)
CONFIG = small_network(width=16, depth=2)


def planted(count: int = 12, seed: int = 0, task: str = "segmentation") -> LabelledScans:
    """Where the first channel is high, all voxels of the latent are foreground; the scan is of class 1 when
    its second channel leans to the right."""
    draws = torch.Generator().manual_seed(seed)
    latents = torch.randn(count, 2, *GRID, generator=draws)
    labels = (latents[:, :1] > 0.3).long()
    for axis in (2, 3, 4):
        labels = labels.repeat_interleave(4, dim=axis)
    target = torch.arange(count) % 2
    ramp = torch.linspace(-2, 2, GRID[0]).reshape(-1, 1, 1)
    latents[:, 1] += (2 * target - 1).reshape(-1, 1, 1, 1) * ramp
    answers = {"segmentation": labels, "classification": target, "regression": target.float() - 0.5}[task]
    return LabelledScans(latents, answers, tuple(f"p{n}" for n in range(count)), (0,) * count)


def with_head(network: FactorNetwork, task: str, classes: int, **settings: Any) -> PretrainedNetwork:
    return task_of(task).network(network, classes, **settings)


def weights(network: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in network.state_dict().items()}


@pytest.mark.parametrize("kind", ["finetuned", "frozen", "unet"])
def test_a_planted_segmentation_is_learned_in_a_few_steps(kind: str) -> None:
    network = (
        SmallUNet(2, 2, per_voxel=True)
        if kind == "unet"
        else with_head(FactorNetwork(CONFIG), "segmentation", 2, trainable=kind == "finetuned")
    )
    unseen = planted(seed=1)
    before = validation_score(network, unseen, SEGMENTATION)
    finetune(network, planted(), replace(SEGMENTATION, steps=100), seed=0)
    assert before < 0.6
    assert validation_score(network, unseen, SEGMENTATION) > 0.75


def test_a_planted_class_is_learned() -> None:
    local = LocalFinetuning(task="classification", classes=2, steps=60, batch_size=12)
    network = with_head(FactorNetwork(CONFIG), "classification", 2, trainable=True)
    finetune(network, planted(24, task="classification"), local, seed=0)
    unseen = planted(20, seed=1, task="classification")
    assert float((predict(network, unseen.latents).argmax(1) == unseen.answers).float().mean()) > 0.8


def test_a_planted_number_is_learned() -> None:
    local = LocalFinetuning(task="regression", classes=1, steps=60, batch_size=12)
    network = with_head(FactorNetwork(CONFIG), "regression", 1, trainable=True)
    unseen = planted(20, seed=1, task="regression")
    before = validation_score(network, unseen, local)
    finetune(network, planted(24, task="regression"), local, seed=0)
    assert validation_score(network, unseen, local) > max(-0.125, before)  # half of the variance


def test_frozen_is_frozen_to_the_last_bit() -> None:
    network = with_head(FactorNetwork(CONFIG), "segmentation", 2, trainable=False)
    before = weights(network)
    finetune(network, planted(), replace(SEGMENTATION, steps=5), seed=0)
    changed = {name for name, tensor in weights(network).items() if not torch.equal(tensor, before[name])}
    assert changed
    assert all(name.startswith("head.") for name in changed)


def test_seeds_reproduce_and_differ_whatever_was_drawn_before() -> None:
    ends = []
    for seed in (0, 0, 1):
        torch.rand(seed + len(ends))  # another global state each time
        network = with_head(FactorNetwork(CONFIG, seed=1), "segmentation", 2, trainable=True)
        finetune(network, planted(), replace(SEGMENTATION, steps=3), seed=seed)
        ends.append(weights(network))
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
    assert not all(torch.equal(ends[0][name], ends[2][name]) for name in ends[0])


def test_the_weights_that_served_validation_best_are_kept() -> None:
    network = with_head(FactorNetwork(CONFIG), "segmentation", 2, trainable=True)
    validation = planted(6, seed=2)
    done = finetune(network, planted(), SEGMENTATION, seed=0, validation=validation)
    assert done.validation == validation_score(network, validation, SEGMENTATION)
    worse = replace(SEGMENTATION, learning_rate=3.0)  # diverges: the last step is not the best
    network = with_head(FactorNetwork(CONFIG), "segmentation", 2, trainable=False)
    done = finetune(network, planted(), worse, seed=0, validation=validation)
    assert done.best_step % 4 == 0
    assert done.validation == validation_score(network, validation, SEGMENTATION)


def test_validation_scans_train_nothing() -> None:
    ends = []
    for validation in (planted(4, seed=3), planted(4, seed=4)):
        network = with_head(FactorNetwork(CONFIG), "segmentation", 2, trainable=True)
        done = finetune(network, planted(), replace(SEGMENTATION, steps=4), seed=0, validation=validation)
        ends.append(done.losses)
    assert ends[0] == ends[1]


def test_a_bank_shows_other_styles_and_changes_no_label(toy_plan: Callable[..., Any], toy_bank: Any) -> None:
    seen: list[torch.Tensor] = []

    class Watched(SmallUNet):
        def forward(self, latents: torch.Tensor) -> torch.Tensor:
            seen.append(latents.clone())
            return super().forward(latents)

    scans = planted(8)
    local = replace(SEGMENTATION, steps=3, batch_size=8)
    finetune(Watched(2, 2, per_voxel=True), scans, local, seed=0, style_bank=toy_bank(toy_plan()))
    as_they_are = [any(torch.equal(one, own) for own in scans.latents) for batch in seen for one in batch]
    assert 0.2 < sum(as_they_are) / len(as_they_are) < 0.95  # half stay, a third of the others draw home
    seen.clear()
    finetune(Watched(2, 2, per_voxel=True), scans, local, seed=0)
    assert all(any(torch.equal(one, own) for own in scans.latents) for batch in seen for one in batch)


def test_no_labels_and_a_loss_that_is_not_finite_are_said() -> None:
    network = with_head(FactorNetwork(CONFIG), "segmentation", 2, trainable=True)
    with pytest.raises(NoLabels):
        finetune(network, planted().rows([]), SEGMENTATION, seed=0)
    scans = planted()
    before = weights(network)
    broken = replace(scans, latents=torch.full_like(scans.latents, float("nan")))
    with pytest.raises(NotFinite, match="weights are untouched"):
        finetune(network, broken, SEGMENTATION, seed=0)
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights(network).items())


@pytest.mark.parametrize(("field", "value"), [("classes", 1), ("steps", 0), ("learning_rate", 0.0)])
def test_settings_that_cannot_be_meant_are_refused(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=field):
        replace(SEGMENTATION, **{field: value})


def test_the_learning_rate_rises_and_falls_as_in_every_run_so_far() -> None:
    local = LocalFinetuning(task="segmentation", classes=2, warmup=0.1, learning_rate=1e-3)
    assert [learning_rate_at(step, 37, local) for step in (0, 3, 4, 5, 20, 36)] == [
        0.0002, 0.0008, 0.001, 0.0009977359612865424, 0.0005237909579118712, 2.2640387134577057e-06,
    ]  # fmt: skip


VOLUME = LocalFinetuning(
    task="segmentation",
    classes=2,
    network="volume_unet",
    steps=40,
    batch_size=4,
    learning_rate=1e-2,
    augmentation=0.3,
    average=0.8,
)


def with_volumes(count: int = 8, seed: int = 0) -> LabelledScans:
    """A bright ball in noise, somewhere; the ball is the foreground."""
    draws = torch.Generator().manual_seed(seed)
    axes = torch.meshgrid(*(torch.arange(16.0),) * 3, indexing="ij")
    centres = 5 + 6 * torch.rand(count, 3, generator=draws)
    labels = torch.stack(
        [sum((x - c).square() for x, c in zip(axes, centre, strict=True)) < 14 for centre in centres]
    )[:, None].long()
    volumes = (0.3 + 0.4 * labels + 0.1 * torch.randn(labels.shape, generator=draws)).clamp(0, 1)
    latents = torch.zeros(count, 2, *GRID)
    return LabelledScans(latents, labels, tuple(f"p{n}" for n in range(count)), (0,) * count, volumes.half())


def test_a_volume_is_segmented_after_a_few_steps_and_the_same_again() -> None:
    scores = []
    for _ in range(2):
        network = VolumeSegmenter(VolumeUNet(seed=1), 2)
        done = finetune(network, with_volumes(), VOLUME, seed=3)
        scores.append((validation_score(network.eval(), with_volumes(seed=9), VOLUME), done.losses))
    assert scores[0] == scores[1]
    assert scores[0][0] > 0.8
    other = VolumeSegmenter(VolumeUNet(seed=1), 2)
    assert finetune(other, with_volumes(), VOLUME, seed=4).losses != scores[0][1]


def test_augmentation_shows_another_volume_at_every_step() -> None:
    one = with_volumes(1)
    still = replace(VOLUME, augmentation=0.0, learning_rate=1e-9, average=0.0, steps=3)
    same = finetune(VolumeSegmenter(VolumeUNet(), 2), one, still, seed=0).losses
    moved = finetune(VolumeSegmenter(VolumeUNet(), 2), one, replace(still, augmentation=1.0), seed=0).losses
    assert max(same) - min(same) < 1e-5
    assert max(moved) - min(moved) > 1e-3


def test_an_average_stands_in_for_the_weights_and_gives_them_back() -> None:
    network = with_head(FactorNetwork(CONFIG), "segmentation", 2, trainable=False)
    bias = dict(network.named_parameters())["head.predict.bias"]
    averaged = MovingAverage(network, 0.75)
    fixed = network.encoder.branch.embed.bias.clone()
    with torch.no_grad():
        bias += 1.0
        network.encoder.branch.embed.bias += 1.0  # not trained, and so not averaged
    averaged.update(step=1000)
    with averaged.in_place():
        torch.testing.assert_close(bias, torch.full_like(bias, 0.25))
        assert torch.equal(network.encoder.branch.embed.bias, fixed + 1)
    torch.testing.assert_close(bias, torch.full_like(bias, 1.0))
    averaged.keep()
    torch.testing.assert_close(bias, torch.full_like(bias, 0.25))
    plain = MovingAverage(network, 0.0)
    plain.update(step=0)
    plain.keep()
    torch.testing.assert_close(bias, torch.full_like(bias, 0.25))


def test_the_average_is_what_validation_saw() -> None:
    plain = replace(SEGMENTATION, steps=6)
    held = planted(4, seed=5)
    judged = with_head(FactorNetwork(CONFIG), "segmentation", 2, trainable=True)
    done = finetune(judged, planted(), replace(plain, average=0.99), seed=0, validation=held)
    assert done.validation == pytest.approx(validation_score(judged, held, plain), abs=1e-6)


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"task": "classification", "network": "volume_unet"}, "segments"),
        ({"augmentation": 1.0}, "augmentation has no effect"),
        ({"average": 1.0}, "average"),
    ],
)
def test_settings_of_networks_that_cannot_be_meant_are_refused(changes: dict[str, Any], word: str) -> None:
    with pytest.raises((ValueError, TypeError), match=word):
        replace(SEGMENTATION, **changes)
