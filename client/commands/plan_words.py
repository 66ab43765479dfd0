"""A published plan in plain words: what will run, on which data, what will leave, for how long, in which
code.

For the person at a hospital who says yes or no. Every sentence is read from the plan; where numbers leave,
it is said how many, under which bound, and that no noise is added. Does not do: recommend.
"""

import dataclasses
import math
from collections.abc import Iterator

from federation.exchanges.erasure import content_bound, erasure_shapes, share_bound
from federation.exchanges.finetuning import FinetunePlan
from federation.exchanges.probes import sums_bound, sums_shapes
from federation.exchanges.survey import smallest_cohort, survey_layout
from federation.plan import RunPlan
from federation.published_plan import PublishedPlan
from federation.wire import num_bytes
from meduet_models.meduet import MeDUET
from meduet_models.sharing import shared_keys

Line = tuple[str, str]
"""A heading (empty: the paragraph before goes on) and a sentence."""


def plan_words(published: PublishedPlan, site_minimum: int = 0) -> list[Line]:
    """The plan in sentences; `site_minimum` is the site's own smallest cohort."""
    plan = published.plan
    lines: list[Line] = [("Plan", f"{plan.name}, hash {published.sha256}")]
    lines += [("Code", f"hash {published.bundle_sha256}")]
    if published.finetuning is None:
        return [*lines, *_run(plan, site_minimum)]
    return [*lines, *_finetuning(plan, published.finetuning)]


def _run(plan: RunPlan, site_minimum: int) -> Iterator[Line]:
    training, aggregation, network = plan.training, plan.aggregation, plan.network
    yield "Who", f"{len(plan.sites)} sites: {', '.join(plan.sites)}."
    yield (
        "What",
        f"A MeDUET network (encoder of {network.depth} blocks, width {network.width}) learns from scans "
        f"without labels; method {aggregation.method}, rule {aggregation.rule}, seed {plan.seed}.",
    )
    yield "On which data", _data(plan)
    yield "", f"The tokenizer must be {plan.tokenizer_sha256[:12]}…; encodings stay in your cache."
    yield (
        "How long",
        f"{training.rounds} rounds of {training.steps_per_round} steps with {training.batch_size} scans; a "
        f"round waits at most {aggregation.deadline_s:g} s, so all of them at most "
        f"{training.rounds * aggregation.deadline_s / 3600:.1f} hours of waiting.",
    )
    least = smallest_cohort(plan, site_minimum)
    raw = plan.diffusion is not None and plan.diffusion.policy == "raw"
    beside = "AND LATENTS OF SINGLE SCANS, SEE BELOW" if raw else "no scan, no file name, no label"
    yield "What leaves", f"Sums over your patients, never of fewer than {least}; {beside}."
    if aggregation.method != "alone":
        layout = survey_layout(plan)
        yield (
            "",
            f"Once before round 1: {_numbers(layout.shapes())} numbers that describe appearance (means and "
            f"spreads of latents); one patient's share is at most {layout.bound:g} long; and how many "
            "patients and scans.",
        )
    yield from _round(plan)
    if plan.probes.every_rounds:
        yield (
            "",
            f"Every {plan.probes.every_rounds} rounds and at the end: {_numbers(sums_shapes(plan))} "
            f"numbers, sums of content and style of the {_whose(plan)} (targets: "
            f"{', '.join(plan.probes.anatomy) or 'none'}); one patient's share is at most "
            f"{sums_bound(plan):.3g} long; then how many patients were recognised.",
        )
    if aggregation.method not in ("alone", "pooled"):
        yield (
            "",
            f"Once after the last round: {_numbers(erasure_shapes(plan))} numbers, sums of pooled content "
            f"(each at most {content_bound(plan):.3g} long); one patient's share is at most "
            f"{share_bound(plan):.3g} long.",
        )
    if plan.diffusion is not None:
        yield from _diffusion(plan)
    yield (
        "Noise",
        "None is added anywhere: what leaves is bounded, not differentially private (epsilon infinite).",
    )


def _round(plan: RunPlan) -> Iterator[Line]:
    method = plan.aggregation.method
    if method == "alone":
        yield "", "Each round: no weights; losses, seconds, and how many scans were trained on."
        return
    network = MeDUET(plan.network, len(plan.sites), seed=0)
    whole = network.state_dict()
    shared = {name: whole[name] for name in shared_keys(network, plan.style.head, method)}
    values = sum(tensor.numel() for tensor in shared.values())
    size = num_bytes(shared, plan.release.wire_dtype)
    what = "of the content branch" if method == "content_share" else "of the network"
    what += "; your style branch stays here" if plan.style.head == "local" else ", style branch included"
    yield (
        "",
        f"Each round: the change of {values:,} weights {what} ({size / 1e6:.1f} MB, "
        f"{plan.release.wire_dtype}), clipped to a length of {plan.release.update_clip_norm:g} times how "
        "many scans were trained on; that number; losses and seconds.",
    )


def _diffusion(plan: RunPlan) -> Iterator[Line]:
    diffusion = plan.diffusion
    assert diffusion is not None
    if diffusion.policy == "raw":
        amount = f"at most {diffusion.items_per_site}" if diffusion.items_per_site else "all"
        yield (
            "",
            f"For a diffusion model: LATENTS OF {amount} of your training scans, each clipped to a root mean "
            f"square of {diffusion.latent_clip:g}, told with {', '.join(diffusion.conditions) or 'nothing'}. "
            "The tokenizer's decoder is public: whoever holds a latent can see the scan.",
        )
    else:
        yield (
            "",
            f"For a diffusion model, in {diffusion.rounds} more rounds: the change of its weights, clipped "
            f"to a length of {diffusion.update_clip_norm:g} times how many scans were trained on; no latent "
            "leaves.",
        )


def _finetuning(plan: RunPlan, finetuning: FinetunePlan) -> Iterator[Line]:
    local = finetuning.local
    trained = "the head alone" if local.encoder == "frozen" else "encoder and head"
    told = ", ".join(f"{value} as {label}" for value, label in local.label_values.items())
    told = f", label values {told}, all others as 0" if told else ""
    target = "a class of every voxel" if local.task == "segmentation" else f"{finetuning.target!r}"
    yield "Who", f"{len(plan.sites)} sites: {', '.join(plan.sites)}."
    yield (
        "What",
        f"Fine-tuning of run {plan.sha256[:12]}… with your labels: {trained} learn to predict {target} "
        f"({local.classes} classes{told}).",
    )
    yield "On which data", f"{_data(plan)} Of those with a label, {finetuning.label_share:.0%}."
    yield (
        "How long",
        f"{finetuning.rounds} rounds of {local.steps} steps; a round waits at most "
        f"{plan.aggregation.deadline_s:g} s.",
    )
    yield (
        "What leaves",
        f"Each round: the change of the weights of {trained}, clipped to a length of "
        f"{finetuning.update_clip_norm:g} times how many scans were trained on; that number; losses and "
        "seconds.",
    )
    yield (
        "Noise",
        "None is added anywhere: what leaves is bounded, not differentially private (epsilon infinite).",
    )


def _data(plan: RunPlan) -> str:
    volumes = plan.volumes
    window = (
        f"intensities from percentile {volumes.mr_percentiles[0]:g} to {volumes.mr_percentiles[1]:g}"
        if volumes.window == "mr_percentiles"
        else f"{volumes.ct_window_hu[0]:g} to {volumes.ct_window_hu[1]:g} HU"
        if volumes.window == "ct_hu"
        else f"{volumes.fixed_window[0]:g} to {volumes.fixed_window[1]:g} in units of their own"
    )
    spacing = " x ".join(f"{mm:g}" for mm in volumes.spacing_mm)
    shape = " x ".join(map(str, volumes.shape))
    modalities = " and ".join(volumes.modalities or (volumes.modality,))
    return (
        f"Your scans of modality {modalities} under data_root, of the patients that your site "
        f"assigned to training; {window}, {spacing} mm, the central {shape} voxels."
    )


def _whose(plan: RunPlan) -> str:
    return "training patients" if plan.probes.patients == "train" else "patients of validation and test"


def _numbers(shapes: dict[str, tuple[int, ...]]) -> str:
    return f"{sum(math.prod(shape) for shape in shapes.values()):,}"


def plan_settings(published: PublishedPlan) -> Iterator[str]:
    """Every setting of the plan, one per line, as `name = value`: nothing that the sentences leave out."""
    yield from _settings("plan", dataclasses.asdict(published.plan))
    if published.finetuning is not None:
        yield from _settings("finetuning", dataclasses.asdict(published.finetuning))


def _settings(name: str, value: object) -> Iterator[str]:
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from _settings(f"{name}.{key}", inner)
    else:
        yield f"{name} = {value}"
