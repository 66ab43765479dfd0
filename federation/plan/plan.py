"""The plan: everything a site is told before it says yes.

The same at every site, frozen, hashed. It says *what* is run, never *which class*: no name in it is imported.
Paths, devices, ceilings and credentials are the site's own (`client/settings.py`) and never appear here. Each
number has a range and each text its letters, beside its type: a plan outside of them is not made.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Annotated, Literal

from federation.plan import canary_plan, latent_privacy, privacy_plan
from federation.plan.canary_plan import AuditCanariesPlan
from federation.plan.diffusion_plan import MOST_STEPS, DiffusionPlan, contradictions
from federation.plan.privacy_plan import PrivacyPlan
from federation.plan.release_policy import NONE, ReleasePolicy
from forms.form import build, check
from forms.json_text import canonical, read_json, sha256_of
from forms.names import OptionalDay, Phrase, Sha256, SiteName
from forms.ranges import Entries, Range, Share
from meduet_models.anatomy_start import AnatomyStart
from meduet_models.meduet import MOST_ACTIVATIONS, NetworkConfig
from meduet_models.objective.settings import ObjectiveConfig
from meduet_models.published.expiry import check_day
from privacy.secure_sum.transcript import FEWEST_SITES, MOST_SITES, threshold
from scans.volume_plan import VolumePlan

WIRE_VERSION = 2

LatentDtype = Literal["float32", "bfloat16"]
WireDtype = Literal["float32", "bfloat16", "mxint8"]


@dataclass(frozen=True, kw_only=True)
class TrainingPlan:
    """What a site does within a round."""

    rounds: Annotated[int, Range(at_least=1, at_most=100_000)]
    """Rounds of the run."""
    steps_per_round: Annotated[int, Range(at_least=1, at_most=1_000_000)]
    """Optimiser steps of each site in a round."""
    batch_size: Annotated[int, Range(at_least=4, at_most=4096)] = 8
    """Scans per step; even, at least 4."""
    optimiser: Literal["adamw", "muon"] = "adamw"
    """`adamw`: as published. `muon`: matrices of the content branch by Muon, at ten times the learning rate,
    everything else by AdamW."""
    learning_rate: Annotated[float, Range(above=0, at_most=10)] = 2e-3
    """Peak learning rate."""
    final_learning_rate: Annotated[float, Range(at_least=0, at_most=10)] = 4e-4
    """Learning rate at the last step (cosine)."""
    warmup: Annotated[float, Share] = 0.05
    """Share of all steps over which the learning rate rises."""
    weight_decay: Annotated[float, Range(at_least=0, at_most=10)] = 1e-2
    """Weight decay."""
    betas: Annotated[tuple[float, float], Range(at_least=0, below=1)] = (0.9, 0.95)
    """AdamW betas."""
    gradient_clip_norm: Annotated[float, Range(above=0, at_most=1_000_000)] = 1.0
    """L2 norm to which the batch gradient is clipped (no privacy meaning)."""
    teacher_momentum: Annotated[tuple[float, float], Share] = (0.99, 0.9997)
    """Moving-average momentum of the teacher at the first and last step (cosine)."""
    proximal: Annotated[float, Range(at_least=0, at_most=10_000)] = 0.0
    """FedProx: weight of the squared distance to the round's shared weights."""
    precision: Literal["float32", "bf16"] = "float32"
    """Autocast of the network; bf16 needs CUDA or a CPU that has it."""


@dataclass(frozen=True, kw_only=True)
class StylePlan:
    """What sites tell each other about appearance."""

    exchange: Literal["bank", "amplitude", "none"] = "bank"
    """`bank`: latent statistics; `amplitude`: low-frequency amplitude spectra (a baseline, known to be
    worse); `none`: nothing."""
    map_grid: Annotated[tuple[int, int, int], Range(at_least=1, at_most=64)] = (2, 3, 2)
    """Coarse mean map, registered crops only."""
    centre: Literal["coarse", "full"] = "coarse"
    """What latents of registered crops are centred on: the coarse mean map, or (`full`) the mean of every
    voxel, as many numbers as a scan has: these tell whether a known scan is among a site's patients."""
    minimum_cohort: Annotated[int, Range(at_least=1, at_most=1_000_000)] = 10
    """Fewest patients whose statistics may leave a site together; a site may ask for more."""
    head: Literal["local", "shared"] = "local"
    """Whether the style branch stays at the site (same broadcast start, anchored) or is averaged."""
    anchor: Annotated[float, Range(at_least=0, at_most=10_000)] = 0.003
    """Weight of the distance of a local style branch to its broadcast start."""
    body_parts: Annotated[tuple[Phrase, ...], Entries(256)] = ()
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
    trim: Annotated[float, Range(at_least=0, below=0.5)] = 0.2
    """Share trimmed from each end by `trimmed_mean`; share of sites assumed bad by `krum`."""
    optimiser: Literal["average", "momentum", "adam", "yogi"] = "average"
    """What the server does with the aggregate."""
    learning_rate: Annotated[float, Range(above=0, at_most=100)] = 1.0
    """Server learning rate."""
    momentum: Annotated[float, Range(at_least=0, below=1)] = 0.9
    """Server momentum (`momentum`), first moment (`adam`, `yogi`)."""
    quorum: Annotated[float, Range(above=0, at_most=1)] = 1.0
    """Share of sites whose valid reply a round needs."""
    deadline_s: Annotated[float, Range(above=0, at_most=2_592_000)] = 3600.0
    """Seconds a round waits for replies."""
    norm_tolerance: Annotated[float, Range(at_least=0, at_most=1_000_000)] = 5.0
    """A reply whose mean update is longer than this many times the median of the round's is put aside (with
    three replies or more); 0: none is."""
    secure_sum: bool = False
    """Whether updates leave masked, so that the centre reads their sum and no site's own
    (`privacy/secure_sum/`); 3 to 32 sites."""
    weight_cap: Annotated[int, Range(at_least=1, at_most=1 << 20)] = 1000
    """Training scans by which a site weighs in a secure sum, at most; one that has more weighs this much. The
    smaller, the finer the grid of the sum."""


@dataclass(frozen=True, kw_only=True)
class ReleasePlan:
    """The promise: bound and noise of everything that leaves a site."""

    update_clip_norm: Annotated[float, Range(above=0, at_most=10_000)] = 20.0
    """L2 norm to which a site's weighted mean update is clipped at the gate."""
    style_clip: Annotated[float, Range(above=0, at_most=10_000)] = 10.0
    """L2 norm to which one patient's latent statistics are clipped before they are summed. They grow with the
    square root of the latent channels, as a plan's own bound does (`server/config.py`)."""
    wire_dtype: WireDtype = "float32"
    """Type in which weights and updates travel, both ways: `float32`, `bfloat16`, or `mxint8`, a byte per
    value (`federation/wire/microscaling.py`)."""
    expires: OptionalDay = ""
    """Last day (UTC) on which what left, and what was made of it, may be used; empty: no such day."""

    def __post_init__(self) -> None:
        """Refuse a day that no calendar has."""
        check_day(self.expires)

    @property
    def latent_dtype(self) -> LatentDtype:
        """Type in which latents travel: `mxint8` is for weights, latents are bfloat16 then."""
        return "bfloat16" if self.wire_dtype == "mxint8" else self.wire_dtype


@dataclass(frozen=True, kw_only=True)
class ProbePlan:
    """What sites tell in sums about what the model knows, while it is trained."""

    every_rounds: Annotated[int, Range(at_least=0, at_most=100_000)] = 0
    """Rounds between federated probes; after the last round always; 0: never."""
    folds: Annotated[int, Range(at_least=3, at_most=100)] = 5
    """Folds of each site's patients; each must hold the minimum cohort, else the site is left out."""
    patients: Literal["train", "held_out"] = "train"
    """Whose scans are read: those trained on (the probe is cross-validated, the model has seen them), or
    those of validation and test, where a site has enough of them."""
    anatomy: Annotated[
        dict[Phrase, Annotated[tuple[float, float], Range(at_least=-1e12, at_most=1e12)]], Entries(64)
    ] = field(default_factory=dict)
    """Anatomical targets, each with the range that is mapped to [-1, 1] (values beyond are cut off): `sex`,
    covariates that are numbers, and `volume_<label>` in mm³ on the prepared grid."""


@dataclass(frozen=True, kw_only=True)
class DemographicsPlan:
    """Whose patients the model card speaks of: counts by age and sex, in whole minimum cohorts."""

    age_edges: Annotated[tuple[Annotated[float, Range(at_least=0, at_most=150)], ...], Entries(20, least=1)]
    """Ages in years between the bands, ascending; the first and the last band are open."""


@dataclass(frozen=True, kw_only=True)
class AuditCountsPlan:
    """Counts of sites' own audits, which the centre pools."""

    false_alarms: Annotated[float, Range(at_least=0.01, at_most=0.5)]
    """Share of the patients who fix a threshold that it lets pass."""


@dataclass(frozen=True, kw_only=True)
class RunPlan:
    """Everything about a run that both sides must agree on."""

    name: Phrase
    """Name of the run."""
    seed: Annotated[int, Range(at_least=0, at_most=2**63 - 1)]
    """Seed of every draw that is not a secret."""
    sites: Annotated[tuple[SiteName, ...], Entries(1000, least=1)]
    """The consortium, in the order of the site labels."""
    tokenizer_sha256: Sha256
    """Hash of the frozen tokenizer; a site with another refuses."""
    volumes: VolumePlan
    """Scan to volume."""
    network: NetworkConfig
    """The network."""
    objective: ObjectiveConfig
    """The loss."""
    anatomy_start: AnatomyStart = "none"
    """What the U-Net of network.encoder=volume_unet starts from: `canonical`, public anatomy that never was a
    patient; `shapes`, its control; `none`, the seed."""
    anatomy_sha256: Sha256 | None = None
    """Hash of that start as it comes with round 1 (`federation/exchanges/pretraining.py`); none: there is
    none."""
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
    demographics: DemographicsPlan | None = None
    """Ages and sexes that sites tell for the model card; none: no site is asked."""
    audit_counts: AuditCountsPlan | None = None
    """Counts that sites tell of their own audits; none: no site is asked."""
    diffusion: DiffusionPlan | None = None
    """The diffusion model; none: there is none."""
    privacy: PrivacyPlan | None = None
    """Differential privacy for each patient; none: bounds without noise, epsilon infinite."""
    audit_canaries: AuditCanariesPlan | None = None
    """Made-up contributors by which the noise is audited; none: there are none."""
    wire_version: Annotated[int, Range(at_least=1, at_most=1000)] = WIRE_VERSION
    """Version of the messages."""

    def __post_init__(self) -> None:
        """Refuse a plan out of its ranges, one that contradicts itself, or sets what has no effect."""
        check(self, "plan")
        for problem in _contradictions(self):
            raise ValueError(problem)

    def to_json(self) -> str:
        """Canonical JSON: sorted keys, no spaces; what is hashed."""
        return canonical(dataclasses.asdict(self))

    @property
    def sha256(self) -> str:
        """Hash of the canonical JSON, 64 hex digits."""
        return sha256_of(self.to_json())

    @property
    def latent_policy(self) -> ReleasePolicy:
        """What sites release for a diffusion model."""
        return NONE if self.diffusion is None else self.diffusion.release

    @property
    def participants(self) -> tuple[str, ...]:
        """Who answers messages: the sites, or the one that holds all scans in the pooled baseline."""
        return ("pooled",) if self.aggregation.method == "pooled" else self.sites

    @property
    def num_rounds(self) -> int:
        """Rounds of the whole run: those of training, and those of noisy steps after them."""
        noisy = None if self.privacy is None else self.privacy.noisy
        return self.training.rounds + (0 if noisy is None else noisy.rounds)

    def steps_in(self, round_number: int) -> int:
        """Steps of a round (from 1), at the centre or of each site."""
        noisy = None if self.privacy is None else self.privacy.noisy
        if noisy is None or round_number <= self.training.rounds:
            return self.training.steps_per_round
        return noisy.steps_per_round

    @property
    def total_steps(self) -> int:
        """Optimiser steps of the rounds of training; schedules run over these."""
        return self.training.rounds * self.training.steps_per_round

    @staticmethod
    def from_json(text: str) -> "RunPlan":
        """Rebuild a plan; what is unknown, missing, ill-typed or out of range raises `ValueError`."""
        return build(RunPlan, read_json(text, "a plan"))


def _contradictions(plan: RunPlan) -> Iterator[str]:
    """Say what in a plan cannot be, or would have no effect; one line each."""
    training, style, aggregation, network = plan.training, plan.style, plan.aggregation, plan.network
    if len({site.lower() for site in plan.sites}) != len(plan.sites):
        yield f"Expected plan.sites to be distinct names; got {', '.join(plan.sites)}."
    if plan.total_steps > MOST_STEPS:
        yield (
            f"Expected training.rounds times training.steps_per_round to be at most {MOST_STEPS:,}; got "
            f"{plan.total_steps:,}."
        )
    if plan.demographics is not None:
        edges = plan.demographics.age_edges
        if any(later <= earlier for earlier, later in itertools.pairwise(edges)):
            yield f"Expected demographics.age_edges to ascend; got {', '.join(f'{e:g}' for e in edges)}."
        if plan.privacy is not None:
            yield "demographics tells counts without noise: it has no place in a plan with privacy."
        if aggregation.method == "alone":
            yield "demographics has no effect with aggregation.method=alone: no model is shared."
    if plan.audit_counts is not None:
        if plan.privacy is not None:
            yield "audit_counts tells counts without noise: it has no place in a plan with privacy."
        if aggregation.method == "alone":
            yield "audit_counts has no effect with aggregation.method=alone: no model is shared."
    if plan.audit_canaries is not None:
        yield from canary_plan.contradictions(plan)
    if training.batch_size % 2:
        yield f"Expected training.batch_size to be even; got {training.batch_size}."
    if (values := training.batch_size * network.activations) > MOST_ACTIVATIONS:
        yield (
            "Expected training.batch_size times tokens, network.width and network.depth (and those of the "
            f"decoder) to be at most {MOST_ACTIVATIONS:,} numbers; got {values:,}."
        )
    if math.prod(network.latent_grid) > math.prod(plan.volumes.shape):
        yield (
            f"Expected network.latent_grid {network.latent_grid} to be no finer than volumes.shape "
            f"{plan.volumes.shape}."
        )
    if any(size % network.patch_size for size in network.latent_grid):
        yield (
            f"Expected the latent grid {network.latent_grid} to divide by network.patch_size"
            f"={network.patch_size}; change volumes.shape or the patch size."
        )
    if aggregation.method not in ("alone", "pooled") and network.code_size < len(plan.sites):
        yield (
            f"Expected network.code_size of at least {len(plan.sites)} numbers, one per site; got "
            f"{network.code_size}."
        )
    if network.style_map_grid != style.map_grid:
        yield "Expected network.style_map_grid and style.map_grid to be equal."
    if plan.volumes.extent == "scan" and style.exchange == "amplitude":
        yield (
            "style.exchange=amplitude compares spectra of crops of one size; with volumes.extent=scan set "
            "style.exchange to bank or none."
        )
    if style.centre == "full" and not plan.volumes.registered:
        yield "style.centre=full needs registered crops; with volumes.registered=false there is no such map."
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
        for setting, condition in (("site_style", "style"), ("restyled_content", "content")):
            used = condition in plan.diffusion.conditions and getattr(plan.diffusion.training, setting) > 0
            if used and style.exchange == "none":
                yield (
                    f"diffusion.training.{setting} needs the styles of the sites; with style.exchange=none "
                    "there are none: set it to 0."
                )
        if aggregation.method == "alone":
            yield "aggregation.method=alone shares no encoder for a diffusion model: set diffusion=none."
    yield from latent_privacy.contradictions(plan)
    yield from _encoder_contradictions(plan)
    yield from _secure_sum_contradictions(plan)
    if plan.privacy is not None:
        yield from privacy_plan.contradictions(plan)
    defaults = AggregationPlan()
    if aggregation.rule in ("mean", "median") and aggregation.trim != defaults.trim:
        yield f"aggregation.trim has no effect with aggregation.rule={aggregation.rule}: leave it out."
    if aggregation.optimiser == "average" and aggregation.momentum != defaults.momentum:
        yield "aggregation.momentum has no effect with aggregation.optimiser=average: leave it out."


def _encoder_contradictions(plan: RunPlan) -> Iterator[str]:
    """What a U-Net on the volume as encoder rules out, and what its start needs."""
    if plan.anatomy_start != "none" and plan.network.encoder != "volume_unet":
        yield (
            f"anatomy_start={plan.anatomy_start} has no effect with network.encoder={plan.network.encoder}, "
            "which has no U-Net on the volume: set network.encoder=volume_unet, or leave it out."
        )
    if (plan.anatomy_start != "none") != (plan.anatomy_sha256 is not None):
        yield (
            f"Expected anatomy_sha256, the hash of a start from public anatomy, with anatomy_start=canonical "
            f"or shapes, and only with them; anatomy_start is {plan.anatomy_start}."
        )


def _secure_sum_contradictions(plan: RunPlan) -> Iterator[str]:
    """What a secure sum rules out, and what it needs."""
    aggregation, num_sites = plan.aggregation, len(plan.sites)
    if not aggregation.secure_sum:
        if aggregation.weight_cap != AggregationPlan().weight_cap:
            yield "aggregation.weight_cap has no effect with aggregation.secure_sum=false: leave it out."
        return
    if plan.privacy is not None and plan.privacy.noisy is None:
        yield (
            f"aggregation.secure_sum has no effect with privacy.level={plan.privacy.level}, where no update "
            "leaves: leave it out."
        )
        return
    if aggregation.method in ("alone", "pooled"):
        yield f"aggregation.method={aggregation.method} sums nothing over sites: leave secure_sum out."
        return
    if not FEWEST_SITES <= num_sites <= MOST_SITES:
        yield (
            f"Expected {FEWEST_SITES} to {MOST_SITES} sites with aggregation.secure_sum=true; got "
            f"{num_sites}. Of two sites each learns the other's update from the sum."
        )
        return
    if aggregation.rule != "mean":
        yield (
            f"aggregation.rule={aggregation.rule} compares the updates of single sites, which a secure sum "
            "hides: set rule=mean or secure_sum=false."
        )
    if aggregation.norm_tolerance != 0:
        yield (
            "aggregation.norm_tolerance compares the lengths of single sites' updates, which a secure sum "
            "hides: set aggregation.norm_tolerance=0. A site's own gate is then all that bounds its update."
        )
    if aggregation.quorum < (least := threshold(num_sites)) / num_sites:
        yield (
            f"Expected aggregation.quorum of at least {least / num_sites:.3g}: a secure sum of {num_sites} "
            f"sites needs {least} of them; got {aggregation.quorum:g}."
        )
    largest = num_sites * aggregation.weight_cap * plan.release.update_clip_norm
    if largest >= 2.0**31:
        yield (
            "Expected sites times aggregation.weight_cap times release.update_clip_norm below 2^31, half of "
            f"the ring; got {largest:.3g}. Lower one of them."
        )
    if plan.diffusion is not None and plan.diffusion.release.trained_at == "sites":
        yield (
            "diffusion.policy=federated would send the diffusion model's updates unmasked: set "
            "diffusion=none, or aggregation.secure_sum=false."
        )
