"""What the diffusion model can be told about a scan, and what it learns from.

`Examples` are latents with what is known of them, however they were obtained; `Conditions` is what the
transformer reads. A condition that is absent, unknown for one sample, or dropped in training becomes that
condition's learned null. What this file does not do: it computes no factor (`conditioner.py`).

Axes: b = samples, n = encoder tokens, k = content channels, s = numbers in a style code, c d h w = latents,
l = label values.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from forms.ranges import Range

Condition = Literal["content", "style", "body_part", "spacing", "category", "label_map"]
CONDITIONS: tuple[Condition, ...] = ("content", "style", "body_part", "spacing", "category", "label_map")
UNKNOWN = -1
"""Body part or class of a sample of which none is known; unknown spacings and label maps are NaN."""


@dataclass(frozen=True, kw_only=True)
class ConditionSizes:
    """What a model can be told; 0 or false where a condition is none of its."""

    content: Annotated[int, Range(at_least=0, at_most=4096)] = 0
    """Channels of a content token."""
    content_grid: Annotated[tuple[int, int, int], Range(at_least=0, at_most=512)] = (0, 0, 0)
    """Content tokens per axis."""
    style: Annotated[int, Range(at_least=0, at_most=1_000_000)] = 0
    """Numbers in a style code."""
    body_part: Annotated[int, Range(at_least=0, at_most=256)] = 0
    """Body parts."""
    spacing: bool = False
    """Whether the spacing of the original scan is told."""
    category: Annotated[int, Range(at_least=0, at_most=1000)] = 0
    """Classes of a scan."""
    label_map: Annotated[int, Range(at_least=0, at_most=1000)] = 0
    """Label values, background included."""

    @property
    def names(self) -> tuple[Condition, ...]:
        """The conditions that the model has, in the order of `CONDITIONS`."""
        return tuple(name for name in CONDITIONS if getattr(self, name))


@dataclass(frozen=True, kw_only=True)
class Conditions:
    """What is told about each of b samples; None: nothing is told to any of them."""

    content: Float[Tensor, "b n k"] | None = None
    style: Float[Tensor, "b s"] | None = None
    body_part: Int[Tensor, " b"] | None = None
    spacing: Float[Tensor, "b 3"] | None = None
    """Millimetres along the RAS axes of the scan before resampling."""
    category: Int[Tensor, " b"] | None = None
    label_map: Float[Tensor, "b l d h w"] | None = None
    """Share of each label value in each latent voxel."""
    dropped: dict[Condition, Bool[Tensor, " b"]] = field(default_factory=dict)
    """Samples that are not told a condition although it is here."""

    def only(self, *names: Condition) -> "Conditions":
        """The same samples, told nothing but these."""
        kept = {name: getattr(self, name) for name in names}
        return Conditions(**kept, dropped={n: mask for n, mask in self.dropped.items() if n in names})

    def each(self, change: Callable[[Tensor], Tensor]) -> "Conditions":
        """With `change` applied to every tensor: a selection of samples, another device."""
        changed = {n: None if (t := getattr(self, n)) is None else change(t) for n in CONDITIONS}
        return Conditions(**changed, dropped={n: change(mask) for n, mask in self.dropped.items()})


@dataclass(frozen=True, kw_only=True)
class Examples:
    """Latents with what is known of them."""

    latents: Float[Tensor, "b c d h w"]
    """As the tokenizer made them."""
    site: Int[Tensor, " b"]
    """Site label: place in the plan's sites."""
    body_part: Int[Tensor, " b"]
    """Place in the plan's `style.body_parts`; -1: unknown."""
    spacing: Float[Tensor, "b 3"]
    """Of the scan before resampling, in mm; NaN: unknown."""
    category: Int[Tensor, " b"]
    """Place in the plan's `diffusion.categories`; -1: unknown."""
    label_map: Float[Tensor, "b l d h w"] | None = None
    """Share of each label value in each latent voxel, NaN throughout where a scan has no label; None: the
    plan tells no labels."""

    def __len__(self) -> int:
        """Samples."""
        return len(self.latents)

    def rows(self, chosen: Tensor) -> "Examples":
        """Some of them."""
        return Examples(
            latents=self.latents[chosen],
            site=self.site[chosen],
            body_part=self.body_part[chosen],
            spacing=self.spacing[chosen],
            category=self.category[chosen],
            label_map=None if self.label_map is None else self.label_map[chosen],
        )

    @staticmethod
    def join(parts: "Sequence[Examples]") -> "Examples":
        """All of several, in order; with label maps where every part has them. Raises `ValueError` when there
        is none."""
        if not parts:
            raise ValueError("Expected at least one set of examples to join; got none.")
        maps = [part.label_map for part in parts if part.label_map is not None]
        return Examples(
            latents=torch.cat([part.latents for part in parts]),
            site=torch.cat([part.site for part in parts]),
            body_part=torch.cat([part.body_part for part in parts]),
            spacing=torch.cat([part.spacing for part in parts]),
            category=torch.cat([part.category for part in parts]),
            label_map=torch.cat(maps) if len(maps) == len(parts) else None,
        )


@runtime_checkable
class ExampleSource(Protocol):
    """Where training draws from: a bank, or a site's own scans."""

    def __len__(self) -> int:
        """Examples there are."""

    def read(self, rows: Int[Tensor, " b"]) -> Examples:
        """These examples, by number from 0; the same number is always the same example."""
