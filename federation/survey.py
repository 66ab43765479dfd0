"""What a survey holds, read from the plan: the one place where site and centre take the layout of style sums
from.

What this file does not do: it computes no sums (`client/latents/style_moments.py`) and judges none
(`strategies/style_bank.py`).
"""

import torch

from federation.limits import Largest, largest_reply, promised
from federation.plan import RunPlan
from meduet_models.style.moments import StyleLayout


def survey_layout(plan: RunPlan) -> StyleLayout:
    """Names, shapes and per-patient bound of the style sums that the plan asks for.

    The coarse map and the full-resolution centre are there only for registered crops. With `style.exchange:
    none` the sums still travel, but only their pooled centre and scale come back.
    """
    return StyleLayout(
        channels=plan.network.latent_channels,
        latent_grid=plan.network.latent_grid,
        map_grid=plan.style.map_grid if plan.volumes.registered else None,
        bound=plan.release.style_clip,
        parts=max(1, len(plan.style.body_parts)),
        amplitude=plan.style.exchange == "amplitude",
    )


def largest_survey(plan: RunPlan) -> Largest:
    """Size of a site's answer to the survey, at most."""
    return largest_reply(promised(survey_layout(plan).shapes(), torch.float32))


def smallest_cohort(plan: RunPlan, site_minimum: int = 0) -> int:
    """Fewest patients behind sums that may leave a site: the stricter of plan and site, and never one
    patient.
    """
    return max(plan.style.minimum_cohort, site_minimum, 2)
