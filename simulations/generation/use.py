"""Use: does a segmenter learn more from few labels when their scans are also shown as generated elsewhere?

The content of each labelled scan is generated again in other sites' styles and keeps its label. Three small
U-Nets see the same few labels for the same number of steps: real scans alone; with the same scans moved to
other sites' entries of the style bank, which needs no generator; with synthetic scans. Measured once, on
held-out patients of every site. Does not do: choose steps or networks on what it measures on.
"""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from client.latents.labelled import LabelledScans, NoLabels, join
from client.training.finetuning import finetune
from federation.exchanges.finetuning import LocalFinetuning
from meduet_models.downstream.networks import predict
from meduet_models.downstream.segmentation import likeliest
from meduet_models.downstream.unet import SmallUNet
from meduet_models.style.bank import StyleBank
from simulations.downstream.metrics import mean_estimate, per_patient
from simulations.generation.quality import UNKNOWN, Interval, QualityRow, quality_row
from simulations.generation.settings import UseSettings

Render = Callable[[LabelledScans, Sequence[int], int], Tensor]
"""Scans, the site in whose style each is wanted, a seed: latents of the same anatomy (b c d h w)."""


def use_rows(
    labelled: LabelledScans,
    test: LabelledScans,
    render: Render,
    style_bank: StyleBank,
    settings: UseSettings,
    *,
    resamples: int,
    seed: int,
    progress: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> list[QualityRow]:
    """Dice on `test` with synthetic and with restyled scans beside few real ones; the floor is the real ones
    alone. A row of the gain beside each, patient by patient.

    Raises `NoLabels` without label volumes, `ValueError` for fewer than two sites in the bank.
    """
    if any(not len(scans) or scans.answers.ndim != 5 for scans in (labelled, test)):
        raise NoLabels("Expected labelled scans to train and to test on; got none.")
    if len(style_bank.present) < 2:
        raise ValueError(
            "Expected the styles of two sites or more; the bank has fewer: nothing to render in."
        )
    classes = 1 + int(max(labelled.answers.max(), test.answers.max()))

    def restyled(scans: LabelledScans, asked: Sequence[int], seed: int) -> Tensor:
        return style_bank.restyle(scans.latents, torch.tensor(scans.site), torch.tensor(asked))

    arms = ("few real", "few real, restyled", "few real, synthetic")
    scores: dict[str, list[np.ndarray]] = {arm: [] for arm in arms}
    added, done = 0, 0
    for number in range(settings.seeds):
        few = labelled.share(min(1.0, settings.patients / len(labelled.patients)), seed + number)
        sites = _others(few, style_bank, settings.copies, seed + number)
        seen = {"few real": few}
        for arm, again in zip(arms[1:], (restyled, render), strict=True):
            copies = [
                dataclasses.replace(
                    few, latents=again(few, asked, 1000 * (seed + number) + copy), site=tuple(asked)
                )
                for copy, asked in enumerate(sites)
            ]
            seen[arm] = join([few, *copies])
        added = len(seen[arms[2]]) - len(few)
        for arm, scans in seen.items():
            scores[arm].append(_dice(scans, test, classes, settings, seed + number))
            done += 1
            progress(f"segmenter, {arm}", done, settings.seeds * len(arms))
    means = {arm: per_patient(np.mean(values, axis=0), test.patient) for arm, values in scores.items()}
    rows = []
    for arm in arms[1:]:
        kind = "content, style" if "synthetic" in arm else "moved to other styles"
        value, floor = (_interval(means[name], resamples, seed) for name in (arm, arms[0]))
        gain = _interval(means[arm] - means[arms[0]], resamples, seed)
        for measure, here, there in ((f"Dice, {arm}", value, floor), (f"Dice gained, {arm}", gain, UNKNOWN)):
            rows.append(quality_row(measure, "volumes", kind, here, there, samples=added, real=len(test)))
    return rows


def _others(few: LabelledScans, style_bank: StyleBank, copies: int, seed: int) -> list[list[int]]:
    """For each copy the site of the target style of every scan: never its own, another for each copy."""
    present = [style_bank.sites.index(site) for site in style_bank.present]
    generator = np.random.default_rng(seed)
    order = [generator.permutation([site for site in present if site != own]) for own in few.site]
    return [[int(sites[copy % len(sites)]) for sites in order] for copy in range(copies)]


def _dice(
    scans: LabelledScans, test: LabelledScans, classes: int, settings: UseSettings, seed: int
) -> np.ndarray:
    """Dice of each test scan, mean over its classes."""
    from monai.metrics import compute_dice  # MONAI takes seconds to import

    local = LocalFinetuning(
        task="segmentation",
        classes=classes,
        steps=settings.steps,
        batch_size=settings.batch_size,
        learning_rate=settings.learning_rate,
    )
    network = SmallUNet(scans.latents.shape[1], classes, per_voxel=True, seed=seed)
    finetune(network, scans, local, seed=seed)
    predicted = likeliest(predict(network.eval(), test.latents))
    dice = compute_dice(predicted, test.answers, include_background=False, num_classes=classes)
    scores: np.ndarray = dice.nanmean(dim=1).double().numpy()
    return scores


def _interval(values: np.ndarray, resamples: int, seed: int) -> Interval:
    estimate = mean_estimate(values, resamples, seed)
    return Interval(estimate.value, estimate.low, estimate.high)
