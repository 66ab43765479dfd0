"""Readers of the content code: a ridge regression to each anatomical target, from the sites' probe sums.

Nobody's code and nobody's age leaves a site: the fit, its penalty included, follows from fold sums that add
(`meduet_models/probes/ridge.py`), and equals that on all patients in one place. A site whose cohort is too
small for such sums is in none of them. The readers are part of the final model
(`meduet_models/pretrained.py`).

What this file does not do: ask anybody (`server/exchanges/probes.py`), or say how well they read: that is
what the probes' readings from content are.
"""

from collections.abc import Mapping

from federation.exchanges.probes import content_part, joint_width, known_sites
from federation.messages import Tensors
from federation.plan import RunPlan
from meduet_models.pretrained import CodeReader
from meduet_models.probes.ridge import ridge_from_sums
from meduet_models.probes.sums import pooled_folds


def readers_of_sums(sums: Mapping[str, Tensors], plan: RunPlan) -> dict[str, CodeReader]:
    """A reader of each target of `plan.probes.anatomy`, in the target's own unit; none where no site tells.

    `sums` are the sites' replies to the first exchange of a probe.
    """
    sites = known_sites(sums, plan)
    if not sites:
        return {}
    fitted = ridge_from_sums(
        pooled_folds(sites), content_part(plan), slice(joint_width(plan), None), each=True
    )
    readers = {}
    for place, (name, (low, high)) in enumerate(plan.probes.anatomy.items()):
        weight, half = fitted.weight[:, place], (high - low) / 2  # targets travel as [-1, 1]
        told = fitted.bias[0, place] - fitted.mean[0] @ weight
        readers[name] = CodeReader(tuple((half * weight).tolist()), float(low + half * (told + 1)))
    return readers
