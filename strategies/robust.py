"""Robust rules: trimmed mean, median and Krum, for when a site may be wrong or hostile.

They need all replies at once, so each validated reply is spilled to a file in the run's folder and read back
by coordinate, in pieces: memory stays that of one piece, whatever the number of sites. Weights are ignored: a
site that lies about its update can lie about its examples. Replies are taken in the order of the sites'
names, so the order of arrival has no influence. What this file does not do: it protects nobody's privacy, and
no rule survives a majority of bad sites.

Axes: m = replies, v = values of one piece.
Sources: trimmed mean and median, Yin et al. 2018 (arXiv:1803.01498); Krum, Blanchard et al. 2017
(arXiv:1703.02757).
"""

import math
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float32
from torch import Tensor

from storage.files import private_folder
from strategies.aggregation import Bounds, Floats, ReplyRefused, Validation, outliers

Rule = Literal["trimmed_mean", "median", "krum"]

_PIECE = 1 << 18


class SpilledReplies:
    """Replies on disk, one file each, and a robust rule over them."""

    def __init__(
        self, reference: Mapping[str, Tensor], bounds: Bounds, folder: Path, rule: Rule, trim: float
    ) -> None:
        check_rule(rule, trim, bounds.num_replies)
        self.validation = Validation(reference, bounds)
        self._folder, self._rule, self._trim = folder, rule, trim
        self._files: dict[str, Path] = {}
        self._norms: dict[str, float] = {}
        shutil.rmtree(folder, ignore_errors=True)  # what an interrupted round left
        private_folder(folder)

    def fold(self, site: str, update: Mapping[str, Tensor], examples: int) -> None:
        """Validate one reply and write `update` / examples to a file; whatever is raised, the replies so far
        are as before."""
        if site in self._files:
            raise ReplyRefused(f"Expected one reply of {site!r}; got a second.")
        values = self.validation.flat(update, examples)
        pieces = [v[i : i + _PIECE] for v in values for i in range(0, len(v), _PIECE)]
        with np.errstate(over="ignore", invalid="ignore"):  # what is not finite is refused
            squares = math.fsum(float(np.dot(piece, piece)) for piece in pieces)
        norm = self.validation.norm(values, squares, examples)
        path = self._folder / f"{len(self._files)}.float32"
        with path.open("wb") as file:  # begun anew by the next reply if this one ends here
            for piece in pieces:
                file.write((piece / np.float32(examples)).data)
        self._files[site], self._norms[site] = path, norm

    def screen(self, tolerance: float) -> dict[str, str]:
        """Leave out who is an outlier among the replies so far (`outliers`); sites and reasons."""
        found = outliers({site: self._norms[site] for site in self._files}, tolerance)
        for site in found:
            self._files.pop(site).unlink()
        return found

    def mean(self) -> dict[str, Tensor]:
        """The rule's aggregate; the files are removed. Raises `ReplyRefused` with too few replies."""
        check_rule(self._rule, self._trim, len(self._files))
        num_values = self.validation.num_values
        replies = [self._read(self._files[site]) for site in sorted(self._files)]
        result = np.empty(num_values, dtype=np.float32)
        match self._rule:
            case "krum":
                chosen = krum(distances(replies), bad_sites(self._trim, len(replies)))
                result[:] = replies[chosen]
            case "median":
                _by_coordinate(replies, result, median)
            case "trimmed_mean":
                cut = bad_sites(self._trim, len(replies))
                _by_coordinate(replies, result, lambda piece: trimmed_mean(piece, cut))
        self.close()
        return self.validation.unflat(result)

    def close(self) -> None:
        """Remove the files."""
        self._files = {}
        shutil.rmtree(self._folder, ignore_errors=True)

    def _read(self, path: Path) -> Floats:
        if not self.validation.num_values:
            return np.empty(0, dtype=np.float32)
        return np.memmap(path, dtype=np.float32, mode="r", shape=(self.validation.num_values,))


def bad_sites(trim: float, num_replies: int) -> int:
    """How many replies a rule takes for bad, or trims from each end: floor(trim · replies)."""
    return math.floor(trim * num_replies + 1e-9)


def check_rule(rule: Rule, trim: float, num_replies: int) -> None:
    """Raise `ReplyRefused` when `rule` means nothing with that many replies."""
    bad = bad_sites(trim, num_replies)
    if rule == "median" and num_replies < 1:
        raise ReplyRefused("Expected at least one valid reply; got none.")
    if rule == "trimmed_mean" and num_replies <= 2 * bad:
        raise ReplyRefused(
            f"Expected more than {2 * bad} replies to trim {bad} from each end; got {num_replies}."
        )
    if rule == "krum" and num_replies < 2 * bad + 3:
        raise ReplyRefused(
            f"Expected at least {2 * bad + 3} replies for Krum with {bad} bad; got {num_replies}."
        )


def median(replies: Float32[Tensor, "m v"]) -> Float32[Tensor, " v"]:
    """Median by coordinate; the mean of the middle two when their number is even."""
    ordered = replies.sort(dim=0).values
    middle = ordered[(len(ordered) - 1) // 2 : len(ordered) // 2 + 1]
    return middle.double().mean(dim=0).float()


def trimmed_mean(replies: Float32[Tensor, "m v"], cut: int) -> Float32[Tensor, " v"]:
    """Mean by coordinate without the `cut` smallest and the `cut` largest."""
    ordered = replies.sort(dim=0).values
    return ordered[cut : len(ordered) - cut].double().mean(dim=0).float()


def krum(squared_distances: Tensor, bad: int) -> int:
    """Index of the reply whose m - bad - 2 nearest neighbours are nearest; the first of equals."""
    num = len(squared_distances)
    others = squared_distances + torch.diag(torch.full((num,), math.inf, dtype=squared_distances.dtype))
    scores = others.sort(dim=1).values[:, : num - bad - 2].sum(dim=1)
    return int(torch.argmin(scores))


def distances(replies: list[Floats]) -> Tensor:
    """Squared L2 distances between all pairs, float64, [m, m]."""
    squared = torch.zeros(len(replies), len(replies), dtype=torch.float64)
    for start in range(0, len(replies[0]), _PIECE):
        pieces = [np.asarray(reply[start : start + _PIECE], dtype=np.float64) for reply in replies]
        for i, first in enumerate(pieces):
            for j, second in enumerate(pieces[:i]):
                difference = first - second
                squared[i, j] += float(np.dot(difference, difference))
    return squared + squared.T


def _by_coordinate(replies: list[Floats], result: Floats, rule: Callable[[Tensor], Tensor]) -> None:
    for start in range(0, len(result), _PIECE):
        piece = np.stack([reply[start : start + _PIECE] for reply in replies])
        result[start : start + _PIECE] = rule(torch.from_numpy(piece)).numpy()
