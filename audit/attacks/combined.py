"""Several scores of the same candidates as one: weighted on half of them, told of the other half.

A hash of site and name deals the halves, so no candidate is in both and nobody chooses. Weights are those of
a linear discriminant, shrunk: the difference of the means of members and others over the covariance within
both, of scores standardised within each site. Weighing and judging the same candidates would claim leaks
that are not there.

What this file does not do: attack; it reads scores that were made.

Axes: n = candidates, a = scores.
"""

import time
from collections.abc import Sequence

import numpy as np

from audit.attacks.scores import FEWEST, Scores, judged
from audit.cohort import Cohort
from audit.findings import Finding
from forms.json_text import sha256_of

_SHRUNK = 0.1


def weighs(cohorts: Sequence[Cohort]) -> np.ndarray:
    """Of each candidate, site by site, whether she is in the half that weights are fitted on."""
    names = [f"weighs scores: {one.site}/{name}" for one in cohorts for name in one.people]
    return np.array([int(sha256_of(name), 16) % 2 == 0 for name in names])


def combined(scores: Sequence[Scores], fits: np.ndarray) -> Scores:
    """The weighted sum of scores, of those who are not in `fits`."""
    x = np.stack([one.within_sites().values for one in scores], axis=1)  # n a
    member = scores[0].member
    inside, outside = x[fits & member], x[fits & ~member]
    within = np.concatenate([inside - inside.mean(0), outside - outside.mean(0)])
    covariance = within.T @ within / len(within)
    shrunk = (1 - _SHRUNK) * covariance + _SHRUNK * np.trace(covariance) / x.shape[1] * np.eye(x.shape[1])
    weight = np.linalg.solve(shrunk, inside.mean(0) - outside.mean(0))
    return scores[0].with_values(x @ weight).some(~fits)


def judged_together(
    artefact: str, scores: Sequence[Scores], cohorts: Sequence[Cohort], blind: Scores
) -> tuple[Finding, Scores] | None:
    """The finding of all scores together; None of fewer than two, or with fewer than `FEWEST` members or
    others to weigh them on."""
    fits, member = weighs(cohorts), blind.member
    if len(scores) < 2 or min(int((fits & side).sum()) for side in (member, ~member)) < FEWEST:
        return None
    began = time.process_time()
    own = combined(scores, fits)
    sentence = (
        f"Whoever weighs {len(scores)} of these scores on half of the candidates asks the sum of the others."
    )
    return judged(artefact, "combined", own, sentence, blind.some(~fits), began), own
