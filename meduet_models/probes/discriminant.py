"""Which of two classes, from sums: logistic regression in closed form, where nobody may take steps.

Between two classes of one shape the ridge regression on ±1 is the linear discriminant, and the log-odds are a
straight line in its score (Efron 1975, doi:10.1080/01621459.1975.10480319). The discriminant and its alpha
follow from fold sums (`ridge.py`); the line from the score's means and spread in either class among patients
left out, which are sums of the same kind: no question more than ridge regression asks, and no step.

What this file does not do: sum or send (`client/exchanges/probes.py`). Newton's logistic regression of
patients in one place is `ridge.fit_logistic`; how the two compare on real scans: docs/log.md.

Axes: k = features, r = rank.
"""

import math

from meduet_models.probes.ridge import LinearMap, ridge_from_sums
from meduet_models.probes.sums import FoldMoments, all_but

_ROUNDING = 1e-6


def is_of_two_classes(folds: FoldMoments, target: int) -> bool:
    """Whether the coordinate `target`, within [-1, 1], is -1 or 1 in everybody, and both are there."""
    whole = all_but(folds)
    count, total, square = float(whole.count), float(whole.total[target]), float(whole.outer[target, target])
    return abs(count - square) <= _ROUNDING * count and abs(total) <= count - 1


def logistic_from_sums(folds: FoldMoments, source: slice, target: int) -> LinearMap:
    """The log-odds of 1 against -1 in the coordinate `target`, from those of `source`.

    Where the score does not rise from one class to the other among patients left out, the log-odds are those
    of the classes' shares. Raises `ValueError` with fewer than three folds, and unless there are two classes.
    """
    if len(folds) < 3 or not is_of_two_classes(folds, target):
        raise ValueError(
            f"Expected sums of at least three folds of patients of two classes, told as -1 and 1; got "
            f"{len(folds)} folds, or other numbers."
        )
    wanted = slice(target, target + 1)
    ridge = ridge_from_sums(folds, source, wanted)
    alphas = (float(ridge.alpha),)
    count = label = score = square = agreement = 0.0  # sums over patients of 1, y, s, s², s y
    for place, fold in enumerate(folds):
        others = [own for other, own in enumerate(folds) if other != place]
        fitted = ridge_from_sums(others, source, wanted, alphas=alphas)
        weight = fitted.weight[:, 0]
        start = float(fitted.bias[0, 0] - fitted.mean[0] @ weight)
        own_count, own_label = float(fold.count), float(fold.total[target])
        along = float(weight @ fold.total[source])
        count, label, score = count + own_count, label + own_label, score + along + start * own_count
        square += float(weight @ fold.outer[source, source] @ weight)
        square += 2 * start * along + start**2 * own_count
        agreement += float(weight @ fold.outer[source, target]) + start * own_label
    high, low = (count + label) / 2, (count - label) / 2  # patients of either class
    of_high, of_low = (score + agreement) / 2 / high, (score - agreement) / 2 / low
    spread = (square - high * of_high**2 - low * of_low**2) / max(count - 2, 1)
    slope = max(of_high - of_low, 0.0) / max(spread, 1e-12)
    offset = math.log(high / low) - slope * (of_high + of_low) / 2
    return LinearMap(ridge.mean, ridge.rotate, slope * ridge.shrunk, slope * ridge.bias + offset, ridge.alpha)
