"""A small network with a loss that mixes scans, as MeDUET's does, for the tests of gradients per group."""

import torch
from torch import Tensor, nn

from privacy.clipping import joint_norm
from privacy.group_gradients import GroupGradients

TOKENS, VALUES = 3, 5


class Mixing(nn.Module):
    """Partners exchange tokens, and each scan looks for itself among all: the loss of each group of `size`.

    Its layers see tokens and pooled scans, the batch once and twice over.
    """

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(VALUES, 6), nn.LayerNorm(6)
        self.plain, self.whole = nn.LayerNorm(6, elementwise_affine=False), nn.LayerNorm((TOKENS, 6))
        self.last = nn.Linear(6, 4, bias=False)
        draws = torch.Generator().manual_seed(1)
        for parameter in self.parameters():
            nn.init.normal_(parameter, generator=draws)

    def forward(self, scans: Tensor, size: int) -> Tensor:
        """Of scans [b, TOKENS, VALUES], the loss of each group."""
        partner = scans.unflatten(0, (-1, size)).flip(1).flatten(0, 1)
        mixed = torch.cat([partner[:, :1], scans[:, 1:]], dim=1)
        keys = self.last(self.norm(self.first(scans)).mean(1))  # b 4
        tokens = torch.tanh(self.first(torch.cat([mixed, scans])))  # 2b t 6
        queries = self.last(self.whole(self.plain(self.norm(tokens))).mean(1))  # 2b 4
        own = queries.unflatten(0, (2, -1, size)).transpose(0, 1)  # g 2 r 4
        similar = own @ keys.unflatten(0, (-1, 1, size)).mT  # g 2 r r
        return similar.square().mean((1, 2, 3)) - similar.log_softmax(-1).diagonal(dim1=2, dim2=3).mean(
            (1, 2)
        )


def trainable(module: nn.Module) -> list[str]:
    return [name for name, parameter in module.named_parameters() if parameter.requires_grad]


def gradients_of(module: Mixing, scans: Tensor, size: int, groups: int) -> dict[str, Tensor]:
    """Of a loss whose scans mix in groups of `size`, as if they did in `groups` equal ones."""
    with GroupGradients(module, trainable(module), groups, len(scans) // groups) as watched:
        module(scans, size).mean().backward()
    return watched.gradients()


def difference(ours: dict[str, Tensor], group: int, theirs: dict[str, Tensor]) -> float:
    """Of one group's gradient as one vector, relative."""
    return joint_norm({n: ours[n][group] - t for n, t in theirs.items()}) / joint_norm(theirs)
