import torch
from torch.nn import functional as F

from meduet_models.factors import (
    Factors,
    StatisticsStyleHead,
    StyleMeter,
    StyleStatistics,
    normalise,
    pooling_weights,
)


def test_normalising_forgets_scale_and_shift_of_a_channel() -> None:
    x = torch.randn(2, 3, 4, 6, 4)
    scale, shift = torch.tensor([0.5, 2.0, 3.0]).reshape(3, 1, 1, 1), torch.randn(3, 1, 1, 1)

    torch.testing.assert_close(normalise(scale * x + shift), normalise(x), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(normalise(x).mean((2, 3, 4)), torch.zeros(2, 3), rtol=0, atol=1e-5)
    torch.testing.assert_close(normalise(x).std((2, 3, 4), correction=0), torch.ones(2, 3))


def test_a_constant_channel_becomes_zero_with_a_finite_gradient() -> None:
    x = torch.full((1, 2, 2, 2, 2), 3.0, requires_grad=True)
    y = normalise(x)
    y.square().sum().backward()
    assert torch.equal(y, torch.zeros_like(y))
    assert x.grad is not None and bool(x.grad.isfinite().all())


def test_the_coarse_map_is_adaptive_average_pooling_also_where_cells_overlap() -> None:
    latents = torch.randn(2, 3, 10, 12, 10)
    measured = StyleMeter((10, 12, 10), (3, 5, 2))(latents)
    torch.testing.assert_close(measured.coarse_map, F.adaptive_avg_pool3d(latents, (3, 5, 2)))


def test_pooling_weights_average() -> None:
    torch.testing.assert_close(pooling_weights(7, 3).sum(0), torch.ones(3))


def test_statistics_are_what_normalising_removed() -> None:
    latents = 3.0 * torch.randn(2, 3, 4, 6, 4) + 1.0
    measured = StyleMeter((4, 6, 4), (2, 3, 2))(latents)
    restored = normalise(latents) * measured.deviation[:, :, None, None, None]
    restored = restored + measured.mean[:, :, None, None, None]
    torch.testing.assert_close(restored, latents, rtol=1e-4, atol=1e-4)


def test_style_tokens_of_one_cell_are_equal_and_follow_their_cell() -> None:
    head = StatisticsStyleHead(2, 6, (4, 3, 2), (2, 1, 1))
    statistics = StyleStatistics(
        torch.randn(1, 2), torch.rand(1, 2) + 0.5, torch.randn(1, 2, 2, 1, 1), torch.rand(1, 2, 2, 1, 1) + 0.5
    )

    style = head(statistics)
    moved = head(
        StyleStatistics(
            statistics.mean,
            statistics.deviation,
            statistics.coarse_map.flip(2),
            statistics.coarse_deviation.flip(2),
        )
    )

    assert style.shape == (1, 24, 6)
    torch.testing.assert_close(style[:, :12], style[:, :1].expand(-1, 12, -1))
    assert not torch.allclose(style[:, 0], style[:, -1])
    torch.testing.assert_close(moved, style.flip(1))


def test_factors_are_indexed_by_volume() -> None:
    factors = Factors(torch.randn(4, 5, 3), torch.randn(4, 5, 2))
    order = torch.tensor([1, 0, 3, 2])
    assert torch.equal(factors[order].content, factors.content[order])
    assert torch.equal(factors[:2].style, factors.style[:2])
