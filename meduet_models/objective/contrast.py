"""SiQC, the swap-invariance quadruplet contrast, and the invariance of content between a scan and its
restyling.

A quadruplet is a pair of volumes and the two decoded with their styles swapped. Its content must follow the
volume that gave the content, its style the site that gave the style. Both are supervised contrasts: a query
from the student must find the keys with its label among those of the teacher.

Axes: b = volumes, n = tokens, k = channels, g = groups that do not see each other, q = queries, m = keys.
Source: MeDUET (arXiv:2602.17901), SiQC; supervised contrast (arXiv:2004.11362); InfoNCE (arXiv:1807.03748).
Differs from the authors' code: a style's label is its site, where theirs is the volume, so that two volumes
of one site repel each other; temperatures act.
"""

from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor
from torch.nn import functional as F

from meduet_models.meduet import layer_normed
from meduet_models.objective.distillation import squared_distance


def pool_tokens(
    tokens: Float[Tensor, "b n k"], visible: Bool[Tensor, "b n"] | None = None
) -> Float[Tensor, "b k"]:
    """Layer-norm each token, then average over the visible ones (all when None)."""
    normed = layer_normed(tokens)
    if visible is None:
        return normed.mean(dim=1)
    weight = visible.unsqueeze(-1).to(normed.dtype)
    return (normed * weight).sum(dim=1) / weight.sum(dim=1)


def by_group(
    rows: Shaped[Tensor, "rows ..."], group_size: int | None, streams: int = 1
) -> Shaped[Tensor, "..."]:
    """The rows of each group of `group_size` scans, on an axis of their own; unchanged when None. `streams`:
    how often the scans of the batch are stacked in `rows`."""
    if group_size is None:
        return rows
    parts = rows.reshape(streams, len(rows) // streams // group_size, group_size, *rows.shape[1:])
    return parts.transpose(0, 1).flatten(1, 2)


def supervised_contrast(
    queries: Float[Tensor, "*g q k"],
    keys: Float[Tensor, "*g m k"],
    query_labels: Int[Tensor, "*g q"],
    key_labels: Int[Tensor, "*g m"],
    temperature: float,
    excluded: Bool[Tensor, "q m"] | None = None,
) -> Float[Tensor, ""]:
    """Mean over queries of the mean negative log-probability of their positives among the keys of their
    group: no number of one group enters another's, not even as NaN.

    Similarity is the cosine over `temperature`; `excluded` pairs are neither positive nor negative; a query
    without a positive counts as zero.
    """
    logits = F.normalize(queries.float(), dim=-1) @ F.normalize(keys.float(), dim=-1).mT / temperature
    positive = query_labels.unsqueeze(-1) == key_labels.unsqueeze(-2)
    if excluded is not None:
        logits = logits.masked_fill(excluded, float("-inf"))
        positive = positive & ~excluded
    log_probability = F.log_softmax(logits, dim=-1).masked_fill(~positive, 0.0)
    return -(log_probability.sum(dim=-1) / positive.sum(dim=-1).clamp(min=1)).mean()


def restyling_invariance(
    restyled: Float[Tensor, "b n k"],
    clean: Float[Tensor, "b n k"],
    subject: Int[Tensor, " b"],
    temperature: float,
    group_size: int | None = None,
) -> Float[Tensor, ""]:
    """Content of a restyled scan (student) against that of the scan (teacher): pooled InfoNCE, among the
    scans of a group, plus token distance.

    Source: ours, measured in docs/architecture.md; without it pooled content forgets the patient while every
    published term falls.
    """
    queries, keys = (by_group(pool_tokens(tokens), group_size) for tokens in (restyled, clean))
    labels = by_group(subject, group_size)
    contrast = supervised_contrast(queries, keys, labels, labels, temperature)
    return contrast + squared_distance(layer_normed(restyled), layer_normed(clean)).mean()
