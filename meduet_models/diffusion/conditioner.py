"""The conditioner: from latents to what the diffusion transformer is told, by a frozen pretrained encoder.

Content is the encoder's content tokens, without the site's directions. Style is a short code of the frozen
VAE's statistics, not a learned feature: mean and log deviation of each channel and, for registered crops, of
each cell of a coarse map, on the federation's common scale. So the code of a scan and the code of a site in
the style bank have one meaning, and a site's style can be asked for where none of its scans are.

What this file does not do: it learns nothing and draws nothing. A code is a statistic of one scan: it leaves
a site only as latents do.

Axes: b = scans, n = tokens, k = content channels, s = numbers in a style code, c d h w = latents.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from meduet_models.diffusion.conditions import Condition, Conditions, ConditionSizes, Examples
from meduet_models.meduet import FactorNetwork, NetworkConfig
from meduet_models.style.moments import SMALLEST_DEVIATION, StyleEntry, coarse_map


class Conditioner:
    """A frozen encoder, asked for content tokens and style codes. Works on the encoder's device."""

    def __init__(self, encoder: FactorNetwork, *, maps: bool) -> None:
        """`maps`: style codes hold the coarse maps (registered crops: `plan.volumes.registered`)."""
        self.encoder = encoder
        self.maps = maps
        config = encoder.config
        self._map_grid = config.style_map_grid if maps else None

    @property
    def device(self) -> torch.device:
        """Where the encoder is."""
        return self.encoder.latent_mean.device

    @torch.no_grad()
    def content(self, latents: Float[Tensor, "b c d h w"]) -> Float[Tensor, "b n k"]:
        """Content tokens of raw latents: layer-normed, erased."""
        return self.encoder.content_tokens(latents.to(self.device))

    @torch.no_grad()
    def style(self, latents: Float[Tensor, "b c d h w"]) -> Float[Tensor, "b s"]:
        """The style code of each scan, from its own statistics."""
        return self.style_of(entries_of_scans(latents.to(self.device), self._map_grid))

    @torch.no_grad()
    def style_of(self, entry: StyleEntry) -> Float[Tensor, "*b s"]:
        """The code of a style entry, a site's or a scan's: what differs from the federation's centre, over
        its scale.

        Raises `ValueError` when the entry lacks the coarse maps that the codes hold, or has maps that they do
        not.
        """
        entry = entry.each(lambda values: values.to(self.device))
        centre, scale = self.encoder.latent_mean, self.encoder.latent_deviation
        parts = [(entry.mean - centre.mean((1, 2, 3))) / scale, (entry.deviation / scale).log()]
        if (entry.map is not None) is not self.maps or (entry.map_deviation is not None) is not self.maps:
            with_maps = "with" if self.maps else "without"
            raise ValueError(
                f"Expected a style {with_maps} coarse maps, as this model's codes are; got the other kind. "
                "Bank and model come from different plans (volumes.registered)."
            )
        if entry.map is not None and entry.map_deviation is not None and self._map_grid is not None:
            if tuple(entry.map.shape[-3:]) != self._map_grid:
                raise ValueError(
                    f"Expected coarse maps of {self._map_grid} cells; got {tuple(entry.map.shape[-3:])}."
                )
            per_channel = scale.reshape(-1, 1, 1, 1)
            centre_map = coarse_map(centre[None], self._map_grid)[0]
            parts.append(((entry.map - centre_map) / per_channel).flatten(-4))
            parts.append((entry.map_deviation / per_channel).log().flatten(-4))
        return torch.cat(parts, dim=-1)

    def conditions(
        self,
        examples: Examples,
        names: Sequence[Condition],
        style_codes: Float[Tensor, "b s"] | None = None,
    ) -> Conditions:
        """What is told of these examples: the conditions in `names`, on the encoder's device.

        `style_codes`: told instead of each scan's own.
        """
        content = style = None
        if "content" in names:
            content = self.content(examples.latents)
        if "style" in names:
            style = self.style(examples.latents) if style_codes is None else style_codes.to(self.device)
        return Conditions(
            content=content,
            style=style,
            body_part=examples.body_part.to(self.device) if "body_part" in names else None,
            spacing=examples.spacing.to(self.device) if "spacing" in names else None,
            category=examples.category.to(self.device) if "category" in names else None,
            label_map=examples.label_map.to(self.device)
            if "label_map" in names and examples.label_map is not None
            else None,
        )


def entries_of_scans(
    latents: Float[Tensor, "b c d h w"], map_grid: tuple[int, int, int] | None
) -> StyleEntry:
    """The style entry of each scan by itself: that of a site with this one scan, unclipped."""
    mean = latents.mean((2, 3, 4))
    second = latents.square().mean((2, 3, 4))
    if map_grid is None:
        return StyleEntry(mean=mean, deviation=_deviation(second - mean.square()))
    coarse = coarse_map(latents, map_grid)
    within = coarse_map(latents.square(), map_grid) - coarse.square()
    return StyleEntry(
        mean=mean,
        deviation=_deviation(second - coarse.square().mean((2, 3, 4))),
        map=coarse,
        map_deviation=_deviation(within),
    )


def condition_sizes(
    network: NetworkConfig,
    names: Sequence[Condition],
    *,
    maps: bool,
    body_parts: int,
    categories: int,
    labels: int,
) -> ConditionSizes:
    """Sizes of the conditions in `names`, of this encoder and this plan."""
    numbers = 2 * network.latent_channels
    if maps:
        x, y, z = network.style_map_grid
        numbers *= 1 + x * y * z
    return ConditionSizes(
        content=network.width if "content" in names else 0,
        content_grid=network.token_grid if "content" in names else (0, 0, 0),
        style=numbers if "style" in names else 0,
        body_part=body_parts if "body_part" in names else 0,
        spacing="spacing" in names,
        category=categories if "category" in names else 0,
        label_map=labels if "label_map" in names else 0,
    )


def _deviation(variance: Tensor) -> Tensor:
    return variance.clamp(min=SMALLEST_DEVIATION**2).sqrt()
