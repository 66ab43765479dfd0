"""The survey: what a site tells about the appearance of its scans, before the first round.

Sums over the patients of the training split, a patient's scans averaged first and scaled to the plan's bound,
and only if enough patients stand behind them. What this file does not do: it sends nothing
(`client/release.py` is the only way out), and keeps no scan's statistics.
"""

import logging
from collections.abc import Mapping, Sequence
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32, Int
from torch import Tensor

from client.scans.patients import rows_by_patient
from federation.exchanges.survey import smallest_cohort, survey_layout
from federation.plan.plan import RunPlan
from meduet_models.style.moments import CohortTooSmall, StyleMoments

_log = logging.getLogger(__name__)


@runtime_checkable
class SurveyedScans(Protocol):
    """What a survey needs of a site's latents (`client/latents/cache.py`)."""

    @property
    def patients(self) -> Sequence[str]:
        """Patient of each scan."""

    @property
    def covariates(self) -> Sequence[Mapping[str, str | float]]:
        """What is known of each scan."""

    def indices(self, split: str) -> Sequence[int]:
        """Scans of a split."""

    def latents(self, indices: Sequence[int]) -> Float[Tensor, "m c d h w"]:
        """Latents of these scans."""


@runtime_checkable
class SurveyedWholeScans(SurveyedScans, Protocol):
    """What a survey needs of whole scans, whose statistics are those of the foreground."""

    def whole(self, row: int, view: int = 0) -> Float32[np.ndarray, "c d h w"]:
        """Latents of a whole scan."""

    def foreground(self, row: int, view: int = 0) -> Bool[np.ndarray, "d h w"]:
        """Which of them are foreground."""


def survey(scans: SurveyedScans, plan: RunPlan, site_minimum: int = 0) -> StyleMoments:
    """The style sums of a site that may leave it.

    Training split only: patients kept for validation and test influence nothing. With body parts, a part with
    too few patients is withheld (its sums are zero). Raises `CohortTooSmall` when nothing is left;
    `site_minimum` is the site's own, and the stricter of it and the plan's wins.
    """
    moments = own_moments(scans, plan)
    least = smallest_cohort(plan, site_minimum)
    enough = moments.sums["count"] >= least
    if not bool(enough.any()):
        most = int(moments.sums["count"].max())
        raise CohortTooSmall(
            f"Expected at least {least} patients behind style sums; got {most}. Nothing is told."
        )
    kept = {n: s * enough.reshape(-1, *[1] * (s.ndim - 1)) for n, s in moments.sums.items()}
    return StyleMoments(moments.layout, kept)


def own_moments(scans: SurveyedScans, plan: RunPlan) -> StyleMoments:
    """The style sums of a site for its own use, whatever its size: never to be sent.

    With these a site that joined late, or that is too small to tell anything, knows its own style
    (`StyleBank.joined_by`).
    """
    layout = survey_layout(plan)
    parts = body_parts(scans, plan)
    rows = rows_by_patient(scans.patients, scans.indices("train"))
    total, num_scaled = StyleMoments.none(layout), 0
    for mine in rows.values():
        if plan.volumes.extent == "scan":
            assert isinstance(scans, SurveyedWholeScans), "whole scans were encoded for this plan"
            seen = [foreground_latents(scans, row) for row in mine]
            patient = StyleMoments.of_voxels(seen, layout, parts[mine].tolist())
        else:
            patient = StyleMoments.of_patient(scans.latents(mine), layout, parts[mine].tolist())
        num_scaled += patient.norm() > layout.bound * (1 - 1e-9)
        total += patient
    if num_scaled:
        _log.warning(
            "The style statistics of %d of %d patients were scaled down to release.style_clip=%g.",
            num_scaled,
            len(rows),
            layout.bound,
        )
    return total


def foreground_latents(scans: SurveyedWholeScans, row: int) -> Float[Tensor, "c n"]:
    """The foreground of a whole scan: its latent voxels, in no order that tells where they lie."""
    return torch.from_numpy(scans.whole(row)[:, scans.foreground(row)])


def body_parts(scans: SurveyedScans, plan: RunPlan) -> Int[Tensor, " b"]:
    """Index of each scan's body part in `style.body_parts`; all 0 when the plan names none.

    Raises `ValueError` when a scan's covariate `body_part` is missing or not in the plan: it would have no
    style.
    """
    index = {name: i for i, name in enumerate(plan.style.body_parts)}
    if not index:
        return torch.zeros(len(scans.patients), dtype=torch.long)
    known_parts = [known.get("body_part") for known in scans.covariates]
    if unknown := [part for part in known_parts if part not in index]:
        raise ValueError(
            f"Expected covariate body_part to be one of {', '.join(index)}; got {unknown[0]!r} "
            f"({len(unknown)} scans). Exclude these scans, or name the part in style.body_parts."
        )
    return torch.tensor([index[str(part)] for part in known_parts])
