"""The canaries of a site in its noisy steps: what those whose coin says so add to the sum of a step.

What this file does not do: throw a coin (`federation/canaries.py`), touch what the patients of a step add up
to, or add noise.

Axes: m = canaries, c d h w = latents.
"""

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from client.latents.group_batches import GroupBatches
from client.training.private import step_sum
from client.training.trainee import Trainee
from federation.canaries import coins, coordinates, marked_phantoms, own_weights
from federation.exchanges.private_rounds import noisy_of
from federation.plan.plan import RunPlan
from meduet_models.style.bank import StyleBank
from privacy.step_secrets import StepSecrets


class StepCanaries:
    """The canaries of one site in one round. Raises `ValueError` as `GroupBatches`."""

    def __init__(
        self,
        plan: RunPlan,
        secret: bytes,
        style_bank: StyleBank,
        public: Float[Tensor, "p c d h w"],
        site: str,
    ) -> None:
        """`secret`: the site's own, of which the coins are thrown."""
        self._plan = plan
        self._in = [number for number, coin in enumerate(coins(secret, plan, "steps")) if coin]
        inside = [number for number, coin in enumerate(coins(secret, plan, "inputs")) if coin]
        phantoms = MarkedPhantoms(marked_phantoms(plan, public)[inside], inside)
        self._groups = GroupBatches(phantoms, plan, style_bank, public, site, secret)

    def step_sum(
        self, trainee: Trainee, noise: StepSecrets, step: int, turn: Literal["mftd", "siqc"]
    ) -> dict[str, Tensor]:
        """What the canaries of a step add up to, by parameter, float64. Each is drawn with a patient's chance
        from a stream of its own, and at most as long as a patient's share."""
        groups = self._groups.drawn(noise.apart("input canaries"), step)
        total = step_sum(trainee, self._groups, groups, turn, self._plan)
        added = self._along_weights(trainee, noise.apart("canaries"), step)
        return {name: tensor + added.get(name, 0.0) for name, tensor in total.items()}

    def _along_weights(self, trainee: Trainee, draws: StepSecrets, step: int) -> dict[str, Tensor]:
        noisy, weights = noisy_of(self._plan), own_weights(self._plan, trainee.student)
        drawn = [
            number
            for number in self._in
            if draws.of_patient(step, str(number)).uniforms(1)[0] < noisy.sampling_rate
        ]
        flat = torch.zeros(sum(tensor.numel() for tensor in weights.values()), dtype=torch.float64)
        flat[coordinates(self._plan, weights)[drawn]] = noisy.clip_norm
        parts = torch.split(flat, [tensor.numel() for tensor in weights.values()])
        return {
            name: part.reshape(tensor.shape).to(tensor.device)
            for (name, tensor), part in zip(weights.items(), parts, strict=True)
        }


class MarkedPhantoms:
    """Input canaries as scans to train on: each a patient of her own, who is in no cohort and on no disk."""

    def __init__(self, values: Float[Tensor, "m c d h w"], numbers: Sequence[int]) -> None:
        self._values = values
        self.patients = [str(number) for number in numbers]
        self.covariates: list[Mapping[str, str | float]] = [{} for _ in numbers]

    @property
    def site_index(self) -> Int[Tensor, " m"]:
        """Nobody's site: groups take the style from the bank."""
        return torch.zeros(len(self.patients), dtype=torch.int64)

    def indices(self, split: str) -> list[int]:
        """All of them are trained on."""
        return list(range(len(self.patients))) if split == "train" else []

    def latents(self, indices: Sequence[int], view: int = 0) -> Float[Tensor, "m c d h w"]:
        """Latents of these; every view is the same."""
        return self._values[list(indices)]
