"""What a page says first: everything in a run's numbers that takes back what the numbers below seem to say.

Sentences, worst first. Nothing good is said here.
What this file does not do: it measures nothing.
"""

from collections.abc import Mapping
from typing import Any

from meduet_models.probes.hidden import AT_ITS_START
from simulations.downstream.comparisons import Comparison, sentences

START = "network at its start"
_FRESH_ABOVE_FITTED, _COVARIATES_TELL = 0.1, 0.05


def at_its_start(measured: Mapping[str, Any]) -> bool:
    """Whether the network has learned next to nothing about what it does not see."""
    error = measured.get("hidden_error")
    return error is not None and error > AT_ITS_START


def about_content(label: str, measured: Mapping[str, Any]) -> str:
    """A statement about content, told to be one about a network at its start where it is."""
    return f"{label} ({START})" if "content" in label and at_its_start(measured) else label


def findings_of(measured: Mapping[str, Any]) -> list[str]:
    """Sentences about what an observer measured at the end of a run (`evaluation.py`, `yardsticks.py`)."""

    def read(name: str) -> float | None:
        value = measured.get(name)
        return None if value is None else float(value)

    said = []
    hidden, ridge = read("hidden_error"), read("hidden_error_ridge")
    if hidden is not None and ridge is not None:
        beside = (
            f"error at hidden tokens {hidden:.2f} (1: nothing learned), ridge from the visible neighbours "
            f"{ridge:.2f}"
        )
        if at_its_start(measured):
            said.append(
                f"{START.capitalize()}: {beside}. Every statement about content is about such a network."
            )
        elif hidden > ridge:
            said.append(f"The network has not learned what neighbours tell a ridge: {beside}.")
    content, style = read("anatomy_from_content"), read("anatomy_from_style")
    if content is not None and style is not None and max(content, style) <= 0:
        said.append(
            f"Anatomy is read from neither: R² {content:.2f} from content, {style:.2f} from style. So few "
            "patients, or so short a training, do not tell which of the two holds it."
        )
    elif content is not None and style is not None and style > content:
        said.append(
            f"Style knows more anatomy than content: R² {style:.2f} from style, {content:.2f} from content. "
            "What is exchanged as style is not free of anatomy."
        )
    gap = read("style_gap_closed")
    if gap is not None and gap < 0:
        said.append(f"A swap moves scans away from the other hospital's style: gap closed {gap:.2f}.")
    if measured.get("alignment_passed") == 0.0:
        said.append(
            f"The alignment of the style heads failed ({measured['alignment']:.2f} of 1 at the worst pair of "
            "sites): no style token may be used at another site."
        )
    said += _of_the_site(read)
    comparisons = [Comparison(**one) for one in measured.get("labels", {}).get("comparisons", [])]
    said += [text for text in sentences(comparisons) if "above every" not in text]
    return said


def _of_the_site(read: Any) -> list[str]:
    said, chance = [], read("chance_site")
    fitted_on, fresh_of = read("fitted_patients_per_site"), read("fresh_patients_per_site")
    for factor in ("content", "code"):
        fitted, fresh = read(f"site_from_{factor}_fitted"), read(f"site_from_{factor}")
        if fitted is not None and fresh is not None and fresh > fitted + _FRESH_ABOVE_FITTED:
            said.append(
                f"The hospital is read from {factor} of fresh people more often than of those the "
                f"erasure was fitted on: {fresh:.0%} ({fresh_of:.0f} patients per site) against {fitted:.0%} "
                f"({fitted_on:.0f})."
            )
    alone = read("site_from_covariates")
    if alone is not None and chance is not None and alone > chance + _COVARIATES_TELL:
        said.append(
            f"Age and sex alone tell the hospital: {alone:.0%} (chance {chance:.0%}). A probe of content "
            "that reads no more than that reads who the patients are, not the scanner."
        )
    return said
