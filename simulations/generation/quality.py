"""Quality of generated scans as rows of a table: a value, its interval, and the same of real scans.

Every row has a floor: the same measure with real scans in the samples' place, as many of them. What is not
told from its floor is as good as these scans can tell. Scans on both sides are decoded by one tokenizer, so
its loss is on neither; it has rows of its own. Two sets never share a patient: samples with the content of
held-out patients are compared with training scans, all others with held-out scans.

What this file does not do: it samples nothing (`generation.py`), and says nothing about controls
(`generation_controls.py`). Distances to neighbours are a hint of memorising, not a bound on it.

Axes: b = scans, k = features, c d h w = latents, D H W = voxels.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Float64
from torch import Tensor

from meduet_models.diffusion.conditioner import Conditioner
from meduet_models.random_features import random_features
from meduet_models.sample_quality import (
    frechet_distance,
    kernel_distance,
    mean_of_pairs,
    nearest,
    neighbourhoods,
    principal_axes,
)
from meduet_models.tokenizer.tokenizer import Tokenizer
from simulations.downstream.metrics import mean_estimate, per_patient

_BATCH = 16
_MOST_AXES = 64
_SCALES = (0.0448, 0.2856, 0.3001)  # the first three of the published five, which need volumes of 160 voxels
ENCODER, FIXED = "our encoder", "fixed random network"


@dataclass(frozen=True)
class QualityRow:
    """One number of the table."""

    measure: str
    """What was measured."""
    features: str
    """On what: features of our encoder, of the fixed network, latents, volumes."""
    told: str
    """What the samples were told."""
    value: float
    low: float
    high: float
    """95% interval, from resampling patients and samples."""
    floor: float
    """The same of real scans in the samples' place; NaN where there is no such thing."""
    floor_low: float
    floor_high: float
    """Its 95% interval."""
    samples: int
    """Generated scans."""
    real: int
    """Real scans that they are compared with."""
    axes: int = 0
    """Principal axes of the real training scans that the features were reduced to; 0: none."""


@dataclass(frozen=True)
class Interval:
    """A value with a 95% interval."""

    value: float
    low: float
    high: float


UNKNOWN = Interval(float("nan"), float("nan"), float("nan"))


@dataclass(frozen=True)
class ScanSet:
    """Scans as the measures see them: real or generated, decoded, with their features."""

    latents: Float[Tensor, "b c d h w"]
    """Raw latents."""
    volumes: Float[Tensor, "b 1 D H W"]
    """Decoded, clipped to [0, 1]."""
    features: Mapping[str, Float[Tensor, "b k"]]
    """`ENCODER` and `FIXED`."""
    patient: tuple[str, ...]
    """What is resampled: the patient of a real scan, or whose content a sample has, or the sample itself."""

    def __len__(self) -> int:
        """Scans."""
        return len(self.patient)

    def rows(self, chosen: Sequence[int]) -> "ScanSet":
        """Some of the scans."""
        which = torch.tensor(list(chosen), dtype=torch.long)
        features = {name: values[which] for name, values in self.features.items()}
        names = tuple(self.patient[i] for i in chosen)
        return ScanSet(self.latents[which], self.volumes[which], features, names)

    def thinned(self, count: int, seed: int) -> "ScanSet":
        """At most `count` of the scans, drawn from `seed`."""
        drawn = np.random.default_rng(seed).permutation(len(self))[:count]
        return self.rows(sorted(int(i) for i in drawn))


def scan_set(
    latents: Float[Tensor, "b c d h w"],
    patient: Sequence[str],
    conditioner: Conditioner,
    tokenizer: Tokenizer,
) -> ScanSet:
    """Decode scans and read their features: pooled content with style code, and the fixed network's."""
    decoded, ours = [], []
    for chunk in torch.split(latents, _BATCH):
        decoded.append(tokenizer.decode(chunk).clamp(0, 1))
        ours.append(torch.cat([conditioner.content(chunk).mean(1), conditioner.style(chunk)], 1).cpu())
    volumes = torch.cat(decoded)
    features = {ENCODER: torch.cat(ours), FIXED: random_features(volumes)}
    return ScanSet(latents, volumes, features, tuple(patient))


def distribution_rows(
    samples: ScanSet,
    reference: ScanSet,
    stand_in: ScanSet,
    fitted_on: ScanSet,
    kind: str,
    *,
    resamples: int,
    neighbours: int,
    seed: int,
) -> list[QualityRow]:
    """Fréchet and kernel distance, precision, recall, density and coverage of samples against `reference`.

    `stand_in` are real scans of other patients: the floor. All three are thinned to one size. Principal axes
    are fitted on `fitted_on` (training scans), at most half as many as scans.
    """
    size = min(len(samples), len(stand_in), len(reference))
    if size <= neighbours:
        raise ValueError(
            f"Expected more than {neighbours} samples, and real scans on both sides; got {len(samples)}, "
            f"{len(reference)} and {len(stand_in)}."
        )
    samples, real, others = (part.thinned(size, seed) for part in (samples, reference, stand_in))
    found = []
    for features in (ENCODER, FIXED):
        reduce = principal_axes(fitted_on.features[features], min(_MOST_AXES, size // 2))
        known = reduce(real.features[features])
        sides = [(reduce(part.features[features]), part.patient) for part in (samples, others)]
        for name, (statistic, least) in _TWO_SIDED.items():
            value, floor = (
                two_sided(statistic, (known, real.patient), side, resamples, seed, least) for side in sides
            )
            found.append(
                quality_row(name, features, kind, value, floor, samples=size, real=size, axes=known.shape[1])
            )
        around = [neighbourhoods(known, values, neighbours) for values, _ in sides]
        for name in ("precise", "recalled", "density", "covered"):
            ours = name in ("precise", "density")  # per sample; the others per real scan
            value, floor = (
                averaged(getattr(one, name).double(), names if ours else real.patient, resamples, seed)
                for one, (_, names) in zip(around, sides, strict=True)
            )
            label = _NEIGHBOURHOODS[name]
            found.append(
                quality_row(label, features, kind, value, floor, samples=size, real=size, axes=known.shape[1])
            )
    return found


def diversity_rows(
    samples: Mapping[str, ScanSet], reference: ScanSet, *, most: int, resamples: int, seed: int
) -> list[QualityRow]:
    """Mean MS-SSIM over pairs of samples, by what they were told, and of real scans of different patients:
    higher is less diverse. Of each at most `most`.
    """
    size = min([most, len(reference), *(len(part) for part in samples.values())])
    floor = _mean_similarity(reference.thinned(size, seed), resamples, seed)
    values = {
        kind: _mean_similarity(part.thinned(size, seed), resamples, seed) for kind, part in samples.items()
    }
    return [
        quality_row("MS-SSIM between scans", "volumes", kind, value, floor, samples=size, real=size)
        for kind, value in values.items()
    ]


def memory_row(
    samples: ScanSet,
    training: ScanSet,
    held: ScanSet,
    deviation: Float[Tensor, " c"],
    kind: str,
    *,
    resamples: int,
    seed: int,
) -> QualityRow:
    """Distance to the nearest training scan over that to the nearest held-out scan, as many of each.

    Below its floor: samples sit closer to the scans that were trained on than new patients do, a hint of
    memorising. The floor is the ratio of held-out patients, half of whom look for the other half. Distances
    in latents over the channel deviation. For samples that were told no content.
    """
    scale = deviation.reshape(-1, 1, 1, 1)

    def flat(part: ScanSet) -> Tensor:
        return (part.latents / scale).flatten(1)

    size = min(len(training), len(held))
    known, unknown = training.thinned(size, seed), held.thinned(size, seed)
    ratio = _log_ratio(flat(samples), flat(known), flat(unknown))
    names = list(dict.fromkeys(held.patient))
    first = set(names[: len(names) // 2])
    here = held.rows([i for i, name in enumerate(held.patient) if name in first])
    there = held.rows([i for i, name in enumerate(held.patient) if name not in first])
    half = min(len(there), len(training))
    of_real = _log_ratio(flat(here), flat(training.thinned(half, seed)), flat(there.thinned(half, seed)))
    value, floor = (
        _exponential(averaged(values, part.patient, resamples, seed))
        for values, part in ((ratio, samples), (of_real, here))
    )
    return quality_row(
        "nearest training over nearest held-out",
        "latents",
        kind,
        value,
        floor,
        samples=len(samples),
        real=size,
    )


def fidelity_rows(
    measure: str,
    volumes: Float[Tensor, "b 1 D H W"],
    truth: Float[Tensor, "b 1 D H W"],
    floor: Float[Tensor, "b 1 D H W"] | None,
    patient: Sequence[str],
    kind: str,
    *,
    resamples: int,
    seed: int,
) -> list[QualityRow]:
    """PSNR (dB) and SSIM of volumes against the truth they stand for; `floor`: what stands in their place."""
    rows = []
    for name, metric in (("PSNR, dB", _psnr), ("SSIM", _ssim)):
        value, reference = (
            UNKNOWN if part is None else averaged(metric(part, truth), patient, resamples, seed)
            for part in (volumes, floor)
        )
        told_of = f"{measure}: {name}"
        rows.append(
            quality_row(told_of, "volumes", kind, value, reference, samples=len(volumes), real=len(truth))
        )
    return rows


def quality_row(
    measure: str,
    features: str,
    kind: str,
    value: Interval,
    floor: Interval,
    *,
    samples: int,
    real: int,
    axes: int = 0,
) -> QualityRow:
    """A row from its two intervals."""
    return QualityRow(
        measure, features, kind, value.value, value.low, value.high, floor.value, floor.low, floor.high,
        samples, real, axes,
    )  # fmt: skip


def averaged(values: Float[Tensor, " b"], patient: Sequence[str], resamples: int, seed: int) -> Interval:
    """The mean over patients, with the percentile interval of the bootstrap."""
    estimate = mean_estimate(per_patient(values.detach().cpu().double().numpy(), patient), resamples, seed)
    return Interval(estimate.value, estimate.low, estimate.high)


Statistic = Callable[[Tensor, Tensor, Tensor, Tensor], float]
"""Real and generated features, and how often each row is counted."""


def two_sided(
    statistic: Statistic,
    real: tuple[Float[Tensor, "r k"], Sequence[str]],
    generated: tuple[Float[Tensor, "g k"], Sequence[str]],
    resamples: int,
    seed: int,
    least: float = -math.inf,
) -> Interval:
    """A distance of two sets, plus and minus 1.96 bootstrap standard errors, and not below `least`.

    Not percentiles: a resample repeats scans, which moves such a distance as a whole.
    """
    (x, x_names), (y, y_names) = real, generated
    ones = [torch.ones(len(part), dtype=torch.float64) for part in (x, y)]
    value = statistic(x, y, *ones)
    generator = np.random.default_rng(seed)
    drawn = np.array(
        [statistic(x, y, _counts(x_names, generator), _counts(y_names, generator)) for _ in range(resamples)]
    )
    drawn = drawn[np.isfinite(drawn)]
    error = 1.96 * float(drawn.std(ddof=1)) if len(drawn) > 1 else float("nan")
    return Interval(value, max(value - error, least), value + error)


def _counts(names: Sequence[str], generator: np.random.Generator) -> Float64[Tensor, " b"]:
    """How often each row is in a resample of the patients."""
    patients, place = np.unique(np.asarray(names), return_inverse=True)
    drawn = np.bincount(generator.integers(len(patients), size=len(patients)), minlength=len(patients))
    return torch.from_numpy(drawn[place].astype(np.float64))


def _frechet(x: Tensor, y: Tensor, u: Tensor, v: Tensor) -> float:
    repeated = [part.repeat_interleave(weight.long(), dim=0) for part, weight in ((x, u), (y, v))]
    if min(len(part) for part in repeated) < 2:
        return float("nan")
    return frechet_distance(*repeated)


_TWO_SIDED: dict[str, tuple[Statistic, float]] = {
    "Fréchet distance": (_frechet, 0.0),
    "kernel distance": (kernel_distance, -math.inf),
}
_NEIGHBOURHOODS = {
    "precise": "precision", "recalled": "recall", "density": "density", "covered": "coverage",
}  # fmt: skip


def _mean_similarity(part: ScanSet, resamples: int, seed: int) -> Interval:
    """MS-SSIM over pairs of scans of different patients, plus and minus 1.96 bootstrap standard errors."""
    from monai.metrics import MultiScaleSSIMMetric  # MONAI takes seconds to import

    side = min(part.volumes.shape[2:])
    kernel = max(k for k in (1, 3, 5) if side // (len(_SCALES) - 1) ** 2 > k - 1)
    metric = MultiScaleSSIMMetric(
        spatial_dims=3, data_range=1.0, kernel_size=kernel, weights=[w / sum(_SCALES) for w in _SCALES]
    )
    table = torch.zeros(len(part), len(part), dtype=torch.float64)
    for i in range(1, len(part)):
        first = part.volumes[i : i + 1].expand(i, -1, -1, -1, -1)
        table[i, :i] = metric(first, part.volumes[:i]).double().flatten()
    table = table + table.T

    def statistic(x: Tensor, y: Tensor, u: Tensor, v: Tensor) -> float:
        return float(mean_of_pairs(table, u))

    nobody = torch.zeros(1, 1, dtype=torch.float64), ("",)
    return two_sided(statistic, (table, part.patient), nobody, resamples, seed)


def _log_ratio(scans: Tensor, known: Tensor, unknown: Tensor) -> Float64[Tensor, " b"]:
    near, far = nearest(scans, known)[0], nearest(scans, unknown)[0]
    return near.clamp(min=1e-12).log() - far.clamp(min=1e-12).log()


def _exponential(interval: Interval) -> Interval:
    value, low, high = np.exp([interval.value, interval.low, interval.high]).tolist()
    return Interval(value, low, high)


def _psnr(volumes: Tensor, truth: Tensor) -> Tensor:
    from monai.metrics import PSNRMetric

    values_db: Tensor = PSNRMetric(max_val=1.0)(volumes, truth)
    return values_db.flatten()


def _ssim(volumes: Tensor, truth: Tensor) -> Tensor:
    from monai.metrics import SSIMMetric

    similarity: Tensor = SSIMMetric(spatial_dims=3, data_range=1.0, win_size=7)(volumes, truth)
    return similarity.flatten()
