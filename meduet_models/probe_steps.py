"""Probes that take many exchanges: logistic regression by Newton's steps and a small MLP by full-batch steps.

One code path: `ask` answers a parameter vector with summed loss, gradient and curvature. Pooled, `ask` is the
sums of everybody; federated, it is the sum over sites of theirs. The fitted probe is the same to rounding.

Guarantee of the sums: with features of L2 norm at most R, one patient moves the logistic gradient by at most
her weight times √(2 (R² + 1)) and the curvature by at most her weight times (R² + 1) / 2 (Frobenius); an
MLP's gradient is scaled to `bound` per patient before it is weighted. Not covered: the summed loss. A site
probe gives every site the same total weight, so a patient's weight is 1 / patients of her site.

What this file does not do: it is not asked for in rounds (each step is an exchange); it is for a consortium
that wants to know once, and the proof that nothing is lost.

Axes: b = patients, k = features, s = sites, v = parameters.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Float64
from torch import Tensor


@dataclass(frozen=True)
class StepSums:
    """What a site answers to a parameter vector; `a + b` are the sums of both cohorts."""

    loss: Float64[Tensor, ""]
    """Summed weighted loss."""
    gradient: Float64[Tensor, " v"]
    """Its gradient."""
    curvature: Float64[Tensor, "v v"] | None = None
    """Its Hessian; none for the MLP."""

    def __add__(self, other: "StepSums") -> "StepSums":
        """The sums over both cohorts."""
        both = self.curvature is not None and other.curvature is not None
        if not both and (self.curvature is not None or other.curvature is not None):
            raise ValueError("Expected curvature of both cohorts or of neither; got it of one.")
        curvature = self.curvature + other.curvature if both else None  # type: ignore[operator]
        return StepSums(self.loss + other.loss, self.gradient + other.gradient, curvature)


Ask = Callable[[Float64[Tensor, " v"]], StepSums]


def over_sites(answers: Sequence[Ask]) -> Ask:
    """The question to all sites: the sum of their answers."""

    def ask(parameters: Float64[Tensor, " v"]) -> StepSums:
        first, *others = (answer(parameters) for answer in answers)
        return sum(others, start=first)

    return ask


def logistic_sums(
    features: Float[Tensor, "b k"],
    site: int,
    num_sites: int,
    weight: float,
    parameters: Float64[Tensor, " v"],
) -> StepSums:
    """A site's sums for multinomial logistic regression; parameters are (k + 1) x sites, intercepts last."""
    x = torch.cat([features.double(), torch.ones(len(features), 1, dtype=torch.float64)], dim=1)
    logits = x @ parameters.reshape(x.shape[1], num_sites)
    share = logits.softmax(1)  # b s
    wrong = share.clone()
    wrong[:, site] -= 1
    inner = torch.diag_embed(share) - share[:, :, None] * share[:, None, :]  # b s s
    curvature = torch.einsum("bi,bj,bst->isjt", x, x, inner).reshape(len(parameters), len(parameters))
    loss = -logits.log_softmax(1)[:, site].sum()
    return StepSums(weight * loss, weight * (x.T @ wrong).flatten(), weight * curvature)


def fit_logistic(
    ask: Ask, num_features: int, num_sites: int, penalty: float = 1e-2, steps: int = 12
) -> Float64[Tensor, "i s"]:
    """Newton's steps on the summed loss + penalty / 2 · ‖weights‖²; returns weights with intercepts last.

    Intercepts carry a thousandth of the penalty: without any, a common shift of all of them would have no
    curvature. A step that raises the loss is halved until it does not.
    """
    ridge = torch.full((num_features + 1, num_sites), penalty, dtype=torch.float64)
    ridge[-1] *= 1e-3
    ridge = ridge.flatten()
    parameters = torch.zeros_like(ridge)

    def total(sums: StepSums, at: Tensor) -> float:
        return float(sums.loss + (ridge * at.square()).sum() / 2)

    sums = ask(parameters)
    for _ in range(steps):
        if sums.curvature is None:
            raise ValueError("Expected sums with curvature for Newton's steps; got gradients alone.")
        slope = sums.gradient + ridge * parameters
        step = torch.linalg.solve(sums.curvature + torch.diag(ridge), slope)
        length = 1.0
        while True:
            tried = ask(parameters - length * step)
            if total(tried, parameters - length * step) <= total(sums, parameters) or length < 1e-3:
                break
            length /= 2
        parameters, sums = parameters - length * step, tried
    return parameters.reshape(num_features + 1, num_sites)


@dataclass(frozen=True, kw_only=True)
class MlpShape:
    """A one-hidden-layer network as one parameter vector."""

    num_features: int
    """Numbers read."""
    num_sites: int
    """Sites told apart."""
    hidden: int = 16
    """Hidden units."""

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """Numbers in first weights, first biases, second weights, second biases."""
        return (
            self.num_features * self.hidden,
            self.hidden,
            self.hidden * self.num_sites,
            self.num_sites,
        )

    def start(self, seed: int) -> Float64[Tensor, " v"]:
        """Drawn weights, no biases."""
        generator = torch.Generator().manual_seed(seed)
        first, _, second, _ = self.sizes
        draws = torch.randn(first + second, generator=generator, dtype=torch.float64)
        return torch.cat(
            [
                draws[:first] / self.num_features**0.5,
                torch.zeros(self.hidden, dtype=torch.float64),
                draws[first:] / self.hidden**0.5,
                torch.zeros(self.num_sites, dtype=torch.float64),
            ]
        )

    def logits(
        self, features: Float[Tensor, "*b k"], parameters: Float64[Tensor, " v"]
    ) -> Float64[Tensor, "*b s"]:
        """Logits of the sites."""
        first, bias, second, last = torch.split(parameters, list(self.sizes))
        hidden = torch.tanh(features.double() @ first.reshape(self.num_features, self.hidden) + bias)
        logits: Tensor = hidden @ second.reshape(self.hidden, self.num_sites) + last
        return logits


def mlp_sums(
    features: Float[Tensor, "b k"],
    site: int,
    shape: MlpShape,
    weight: float,
    bound: float,
    parameters: Float64[Tensor, " v"],
) -> StepSums:
    """A site's sums for the MLP: each patient's gradient scaled to L2 norm at most `bound`, then weighted."""

    def loss(at: Tensor, x: Tensor) -> Tensor:
        return -F.log_softmax(shape.logits(x, at), dim=-1)[site]

    value = torch.func.grad_and_value(loss)
    gradients, losses = torch.func.vmap(value, in_dims=(None, 0))(parameters, features.double())
    gradients = gradients * (bound / gradients.norm(dim=1, keepdim=True).clamp(min=bound))
    return StepSums(weight * losses.sum(), weight * gradients.sum(0))


def fit_mlp(
    ask: Ask, shape: MlpShape, seed: int, steps: int = 150, learning_rate: float = 2e-2, penalty: float = 1e-4
) -> Float64[Tensor, " v"]:
    """Adam on the summed gradients, every step one exchange; the same start everywhere from `seed`."""
    parameters = shape.start(seed).requires_grad_()
    optimiser = torch.optim.Adam([parameters], lr=learning_rate)
    for _ in range(steps):
        at = parameters.detach()
        parameters.grad = ask(at).gradient + penalty * at
        optimiser.step()
    return parameters.detach()
