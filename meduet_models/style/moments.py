"""Style: a site's appearance as sums over patients that add, and restyling latents with it.

`StyleMoments` are what a site tells: sums, over its patients, of statistics of the frozen VAE's latents. A
`StyleEntry` is what they say about the site; `restyle` moves latents from one entry to another. Sums of two
sites are the sums of their union, so bounding, masking and journaling need to know nothing about style.

What this file does not do: it keeps no scan's statistics (a patient's are scaled to the bound and added at
once), keeps no bank (`bank.py`), sends nothing (`client/latents/style_moments.py`,
`strategies/style_bank.py`).

Where it comes from: AdaIN at the level of a site (CCST, WACV 2023: channel mean and deviation of a frozen
network), and, for registered crops, coarse maps of mean and deviation: they follow shading, and noise and
contrast that differ from place to place. Error of a restyled scan against the same patient on the other
scanner, relative to doing nothing: .40 with channel mean and deviation, .16 with a 2 x 3 x 2 mean map, .11
with the deviation map beside it (hippocampus, four simulated scanners; docs/log.md).

Axes: b = scans, m = scans of one patient, p = body parts, c = channels, d h w = latent voxels, x y z = cells
of the coarse map, k j i = low frequencies of the amplitude baseline.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Float64
from torch import Tensor

from meduet_models.style.amplitude import low_amplitude, swap_amplitude

SMALLEST_DEVIATION = 1e-3
"""Floor under a deviation, in latent units: a channel that is constant at a site is moved, never blown up."""
_ROUNDING = 1e-4  # of sums that travelled as float32


class CohortTooSmall(ValueError):
    """Fewer patients than the agreed minimum: statistics of so few do not leave a site."""


@dataclass(frozen=True, kw_only=True)
class StyleLayout:
    """What a vector of style sums holds, in which order, and the bound of one patient's part in it."""

    channels: int
    """Channels of the latents."""
    latent_grid: tuple[int, int, int]
    """Voxels of the latents per axis."""
    map_grid: tuple[int, int, int] | None
    """Cells of the coarse mean map per axis; None when crops are not registered."""
    bound: float
    """L2 norm to which one patient's statistics are scaled before they are summed."""
    parts: int = 1
    """Body parts with sums of their own."""
    amplitude: bool = False
    """Whether low-frequency amplitudes travel too (baseline of `amplitude.py`)."""
    centre: bool = False
    """Whether the mean latents of every voxel travel too, of registered crops: as many numbers as a scan
    has, from which a member of a cohort can be told."""

    def __post_init__(self) -> None:
        """Refuse a bound that bounds nothing and a map finer than the latents."""
        if not (math.isfinite(self.bound) and self.bound > 0):
            raise ValueError(
                f"Expected a finite bound > 0 of a patient's style statistics; got {self.bound}."
            )
        if self.map_grid and any(g > n for g, n in zip(self.map_grid, self.latent_grid, strict=True)):
            raise ValueError(
                f"Expected a style map of at most {self.latent_grid} cells; got {self.map_grid}."
            )

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes of the sums, in the order of the vector."""
        per_channel = (self.parts, self.channels)
        shapes: dict[str, tuple[int, ...]] = {
            "count": (self.parts,),
            "mean": per_channel,
            "mean_square": per_channel,
            "variance": per_channel,
        }
        if self.map_grid is not None:
            cells = (*per_channel, *self.map_grid)
            shapes |= {"map": cells, "map_square": cells}
            if self.centre:
                shapes["centre"] = (*per_channel, *self.latent_grid)
        if self.amplitude:
            shapes["amplitude"] = (*per_channel, 3, 3, 2)
        return shapes

    @property
    def length(self) -> int:
        """Numbers in the vector."""
        return sum(math.prod(shape) for shape in self.shapes().values())


@dataclass(frozen=True)
class StyleEntry:
    """The style of a site (or, with leading axes, of several)."""

    mean: Float[Tensor, "*b c"]
    """Channel means."""
    deviation: Float[Tensor, "*b c"]
    """Channel deviations: around the coarse map where there is one, around the mean otherwise."""
    map: Float[Tensor, "*b c x y z"] | None = None
    """Coarse mean map of registered crops."""
    map_deviation: Float[Tensor, "*b c x y z"] | None = None
    """Deviation within each cell of that map."""
    amplitude: Float[Tensor, "*b c k j i"] | None = None
    """Mean low-frequency amplitudes (baseline only)."""

    def each(self, change: Callable[[Tensor], Tensor]) -> "StyleEntry":
        """The entry with `change` applied to each of its tensors: a selection of sites, another device."""
        return StyleEntry(
            mean=change(self.mean),
            deviation=change(self.deviation),
            map=None if self.map is None else change(self.map),
            map_deviation=None if self.map_deviation is None else change(self.map_deviation),
            amplitude=None if self.amplitude is None else change(self.amplitude),
        )

    def to_vector(self) -> Float[Tensor, "*b s"]:
        """Mean, deviation and mean map as one vector per entry: what a style gap is measured on."""
        parts = [self.mean, self.deviation] + ([] if self.map is None else [self.map.flatten(-4)])
        return torch.cat(parts, dim=-1)


@dataclass(frozen=True)
class StyleMoments:
    """Sums over the patients of a site; `a + b` are the sums of both cohorts.

    Guarantee: each patient enters `sums` other than `count` as one vector, the average of the patient's
    scans, scaled to L2 norm at most `layout.bound`. Adding or removing one patient changes that vector of
    sums by at most `layout.bound` in L2; replacing one, by at most twice that. Not covered: the counts (they
    change by one), and anything that is said beside these sums. Nothing here is noise: a sum over few
    patients still describes them, hence the minimum cohort at both ends.
    """

    layout: StyleLayout
    """What the sums are."""
    sums: Mapping[str, Float64[Tensor, "..."]]
    """One tensor per name of `layout.shapes()`, float64. Maps and `centre` are divided by the square root of
    their number of cells, so that every block of a patient's vector has a norm of the same order."""

    @staticmethod
    def none(layout: StyleLayout) -> "StyleMoments":
        """The sums over nobody."""
        return StyleMoments(
            layout, {name: torch.zeros(shape, dtype=torch.float64) for name, shape in layout.shapes().items()}
        )

    @staticmethod
    def of_patient(
        latents: Float[Tensor, "m c d h w"], layout: StyleLayout, parts: Sequence[int] | None = None
    ) -> "StyleMoments":
        """One patient: the average of the statistics of her scans, scaled to the bound, with count 1.

        `parts` is the body part of each scan (default: all 0). `mean` and `variance` are those of all voxels
        of her scans of a part together. Raises `ValueError` when latents have other axes than the layout, or
        are not finite.
        """
        if tuple(latents.shape[1:]) != (layout.channels, *layout.latent_grid):
            raise ValueError(
                f"Expected latents of {(layout.channels, *layout.latent_grid)}; "
                f"got {tuple(latents.shape[1:])}."
            )
        if not bool(torch.isfinite(latents).all()):
            raise ValueError("Expected finite latents; got NaN or infinity. Exclude the scan.")
        part_of = torch.tensor(list(parts) if parts is not None else [0] * len(latents))
        moments = StyleMoments.none(layout)
        for part in sorted(set(part_of.tolist())):
            for name, value in _statistics(latents[part_of == part].double(), layout).items():
                moments.sums[name][part] = value
        return moments._bounded()

    @staticmethod
    def of_voxels(
        scans: Sequence[Float[Tensor, "c n"]], layout: StyleLayout, parts: Sequence[int] | None = None
    ) -> "StyleMoments":
        """One patient whose scans are of any size: as `of_patient`, of all latent voxels that are given.

        Raises `ValueError` for a layout with maps, which need scans of one size, and as `of_patient`.
        """
        if layout.map_grid is not None or layout.amplitude:
            raise ValueError("Expected a layout without maps and amplitudes for scans of different sizes.")
        if odd := [tuple(scan.shape) for scan in scans if scan.shape[0] != layout.channels]:
            raise ValueError(f"Expected latents of {layout.channels} channels; got {odd[0]}.")
        if not all(bool(torch.isfinite(scan).all()) for scan in scans):
            raise ValueError("Expected finite latents; got NaN or infinity. Exclude the scan.")
        part_of = list(parts) if parts is not None else [0] * len(scans)
        moments = StyleMoments.none(layout)
        for part in sorted(set(part_of)):
            own = [scan.double() for scan, its in zip(scans, part_of, strict=True) if its == part]
            together = torch.cat(own, dim=1)[None, :, :, None, None]
            for name, value in _statistics(together, layout).items():
                moments.sums[name][part] = value
        return moments._bounded()

    def _bounded(self) -> "StyleMoments":
        """The same sums, scaled in place to the layout's bound."""
        norm = self.norm()
        for name, total in self.sums.items():
            if name != "count" and norm > self.layout.bound:
                total.mul_(self.layout.bound / norm)
        return self

    @staticmethod
    def of(
        latents: Float[Tensor, "b c d h w"],
        patients: Sequence[str],
        layout: StyleLayout,
        parts: Sequence[int] | None = None,
    ) -> "StyleMoments":
        """Several patients, from all their scans at once; `patients` and `parts` say whose and of what each
        scan is.
        """
        rows: dict[str, list[int]] = {}
        for row, patient in enumerate(patients):
            rows.setdefault(patient, []).append(row)
        total = StyleMoments.none(layout)
        for scans in rows.values():
            total += StyleMoments.of_patient(
                latents[scans], layout, [parts[r] for r in scans] if parts else None
            )
        return total

    def check(self, most: int) -> None:
        """Raise `ValueError` unless these can be the sums of whole patients, `most` of them at most.

        A sum of squares over n patients is at least the square of their sum over n, in each channel and cell.
        """
        if not bool(torch.isfinite(self.to_vector()).all()):
            raise ValueError("Expected finite style sums; got NaN or infinity.")
        counts = self.sums["count"]
        if not torch.equal(counts, counts.round()):
            raise ValueError(f"Expected whole patients; got {counts.tolist()}.")
        if bool((counts < 0).any()) or float(counts.sum()) > most:
            raise ValueError(f"Expected style sums of 0 to {most} patients; got {counts.tolist()}.")
        squares = {"variance", "mean_square", "map_square"} & set(self.sums)
        if any(bool((self.sums[name] < 0).any()) for name in squares):
            raise ValueError("Expected sums of squares and variances of at least 0; got negative ones.")
        cells = 1.0 if self.layout.map_grid is None else math.sqrt(math.prod(self.layout.map_grid))
        for name, scale in (("mean", 1.0), ("map", cells)):
            if name in self.sums:
                least = scale * (self.sums[name].square() / _beside(counts, self.sums[name]))
                if bool((self.sums[f"{name}_square"] < least * (1 - _ROUNDING)).any()):
                    raise ValueError(
                        f"Expected sums of squares that go with the sums of {name}; they are those of no "
                        "patients, whoever they are."
                    )

    def times(self, factor: float) -> "StyleMoments":
        """The sums of this cohort with a weight, count included."""
        return StyleMoments(self.layout, {name: total * factor for name, total in self.sums.items()})

    def __add__(self, other: "StyleMoments") -> "StyleMoments":
        """The sums of both cohorts; raises `ValueError` when they do not hold the same things."""
        if self.layout != other.layout:
            raise ValueError(f"Expected style sums of one layout; got {self.layout} and {other.layout}.")
        return StyleMoments(self.layout, {name: s + other.sums[name] for name, s in self.sums.items()})

    def norm(self) -> float:
        """L2 norm of all sums except the counts."""
        return math.sqrt(sum(float(s.square().sum()) for name, s in self.sums.items() if name != "count"))

    def to_vector(self) -> Float64[Tensor, " v"]:
        """All sums as one vector, in the order of the layout: vector(a + b) == vector(a) + vector(b)."""
        return torch.cat([self.sums[name].flatten() for name in self.layout.shapes()])

    @staticmethod
    def from_vector(vector: Float[Tensor, " v"], layout: StyleLayout) -> "StyleMoments":
        """Back from `to_vector`, whether summed before or not; raises `ValueError` for another length."""
        if len(vector) != layout.length:
            raise ValueError(
                f"Expected {layout.length} style sums; got {len(vector)}. Plan and site disagree."
            )
        shapes = layout.shapes()
        blocks = torch.split(vector.double(), [math.prod(shape) for shape in shapes.values()])
        return StyleMoments(
            layout, {n: b.reshape(s).clone() for (n, s), b in zip(shapes.items(), blocks, strict=True)}
        )

    def to_tensors(self) -> dict[str, Tensor]:
        """The sums by name, float32: what travels."""
        return {name: self.sums[name].float() for name in self.layout.shapes()}

    @staticmethod
    def from_tensors(tensors: Mapping[str, Tensor], layout: StyleLayout) -> "StyleMoments":
        """Back from `to_tensors`; raises `ValueError` naming the first sum that is unknown, missing or
        misshapen.
        """
        shapes = layout.shapes()
        for name in sorted(set(tensors) | set(shapes)):
            came = tuple(tensors[name].shape) if name in tensors else "none"
            if came != shapes.get(name, "none"):
                raise ValueError(f"Expected style sum {name!r} of {shapes.get(name, 'none')}; got {came}.")
        return StyleMoments(layout, {name: tensors[name].detach().double().cpu() for name in shapes})

    def entry(self, part: int = 0) -> StyleEntry:
        """The site's style for a body part, float32; raises `CohortTooSmall` when nobody was summed.

        This is what a site that joined late, or was held out, computes from its own scans.
        """
        count = float(self.sums["count"][part])
        if count < 1:
            raise CohortTooSmall("Expected at least one patient behind a style entry; got none.")
        average = {name: total[part] / count for name, total in self.sums.items()}
        second = average["variance"] + average["mean_square"]  # c: mean of squares over patients and voxels
        coarse = within = None
        around = average["mean"].square()
        if self.layout.map_grid is not None:
            cells = math.sqrt(math.prod(self.layout.map_grid))
            coarse = average["map"] * cells
            within = _deviation(average["map_square"] * cells - coarse.square())
            around = coarse.square().mean((1, 2, 3))
        return StyleEntry(
            mean=average["mean"].float(),
            deviation=_deviation(second - around),
            map=None if coarse is None else coarse.float(),
            map_deviation=within,
            amplitude=average["amplitude"].float() if self.layout.amplitude else None,
        )

    def latent_scale(self) -> tuple[Float[Tensor, "c d h w"], Float[Tensor, " c"]]:
        """Centre and deviation that standardise latents, over all patients and body parts in the sums.

        The centre is the coarse mean map of registered crops at the resolution of the latents, or their mean
        in every voxel where that travels; else the channel mean everywhere. Use it on pooled sums only: on
        one site's it would show that site's mean anatomy (and with two sites, each can subtract its own).
        """
        count = float(self.sums["count"].sum())
        if count < 1:
            raise CohortTooSmall("Expected at least one patient behind the latent scale; got none.")
        average = {name: total.sum(0) / count for name, total in self.sums.items() if name != "count"}
        second = average["variance"] + average["mean_square"]
        grid = self.layout.latent_grid
        if "centre" in average:
            centre = average["centre"] * math.sqrt(math.prod(grid))
        elif self.layout.map_grid is not None:
            coarse = average["map"] * math.sqrt(math.prod(self.layout.map_grid))
            centre = smooth_map(coarse, grid)
        else:
            centre = average["mean"][:, None, None, None].expand(-1, *grid)
        return centre.float().clone(), _deviation(second - centre.square().mean((1, 2, 3)))


def restyle(
    latents: Float[Tensor, "b c d h w"], own: StyleEntry, target: StyleEntry
) -> Float[Tensor, "b c d h w"]:
    """Move latents from the style of `own` to that of `target`; entries of one site, or one per scan.

    With maps: up(map_target) + (x - up(map_own)) · exp(up(log deviation_target) - up(log deviation_own)),
    trilinear between the centres of the cells. Without: the same with channel means and deviations. With
    amplitudes: those of the target take the place of the scan's own (baseline).
    """
    if own.amplitude is not None and target.amplitude is not None:
        return swap_amplitude(latents, target.amplitude)
    if own.map is None or target.map is None or own.map_deviation is None or target.map_deviation is None:
        ratio = (target.deviation / own.deviation)[..., None, None, None]
        return target.mean[..., None, None, None] + (latents - own.mean[..., None, None, None]) * ratio
    grid = (latents.shape[2], latents.shape[3], latents.shape[4])
    log_ratio = upsample(target.map_deviation.log(), grid) - upsample(own.map_deviation.log(), grid)
    return upsample(target.map, grid) + (latents - upsample(own.map, grid)) * log_ratio.exp()


def coarse_map(latents: Float[Tensor, "b c d h w"], grid: tuple[int, int, int]) -> Float[Tensor, "b c x y z"]:
    """Mean of each cell of a coarse grid laid over the latents."""
    return F.adaptive_avg_pool3d(latents, grid)


def upsample(coarse: Float[Tensor, "*b c x y z"], grid: tuple[int, int, int]) -> Float[Tensor, "*b c d h w"]:
    """A coarse map at the resolution of the latents, trilinear between the centres of the cells."""
    flat = coarse.reshape(-1, 1, *coarse.shape[-3:])
    fine = F.interpolate(flat, size=grid, mode="trilinear", align_corners=False)
    return fine.reshape(*coarse.shape[:-3], *grid)


def smooth_map(coarse: Float[Tensor, "c x y z"], grid: tuple[int, int, int]) -> Float[Tensor, "c d h w"]:
    """A coarse map at the resolution of the latents, as `upsample`, but so that the mean of each cell stays
    what it was: of all maps that are trilinear between cells, about the nearest to what was averaged."""
    x, y, z = coarse.shape[1:]
    cells = x * y * z
    single = torch.eye(cells, dtype=coarse.dtype).reshape(cells, x, y, z)
    blurred = F.adaptive_avg_pool3d(upsample(single, grid), (x, y, z)).reshape(cells, cells)
    sharpened = torch.linalg.solve(blurred.T, coarse.reshape(-1, cells).T).T
    return upsample(sharpened.reshape(coarse.shape), grid)


def _statistics(
    latents: Tensor, layout: StyleLayout
) -> dict[str, Tensor]:  # m c d h w, of one patient and part
    mean = latents.mean((0, 2, 3, 4))
    values = {
        "count": torch.ones((), dtype=torch.float64),
        "mean": mean,
        "mean_square": mean.square(),
        "variance": latents.var((0, 2, 3, 4), unbiased=False),
    }
    if layout.map_grid is not None:
        centre = latents.mean(0)  # c d h w
        cells = math.sqrt(math.prod(layout.map_grid))
        values["map"] = coarse_map(centre[None], layout.map_grid)[0] / cells
        squares = latents.square().mean(0)
        values["map_square"] = coarse_map(squares[None], layout.map_grid)[0] / cells
        if layout.centre:
            values["centre"] = centre / math.sqrt(math.prod(layout.latent_grid))
    if layout.amplitude:
        values["amplitude"] = low_amplitude(latents).mean(0)
    return values


def _beside(counts: Tensor, sums: Tensor) -> Tensor:
    """Counts per body part, at least one, as they divide `sums`."""
    return counts.clamp(min=1.0).reshape(-1, *(1,) * (sums.ndim - 1))


def _deviation(variance: Tensor) -> Tensor:
    return variance.clamp(min=SMALLEST_DEVIATION**2).sqrt().float()
