"""The moving-average teacher: the student's weights, averaged over its steps; it has no gradient of its own.

It carries the factor network alone: site classifiers and fixed tables are not averaged. Its weights are in
`state_dict`, so they belong in a checkpoint; its momentum is a function of progress and needs none.

Source: mean teachers (arXiv:1703.01780); cosine momentum of BYOL (arXiv:2006.07733), as MeDUET
(arXiv:2602.17901) uses it.
"""

import torch
from torch import nn

from meduet_models.meduet import FactorNetwork
from meduet_models.schedules import cosine


def momentum_at(progress: float, first: float, last: float) -> float:
    """Momentum at a share `progress` in [0, 1] of all steps: from `first` to `last` along a cosine."""
    return cosine(first, last, progress)


class Teacher(nn.Module):
    """A frozen `FactorNetwork` that follows a student."""

    def __init__(self, student: FactorNetwork) -> None:
        super().__init__()
        self.network = FactorNetwork(student.config)
        self.network.requires_grad_(False).to(student.latent_mean.device)
        self.reset(student)

    @torch.no_grad()
    def reset(self, student: FactorNetwork) -> None:
        """Become an exact copy of the student, as at the start of a run."""
        theirs = student.state_dict()
        self.network.load_state_dict({name: theirs[name] for name in self.network.state_dict()})

    @torch.no_grad()
    def update(self, student: FactorNetwork, momentum: float) -> None:
        """Move 1 - `momentum` of the way to the student; once per optimiser step that was taken.

        Constants (latent scale, erasure) are copied, not averaged.
        """
        theirs = dict(student.named_parameters())
        names, ours = zip(*self.network.named_parameters(), strict=True)
        torch._foreach_lerp_(list(ours), [theirs[name] for name in names], 1.0 - momentum)
        for name in FactorNetwork.CONSTANTS:
            getattr(self.network, name).copy_(getattr(student, name))


def early_momentum(most: float, step: int) -> float:
    """Momentum, at step number `step` (from 0), of a moving average that soon forgets where it began.

    At most `most`; early (1 + step) / (10 + step).
    """
    return min(most, (1 + step) / (10 + step))
