"""The style axes of a site: fitted once, when a run begins, on its own training scans in every site's style.

What this file does not do: the mathematics (`meduet_models/style/axes.py`). Where style heads are shared
there are none, nor for whole scans, of which a step sees another crop each time: statistics are then read as
they are.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from client.latents.batches import Batches
from client.training.site_state import SiteState
from client.training.trainee import student_of
from federation.plan.plan import RunPlan
from meduet_models.factors import StatisticsStyleHead
from meduet_models.style.axes import MOST_SCANS, StyleAxes
from meduet_models.threads import fixed_threads

_AT_ONCE = 16


@torch.no_grad()
def with_style_axes(
    home: Mapping[str, Tensor],
    shared: Mapping[str, Tensor],
    batches: Callable[[], Batches],
    plan: RunPlan,
) -> dict[str, Tensor]:
    """The start's home weights with this site's style axes; the same bits whatever the number of threads.

    `batches` reads scans, and is called once the weights fit. Raises `WrongWeights`.
    """
    student = student_of(plan, shared, SiteState(round=0, home=home))
    head = student.style_head
    whole, stays = plan.volumes.extent == "scan", "style_head.axes_read" in home
    if whole or not stays or not isinstance(head, StatisticsStyleHead):
        return dict(home)
    seen_by = batches()
    styles = seen_by.styles
    if len(styles) < 2:
        return dict(home)
    rows = seen_by.training_rows
    chunks = torch.split(torch.tensor(rows[:: -(-len(rows) // MOST_SCANS)]), _AT_ONCE)
    with fixed_threads(1):
        seen = [
            torch.cat([student.style_statistics(seen_by.in_style(c.tolist(), style)) for c in chunks])
            for style in styles
        ]
        axes = StyleAxes.of(torch.stack(seen))
    head.set_axes(axes)
    weights = student.state_dict()
    return {name: weights[name] for name in home}
