import pytest
import torch
from torch import Tensor

from meduet_models.probes.anatomy import anatomy_probe
from meduet_models.style.axes import MOST_AXES, StyleAxes

STATISTICS = 20


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def of_age(age: Tensor) -> Tensor:
    """Statistics that age moves in one direction, and much else in others; the same direction every time."""
    return 3 * age[:, None] * normal(STATISTICS, seed=1) + normal(len(age), STATISTICS, seed=2 + len(age))


def in_styles(scans: Tensor, styles: int, apart: float = 8.0) -> Tensor:
    return torch.stack([scans + apart * normal(STATISTICS, seed=100 + s) for s in range(styles)])


def along(axes: StyleAxes, statistics: Tensor) -> Tensor:
    return axes.centre + (statistics - axes.centre) @ axes.read.T @ axes.back.T


def test_every_style_that_axes_are_fitted_on_is_read_exactly() -> None:
    seen = in_styles(of_age(normal(12, seed=0)), styles=4)
    axes, styles = StyleAxes.of(seen), seen.mean(1)

    assert axes.read.shape == (3, STATISTICS)
    torch.testing.assert_close(along(axes, styles), styles)
    torch.testing.assert_close(axes.read @ axes.back, torch.eye(3, dtype=torch.float64))


def test_age_is_read_from_statistics_and_not_from_where_they_lie_along_the_axes() -> None:
    axes = StyleAxes.of(in_styles(of_age(normal(40, seed=0)), styles=3))
    age = normal(300, seed=5)
    fresh, who = in_styles(of_age(age), styles=3)[1], [str(i) for i in range(300)]

    without, with_axes = (anatomy_probe(x, age[:, None], who, 0) for x in (fresh, along(axes, fresh)))

    assert float(without) > 0.9
    assert float(with_axes) < 0.05


def test_styles_that_differ_less_than_scans_do_give_no_axes() -> None:
    axes = StyleAxes.of(in_styles(of_age(normal(40, seed=0)), styles=3, apart=0.01))
    assert axes.read.shape == (0, STATISTICS) and axes.back.shape == (STATISTICS, 0)


def test_there_are_at_most_so_many_axes() -> None:
    assert len(StyleAxes.of(in_styles(normal(30, STATISTICS, seed=0), styles=12)).read) == MOST_AXES


def test_statistics_that_never_vary_do_no_harm() -> None:
    seen = in_styles(of_age(normal(12, seed=0)), styles=3)
    seen[..., 0] = 1.0
    axes = StyleAxes.of(seen)
    assert bool(torch.isfinite(axes.read).all())
    torch.testing.assert_close(along(axes, seen.mean(1)), seen.mean(1))


@pytest.mark.parametrize(("styles", "scans"), [(1, 9), (3, 1)])
def test_one_style_or_one_scan_has_no_axes(styles: int, scans: int) -> None:
    with pytest.raises(ValueError, match="at least two scans in two styles"):
        StyleAxes.of(torch.zeros(styles, scans, 3))
