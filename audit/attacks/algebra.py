"""Exact algebra on sums: who is in them, and what was measured of whom, without a model or a threshold.

A sum of products of few vectors spans these vectors and nothing else (`outside_span`); over many it still
reaches further towards its own (`reach`). Products with a measured value are equations for the values
(`solved`). A sum itself, with a pool that holds all members, is an equation for who is in it
(`weights_in`). Two sums, one patient apart, are that patient.

What this file does not do: it knows no release and no model; vectors come as the attacker computes them from
scans that he holds.

Axes: n = candidates, p = a pool of them, r = reference, d = numbers in a vector, t = measured values.

Source: tracing by a whitened inner product: Dwork et al. 2015 (robust traceability), Homer et al. 2008.
"""

import math

import torch
from jaxtyping import Bool, Float, Float64
from torch import Tensor

EXACT = 1e-5
"""Relative residual below which a candidate is in a span: far above rounding, far below anybody else."""
_CARRIES = 1e-13  # of the largest eigenvalue: below, a direction is rounding
_SHRINKAGE = 0.1


def rank(products: Float64[Tensor, "d d"]) -> int:
    """Directions that a sum of products has."""
    return int(_directions(products)[0].shape[0])


def outside_span(candidates: Float[Tensor, "n d"], products: Float64[Tensor, "d d"]) -> Float64[Tensor, " n"]:
    """The share of each candidate's length that lies outside of the span of what was summed: 0 of a member.

    Says nothing once the sum has as many directions as a vector has numbers.
    """
    x = candidates.double()
    _, vectors = _directions(products)
    left = x - (x @ vectors) @ vectors.T
    share: Tensor = left.norm(dim=1) / x.norm(dim=1).clamp(min=1e-300)
    return share


def reach(candidates: Float[Tensor, "n d"], products: Float64[Tensor, "d d"]) -> Float64[Tensor, " n"]:
    """Leverage: xᵀ (Σ yyᵀ)⁻¹ x, at most 1 of a member, and about d / n on average over them; smaller is more
    like a member.

    Means nothing where fewer were summed than a vector has numbers: it ranks the wrong way there.
    """
    values, vectors = _directions(products)
    return ((candidates.double() @ vectors).square() / values).sum(1)


def solved(members: Float[Tensor, "n d"], products: Float64[Tensor, "d t"]) -> Float64[Tensor, "n t"] | None:
    """The measured values of known members, from the sum of their vectors times the values; None where there
    are more members than numbers in a vector: then there are many solutions."""
    x = members.double()
    if len(x) == 0 or int(torch.linalg.matrix_rank(x)) < len(x):
        return None
    solution: Tensor = torch.linalg.lstsq(x.T, products.double(), driver="gelsd").solution
    return solution


def weights_in(pool: Float[Tensor, "p d"], total: Float[Tensor, " d"]) -> tuple[Float64[Tensor, " p"], bool]:
    """How often each of a pool is in a sum, and whether that is the only solution and a whole one.

    Whole: the pool's vectors are independent, they make up the sum, and each is in it once or not at all. A
    pool in which a member is missing does not make up the sum.
    """
    x, s = pool.double(), total.double()
    scale = x.std(0).clamp(min=1e-12) if len(x) > 1 else torch.ones_like(s)
    x, s = x / scale, s / scale
    found: Tensor = torch.linalg.lstsq(x.T, s[:, None], driver="gelsd").solution[:, 0]
    left = float((x.T @ found - s).norm() / s.norm().clamp(min=1e-300))
    independent = len(x) <= x.shape[1] and int(torch.linalg.matrix_rank(x, rtol=1e-6)) == len(x)
    nearest = found.clamp(0, 1).round()
    return found, independent and left < 1e-4 and bool(((found - nearest).abs() < 0.1).all())


def leaning(
    candidates: Float[Tensor, "n d"], mean: Float[Tensor, " d"], reference: Float[Tensor, "r d"]
) -> Float64[Tensor, " n"]:
    """How far each candidate leans towards a mean that was released, in units of what is usual.

    Whitened by the `reference` (others' vectors, or the whole pool without its labels): an attacker counts
    every number that carries something of a patient, however small its spread.
    """
    usual = reference.double().mean(0)
    spread = reference.double().std(0)
    carries = (spread > 1e-9 * spread.max()).double()
    r, x, m = ((one.double() - usual) / spread.clamp(min=1e-12) for one in (reference, candidates, mean))
    covariance = r.T @ r / max(1, len(r) - 1)
    metric = (1 - _SHRINKAGE) * covariance + _SHRINKAGE * torch.eye(len(usual), dtype=torch.float64)
    scores: Tensor = (x * carries) @ torch.linalg.solve(metric, m * carries)
    return scores


def leaning_of_each(
    candidates: Float[Tensor, "n d"], mean: Float[Tensor, " d"], other: Bool[Tensor, " n"], seed: int = 0
) -> Float64[Tensor, " n"]:
    """`leaning` of an attacker who knows what is usual from the `other` candidates, who took no part.

    Nobody is in the reference that she is compared with: an other is left out herself, and for a member one
    of them at random, so that both are compared with as many.
    """
    rows, generator = other.nonzero()[:, 0], torch.Generator().manual_seed(seed)
    scores = []
    for row in range(len(candidates)):
        without = row if bool(other[row]) else rows[torch.randint(len(rows), (), generator=generator)]
        reference = candidates[rows[rows != without]]
        scores.append(leaning(candidates[row : row + 1], mean, reference)[0])
    return torch.stack(scores)


def difference(
    first: Float[Tensor, " d"], second: Float[Tensor, " d"], counts: tuple[float, float]
) -> Float64[Tensor, " d"] | None:
    """The vector of the one patient by whom two sums differ; None unless their counts differ by one."""
    if abs(counts[1] - counts[0]) != 1:
        return None
    return (second.double() - first.double()) * (counts[1] - counts[0])


def smallest_cohort(width: int) -> int:
    """About from how many patients on leverage tells members of sums of products of so many numbers with an
    area below .60: thirty for each number (Gaussian width 96: .69 at 1,000, .57 at 3,000)."""
    return 30 * width


def tracing_area(patients: float, numbers: int) -> float:
    """The largest area that leaning towards a mean of so many numbers over so many patients can have: Φ of
    the signal √(numbers / patients) over √2."""
    return 0.5 * (1 + math.erf(math.sqrt(numbers / patients) / 2))


def _directions(products: Float64[Tensor, "d d"]) -> tuple[Tensor, Tensor]:
    """Eigenvalues that carry something, and their vectors."""
    values, vectors = torch.linalg.eigh(products.double())
    kept = values > _CARRIES * values.max().clamp(min=1e-300)
    return values[kept], vectors[:, kept]
