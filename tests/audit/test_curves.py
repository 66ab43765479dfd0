"""Curves, pictures and subgroups of a report: right, readable without scripts, and named."""

import base64
import dataclasses
import io
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.image import imread

from audit.attacks.by_kind import audit
from audit.attacks.scores import Scores, judged, worst_group
from audit.effort import QUICK
from audit.gallery import picture
from audit.policy import Policy, decide
from audit.record.curves import SIDE, curves
from audit.record.page import page_of
from audit.record.record import Record, record_of
from audit.statistics.intervals import area, roc
from tests.audit.released import Answered, toy_plan
from tests.audit.test_record import ABOUT


def scores(n: int, shift: Any, seed: int = 0, **groups: np.ndarray) -> Scores:
    """As many members as others, members higher by `shift`."""
    draws, member = np.random.default_rng(seed), np.arange(2 * n) < n
    return Scores(draws.normal(size=2 * n) + shift * member, member, np.zeros(2 * n, int), groups)


def test_the_area_below_the_corners_is_the_area_also_with_ties() -> None:
    for values in (scores(50, 1.0), dataclasses.replace(scores(50, 1.0), values=np.arange(100) // 7 * -1.0)):
        x, y = np.array(roc(values.inside, values.outside)).T
        assert abs(np.trapezoid(y, x) - area(values.inside, values.outside)) < 1e-3
        assert (x[0], y[0], x[-1], y[-1]) == (0, 0, 1, 1)


def test_the_worst_subgroup_is_named_and_small_ones_are_not_looked_at() -> None:
    sex = np.tile(np.array(["F", "M"]), 60)
    few = np.where(np.arange(120) < 10, "old", "young")
    own = scores(60, 2.0 * (sex == "M"), sex=sex, age=few)
    worst = worst_group(own)
    assert worst is not None and worst[0] == "sex M" and worst[1] > 0.85
    finding = judged("toy", "loss", own, "")
    assert finding.worst_group == "sex M" and (finding.value or 1) < worst[1]
    assert worst_group(scores(60, 1.0, age=few)) is None  # ten are too few, and one subgroup is no comparison


def test_a_picture_is_a_file_with_a_row_for_each_volume_and_a_column_for_each_list() -> None:
    volumes = torch.rand(3, 1, 8, 6, 4, generator=torch.Generator().manual_seed(0))
    one = picture("left; right.", [volumes, volumes.zero_()])
    image = imread(io.BytesIO(base64.b64decode(one.png)), format="png")
    assert image.shape[:2] == (3 * (6 + 4), 2 * (8 + 4)) and float(image[5, -6, 0]) == 0.0


def record(folder: Path) -> Record:
    evidence = Answered(folder, 30, 30, toy_plan()).ask("survey", "erasure").evidence()
    audited = audit(evidence, QUICK, lambda text: None)
    decision = decide(Policy(), audited.findings, {}, audited.behind)
    return record_of(evidence, audited, Policy(), decision, None, ABOUT)


def test_the_page_draws_each_curve_from_the_record_and_says_in_words_what_is_drawn(tmp_path: Path) -> None:
    made = record(tmp_path)
    (drawn, *_) = curves(made.artefacts)
    assert "ROC curves of north: " in drawn.alt and all(f"{line.name} " in drawn.alt for line in drawn.lines)
    for point in " ".join(line.points for line in drawn.lines).split():
        assert all(0 <= float(part) <= SIDE for part in point.split(","))
    page = page_of(made)
    assert page.count('role="img"') == len(curves(made.artefacts)) and "<script" not in page
    assert page.count("<img ") == 0 and "What it looks like" not in page


def test_pictures_of_patients_are_on_the_page_and_called_that(tmp_path: Path) -> None:
    made = record(tmp_path)
    shown = picture("one <b>; two.", [torch.zeros(1, 1, 4, 4, 4)] * 2)
    first = made.artefacts[1]
    finding = dataclasses.replace(first.findings[0], pictures=(shown,))
    with_one = dataclasses.replace(
        made, artefacts=(dataclasses.replace(first, findings=(finding,)), *made.artefacts[2:])
    )
    page = page_of(with_one)
    assert page.count("<img ") == page.count("data:image/png;base64,") == 1
    assert "These are pictures of patients." in page and "one &lt;b&gt;" in page and "one <b>" not in page
