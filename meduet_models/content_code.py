"""The content code: 64 to 128 numbers per scan that know where things are and not which site it is from.

The mean over content tokens throws anatomy away (docs/log.md: sex .65 where the tokens have .92), so tokens
are read whole. Their axes are public: the principal axes of the content of phantoms that the centre draws,
in the sites' styles; no patient is in them. They are kept as a product, axes over places times axes
over channels and a matrix over both, since all tokens side by side are too many numbers to send around. What
a site tells is one vector, the sum of its patients' codes, and where it has patients enough the sum of their
pooled content beside it (`CodeSums`). From the sites' means follow the projections that take what sites
differ in out of the code (`without_sites`) and out of every token (`token_erasure`).

What this file does not do: draw phantoms (`server/public_latents.py`), or promise that nothing of the site is
left: the means are those of a few dozen patients, and their error stays in the code of a patient who was not
in them (`shift_left`). A site that was in no sum is taken out by `erase_own_site` from its own scans.

Source: ours. Principal axes of both sides of a matrix: Lathauwer et al. 2000 (HOSVD); taking means' span out:
nuisance attribute projection (Campbell et al. 2006). Measured in docs/log.md.

Axes: b = scans, n = tokens, k = content channels, a = axes over places, c = axes over channels, z = a times
c, q = numbers in the code, s = sites, v = numbers in a vector.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from meduet_models.erasure import fit_erasure, patient_means

WHITENING = 0.5
"""Power of the public deviations by which axes are divided: 0 leaves them, 1 makes all as long."""
_BOUND = 2.0
_ROUNDING = 1e-6


def code_bound(size: int) -> float:
    """L2 norm to which one patient's code of so many numbers is scaled: some lengths of a public one."""
    return _BOUND * math.sqrt(size)


@dataclass(frozen=True)
class ContentCode:
    """The map from layer-normed content tokens to the code: matrix (places · tokens · channelsᵀ - mean)."""

    places: Float[Tensor, "a n"]
    """Axes over the places of tokens, orthonormal."""
    channels: Float[Tensor, "c k"]
    """Axes over content channels, orthonormal."""
    mean: Float[Tensor, " z"]
    matrix: Float[Tensor, "q z"]

    def read(self, tokens: Float[Tensor, "b n k"]) -> Float[Tensor, "b q"]:
        """The code of each scan, in the dtype of its tokens."""
        places, channels, mean, matrix = (
            part.to(tokens) for part in (self.places, self.channels, self.mean, self.matrix)
        )
        seen = torch.einsum("an,bnk,ck->bac", places, tokens, channels).flatten(1)
        return (seen - mean) @ matrix.T

    def tokens_of(self, change: Float[Tensor, "*s q"]) -> Float64[Tensor, "*s n k"]:
        """The least change of all tokens that changes the code by `change`."""
        back = change.double() @ torch.linalg.pinv(self.matrix.double()).T  # s z
        seen = back.unflatten(-1, (len(self.places), len(self.channels)))
        return torch.einsum("an,...ac,ck->...nk", self.places.double(), seen, self.channels.double())


def code_of(tensors: Mapping[str, Tensor]) -> ContentCode:
    """The code among a network's tensors."""
    return ContentCode(*(tensors[f"code_{part.name}"] for part in fields(ContentCode)))


def public_code(tokens: Float[Tensor, "b n k"], places: int, channels: int, size: int) -> ContentCode:
    """The principal axes of public content, so scaled that the mean square of its codes is `size`.

    `places` and `channels` are the numbers of axes kept of either side. Raises `ValueError` for fewer public
    scans than numbers in the code, for tokens that are not finite, and for ones that do not vary enough.
    """
    if len(tokens) <= size:
        raise ValueError(f"Expected more than {size} public scans for a code of {size}; got {len(tokens)}.")
    if not bool(torch.isfinite(tokens).all()):
        raise ValueError("Expected finite public content; got NaN or infinity.")
    apart = tokens.double().cpu() - tokens.double().cpu().mean(0)
    over_places = _leading(torch.einsum("bnk,bmk->nm", apart, apart), places)
    over_channels = _leading(torch.einsum("bnk,bnj->kj", apart, apart), channels)
    seen = torch.einsum("an,bnk,ck->bac", over_places, tokens.double().cpu(), over_channels).flatten(1)
    mean = seen.mean(0)
    _, lengths, rows = torch.linalg.svd(seen - mean, full_matrices=False)
    axes, variances = _upright(rows[:size]), lengths[:size].square() / len(seen)
    if float(variances[-1]) <= 1e-12 * float(variances[0]) or float(variances[0]) <= 0:
        raise ValueError(f"Expected public content that varies in {size} ways; it does not.")
    scale = variances ** (-0.5 * WHITENING)
    scale = scale * (size / (variances * scale.square()).sum()).sqrt()
    return ContentCode(over_places, over_channels, mean, scale[:, None] * axes)


def without_sites(code: ContentCode, sums: Mapping[str, "CodeSums"]) -> ContentCode:
    """The code centred on the sites' means, without the directions in which these means differ.

    Raises `ValueError` with fewer than two sites, and for one without patients.
    """
    means = _means(sums)  # s q
    centre = means.mean(0)
    matrix = code.matrix.double()
    basis = _basis(means - centre)
    projected = matrix - basis.T @ (basis @ matrix)
    mean = code.mean.double() + torch.linalg.pinv(matrix) @ centre
    return ContentCode(code.places, code.channels, mean, projected)


def token_erasure(
    code: ContentCode, sums: Mapping[str, "CodeSums"], pooled: Mapping[str, "CodeSums"]
) -> tuple[Float64[Tensor, " k"], Float64[Tensor, "k k"]]:
    """The affine map of every token that takes out the channels in which sites differ on average over places;
    (mean, matrix) of r(x) = mean + matrix (x - mean).

    From the `pooled` content of the sites that told it; of fewer than two, as far as the code of `sums` shows
    these channels. `code` is the one that the sums were told of: before `without_sites`.
    """
    if len(pooled) > 1:
        return fit_erasure(_means(pooled))
    return fit_erasure(code.tokens_of(_means(sums)).mean(-2))


def shift_left(numbers: int, patients: int) -> float:
    """How far two sites' people still are apart after the erasure, in standard deviations within a site.

    Of a site effect that is large beside the error of means of so many `patients` per site: the means are off
    by 2 / patients in each of the numbers, the projection takes out one direction, and no choice of metric or
    shrinkage knows the others: √(2 (numbers - 1) / patients). A linear probe that knew everything else would
    be right in Φ(half of it) of fresh people. Measured beside it: docs/log.md.
    """
    return math.sqrt(2 * (numbers - 1) / patients)


def erase_own_site(codes: Float[Tensor, "b q"], patients: Sequence[str]) -> Float[Tensor, "q q"]:
    """The map that takes a site that was in no sum out of its own codes, from its own patients.

    Codes are centred on the federation's sites, so the site's shift is its mean and the map is the projection
    that removes that direction; nothing needs to leave the site. For a hospital that joined late or was held
    out. Raises `ValueError` without scans.
    """
    if not len(codes):
        raise ValueError("Expected codes of at least one scan; got none.")
    mean = patient_means(codes, patients).mean(0)
    direction = mean / mean.norm().clamp(min=1e-12)
    return torch.eye(len(mean), dtype=codes.dtype) - torch.outer(direction, direction)


@dataclass(frozen=True)
class CodeSums:
    """What a site tells for the erasure: the sum of its patients' codes, or of their pooled content; `a + b`
    are those of both cohorts.

    Guarantee: each patient enters as one vector, the average over her scans, scaled to L2 norm at most R =
    `bound`. Adding or removing one patient changes `to_vector()`, the count included, by at most sqrt(R² + 1)
    in L2. Not covered: a mean of few patients still tells, of a scan that somebody holds, with some certainty
    whether it is among them (docs/threats.md).
    """

    count: Float64[Tensor, ""]
    """Patients."""
    total: Float64[Tensor, " q"]
    bound: float
    """L2 norm to which one patient's code is scaled."""

    @staticmethod
    def none(size: int, bound: float) -> "CodeSums":
        """The sums over nobody."""
        return CodeSums.from_vector(torch.zeros(size + 1, dtype=torch.float64), size, bound)

    @staticmethod
    def of(codes: Float[Tensor, "b q"], patients: Sequence[str], bound: float) -> "CodeSums":
        """From the codes of scans; raises `ValueError` when they are not finite."""
        if not bool(torch.isfinite(codes).all()):
            raise ValueError("Expected finite content codes; got NaN or infinity. Nothing is released.")
        x = patient_means(codes.double().cpu(), patients)
        x = x * (bound / x.norm(dim=1, keepdim=True).clamp(min=bound))
        return CodeSums(torch.tensor(len(x), dtype=torch.float64), x.sum(0), bound)

    def __add__(self, other: "CodeSums") -> "CodeSums":
        """The sums of both cohorts; raises `ValueError` when sizes or bounds differ."""
        if (len(self.total), self.bound) != (len(other.total), other.bound):
            raise ValueError(
                f"Expected code sums of {len(self.total)} numbers and bound {self.bound}; got "
                f"{len(other.total)} and {other.bound}."
            )
        return CodeSums(self.count + other.count, self.total + other.total, self.bound)

    def check(self, most: int) -> None:
        """Raise `ValueError` unless these can be the sums of whole patients, `most` at most, each within the
        bound."""
        count = float(self.count)
        if not bool(torch.isfinite(self.to_vector()).all()):
            raise ValueError("Expected finite code sums; got NaN or infinity.")
        if not 0 <= count <= most or count != round(count):
            raise ValueError(f"Expected code sums of 0 to {most} whole patients; got {count:g}.")
        if float(self.total.norm()) > count * self.bound * (1 + _ROUNDING):
            raise ValueError("Expected code sums within the bound per patient; they are longer.")

    def to_vector(self) -> Float64[Tensor, " v"]:
        """Count and sum."""
        return torch.cat([self.count[None], self.total])

    @staticmethod
    def from_vector(vector: Float[Tensor, " v"], size: int, bound: float) -> "CodeSums":
        """Back from `to_vector`, whether summed before or not; raises `ValueError` for another length."""
        if len(vector) != size + 1:
            raise ValueError(f"Expected {size + 1} code sums; got {len(vector)}.")
        return CodeSums(vector[0].double().clone(), vector[1:].double().clone(), bound)


def _means(sums: Mapping[str, CodeSums]) -> Float64[Tensor, "s q"]:
    if len(sums) < 2:
        raise ValueError(f"Expected code sums of at least two sites to erase between; got {len(sums)}.")
    for site, own in sums.items():
        if not bool(torch.isfinite(own.to_vector()).all()) or own.count < 1:
            raise ValueError(
                f"Expected finite code sums of at least one patient from {site!r}; leave it out."
            )
    return torch.stack([own.total / own.count for own in sums.values()])


def _basis(apart: Float64[Tensor, "s q"]) -> Float64[Tensor, "r q"]:
    """Orthonormal basis of what sites differ in: of rank sites - 1 at most."""
    _, lengths, rows = torch.linalg.svd(apart, full_matrices=False)
    basis: Tensor = rows[(lengths > 1e-9 * lengths.max()) & (lengths > 1e-12)]
    return basis[: len(apart) - 1]


def _leading(second_moment: Float64[Tensor, "k k"], count: int) -> Float64[Tensor, "count k"]:
    """The leading eigenvectors as rows."""
    vectors: Tensor = torch.linalg.eigh(second_moment)[1]
    return _upright(vectors.T.flip(0)[:count])


def _upright(rows: Float64[Tensor, "q k"]) -> Float64[Tensor, "q k"]:
    """Axes whose largest entries are positive: their sign is nobody's choice."""
    largest = rows.gather(1, rows.abs().argmax(1, keepdim=True))
    return rows * largest.sign()
