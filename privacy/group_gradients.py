"""Gradients per group of a loss that mixes the scans of a group: exact, in one pass; and their clipped sum.

A loss that mixes scans has no gradient of one scan: what per-sample clipping cuts depends on everybody in the
batch, and taking one away moved its sum by 2.6 (8 scans) to 9.8 (128) times the bound. It has a gradient of
each group that meets no other. A layer's parameters get it from the layer's input and the gradient at its
output: hooks keep the one, wait for the other, and multiply the two group by group (as Opacus' hooks do, scan
by scan).

What it takes: a batch of equal groups, one after the other, whose loss is the mean over groups of each
group's own; layers that treat rows alone, called as modules, on rows that are the batch's, stacked any number
of times. What this file does not do: check that a loss keeps its groups apart, draw who is in a step, add
noise, count epsilon. A term of the weights alone (a tether) is not seen: add it after the noise.

Axes: g = groups, s = stacked batches, r = rows of a group in one of them, t = tokens, i = inputs, o = outputs
of a layer.
Source: per-example gradients by hooks (arXiv:1510.01799); DP-SGD (arXiv:1607.00133).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import TracebackType

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle

_ROUNDING = 2.0**-20
"""Head-room for rounding, of norms and of sums."""


def parameters_of_layers(module: nn.Module) -> tuple[str, ...]:
    """Names of the parameters that have a gradient per group: those of `nn.Linear` and `nn.LayerNorm` (not of
    what is derived from them). All others must be frozen."""
    own = {id(p) for layer in module.modules() if _is_covered(layer) for p in layer.parameters(recurse=False)}
    return tuple(name for name, parameter in module.named_parameters() if id(parameter) in own)


class GroupGradients:
    """A context around forward and backward of one batch; afterwards `gradients` has each group's own.

    Inside, the parameters rest: no gradient of the batch as a whole is computed, and `.grad` stays as it was.

    Guarantee: row r of a layer's input counts for group `r % (groups * group_size) // group_size` alone. If
    the loss and the layers keep groups apart, so do the gradients, not finite ones included, to rounding (how
    many groups a batch has may change a gradient by some 1e-7 of itself). Not covered: a layer whose first
    axis is not the batch's, or whose weights are used without calling it.
    """

    def __init__(self, module: nn.Module, names: Sequence[str], groups: int, group_size: int) -> None:
        """`names`: all that is trainable in `module`, as it names its parameters.

        Raises `ValueError` for a compiled module, for a name that is unknown or that no layer gives a
        gradient, and for a trainable parameter without a name here.
        """
        if groups < 1 or group_size < 1:
            raise ValueError(
                f"Expected at least one group of at least one scan; got {groups} of {group_size}."
            )
        if any(hasattr(m, "_orig_mod") or m._compiled_call_impl is not None for m in module.modules()):
            raise ValueError("Expected a module that is not compiled: torch.compile leaves hooks out.")
        parameters, covered = dict(module.named_parameters()), set(parameters_of_layers(module))
        if unknown := [name for name in names if name not in parameters]:
            raise ValueError(f"Expected names of parameters; the module has no {unknown[0]}.")
        if without := [name for name in names if name not in covered]:
            raise ValueError(
                f"Expected parameters of linear layers and layer norms; {without[0]} is in neither. Freeze "
                "it, or make it a layer."
            )
        if unnamed := [n for n, p in parameters.items() if p.requires_grad and n not in set(names)]:
            raise ValueError(
                f"Expected every trainable parameter among the names; {unnamed[0]} is not. Freeze it."
            )
        self._groups, self._batch = groups, groups * group_size
        self._parameters = {name: parameters[name] for name in names}
        self._names = {id(parameter): name for name, parameter in self._parameters.items()}
        self._layers = [
            layer
            for layer in module.modules()
            if _is_covered(layer) and any(id(p) in self._names for p in layer.parameters(recurse=False))
        ]
        self._gradients: dict[str, Tensor] = {}
        self._handles: list[RemovableHandle] = []
        self._were_trainable: dict[str, bool] = {}

    def __enter__(self) -> "GroupGradients":
        """Begin to watch."""
        self._were_trainable = {name: p.requires_grad for name, p in self._parameters.items()}
        for parameter in self._parameters.values():
            parameter.requires_grad_(False)
        self._handles = [layer.register_forward_hook(self._called) for layer in self._layers]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Leave the module as it was."""
        for handle in self._handles:
            handle.remove()
        for name, parameter in self._parameters.items():
            parameter.requires_grad_(self._were_trainable[name])

    def gradients(self) -> dict[str, Tensor]:
        """The gradient of each group's own loss, [groups, *shape] for every name.

        Raises `ValueError` when a named parameter has none: the loss did not reach it.
        """
        if missing := [name for name in self._parameters if name not in self._gradients]:
            raise ValueError(
                f"Expected a loss that reaches every named parameter; {missing[0]} got no gradient."
            )
        return {name: self._gradients[name] for name in self._parameters}

    # Hooks

    def _called(self, layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        """Wait for the gradient at `output`."""
        if not torch.is_grad_enabled():
            return
        if len(output) % self._batch:
            name = next(self._names[id(p)] for p in layer.parameters(recurse=False) if id(p) in self._names)
            raise ValueError(
                f"Expected rows of whole batches of {self._batch} at the layer of {name}; got {len(output)}."
            )
        if not output.requires_grad:  # the first of its path: nothing below is trained
            output.requires_grad_()
        output.register_hook(partial(self._reached, layer, inputs[0].detach()))  # type: ignore[no-untyped-call]

    @torch.no_grad()
    def _reached(self, layer: nn.Module, x: Tensor, gradient: Tensor) -> None:
        """Add what this call of the layer gives its parameters, times the number of groups: the loss is their
        mean."""
        stacked = len(x) // self._batch
        if isinstance(layer, nn.Linear) and (weight := self._total(layer.weight)) is not None:
            for inputs, outputs in zip(x.chunk(stacked), gradient.chunk(stacked), strict=True):
                a = outputs.reshape(self._groups, -1, layer.out_features).to(weight.dtype)  # g rt o
                b = inputs.reshape(self._groups, -1, layer.in_features).to(weight.dtype)  # g rt i
                weight.baddbmm_(a.mT, b, alpha=self._groups)
        sums = [(layer.bias, gradient)]
        if isinstance(layer, nn.LayerNorm):
            sums.append((layer.weight, gradient * F.layer_norm(x, layer.normalized_shape, eps=layer.eps)))
        for parameter, values in sums:
            if isinstance(parameter, Tensor) and (total := self._total(parameter)) is not None:
                each = values.to(total.dtype).reshape(stacked, self._groups, -1, *parameter.shape)  # s g rt o
                total.add_(each.sum(dim=(0, 2)), alpha=self._groups)

    def _total(self, parameter: Tensor) -> Tensor | None:
        """Where this parameter's gradients are added up; None when it is not trained."""
        name = self._names.get(id(parameter))
        if name is not None and name not in self._gradients:
            self._gradients[name] = parameter.new_zeros(self._groups, *parameter.shape)
        return None if name is None else self._gradients[name]


def _is_covered(layer: nn.Module) -> bool:
    return type(layer) in (nn.Linear, nn.LayerNorm)  # what is made of them may compute something else


@dataclass(frozen=True)
class ClippedSum:
    """The sum over groups of their clipped gradients; `a + b` is the sum over the groups of both, so a step
    too large for memory is taken some groups at a time."""

    total: dict[str, Tensor]
    """The sum, float64: it is rounded when it has its noise."""
    clipped: int
    """Groups whose gradient was longer than the bound. Exact, so it stays at home."""
    not_finite: int
    """Groups whose gradient held a NaN or an infinity and counts as zero. Exact, so it stays at home."""

    @staticmethod
    def of_none(parameters: Mapping[str, Tensor]) -> "ClippedSum":
        """The sum over no group: a zero for each number of these parameters."""
        zeros = {name: torch.zeros_like(p, dtype=torch.float64) for name, p in parameters.items()}
        return ClippedSum(zeros, clipped=0, not_finite=0)

    def __add__(self, other: "ClippedSum") -> "ClippedSum":
        """The sum over the groups of both."""
        total = {name: tensor + other.total[name] for name, tensor in self.total.items()}
        return ClippedSum(total, self.clipped + other.clipped, self.not_finite + other.not_finite)


def clipped_sum(gradients: Mapping[str, Float[Tensor, "g ..."]], clip_norm: float) -> ClippedSum:
    """Scale each group's gradient, all tensors as one vector, to L2 norm at most `clip_norm`, and add up.

    Guarantee: adding or removing one group changes the sum by at most `clip_norm` in L2; replacing one, by at
    most twice that, whatever its gradient is. It holds for a patient only where she is in one group, and
    nobody's group depends on who else is there. Not covered: the counts beside it. Raises `ValueError` for a
    bound that is not finite and positive.
    """
    if not (math.isfinite(clip_norm) and clip_norm > 0):
        raise ValueError(f"Expected a finite clip_norm > 0; got {clip_norm}.")
    each = [t.reshape(len(t), -1) for t in gradients.values()]  # g p
    norms = torch.stack([torch.linalg.vector_norm(t, dim=1, dtype=torch.float64) for t in each]).norm(
        dim=0
    )  # g
    finite = norms.isfinite()
    factors = (clip_norm * (1 - _ROUNDING) / norms[finite]).clamp(max=1.0)
    total = {
        name: torch.tensordot(factors, tensor[finite].double(), dims=1) for name, tensor in gradients.items()
    }
    return ClippedSum(total, int((norms[finite] > clip_norm).sum()), int((~finite).sum()))
