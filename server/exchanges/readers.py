"""Readers of the content code: a regression to each anatomical target, from the sites' probe sums.

Ridge regression of a number; of a target that is one of the ends of its range in everybody (a sex), logistic
regression in closed form.

Nobody's code and nobody's age leaves a site: the fit, its penalty included, follows from fold sums that add
(`meduet_models/probes/ridge.py`, `discriminant.py`), and equals that on all patients in one place. A site
whose cohort is too small for such sums is in none of them. The readers are part of the final model
(`meduet_models/published/pretrained.py`).

What this file does not do: ask anybody (`server/exchanges/probes.py`), or say how well they read: that is
what the probes' readings from content are.
"""

from collections.abc import Mapping

from jaxtyping import Float64
from torch import Tensor

from federation.exchanges.probes import content_part, joint_width, known_sites
from federation.plan.plan import RunPlan
from federation.wire.messages import Tensors
from meduet_models.probes.discriminant import is_of_two_classes, logistic_from_sums
from meduet_models.probes.ridge import LinearMap, ridge_from_sums
from meduet_models.probes.sums import pooled_folds
from meduet_models.published.pretrained import CodeReader


def readers_of_sums(sums: Mapping[str, Tensors], plan: RunPlan) -> dict[str, CodeReader]:
    """A reader of each target of `plan.probes.anatomy`, in the target's own unit; none where no site tells.

    `sums` are the sites' replies to the first exchange of a probe.
    """
    sites = known_sites(sums, plan)
    if not sites:
        return {}
    folds, content = pooled_folds(sites), content_part(plan)
    fitted = ridge_from_sums(folds, content, slice(joint_width(plan), None), each=True)
    readers = {}
    for place, (name, (low, high)) in enumerate(plan.probes.anatomy.items()):
        target = joint_width(plan) + place
        if is_of_two_classes(folds, target):
            weight, bias = _of_codes(logistic_from_sums(folds, content, target), 0)
            readers[name] = CodeReader(tuple(weight.tolist()), bias, (low, high))
            continue
        weight, bias = _of_codes(fitted, place)
        half = (high - low) / 2  # targets travel as [-1, 1]
        readers[name] = CodeReader(tuple((half * weight).tolist()), low + half * (bias + 1))
    return readers


def _of_codes(fitted: LinearMap, place: int) -> tuple[Float64[Tensor, " q"], float]:
    """Weights of the code as it is, and what nothing is mapped to."""
    weight = fitted.weight[:, place]
    return weight, float(fitted.bias[0, place] - fitted.mean[0] @ weight)
