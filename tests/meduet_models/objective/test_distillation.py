import torch

from meduet_models.factors import Factors
from meduet_models.objective.distillation import distil_factors, squared_distance


def test_content_counts_half_and_only_hidden_positions_count() -> None:
    teacher = Factors(torch.zeros(1, 4, 3), torch.zeros(1, 4, 2))
    hidden = torch.tensor([[True, True, False, False]])
    content, style = torch.zeros(1, 4, 3), torch.zeros(1, 4, 2)
    content[0, 0], content[0, 2] = 2.0, 50.0
    style[0, 1], style[0, 3] = 3.0, 50.0

    # content: (4 + 0) / 2, halved; style: (0 + 9) / 2
    assert distil_factors(Factors(content, style), teacher, hidden).item() == 0.5 * 2.0 + 4.5


def test_equal_factors_cost_nothing() -> None:
    factors = Factors(torch.randn(2, 4, 3), torch.randn(2, 4, 2))
    assert distil_factors(factors, factors, torch.ones(2, 4, dtype=torch.bool)).item() == 0.0


def test_the_distance_is_computed_in_float32() -> None:
    a = torch.full((1, 1, 256), 1.0, dtype=torch.bfloat16)
    assert squared_distance(a, a + 0.0625).dtype == torch.float32
    assert squared_distance(a, a + 0.0625).item() == 0.0625**2
