"""`volumes.extent`: what goes with it and what does not, what people are told, what the site checks."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from client.checks.intake import cohort_lines
from client.commands.plan_words import plan_settings, plan_words
from client.scans.cohort import Cohort, ScanEntry
from federation.plan.plan import RunPlan, StylePlan
from federation.published_plan import PublishedPlan
from scans.scans import accept
from scans.volume_plan import VolumePlan
from scans.volumes import kept_share
from tests.client.conftest import make_plan

WHOLE = VolumePlan(modality="mr", shape=(16, 24, 16), registered=False, extent="scan")


def test_crops_are_what_a_plan_means_that_does_not_say() -> None:
    plan = make_plan()
    assert plan.volumes.extent == "crop"
    values = dataclasses.asdict(plan.volumes)
    del values["extent"], values["crop_foreground"]
    assert VolumePlan(**values) == plan.volumes


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"extent": "scan", "registered": True}, "set volumes.registered=false"),
        ({"crop_foreground": 0.5}, "no effect with volumes.extent=crop"),
        ({"extent": "scan", "registered": False, "crop_foreground": 1.5}, "volumes.crop_foreground"),
    ],
)
def test_what_contradicts_whole_scans_is_refused_in_one_line(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said) as refused:
        VolumePlan(modality="mr", **settings)
    assert "\n" not in str(refused.value)


def test_amplitudes_and_full_centres_of_whole_scans_are_refused() -> None:
    for style, said in (
        (StylePlan(exchange="amplitude"), "spectra of crops"),
        (StylePlan(centre="full"), "registered crops"),
    ):
        with pytest.raises(ValueError, match=said):
            make_plan(volumes=WHOLE, style=style)


def test_the_plan_as_people_read_it_says_what_the_extent_means() -> None:
    def words(plan: RunPlan) -> str:
        return " ".join(text for _, text in plan_words(PublishedPlan(plan=plan, bundle_sha256="0" * 64)))

    assert "the central 16 x 24 x 16 voxels" in words(make_plan())
    shown = words(make_plan(volumes=WHOLE))
    assert "all of their foreground" in shown and "crop of 16 x 24 x 16 voxels" in shown and "30%" in shown
    assert "the central 16 x 24 x 16 voxels" not in shown
    assert "plan.volumes.extent = scan" in list(
        plan_settings(PublishedPlan(plan=make_plan(volumes=WHOLE), bundle_sha256="0" * 64))
    )


def test_check_says_what_a_crop_cuts_off_and_nothing_where_all_is_seen() -> None:
    array = np.random.default_rng(0).random((60, 60, 60)).astype(np.float32)
    scan = accept(array, np.eye(4))
    crop = dataclasses.replace(WHOLE, extent="crop")
    assert kept_share(scan, crop) < 0.1 and kept_share(scan, WHOLE) == 1.0

    def said(volumes: VolumePlan) -> list[str]:
        entry = ScanEntry("0", "p", path=Path("a"), files=(), modality="mr", split="train",
                          kept=kept_share(scan, volumes))  # fmt: skip
        return [name for name, *_ in cohort_lines(Cohort(Path(), (entry,), ()), volumes)]

    assert "crop" in said(crop) and "crop" not in said(WHOLE)
