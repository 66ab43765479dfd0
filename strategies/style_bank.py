"""Collecting the style bank: sites' sums in, one bank out; refuses what no honest cohort can have told.

Each reply is judged alone: sums of the agreed names and shapes, finite, of at least the minimum cohort, that
patients can have, within the bound that was agreed for each. What this file does not do: it asks nobody
(`content_share.py`) and cannot tell a plausible lie from the truth; how far one can move the pooled scale is
bounded in `meduet_models/style/bank.py`.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from federation.exchanges.survey import smallest_cohort, survey_layout
from federation.plan.plan import RunPlan
from federation.wire.limits import MOST_PATIENTS
from meduet_models.style.bank import StyleBank
from meduet_models.style.moments import StyleMoments

_ROUNDING = 1e-2
"""Head-room for sums that travelled in 8 significant bits."""


class StyleSurvey:
    """The replies to a survey, as they come in."""

    def __init__(self, plan: RunPlan) -> None:
        self.plan = plan
        self.layout = survey_layout(plan)
        self.refused: dict[str, str] = {}
        """Why a site's reply was refused, in one line each."""
        self._moments: dict[str, StyleMoments] = {}

    def add(self, site: str, tensors: Mapping[str, Tensor]) -> bool:
        """Take a site's sums; False, with the reason in `refused`, when they cannot be taken.

        A site that answers twice counts once: the same sums again change nothing, others are refused and the
        first stay: two sums that differ by one patient would show that patient. A site that was refused may
        answer again.
        """
        try:
            moments = StyleMoments.from_tensors(tensors, self.layout)
            self._check(site, moments)
        except ValueError as reason:
            self.refused[site] = str(reason)
            return False
        self._moments[site] = moments
        self.refused.pop(site, None)
        return True

    def _check(self, site: str, moments: StyleMoments) -> None:
        if site not in self.plan.sites:
            raise ValueError(f"Expected a site of the plan; got {site!r}.")
        counts = moments.sums["count"]
        least = smallest_cohort(self.plan)
        if not bool(((counts == 0) | (counts >= least)).all()) or not bool(counts.any()):
            raise ValueError(f"Expected style sums of at least {least} patients; got {counts.tolist()}.")
        sizes = torch.stack([s.abs().flatten(1).sum(1) for n, s in moments.sums.items() if n != "count"]).sum(
            0
        )
        if bool(((counts == 0) & (sizes > 0)).any()):
            raise ValueError("Expected nothing to be told of body parts without patients; got sums.")
        moments.check(MOST_PATIENTS)
        if moments.norm() > float(counts.sum()) * self.layout.bound * (1 + _ROUNDING):
            raise ValueError(
                f"Expected style sums within {self.layout.bound:g} per patient; "
                f"got {moments.norm() / float(counts.sum()):g}. The site has not bounded them."
            )
        known = self._moments.get(site)
        if known is not None and not torch.equal(known.to_vector(), moments.to_vector()):
            raise ValueError("Expected the sums that this site told before; got others. The first stay.")

    @property
    def answered(self) -> tuple[str, ...]:
        """Sites whose sums are in, in the plan's order."""
        return tuple(site for site in self.plan.sites if site in self._moments)

    def bank(self) -> StyleBank:
        """The bank of the sites that answered, the same whatever the order of their replies.

        With `style.exchange: none` it holds the pooled centre and scale only. Raises `CohortTooSmall` when no
        site could answer.
        """
        moments = {site: self._moments[site] for site in self.answered}
        return StyleBank.of(self.plan.sites, moments, with_entries=self.plan.style.exchange != "none")
