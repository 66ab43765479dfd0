"""A frozen model, read in closed form: what its content is worth to whoever trains nothing.

A class or a number per scan is read from the content code, or from all content tokens side by side: logistic
and ridge regression, alpha chosen by leaving out labelled patients (`meduet_models/probes/ridge.py`). A class
per voxel is read at each position of the token grid by a ridge regression of its own, from the position's
token and the leading channels of the 27 tokens around it: the baseline that registered crops ask for.

What this file does not do: train, choose labels, or measure.

Axes: b = scans, n = tokens, k = content channels, c = channels kept of neighbours, f = features, r = ways in
which labels vary.
"""

import itertools
from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn import functional as F

from meduet_models.downstream.task import Reading
from meduet_models.meduet import FactorNetwork, NetworkConfig
from meduet_models.probes.ridge import fit_logistic, fit_ridge
from meduet_models.tokenizer.tokenizer import STRIDE
from meduet_models.tokens import patchify, unpatchify

_CHANNELS = 16
_WAYS = 32
_AT_ONCE = 16


@torch.inference_mode()
def frozen_tokens(network: FactorNetwork, latents: Float[Tensor, "b c d h w"]) -> Float[Tensor, "b n k"]:
    """Content tokens of many scans, in batches."""
    return torch.cat([network.content_tokens(chunk) for chunk in torch.split(latents, _AT_ONCE)])


@torch.inference_mode()
def frozen_features(
    network: FactorNetwork, latents: Float[Tensor, "b c d h w"], reading: Reading
) -> Float[Tensor, "b f"]:
    """The code of each scan, or its tokens side by side (of a model without a code, too)."""
    if reading == "code" and network.has_content_code:
        return torch.cat([network.content_code(chunk) for chunk in torch.split(latents, _AT_ONCE)])
    return frozen_tokens(network, latents).flatten(1)


def fit_classes(
    features: Float[Tensor, "b f"],
    labels: Int64[Tensor, " b"],
    classes: int,
    patients: Sequence[str],
    seed: int,
) -> Callable[[Tensor], Tensor]:
    """From features to probabilities of the classes."""
    fitted = fit_logistic(features, labels, classes, patients, seed=seed)
    return lambda unseen: fitted(unseen).softmax(1).float()


def fit_number(
    features: Float[Tensor, "b f"], numbers: Float[Tensor, " b"], patients: Sequence[str], seed: int
) -> Callable[[Tensor], Tensor]:
    """From features to a number, [b 1]."""
    fitted = fit_ridge(features, numbers[:, None], patients, seed=seed)
    return lambda unseen: fitted(unseen).float()


def fit_voxels(
    tokens: Float[Tensor, "b n k"],
    labels: Int64[Tensor, "b 1 D H W"],
    classes: int,
    patients: Sequence[str],
    config: NetworkConfig,
    seed: int,
) -> Callable[[Tensor], Tensor]:
    """From content tokens to a score of every class in every voxel, [b classes D H W].

    The labels of a position vary in at most as many ways as there are scans: the leading ones are predicted.
    """
    edge = config.patch_size * STRIDE
    channels = _leading_channels(tokens)
    of_voxel = F.one_hot(labels[:, 0], classes).movedim(-1, 1).float()  # b classes D H W
    truth = patchify(of_voxel, edge).transpose(0, 1)  # n b p
    mean = truth.mean(1, keepdim=True)
    ways = min(_WAYS, max(1, len(labels) - 1))
    axes = torch.linalg.svd(truth - mean, full_matrices=False)[2][:, :ways]  # n r p
    fitted = fit_ridge(
        _around(tokens, channels, config.token_grid), (truth - mean) @ axes.mT, patients, seed=seed
    )

    def scores(unseen: Tensor) -> Tensor:
        chunks = []
        for chunk in torch.split(unseen, _AT_ONCE):
            predicted = fitted(_around(chunk, channels, config.token_grid)).float() @ axes + mean  # n b p
            chunks.append(unpatchify(predicted.transpose(0, 1), config.token_grid, edge))
        return torch.cat(chunks)

    return scores


def _leading_channels(tokens: Float[Tensor, "b n k"]) -> Float[Tensor, "c k"]:
    """Orthonormal axes along which the channels of these tokens vary most."""
    apart = tokens.double().flatten(0, 1)
    apart = apart - apart.mean(0)
    vectors: Tensor = torch.linalg.eigh(apart.T @ apart)[1]
    return vectors.T.flip(0)[:_CHANNELS].to(tokens)


def _around(
    tokens: Float[Tensor, "b n k"], channels: Float[Tensor, "c k"], grid: tuple[int, int, int]
) -> Float[Tensor, "n b f"]:
    """Each position's own token and the leading channels of those around it, at the border the nearest."""
    seen = (tokens @ channels.T).transpose(1, 2).reshape(len(tokens), -1, *grid)  # b c d h w
    padded = F.pad(seen, (1,) * 6, mode="replicate")
    d, h, w = grid
    beside = [
        padded[:, :, i : i + d, j : j + h, k : k + w].flatten(2)
        for i, j, k in itertools.product(range(3), repeat=3)
        if (i, j, k) != (1, 1, 1)
    ]
    return torch.cat([tokens.transpose(1, 2), *beside], dim=1).permute(2, 0, 1)
