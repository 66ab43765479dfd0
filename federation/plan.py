"""The plan: everything a site is told before it says yes.

The same at every site, frozen, hashed. It says *what* is run, never *which class*: no name in it is imported.
Paths, devices, ceilings and credentials are the site's own (`client/site.py`) and never appear here.
"""

import dataclasses
import hashlib
import json
import re
import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from federation.diffusion_plan import DiffusionPlan, contradictions
from meduet_models.meduet import NetworkConfig
from meduet_models.objective import ObjectiveConfig

WIRE_VERSION = 2

LatentDtype = Literal["float32", "bfloat16"]
WireDtype = Literal["float32", "bfloat16", "mxint8"]


@dataclass(frozen=True, kw_only=True)
class VolumePlan:
    """How a scan becomes a volume, the same at every site."""

    modality: str
    """Shared modality name; sites map their local names to it."""
    modalities: tuple[str, ...] = ()
    """Several contrasts, `modality` among them, each a scan of its own; those of a patient are in one split.
    Empty: `modality` alone."""
    window: Literal["mr_percentiles", "ct_hu", "fixed"] = "mr_percentiles"
    """How intensities become [0, 1]: by percentiles of each scan, by a range in Hounsfield units, or (maps in
    units of their own) by `fixed_window`."""
    mr_percentiles: tuple[float, float] = (0.5, 99.5)
    """Robust range of an MR scan, in percent of its voxels."""
    ct_window_hu: tuple[float, float] = (-175.0, 250.0)
    """Range of a CT scan, in Hounsfield units."""
    fixed_window: tuple[float, float] = (0.0, 1.0)
    """Range of a quantitative map, in its own units."""
    spacing_mm: tuple[float, float, float] = (1.0, 1.0, 1.0)
    """Voxel spacing after resampling, RAS axes."""
    shape: tuple[int, int, int] = (32, 48, 32)
    """Voxels after centre crop or pad; multiples of the tokenizer's stride."""
    registered: bool = True
    """Whether crops show the same body part at the same place: allows coarse mean maps."""
    four_d: Literal["first", "mean", "refuse"] = "first"
    """What a 4-D scan becomes: its first volume, its mean over time, or an exclusion."""
    views: int = 1
    """Encodings cached per scan: the scan itself and `views - 1` augmentations made before encoding."""


@dataclass(frozen=True, kw_only=True)
class TrainingPlan:
    """What a site does within a round."""

    rounds: int
    """Rounds of the run."""
    steps_per_round: int
    """Optimiser steps of each site in a round."""
    batch_size: int = 8
    """Scans per step; even, at least 4."""
    learning_rate: float = 2e-3
    """Peak learning rate."""
    final_learning_rate: float = 4e-4
    """Learning rate at the last step (cosine)."""
    warmup: float = 0.05
    """Share of all steps over which the learning rate rises."""
    weight_decay: float = 1e-2
    """AdamW weight decay."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW betas."""
    gradient_clip_norm: float = 1.0
    """L2 norm to which the batch gradient is clipped (no privacy meaning)."""
    teacher_momentum: tuple[float, float] = (0.99, 0.9997)
    """Moving-average momentum of the teacher at the first and last step (cosine)."""
    proximal: float = 0.0
    """FedProx: weight of the squared distance to the round's shared weights."""
    precision: Literal["float32", "bf16"] = "float32"
    """Autocast of the network; bf16 needs CUDA or a CPU that has it."""


@dataclass(frozen=True, kw_only=True)
class StylePlan:
    """What sites tell each other about appearance."""

    exchange: Literal["bank", "amplitude", "none"] = "bank"
    """`bank`: latent statistics; `amplitude`: low-frequency amplitude spectra (a baseline, known to be
    worse); `none`: nothing."""
    map_grid: tuple[int, int, int] = (2, 3, 2)
    """Coarse mean map, registered crops only."""
    minimum_cohort: int = 10
    """Fewest patients whose statistics may leave a site together; a site may ask for more."""
    head: Literal["local", "shared"] = "local"
    """Whether the style branch stays at the site (same broadcast start, anchored) or is averaged."""
    anchor: float = 0.003
    """Weight of the distance of a local style branch to its broadcast start."""
    body_parts: tuple[str, ...] = ()
    """Values of the scans' covariate `body_part` that get style entries of their own; empty: one per site."""


@dataclass(frozen=True, kw_only=True)
class AggregationPlan:
    """How replies become the next shared weights."""

    method: Literal["content_share", "fedavg", "fedprox", "fedbn", "alone", "pooled"] = "content_share"
    """`content_share`: content branch only. `fedavg`, `fedprox`: everything. `fedbn`: everything but norm
    layers. `alone`: nothing. `pooled`: one participant holds every site's scans, each labelled with its site
    (an upper bound, not a federation)."""
    rule: Literal["mean", "trimmed_mean", "median", "krum"] = "mean"
    """Weighted mean, or a robust rule (unweighted)."""
    trim: float = 0.2
    """Share trimmed from each end by `trimmed_mean`; share of sites assumed bad by `krum`."""
    optimiser: Literal["average", "momentum", "adam", "yogi"] = "average"
    """What the server does with the aggregate."""
    learning_rate: float = 1.0
    """Server learning rate."""
    momentum: float = 0.9
    """Server momentum (`momentum`), first moment (`adam`, `yogi`)."""
    quorum: float = 1.0
    """Share of sites whose valid reply a round needs."""
    deadline_s: float = 3600.0
    """Seconds a round waits for replies."""
    norm_tolerance: float = 5.0
    """A reply whose mean update is longer than this many times the median of the round's is put aside (with
    three replies or more); 0: none is."""


@dataclass(frozen=True, kw_only=True)
class ReleasePlan:
    """The promise: bound and noise of everything that leaves a site."""

    update_clip_norm: float = 20.0
    """L2 norm to which a site's weighted mean update is clipped at the gate."""
    style_clip: float = 10.0
    """L2 norm to which one patient's latent statistics are clipped before they are summed."""
    wire_dtype: WireDtype = "float32"
    """Type in which weights and updates travel, both ways: `float32`, `bfloat16`, or `mxint8`, a byte per
    value (`federation/microscaling.py`)."""

    @property
    def latent_dtype(self) -> LatentDtype:
        """Type in which latents travel: `mxint8` is for weights, latents are bfloat16 then."""
        return "bfloat16" if self.wire_dtype == "mxint8" else self.wire_dtype


@dataclass(frozen=True, kw_only=True)
class ProbePlan:
    """What sites tell in sums about what the model knows, while it is trained."""

    every_rounds: int = 0
    """Rounds between federated probes; after the last round always; 0: never."""
    folds: int = 5
    """Folds of each site's patients; each must hold the minimum cohort, else the site is left out."""
    patients: Literal["train", "held_out"] = "train"
    """Whose scans are read: those trained on (the probe is cross-validated, the model has seen them), or
    those of validation and test, where a site has enough of them."""
    anatomy: dict[str, tuple[float, float]] = field(default_factory=dict)
    """Anatomical targets, each with the range that is mapped to [-1, 1] (values beyond are cut off): `sex`,
    covariates that are numbers, and `volume_<label>` in mm³ on the prepared grid."""


@dataclass(frozen=True, kw_only=True)
class RunPlan:
    """Everything about a run that both sides must agree on."""

    name: str
    """Name of the run."""
    seed: int
    """Seed of every draw that is not a secret."""
    sites: tuple[str, ...]
    """The consortium, in the order of the site labels."""
    tokenizer_sha256: str
    """Hash of the frozen tokenizer; a site with another refuses."""
    volumes: VolumePlan
    """Scan to volume."""
    network: NetworkConfig
    """The network."""
    objective: ObjectiveConfig
    """The loss."""
    training: TrainingPlan
    """Local training."""
    style: StylePlan
    """Style exchange."""
    aggregation: AggregationPlan
    """Aggregation."""
    release: ReleasePlan
    """The gate."""
    probes: ProbePlan = field(default_factory=ProbePlan)
    """Federated probes."""
    diffusion: DiffusionPlan | None = None
    """The diffusion model; none: there is none."""
    wire_version: int = WIRE_VERSION
    """Version of the messages."""

    def __post_init__(self) -> None:
        """Refuse a plan that contradicts itself, or sets what has no effect."""
        for problem in _contradictions(self):
            raise ValueError(problem)

    def to_json(self) -> str:
        """Canonical JSON: sorted keys, no spaces; what is hashed."""
        return json.dumps(dataclasses.asdict(self), sort_keys=True, separators=(",", ":"))

    @property
    def sha256(self) -> str:
        """Hash of the canonical JSON, 64 hex digits."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    @property
    def participants(self) -> tuple[str, ...]:
        """Who answers messages: the sites, or the one that holds all scans in the pooled baseline."""
        return ("pooled",) if self.aggregation.method == "pooled" else self.sites

    @property
    def total_steps(self) -> int:
        """Local optimiser steps of one site over the whole run; schedules run over these."""
        return self.training.rounds * self.training.steps_per_round

    @staticmethod
    def from_json(text: str) -> "RunPlan":
        """Rebuild a plan; unknown, missing or ill-typed fields raise `ValueError`."""
        return build(RunPlan, json.loads(text))


def _contradictions(plan: RunPlan) -> Iterator[str]:
    """Say what in a plan cannot be, or would have no effect; one line each."""
    training, style, aggregation, network = plan.training, plan.style, plan.aggregation, plan.network
    if len(set(plan.sites)) != len(plan.sites) or not plan.sites:
        yield f"Expected plan.sites to be one or more distinct names; got {', '.join(plan.sites) or 'none'}."
    volumes = plan.volumes
    if volumes.modalities and (
        volumes.modality not in volumes.modalities
        or len(set(volumes.modalities)) != len(volumes.modalities)
        or "" in volumes.modalities
    ):
        yield (
            f"Expected volumes.modalities to be different names with volumes.modality={volumes.modality} "
            f"among them; got {', '.join(volumes.modalities)}."
        )
    if volumes.window == "fixed" and not volumes.fixed_window[0] < volumes.fixed_window[1]:
        yield f"Expected volumes.fixed_window to be a range [low, high]; got {list(volumes.fixed_window)}."
    if volumes.window != "fixed" and volumes.fixed_window != VolumePlan.fixed_window:
        yield f"volumes.fixed_window has no effect with volumes.window={volumes.window}: leave it out."
    if training.rounds < 1 or training.steps_per_round < 1:
        yield "Expected training.rounds and training.steps_per_round to be at least 1."
    if training.batch_size < 4 or training.batch_size % 2:
        yield f"Expected training.batch_size to be even and at least 4; got {training.batch_size}."
    if any(size % network.patch_size for size in network.latent_grid):
        yield (
            f"Expected the latent grid {network.latent_grid} to divide by network.patch_size"
            f"={network.patch_size}; change volumes.shape or the patch size."
        )
    if style.exchange != "none" and network.code_size < len(plan.sites):
        yield (
            f"Expected network.code_ratio to leave a content code of at least {len(plan.sites)} numbers, one "
            f"per site; got {network.code_size}."
        )
    if network.style_map_grid != style.map_grid:
        yield "Expected network.style_map_grid and style.map_grid to be equal."
    if aggregation.method == "fedprox" and training.proximal <= 0:
        yield "aggregation.method=fedprox needs training.proximal above 0."
    if aggregation.method in ("alone", "pooled") and style.exchange != "none":
        yield f"aggregation.method={aggregation.method} exchanges nothing: set style.exchange=none."
    if aggregation.method in ("fedavg", "fedprox", "fedbn") and style.head == "local":
        yield f"aggregation.method={aggregation.method} averages the style head too: set style.head=shared."
    if style.head == "shared" and style.anchor != 0:
        yield "style.anchor holds a local style head; with style.head=shared it has no effect: set it to 0."
    for name in ("invariance", "restyled_reconstruction"):
        if style.exchange == "none" and getattr(plan.objective.weights, name) > 0:
            yield (
                f"objective.weights.{name} compares a scan with its restyling; with style.exchange=none there"
                " is none: set it to 0."
            )
    if plan.probes.every_rounds < 0 or plan.probes.folds < 3:
        yield "Expected probes.every_rounds of at least 0 and probes.folds of at least 3 (fit, choose, test)."
    if plan.probes.every_rounds and aggregation.method in ("alone", "pooled"):
        yield (
            "probes.every_rounds compares sites that share a model; with aggregation.method="
            f"{aggregation.method} there is nothing to compare: set it to 0."
        )
    for name, (low, high) in plan.probes.anatomy.items():
        if not low < high:
            yield f"Expected probes.anatomy.{name} to be a range [low, high]; got [{low:g}, {high:g}]."
    if plan.diffusion is not None:
        yield from contradictions(plan.diffusion, training.rounds, style.body_parts, network)
        for setting, told in (("site_style", "style"), ("restyled_content", "content")):
            used = told in plan.diffusion.conditions and getattr(plan.diffusion.training, setting) > 0
            if used and style.exchange == "none":
                yield (
                    f"diffusion.training.{setting} needs the styles of the sites; with style.exchange=none "
                    "there are none: set it to 0."
                )
        if aggregation.method == "alone":
            yield "aggregation.method=alone shares no encoder for a diffusion model: set diffusion=none."
    defaults = AggregationPlan()
    if aggregation.rule in ("mean", "median") and aggregation.trim != defaults.trim:
        yield f"aggregation.trim has no effect with aggregation.rule={aggregation.rule}: leave it out."
    if aggregation.optimiser == "average" and aggregation.momentum != defaults.momentum:
        yield "aggregation.momentum has no effect with aggregation.optimiser=average: leave it out."


T = TypeVar("T")


def build(kind: type[T], values: Any, where: str = "plan") -> T:
    """Build dataclass `kind` from plain `values` (dicts, lists, scalars), strictly.

    Raises `ValueError` naming the field when a key is unknown or missing, or a value has another type.
    """
    result: T = _value(kind, values, where)
    return result


def _value(kind: Any, value: Any, where: str) -> Any:
    if dataclasses.is_dataclass(kind):
        return _dataclass(kind, value, where)
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:
        if value not in arguments:
            raise ValueError(
                f"Expected {where} to be one of {', '.join(map(str, arguments))}; got {value!r}."
            )
        return value
    if origin in (types.UnionType, typing.Union):
        if value is None and type(None) in arguments:
            return None
        (inner,) = [a for a in arguments if a is not type(None)]
        return _value(inner, value, where)
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise ValueError(f"Expected {where} to be a list; got {value!r}.")
        kinds = [arguments[0]] * len(value) if arguments[-1] is Ellipsis else list(arguments)
        if len(kinds) != len(value):
            raise ValueError(f"Expected {where} to have {len(kinds)} values; got {len(value)}.")
        return tuple(_value(k, v, f"{where}[{i}]") for i, (k, v) in enumerate(zip(kinds, value, strict=True)))
    if origin is dict:
        if not isinstance(value, dict):
            raise ValueError(f"Expected {where} to be a mapping; got {value!r}.")
        if arguments[0] is int:  # JSON has no keys but text
            value = {int(k) if re.fullmatch(r"-?\d+", str(k)) else k: v for k, v in value.items()}
        return {
            _value(arguments[0], k, where): _value(arguments[1], v, f"{where}.{k}") for k, v in value.items()
        }
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise ValueError(f"Expected {where} to be {kind.__name__}; got {value!r}.")
    return value


def _dataclass(kind: Any, value: Any, where: str) -> Any:
    if not isinstance(value, dict):
        raise ValueError(f"Expected {where} to be a mapping; got {value!r}.")
    fields = {f.name: f for f in dataclasses.fields(kind)}
    if unknown := sorted(set(value) - set(fields)):
        raise ValueError(f"{where} has no setting {unknown[0]!r}; it has {', '.join(fields)}.")
    hints = typing.get_type_hints(kind)
    built = {name: _value(hints[name], v, f"{where}.{name}") for name, v in value.items()}
    required = {
        n
        for n, f in fields.items()
        if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    }
    if missing := sorted(required - set(built)):
        raise ValueError(f"{where} lacks {', '.join(missing)}.")
    return kind(**built)
