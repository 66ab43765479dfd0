"""Gradients per sample of a loss that mixes none: Opacus' hooks, and nothing else of Opacus.

Fine-tuning and diffusion ask each scan by itself, so the gradient of one scan can be clipped by itself. A
loss that mixes scans is refused here; it has `group_gradients.py`, which also gives the clipped sum.

What this file does not do: draw who is in a step, clip, add noise, count epsilon. Opacus' engine, noise
generator and accountants are not used: the first two can be repeated from a seed, the last says too little.
Source: Opacus (arXiv:2109.12298).
"""

import warnings
from collections.abc import Callable
from typing import Protocol, runtime_checkable

from torch import Tensor, nn


@runtime_checkable
class Objective(Protocol):
    """What a loss says of itself."""

    @property
    def mixes(self) -> bool:
        """Whether a sample's loss depends on other samples of its batch."""


def check_asks_alone(objective: Objective, module: nn.Module) -> None:
    """Raise `ValueError` for an objective that mixes samples, and for a layer that does (batch norm)."""
    if objective.mixes:
        raise ValueError(
            f"{type(objective).__name__} mixes the scans of a batch: a scan's gradient depends on all, "
            "and clipping each bounds nobody (taking one scan away moved the sum by 2.6 times the bound with "
            "8 scans, by 9.8 times with 128). Use gradients per group."
        )
    # Imported here: it takes seconds, which only noisy training needs.
    from opacus.validators import ModuleValidator

    if errors := ModuleValidator.validate(module, strict=False):
        raise ValueError(f"Expected layers that treat samples alone: {str(errors[0]).splitlines()[0]}")


def per_sample_gradients(
    objective: Objective, module: nn.Module, mean_loss: Callable[[], Tensor], samples: int
) -> dict[str, Tensor]:
    """The gradient of each sample's own loss, [samples, *shape] for every trainable parameter of `module`.

    `mean_loss` calls the module, in training mode, on a batch of so many samples and returns the mean of
    their losses.

    Guarantee: none by itself. Clipped one by one, these gradients bound what one sample can change only
    because the loss mixes none. Raises `ValueError` as `check_asks_alone`, and for a trainable parameter
    without a gradient per sample.
    """
    check_asks_alone(objective, module)
    from opacus.grad_sample import GradSampleModule  # as there

    before = {name: parameter.grad for name, parameter in module.named_parameters()}
    watched = GradSampleModule(module, loss_reduction="mean", strict=False)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Full backward hook is firing", UserWarning)  # at first layers
            mean_loss().backward()  # type: ignore[no-untyped-call]
        trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
        gradients = {name: getattr(parameter, "grad_sample", None) for name, parameter in trained.items()}
    finally:
        watched.to_standard_module()
        for name, parameter in module.named_parameters():
            parameter.grad = before[name]  # of the batch as a whole: nobody's clipped gradient
    found = {name: g for name, g in gradients.items() if isinstance(g, Tensor) and len(g) == samples}
    if missing := [name for name in gradients if name not in found]:
        raise ValueError(
            f"Expected {samples} gradients of each trainable parameter; {missing[0]} has none, or not so "
            "many. Freeze it, or make it a layer that the loss calls in training mode."
        )
    return found
