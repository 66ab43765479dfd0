from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from client.latents.examples import SiteExamples, examples_of
from federation.plan.diffusion_plan import DiffusionPlan
from federation.plan.plan import RunPlan, StylePlan
from meduet_models.diffusion.settings import DiffusionTraining, TransformerShape
from scans.volumes import Geometry, ras_spacing
from tests.worlds import KnownScans

SHAPE = TransformerShape(patch_size=2, width=12, depth=1, heads=2)


class Scans(KnownScans):
    """Four scans of a site: three for training, one of them without a label."""

    def __init__(self) -> None:
        super().__init__(1, 4, held_out=1)
        draws = torch.Generator().manual_seed(3)
        self.label = (torch.rand(4, 1, 16, 24, 16, generator=draws) * 3).long()
        self.covariates = [
            {"body_part": "head", "grade": 2.0},
            {"body_part": "neck", "grade": 1.0},
            {"body_part": "head"},
            {"body_part": "head", "grade": 1.0},
        ]
        self.has_label = [True, True, False, True]

    def geometry(self, row: int, view: int = 0) -> Geometry:
        # voxel axes run towards posterior, right, superior; the spacings differ
        affine = np.array([[0, 0.5 + row, 0, 9], [-2.0, 0, 0, 1], [0, 0, 3.0, 0], [0, 0, 0, 1]])
        return Geometry(affine, (8, 8, 8), np.eye(4), (16, 24, 16))


@pytest.fixture
def plan(toy_plan: Callable[..., RunPlan]) -> RunPlan:
    diffusion = DiffusionPlan(
        policy="raw",
        transformer=SHAPE,
        training=DiffusionTraining(),
        conditions=("content", "category", "label_map", "body_part", "spacing"),
        category="grade",
        categories=("1", "2"),
        labels=3,
    )
    style = StylePlan(minimum_cohort=3, body_parts=("neck", "head"))
    plan: Any = toy_plan(style=style, diffusion=diffusion)
    return plan


def test_everything_known_of_a_scan_is_told_and_the_unknown_is_said_to_be_unknown(plan: RunPlan) -> None:
    scans = Scans()
    examples = examples_of(scans, [2, 0, 1], plan)
    assert torch.equal(examples.latents, scans.values[[2, 0, 1]])
    assert examples.site.tolist() == [1, 1, 1]
    assert examples.body_part.tolist() == [1, 1, 0]
    assert examples.category.tolist() == [-1, 1, 0]
    assert examples.label_map is not None
    assert examples.label_map[0].isnan().all() and not examples.label_map[1:].isnan().any()


def test_spacing_is_along_right_anterior_superior_whatever_the_order_of_the_voxels(plan: RunPlan) -> None:
    assert examples_of(Scans(), [0, 1], plan).spacing.tolist() == [[0.5, 2.0, 3.0], [1.5, 2.0, 3.0]]
    turned = np.array([[0.1, 0, 2.0, 0], [0, 3.0, 0.1, 0], [-4.0, 0, 0, 0], [0, 0, 0, 1]])
    spacing = ras_spacing(Geometry(turned, (8, 8, 8), np.eye(4), (8, 8, 8)))
    np.testing.assert_allclose(spacing, [2.0025, 3.0, 4.0013], rtol=1e-4)


def test_a_label_map_holds_the_share_of_each_label_in_each_latent_voxel(plan: RunPlan) -> None:
    scans = Scans()
    maps = examples_of(scans, [0], plan).label_map
    assert maps is not None and maps.shape == (1, 3, 4, 6, 4)
    block = scans.label[0, 0, 8:12, 4:8, 0:4]
    shares = [float((block == value).float().mean()) for value in range(3)]
    assert maps[0, :, 2, 1, 0].tolist() == pytest.approx(shares, abs=1e-6)
    torch.testing.assert_close(maps.sum(1), torch.ones(1, 4, 6, 4))


def test_a_site_without_labels_or_a_plan_without_any_tells_none(plan: RunPlan) -> None:
    assert plan.diffusion is not None
    silent = replace(plan, diffusion=replace(plan.diffusion, conditions=("content",), category="",
                                             categories=(), labels=0))  # fmt: skip
    examples = examples_of(Scans(), [0, 1], silent)
    assert examples.label_map is None and examples.category.tolist() == [-1, -1]
    nobody = replace(silent, style=StylePlan(minimum_cohort=3), diffusion=None)
    assert examples_of(Scans(), [0, 1], nobody).body_part.tolist() == [-1, -1]


def test_a_value_that_the_plan_does_not_name_is_refused(plan: RunPlan) -> None:
    scans = Scans()
    scans.covariates[1]["grade"] = 7.0
    with pytest.raises(ValueError, match=r"grade to be one of 1, 2 .*'7'"):
        examples_of(scans, [0, 1], plan)
    scans = Scans()
    scans.label[1] += 1
    with pytest.raises(ValueError, match="labels from 0 to 2"):
        examples_of(scans, [1], plan)


def test_a_number_is_always_the_same_training_scan(plan: RunPlan) -> None:
    source = SiteExamples(Scans(), plan)
    assert len(source) == 3
    assert torch.equal(source.read(torch.tensor([2, 0, 2])).latents, Scans().values[[2, 0, 2]])
    with pytest.raises(IndexError):
        source.read(torch.tensor([3]))
