"""Has the network learned anything about the scan? Its error at hidden tokens, beside the neighbours' ridge.

Half of the tokens of each scan are hidden; the network encodes the others alone and predicts them. Its
squared error is told over that of the mean map of the training scans: 1 means that nothing was learned but
the mean. Beside it, under the same masks: one ridge for all positions from the 26 tokens around each, in
which hidden ones are zeros and told apart; and the same ridge with every neighbour seen. A network above the
first has not learned what a line of linear algebra knows.

What this file does not do: it reads no site and no patient out of anything (`quick.py`, `anatomy.py`).

Axes: b = scans, n = tokens, p = values in a token, c d h w = latents.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from meduet_models.meduet import FactorNetwork
from meduet_models.probes.ridge import fit_ridge

Grid = tuple[int, int, int]
"""Tokens along each axis."""
AT_ITS_START = 0.7
"""Hidden error above which a network is near its start, whatever else is read from its content."""
_HIDDEN_SHARE = 0.5
_DRAWS = 3
_ALPHAS = (1e-1, 1e-2, 1e-3, 1e-4)
_MOST_ROWS = 3000  # of the neighbours' ridge, which has some hundred features


@dataclass(frozen=True)
class HiddenErrors:
    """Errors at hidden tokens over the variance around the mean map."""

    network: float
    neighbours: float
    """Ridge from the visible neighbours, under the network's masks."""
    all_neighbours: float
    """Ridge from all 26 neighbours."""


@torch.inference_mode()
def hidden_errors(
    network: FactorNetwork,
    training: Float[Tensor, "a c d h w"],
    patients: Sequence[str],
    held: Float[Tensor, "b c d h w"],
    seed: int = 0,
) -> HiddenErrors:
    """Measure on `held`; the mean map and the ridges are fitted on `training`, whose patients are named."""
    config = network.config
    known, unseen = network.target_tokens(training), network.target_tokens(held)  # b n p, scaled
    mean = known.mean(0)
    known, left = known - mean, unseen - mean
    errors: dict[str, list[Tensor]] = {"network": [], "neighbours": [], "all": [], "mean": []}
    sparse = _Ridge(known, patients, config.token_grid, seed, hide=True)
    full = _Ridge(known, patients, config.token_grid, seed, hide=False)
    seen_all = full.predict(left, torch.zeros(left.shape[:2], dtype=torch.bool))
    for draw in range(_DRAWS):
        hidden = hidden_masks(len(held), config.num_tokens, seed + draw)
        features = network.encoder.forward_visible(network.embed_latents(held, ~hidden), ~hidden)
        predicted = network.predict_tokens(network.factors(held, features), ~hidden)
        for name, error in (
            ("network", predicted - unseen),
            ("neighbours", sparse.predict(left, hidden) - left),
            ("all", seen_all - left),
            ("mean", left),
        ):
            errors[name].append(error.square().mean(-1)[hidden].mean())
    total = {name: float(torch.stack(own).mean()) for name, own in errors.items()}
    scale = max(total["mean"], 1e-12)
    return HiddenErrors(total["network"] / scale, total["neighbours"] / scale, total["all"] / scale)


def hidden_masks(scans: int, tokens: int, seed: int) -> Bool[Tensor, "b n"]:
    """Half of the tokens of each scan, by the seed."""
    generator = torch.Generator().manual_seed(seed)
    rank = torch.rand(scans, tokens, generator=generator).argsort(1).argsort(1)
    return rank < round(_HIDDEN_SHARE * tokens)


def with_neighbours(tokens: Float[Tensor, "b n p"], grid: Grid) -> Float[Tensor, "b n m"]:
    """Each token with the 26 around it, in raster order; zeros beyond the border."""
    padded = F.pad(tokens.reshape(len(tokens), *grid, tokens.shape[2]), (0, 0, 1, 1, 1, 1, 1, 1))  # b d h w p
    d, h, w = grid
    steps = itertools.product(range(3), repeat=3)
    around = [padded[:, i : i + d, j : j + h, k : k + w] for i, j, k in steps]
    return torch.cat(around, dim=-1).flatten(1, 3)


class _Ridge:
    """A token from those around it, the same map at every place."""

    def __init__(
        self,
        known: Float[Tensor, "a n p"],
        patients: Sequence[str],
        grid: Grid,
        seed: int,
        hide: bool,
    ) -> None:
        self._grid = grid
        hidden = hidden_masks(len(known), known.shape[1], seed + _DRAWS)
        if not hide:
            hidden = torch.zeros_like(hidden)
        x, y = self._features(known, hidden).flatten(0, 1), known.flatten(0, 1)
        who = [name for name in patients for _ in range(known.shape[1])]
        generator = torch.Generator().manual_seed(seed)
        rows = torch.randperm(len(x), generator=generator)[:_MOST_ROWS]
        chosen = [who[int(row)] for row in rows]
        self._fitted = fit_ridge(x[rows], y[rows], chosen, alphas=_ALPHAS, choice="generalised")

    def predict(self, tokens: Float[Tensor, "b n p"], hidden: Bool[Tensor, "b n"]) -> Float[Tensor, "b n p"]:
        """What the neighbours say of each token."""
        return self._fitted(self._features(tokens, hidden).flatten(0, 1)).reshape(tokens.shape).float()

    def _features(self, tokens: Tensor, hidden: Tensor) -> Tensor:
        """The 26 around each token, and which of them are hidden; never the token itself."""
        shown = (~hidden).to(tokens.dtype).unsqueeze(-1)
        around = with_neighbours(torch.cat([tokens * shown, shown], dim=2), self._grid)
        width = tokens.shape[2] + 1
        return torch.cat([around[..., : 13 * width], around[..., 14 * width :]], dim=-1)
