"""The canaries of a plan: what each contributes, which everybody can draw, and the coins, which no one can.

A canary is one more contributor to a sum with noise, of the worst kind: her share is as long as a patient's
may be and points where nobody else's does. Each has a coin of the site's own, the same in every round; whose
coin says so is in, drawn in each step with a patient's chance. Who sees what left guesses the coins, and how
many guesses are right bounds epsilon from below. A patient's draws, group, cut and noise are what they were:
a canary meets none of them but in the sum.

What this file does not do: add a canary to a sum (`client/training/canaries.py`,
`client/exchanges/style_code.py`), or guess (`audit/attacks/canaries.py`).

Source: worst-case and input canaries: Nasr et al. 2023 (arXiv:2302.07956); in one run: Steinke, Nasr,
Jagielski 2023 (arXiv:2305.08846).

Axes: m = canaries of a kind, v = numbers of a share, c d h w = latents.
"""

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor

from federation.exchanges.private_rounds import trained_keys, travelling_keys
from federation.plan.canary_plan import AuditCanariesPlan
from federation.plan.plan import RunPlan
from meduet_models.meduet import MeDUET
from meduet_models.seeds import generator_of
from privacy.randomness import SecretSource
from privacy.style_code import SHARE_BOUND

Kind = Literal["style_code", "steps", "inputs"]
"""As the plan's settings call them."""
MARK = 4.0
"""How far the mark of a phantom is from what is usual, in deviations of public latents."""


def number_of(plan: RunPlan, kind: Kind) -> int:
    """Canaries of a kind at each site; 0 in a plan without any."""
    canaries: AuditCanariesPlan | None = plan.audit_canaries
    if canaries is None:
        return 0
    match kind:
        case "style_code":
            return canaries.style_code
        case "steps":
            return canaries.steps
        case "inputs":
            return canaries.inputs


def coins(secret: bytes, plan: RunPlan, kind: Kind) -> tuple[bool, ...]:
    """Which canaries are in: fair coins of the site with this secret, the same whenever they are thrown."""
    stream = SecretSource(secret).stream("coins of canaries", plan.sha256, kind)
    return tuple(bool(one < 0.5) for one in stream.uniforms(number_of(plan, kind)))


def style_shares(chosen: Sequence[bool], dimensions: int) -> Float64[Tensor, " v"]:
    """The shares of the chosen canaries of the style code, added up: each along its own axis, as long as a
    patient's may be, and none of it in the count."""
    total = torch.zeros(dimensions + 1, dtype=torch.float64)
    total[: len(chosen)] = SHARE_BOUND * torch.tensor(chosen, dtype=torch.float64)
    return total


def own_weights(plan: RunPlan, network: MeDUET) -> Mapping[str, Tensor]:
    """The parameters in which canaries of the steps have their weights: all that noisy steps train and that
    travel."""
    travelling, parameters = set(travelling_keys(plan, network)), dict(network.named_parameters())
    return {name: parameters[name] for name in trained_keys(plan, network) if name in travelling}


def coordinates(plan: RunPlan, weights: Mapping[str, Tensor]) -> Int[Tensor, " m"]:
    """Which of these weights, all tensors in a row, each canary of the steps has for its own."""
    numbers = sum(tensor.numel() for tensor in weights.values())
    draws = generator_of("canaries of the steps", plan.seed)
    return torch.randperm(numbers, generator=draws)[: number_of(plan, "steps")]


def marked_phantoms(plan: RunPlan, public: Float[Tensor, "p c d h w"]) -> Float[Tensor, "m c d h w"]:
    """The input canaries: public scans, each with a block of half its size in each direction whose values are
    `MARK` deviations up or down, as no scan's are."""
    draws = generator_of("input canaries", plan.seed)
    chosen = torch.randperm(len(public), generator=draws)[: number_of(plan, "inputs")]
    deviation, phantoms = MARK * public.std((0, 2, 3, 4)), public[chosen].clone()
    grid = phantoms.shape[2:]
    size = [max(1, length // 2) for length in grid]
    for phantom in phantoms:
        first = [
            int(torch.randint(of - n + 1, (), generator=draws)) for of, n in zip(grid, size, strict=True)
        ]
        block = tuple(slice(at, at + n) for at, n in zip(first, size, strict=True))
        signs = 2.0 * torch.randint(2, (phantom.shape[0], *size), generator=draws) - 1
        phantom[(slice(None), *block)] = signs * deviation[:, None, None, None]
    return phantoms
