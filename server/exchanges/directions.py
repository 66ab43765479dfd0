"""Directions of anatomy in content: how content tokens change with a covariate, from the sites' probe sums.

A direction is the regression of the content code on the target within sites, laid back onto the tokens that
the code is read from: what a patient's content differs by, and where, on average, per unit of the target. It
is the pattern that belongs to the linear reading of the target, not the reading's own weights, which would
also cancel what is nothing of the target (Haufe et al., NeuroImage 2014). Only targets that the ridge reading
finds in content on unseen patients get one. It is marginal: with age goes whatever goes with age at these
sites. A site's mean is taken out first, so populations that differ between sites do not enter.

What this file does not do: it asks nobody (`server/exchanges/probes.py` does), and moves no content
(`server/synthesis/synthesis.py` does).

Axes: n = tokens, k = content channels.
"""

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from federation.exchanges.probes import content_part, joint_width, known_sites
from federation.plan.plan import RunPlan
from federation.wire.messages import Tensors
from meduet_models.content_code import ContentCode
from meduet_models.probes.sums import all_but, explained_from_sums, pooled_folds

LEAST_READING = 0.1
"""Out-of-fold R² of the ridge reading from content below which a target has no direction."""


def directions_of_sums(
    sums: Mapping[str, Tensors], plan: RunPlan, code: ContentCode
) -> dict[str, Float[Tensor, "n k"]]:
    """Change of content tokens per unit of each anatomical target of `plan.probes.anatomy`, float32.

    The unit is the target's own: a year, a mm³, from F to M. `code` is the one that the sums were told of,
    `sums` are the sites' replies to the first
    exchange of a probe; sites of which too few patients have all targets tell none. A target has no direction
    when content does not tell it (`LEAST_READING`), or when it is the same for all.
    """
    sites = known_sites(sums, plan)
    if not sites:
        return {}
    content, targets = content_part(plan), slice(joint_width(plan), None)
    read = explained_from_sums(pooled_folds(sites), content, targets)
    within = torch.zeros_like(next(iter(sites.values()))[0].outer)
    for folds in sites.values():
        own = all_but(folds)
        within += own.outer - torch.outer(own.total, own.total) / own.count
    directions = {}
    for place, (name, (low, high)) in enumerate(plan.probes.anatomy.items()):
        if not float(read[place]) >= LEAST_READING:  # NaN: the same for all
            continue
        target = joint_width(plan) + place
        per_range = within[content, target] / within[target, target]
        per_unit = per_range * 2 / (high - low)  # targets travel as [-1, 1]
        directions[name] = code.tokens_of(per_unit).float()
    return directions
