"""ROC curves of a report as lines in a square, both axes in powers of ten: few false alarms are what counts.

What this file does not do: measure; every point stands in the record.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from audit.record.record import ArtefactRow, FindingRow

SIDE = 240
DECADES = 3
"""From one in a thousand to all; fewer false alarms than that are at the left edge."""
_COLOURS = ("#16324f", "#b3261e", "#1a7f4b", "#8a6100", "#6a3fa0", "#00707a")
_DASHES = ("", "6 3", "2 3", "8 3 2 3")


@dataclass(frozen=True)
class Line:
    """A curve."""

    name: str
    points: str
    """Of an SVG polyline in a square of `SIDE`."""
    colour: str
    dash: str


@dataclass(frozen=True)
class Curves:
    """The curves of one artefact."""

    artefact: str
    lines: tuple[Line, ...]
    chance: str
    """The line of who guesses."""
    alt: str


def curves(artefacts: Sequence[ArtefactRow]) -> list[Curves]:
    """A figure for each artefact of which anything was ranked."""
    drawn = []
    for artefact in artefacts:
        ranked = [one for one in artefact.findings if one.roc]
        lines = tuple(
            Line(
                f"{one.attack} {number + 1}" if _several(one, ranked) else one.attack,
                _points(one.roc),
                _COLOURS[number % len(_COLOURS)],
                _DASHES[number // len(_COLOURS) % len(_DASHES)],
            )
            for number, one in enumerate(ranked)
        )
        if lines:
            areas = ", ".join(f"{one.attack} {one.value:.2f}" for one in ranked if one.value is not None)
            alt = f"ROC curves of {artefact.name}, both axes logarithmic; areas: {areas}."
            drawn.append(Curves(artefact.name, lines, _points(_CHANCE), alt))
    return drawn


_CHANCE = tuple((10 ** (n / 8 - DECADES),) * 2 for n in range(8 * DECADES + 1))


def _several(one: FindingRow, ranked: Sequence[FindingRow]) -> bool:
    return sum(other.attack == one.attack for other in ranked) > 1


def _points(corners: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{SIDE * _share(x):.1f},{SIDE * (1 - _share(y)):.1f}" for x, y in corners)


def _share(value: float) -> float:
    """Where a rate lies along an axis, from 0 to 1."""
    return max(0.0, 1 + math.log10(value) / DECADES) if value > 0 else 0.0
