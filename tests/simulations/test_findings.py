"""What a page says first: what takes the numbers back, and nothing where there is nothing."""

from typing import Any

import pytest

from simulations.findings import about_content, at_its_start, findings_of

GOOD: dict[str, Any] = {
    "hidden_error": 0.35, "hidden_error_ridge": 0.4, "anatomy_from_content": 0.5, "anatomy_from_style": 0.1,
    "style_gap_closed": 0.6, "alignment": 0.9, "alignment_passed": 1.0, "chance_site": 0.25,
    "site_from_content": 0.3, "site_from_content_fitted": 0.25, "fitted_patients_per_site": 24.0,
    "fresh_patients_per_site": 9.0, "site_from_covariates": 0.27,
}  # fmt: skip


def test_numbers_that_say_what_they_seem_to_say_are_not_commented() -> None:
    assert findings_of(GOOD) == [] == findings_of({})
    assert about_content("hospital from content", GOOD) == "hospital from content"


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"hidden_error": 0.71}, "Network at its start"),
        ({"hidden_error": 0.6}, "has not learned what neighbours tell"),
        ({"anatomy_from_style": 0.52}, "Style knows more anatomy than content: R² 0.52"),
        (
            {"anatomy_from_content": -0.07, "anatomy_from_style": -0.01},
            "Anatomy is read from neither: R² -0.07",
        ),
        ({"style_gap_closed": -1.28}, "gap closed -1.28"),
        ({"alignment_passed": 0.0}, "alignment of the style heads failed"),
        ({"site_from_content": 0.48}, "48% (9 patients per site) against 25% (24)"),
        ({"site_from_covariates": 0.4}, "Age and sex alone tell the hospital: 40%"),
    ],
)
def test_what_takes_a_number_back_is_said(changed: dict[str, float], said: str) -> None:
    (sentence,) = findings_of(GOOD | changed)
    assert said in sentence


def test_every_statement_about_content_is_one_about_a_network_at_its_start() -> None:
    start = GOOD | {"hidden_error": 0.89}
    assert at_its_start(start) and not at_its_start({})
    assert about_content("patient from content", start) == "patient from content (network at its start)"
    assert about_content("patient from style", start) == "patient from style"


def test_a_network_that_is_not_above_a_map_that_reads_no_scan_says_so() -> None:
    compared = {
        "task": "segmentation", "metric": "Dice", "test": "seen", "labels": "100%", "who": "this network",
        "rival": "label_map", "difference": 0.01, "low": -0.01, "high": 0.03,
    }  # fmt: skip
    said = findings_of(GOOD | {"labels": {"dice": {}, "comparisons": [compared]}})
    assert "not above the mean training label, which reads no scan" in said[0] and "withdrawn" in said[1]
    assert findings_of(GOOD | {"labels": {"comparisons": [compared | {"low": 0.001}]}}) == []
