"""The table of a downstream evaluation: what has no prose is shown by its name."""

from pathlib import Path

from simulations.downstream.evaluate import DownstreamRow
from simulations.downstream.report import write_downstream


def test_a_mode_and_a_metric_that_nobody_described_are_shown_by_their_names(tmp_path: Path) -> None:
    row = DownstreamRow("guessing", "dreamt", "100%", "seen", "luck", 0.5, 0.4, 0.6, 5, 0, 9)
    page = write_downstream(tmp_path, [row], {}).read_text()
    assert "dreamt" in page and "luck" in page and "guessing" in page
