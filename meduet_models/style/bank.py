"""The style bank: every site's style, as it goes out with a round, and restyling scans to its
entries.

The bank holds one `StyleEntry` per site (and body part) in the order of the plan's sites, and the pooled
centre and scale of the latents. A client restyles its own latents to other sites' entries and labels them
with that site: this is what shows it appearances that it has never scanned, on its own anatomy.

What this file does not do: it draws nobody (`objective.draw_step`), makes no entry of a single scan, checks
no reply (`strategies/style_bank.py`), and measures nothing (`style.py`).

Axes: b = scans, s = sites, p = body parts, c = channels, d h w = latent voxels.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from meduet_models.style.moments import (
    SMALLEST_DEVIATION,
    CohortTooSmall,
    StyleEntry,
    StyleLayout,
    StyleMoments,
    restyle,
    smooth_map,
)

_ENTRY = ("mean", "deviation", "map", "map_deviation", "amplitude")
MOST_WEIGHT = 3.0
"""Patients of one site count in the pooled centre and scale at most this many times those of all others
together: a site that claims ever so many patients of nothing makes the scale at most 2 (1 / sqrt(1 - 3/4))
times too small."""
_POSITIVE = ("deviation", "map_deviation", "scale")


@dataclass(frozen=True)
class StyleBank:
    """The styles of a consortium. Sites that have told nothing have a count of 0 and are no target."""

    sites: tuple[str, ...]
    """The plan's sites, in its order: the order of the site labels."""
    count: Float[Tensor, "s p"]
    """Patients behind each entry."""
    entries: StyleEntry
    """Leading axes s p."""
    centre: Float[Tensor, "c d h w"]
    """Mean latents, pooled over all sites that answered."""
    scale: Float[Tensor, " c"]
    """Deviation of the latents around `centre`, pooled."""

    @staticmethod
    def of(
        sites: tuple[str, ...], moments: Mapping[str, StyleMoments], with_entries: bool = True
    ) -> "StyleBank":
        """The bank of the sites that answered.

        Without entries (`style.exchange: none`) only the pooled centre and scale are in it. Raises
        `CohortTooSmall` when no site answered, `ValueError` for a site that is not in the plan.
        """
        if unknown := sorted(set(moments) - set(sites)):
            raise ValueError(f"Expected style sums of the plan's sites; got some of {unknown[0]!r}.")
        if not moments:
            raise CohortTooSmall("Expected style sums of at least one site; got none.")
        first, *others = _weighed(moments).values()
        pooled = sum(others, start=first)
        centre, scale = pooled.latent_scale()
        bank = StyleBank(
            sites, torch.zeros(len(sites), pooled.layout.parts), _blank(sites, pooled.layout), centre, scale
        )
        for site, own in moments.items() if with_entries else ():
            for part in range(pooled.layout.parts):
                if own.sums["count"][part] >= 1:
                    bank._put(site, part, float(own.sums["count"][part]), own.entry(part))
        return bank

    @staticmethod
    def of_entries(
        sites: tuple[str, ...], entries: Mapping[str, tuple[float, StyleEntry]], layout: StyleLayout
    ) -> "StyleBank":
        """The bank of the sites whose styles are told as entries, with about how many patients are behind
        each. Centre and scale are those of the union, as far as entries tell them.

        Raises `CohortTooSmall` when no site answered, `ValueError` for a site that is not in the plan.
        """
        if unknown := sorted(set(entries) - set(sites)):
            raise ValueError(f"Expected styles of the plan's sites; got one of {unknown[0]!r}.")
        grid, channels = layout.latent_grid, layout.channels
        blank = _blank(sites, layout)
        bank = StyleBank(
            sites, torch.zeros(len(sites), 1), blank, torch.zeros(channels, *grid), torch.ones(channels)
        )
        counts = _capped({site: count for site, (count, _) in entries.items()})
        for site, (_, entry) in entries.items():
            bank._put(site, 0, counts[site], entry)
        pooled = bank.pooled()
        flat = pooled.mean[:, None, None, None].expand(-1, *grid).clone()
        centre = flat if pooled.map is None else smooth_map(pooled.map, grid)
        return dataclasses.replace(bank, centre=centre, scale=pooled.deviation.clamp(min=SMALLEST_DEVIATION))

    def joined_by(self, site: str, moments: StyleMoments) -> "StyleBank":
        """The same bank with one site's entries from its own sums: for a site that told nothing, or that
        joined late and comes after all others.

        Centre and scale stay: the network was trained with them. Nothing of it needs to leave the site.
        """
        tensors = {name: t.clone() for name, t in self.to_tensors().items()}
        sites = self.sites
        if site not in sites:
            sites = (*sites, site)
            for name in set(tensors) - {"centre", "scale"}:
                blank = torch.full_like(tensors[name][:1], 1.0 if name in _POSITIVE else 0.0)
                tensors[name] = torch.cat([tensors[name], blank])
        joined = self.from_tensors(tensors, sites)
        for part in range(joined.count.shape[1]):
            if moments.sums["count"][part] >= 1:
                joined._put(site, part, float(moments.sums["count"][part]), moments.entry(part))
        return joined

    def _put(self, site: str, part: int, count: float, entry: StyleEntry) -> None:
        row = self.sites.index(site)
        self.count[row, part] = count
        for name in _ENTRY:
            if (whole := getattr(self.entries, name)) is not None:
                whole[row, part] = getattr(entry, name)

    def to_tensors(self) -> dict[str, Tensor]:
        """The bank as named float32 tensors: what travels with a round."""
        named = {name: getattr(self.entries, name) for name in _ENTRY}
        named |= {"count": self.count, "centre": self.centre, "scale": self.scale}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    @staticmethod
    def from_tensors(tensors: Mapping[str, Tensor], sites: tuple[str, ...]) -> "StyleBank":
        """Back from `to_tensors`; raises `ValueError` when a tensor is missing, unknown, of other axes or not
        finite.
        """
        needed = {"mean", "deviation", "count", "centre", "scale"}
        if missing := sorted(needed - set(tensors)):
            raise ValueError(f"Expected a style bank with {missing[0]!r}; it is missing.")
        if unknown := sorted(set(tensors) - needed - set(_ENTRY)):
            raise ValueError(f"Expected a style bank of known tensors; got {unknown[0]!r}.")
        lead = tuple(tensors["count"].shape)
        channels = tuple(tensors["scale"].shape)
        if len(lead) != 2 or lead[0] != len(sites) or len(channels) != 1:
            raise ValueError(f"Expected a style bank of {len(sites)} sites; got counts of {lead}.")
        for name in set(_ENTRY) & set(tensors):
            if tuple(tensors[name].shape[:3]) != lead + channels:
                raise ValueError(
                    f"Expected {name!r} of the style bank to start with {lead + channels}; "
                    f"got {tuple(tensors[name].shape)}."
                )
        if tensors["centre"].ndim != 4 or tensors["centre"].shape[:1] != channels:
            raise ValueError(
                f"Expected a centre of {channels[0]} channels; got {tuple(tensors['centre'].shape)}."
            )
        if not all(bool(torch.isfinite(t).all()) for t in tensors.values()):
            raise ValueError("Expected a style bank of finite numbers; got NaN or infinity.")
        if not all(bool((tensors[name] > 0).all()) for name in _POSITIVE if name in tensors):
            raise ValueError("Expected positive deviations in the style bank; got some of 0 or less.")
        entries = StyleEntry(*(tensors.get(name) for name in _ENTRY))  # type: ignore[arg-type]
        return StyleBank(sites, tensors["count"], entries, tensors["centre"], tensors["scale"])

    @property
    def present(self) -> tuple[str, ...]:
        """Sites with an entry for at least one body part."""
        return tuple(s for s, n in zip(self.sites, self.count.sum(1).tolist(), strict=True) if n)

    def entry(self, site: Int[Tensor, " b"], part: Int[Tensor, " b"] | None = None) -> StyleEntry:
        """The entries of these sites (and body parts), one per scan.

        Raises `ValueError` where there is none.
        """
        part = self._parts(site, part)
        if not bool((self.count[site, part] > 0).all()):
            absent = sorted(
                {self.sites[int(s)] for s, p in zip(site, part, strict=True) if self.count[s, p] == 0}
            )
            raise ValueError(
                f"Expected a style of {absent[0]!r} in the bank; that site told none. "
                "A site's own style can be computed from its own scans: see `joined_by`."
            )
        chosen = (site, part)
        return self.entries.each(lambda values: values[chosen])

    def pooled(self, part: int = 0) -> StyleEntry:
        """The style of all sites together, weighted by patients: that of the union of their scans."""
        weight = (self.count[:, part] / self.count[:, part].sum().clamp(min=1)).double()
        if float(weight.sum()) == 0:
            raise CohortTooSmall("Expected at least one site's style to pool; the bank has none.")

        def mean(values: Tensor) -> Tensor:
            return (values[:, part].double() * weight.reshape(-1, *[1] * (values.ndim - 2))).sum(0)

        own = self.entries
        channel_mean = mean(own.mean)
        coarse = None if own.map is None else mean(own.map)
        around_of_sites = own.mean.square() if own.map is None else own.map.square().mean((-3, -2, -1))
        around = channel_mean.square() if coarse is None else coarse.square().mean((-3, -2, -1))
        variance = mean(own.deviation.square() + around_of_sites) - around
        within = None
        if own.map is not None and own.map_deviation is not None and coarse is not None:
            within = mean(own.map_deviation.square() + own.map.square()) - coarse.square()
        return StyleEntry(
            mean=channel_mean.float(),
            deviation=variance.clamp(min=0).sqrt().float(),
            map=None if coarse is None else coarse.float(),
            map_deviation=None if within is None else within.clamp(min=SMALLEST_DEVIATION**2).sqrt().float(),
            amplitude=None if own.amplitude is None else mean(own.amplitude).float(),
        )

    def restyle(
        self,
        latents: Float[Tensor, "b c d h w"],
        own: Int[Tensor, " b"],
        target: Int[Tensor, " b"],
        part: Int[Tensor, " b"] | None = None,
    ) -> Float[Tensor, "b c d h w"]:
        """Scan i of site `own[i]` in the style of site `target[i]`; a scan that stays home is untouched."""
        own, target = own.cpu(), target.cpu()
        part = self._parts(own, part)
        restyled = latents.clone()
        away = (own != target).nonzero()[:, 0]
        if len(away):
            entries = [
                self.entry(sites[away], part[away]).each(lambda t: t.to(latents.device))
                for sites in (own, target)
            ]
            rows = away.to(latents.device)
            restyled[rows] = restyle(latents[rows], *entries)
        return restyled

    def _parts(self, site: Tensor, part: Tensor | None) -> Tensor:
        if part is None and self.count.shape[1] > 1:
            raise ValueError(
                f"Expected the body part of each scan: the bank holds {self.count.shape[1]} of them."
            )
        return torch.zeros_like(site) if part is None else part.cpu()


def _blank(sites: tuple[str, ...], layout: StyleLayout) -> StyleEntry:
    lead = (len(sites), layout.parts, layout.channels)
    return StyleEntry(
        mean=torch.zeros(lead),
        deviation=torch.ones(lead),
        map=None if layout.map_grid is None else torch.zeros(*lead, *layout.map_grid),
        map_deviation=None if layout.map_grid is None else torch.ones(*lead, *layout.map_grid),
        amplitude=torch.zeros(*lead, 3, 3, 2) if layout.amplitude else None,
    )


def _weighed(moments: Mapping[str, StyleMoments]) -> dict[str, StyleMoments]:
    """The sites' sums, with `MOST_WEIGHT` kept."""
    counts = {site: float(own.sums["count"].sum()) for site, own in moments.items()}
    capped = _capped(counts)
    return {
        site: own.times(capped[site] / counts[site]) if capped[site] < counts[site] else own
        for site, own in moments.items()
    }


def _capped(counts: Mapping[str, float]) -> dict[str, float]:
    """Patients of each site, at most `MOST_WEIGHT` times those of all others together."""
    most = {site: MOST_WEIGHT * (sum(counts.values()) - count) for site, count in counts.items()}
    return {site: most[site] if 0 < most[site] < count else count for site, count in counts.items()}
