import pytest
import torch
from torch.func import grad, vmap
from torch.nn import functional as F

from meduet_models.objective.adversary import SiteClassifier, reverse_gradient


@pytest.mark.parametrize("strength", [0.0, 0.3, 1.0])
def test_reversal_keeps_the_value_and_turns_the_gradient(strength: float) -> None:
    x = torch.randn(3, 4, requires_grad=True)
    y = reverse_gradient(x, strength)
    (y**3).sum().backward()

    assert torch.equal(y, x)
    assert x.grad is not None
    torch.testing.assert_close(x.grad, -strength * 3 * x.detach() ** 2)


def test_reversal_works_under_per_group_gradients() -> None:
    x = torch.randn(5, 3)
    per_group = vmap(grad(lambda row: (reverse_gradient(row, 0.5) ** 2).sum()))(x)
    torch.testing.assert_close(per_group, -x)


def test_the_classifier_learns_the_site_while_what_is_below_unlearns_it() -> None:
    torch.manual_seed(0)
    site = torch.arange(40) % 2
    x = torch.randn(40, 6) + 2.0 * site.unsqueeze(1)
    below, classifier = torch.nn.Linear(6, 6), SiteClassifier(6, 2)

    def loss() -> torch.Tensor:
        return F.cross_entropy(classifier(reverse_gradient(below(x), 1.0)), site)

    before = loss()
    before.backward()
    with torch.no_grad():
        for parameter in classifier.parameters():
            parameter -= 0.05 * parameter.grad
        assert loss() < before
        for parameter in classifier.parameters():
            parameter += 0.05 * parameter.grad
        for parameter in below.parameters():
            parameter -= 0.05 * parameter.grad
        assert loss() > before
