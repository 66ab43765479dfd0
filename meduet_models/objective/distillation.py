"""MFTD, mixed-factor token distillation: what was decoded at hidden positions must read as the teacher reads
the scan.

The student re-encodes a volume that it decoded from half of its tokens; at the hidden half, its content and
style tokens are drawn to those that the moving-average teacher finds in the clean scan. Which volumes are
decoded, and when this starts, is `objective.py`.

Axes: b = volumes, n = tokens, k = content channels, s = style channels.
Source: MeDUET (arXiv:2602.17901), MFTD; content counts half, as published.
"""

from jaxtyping import Bool, Float
from torch import Tensor

from meduet_models.factors import Factors
from meduet_models.objective.demixing import hidden_mean


def distil_factors(student: Factors, teacher: Factors, hidden: Bool[Tensor, "b n"]) -> Float[Tensor, ""]:
    """Half the content error plus the style error at hidden positions; squared, mean over channels and
    positions."""
    content = hidden_mean(squared_distance(student.content, teacher.content), hidden)
    style = hidden_mean(squared_distance(student.style, teacher.style), hidden)
    return 0.5 * content + style


def squared_distance(a: Float[Tensor, "b n k"], b: Float[Tensor, "b n k"]) -> Float[Tensor, "b n"]:
    """Mean squared difference of each token, float32."""
    return (a.float() - b.float()).square().mean(dim=-1)
