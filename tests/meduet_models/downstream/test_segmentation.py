"""Overlap and distances against values computed by hand; the loss."""

import numpy as np
import pytest
import torch

from meduet_models.downstream.segmentation import Segmentation, likeliest, segmentation_values


def cube(start: int, label: int = 1, edge: int = 4) -> torch.Tensor:
    volume = torch.zeros(1, 1, 12, 12, 12, dtype=torch.long)
    volume[0, 0, start : start + edge, 4 : 4 + edge, 4 : 4 + edge] = label
    return volume


def values(predicted: torch.Tensor, truth: torch.Tensor, **changes: object) -> dict[str, float]:
    settings = {"classes": 2, "spacing_mm": (1.0, 1.0, 1.0), "tolerance_mm": 1.0} | changes
    found = segmentation_values(predicted, truth, **settings)  # type: ignore[arg-type]
    return {name: float(own[0]) for name, own in found.items()}


def test_a_cube_shifted_by_a_voxel() -> None:
    found = values(cube(4), cube(5))
    assert found["dice"] == pytest.approx(2 * 48 / 128)
    assert found["surface_dice"] == 1.0  # every surface voxel lies within 1 mm of the other surface
    assert found["hd95"] == pytest.approx(1.0)
    strict = values(cube(4), cube(5), tolerance_mm=0.5)
    assert 0 < strict["surface_dice"] < 1


def test_distances_are_in_millimetres() -> None:
    assert values(cube(4), cube(5), spacing_mm=(3.0, 1.0, 1.0))["hd95"] == pytest.approx(3.0)
    assert values(cube(4), cube(5), spacing_mm=(3.0, 1.0, 1.0))["surface_dice"] < 1
    assert values(cube(3), cube(5))["hd95"] == pytest.approx(2.0)


def test_a_perfect_answer() -> None:
    assert values(cube(4), cube(4)) == {"dice": 1.0, "surface_dice": 1.0, "hd95": 0.0}


def test_a_missed_class_has_no_overlap_and_no_distance() -> None:
    found = values(torch.zeros_like(cube(4)), cube(4))
    assert (found["dice"], found["surface_dice"]) == (0.0, 0.0)
    assert np.isnan(found["hd95"])


def test_a_class_that_is_not_there_has_no_value() -> None:
    nothing = values(torch.zeros_like(cube(4)), torch.zeros_like(cube(4)))
    assert all(np.isnan(value) for value in nothing.values())
    one_of_two = values(cube(4), cube(5), classes=3)
    assert one_of_two["dice"] == pytest.approx(0.75)


def test_the_loss_of_a_perfect_answer_is_nothing() -> None:
    labels = cube(4)
    sure = torch.cat([1 - labels, labels], dim=1).float() * 100 - 50
    assert float(Segmentation().loss(sure, labels)) < 1e-3
    assert float(Segmentation().loss(-sure, labels)) > 10
    assert Segmentation().score(sure, labels) == 1.0


def test_the_likeliest_class_is_the_first_of_equals_and_what_is_no_number_wins() -> None:
    outputs = torch.randint(0, 3, (2, 5, 4, 6, 8), generator=torch.Generator().manual_seed(0)).float()
    outputs[0, 2, 1] = torch.nan
    assert torch.equal(likeliest(outputs), outputs.argmax(dim=1, keepdim=True))
