"""A published plan in plain words: what will run, on which data, what will leave, for how long, in which
code.

For the person at a hospital who says yes or no. Every sentence is read from the plan; where numbers leave,
it is said how many, under which bound, what can be told from them, how often they may be asked for, and that
no noise is added. Does not do: recommend.
"""

import dataclasses
from collections.abc import Iterator

from client.books.refusals import MOST
from client.commands.latent_words import diffusion_words
from client.commands.privacy_words import (
    Line,
    layout_of,
    noisy_finetuning,
    numbers,
    protected,
    shared,
)
from client.consent.exact_sums import fewest_for_means, fewest_patients
from federation.exchanges.audit_counts import AUDIT_COUNTS, CELLS, TRIED, cell_of
from federation.exchanges.demographics import DEMOGRAPHICS, SEX_NAMES, age_bands
from federation.exchanges.diffusion import DIFFUSION
from federation.exchanges.erasure import ERASURE, erasure_shapes, numbers_told, pooled_bound
from federation.exchanges.finetuning import FinetunePlan
from federation.exchanges.latent_moments import LATENT_MOMENTS
from federation.exchanges.latents import LATENTS
from federation.exchanges.pretraining import PRETRAINING
from federation.exchanges.private_rounds import PRIVATE_ROUNDS
from federation.exchanges.probes import PROBES, sums_bound, sums_shapes, widest_sums
from federation.exchanges.secure_sum import SUM_MASKED, SUM_PRIVATE
from federation.exchanges.style_code import STYLE_CODE
from federation.exchanges.survey import SURVEY, smallest_cohort, survey_layout
from federation.exchanges.synthetic_latents import SYNTHETIC_LATENTS
from federation.plan.plan import RunPlan
from federation.published_plan import PublishedPlan
from federation.wire.sum_layout import SumLayout
from federation.wire.wire import num_bytes
from meduet_models.content_code import code_bound
from privacy.secure_sum.transcript import threshold

ONCE = (
    "Each is answered once: the same question gets the same answer again, another in its place is refused, "
    f"and stands in your journal. After {MOST} questions that could not be answered your site stops, until "
    "you say to go on."
)
_SURVEY_TELLS = (
    "how your scanner's images look, on average; of one patient little, unless nearly all of your scans are "
    "known to somebody."
)
_CENTRE_TELLS = (
    " THE MEAN OF EVERY VOXEL IS AMONG THEM (style.centre=full): from it, whether a person whose scan "
    "somebody else holds is among yours."
)
_COUNTS_TELL = (
    "of a band with fewer than {least} patients nothing; where a count stands just below the next cohort, "
    "whoever knows all the others sees whether one more is there."
)
_CLAIMS_TELL = (
    "of a cell with fewer than {cell} patients nothing; who knows the scores of all the others sees whether "
    "one more is counted where a cell stands just below the next {cell}."
)
_UPDATE_TELLS = (
    "from the change and the weights before it, parts of the scans of a small batch can be reconstructed, "
    "and whether a known scan was trained on. Which scans met in a batch is drawn from a secret of your site."
)
_HITS_TELL = (
    " The number of recognised patients answers one question of the centre's choosing about them, such as "
    "whether a known person is there."
)


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
    if network.encoder == "volume_unet":
        yield (
            "",
            "Beside latents it sees a picture that they are decoded into, by a U-Net (no other voxels)"
            f"{_STARTS[plan.anatomy_start]}",
        )
    yield "On which data", _data(plan)
    yield "", f"The tokenizer must be {plan.tokenizer_sha256[:12]}…; encodings stay in your cache."
    if plan.privacy is not None:
        yield from protected(plan)
        yield from _how_often(plan)
        yield from _until(plan)
        return
    yield (
        "How long",
        f"{training.rounds} rounds of {training.steps_per_round} steps with {training.batch_size} scans; a "
        f"round waits at most {aggregation.deadline_s:g} s, so all of them at most "
        f"{training.rounds * aggregation.deadline_s / 3600:.1f} hours of waiting.",
    )
    least = smallest_cohort(plan, site_minimum)
    beside = plan.latent_policy.beside_sums
    yield "What leaves", f"Sums over your patients, never of fewer than {least}; {beside}."
    if aggregation.method != "alone":
        layout = survey_layout(plan)
        yield (
            "",
            f"Once before round 1: {numbers(layout.shapes())} numbers that describe appearance (means and "
            f"spreads of latents); one patient's share is at most {layout.bound:g} long; and how many "
            "patients and scans.",
        )
        yield _told(_SURVEY_TELLS + (_CENTRE_TELLS if layout.centre else ""))
    if plan.demographics is not None:
        bands = ", ".join(age_bands(plan.demographics.age_edges))
        yield (
            "",
            "Once before round 1, for the model card: how many of your training patients are in each band "
            f"of ages ({bands}) and of each sex ({', '.join(SEX_NAMES)}), each count rounded down to whole "
            f"cohorts of {least}; the centre publishes their sums over all sites.",
        )
        yield _told(_COUNTS_TELL.format(least=least))
    yield from _round(plan)
    if plan.probes.every_rounds:
        yield (
            "",
            f"Every {plan.probes.every_rounds} rounds and at the end: {numbers(sums_shapes(plan))} "
            f"numbers, sums of content and style of the {_whose(plan)} (targets: "
            f"{', '.join(plan.probes.anatomy) or 'none'}); one patient's share is at most "
            f"{sums_bound(plan):.3g} long; then how many patients were recognised.",
        )
        yield _told(_few(widest_sums(plan), " in each fold") + _HITS_TELL)
    if aggregation.method not in ("alone", "pooled"):
        size = network.code_size
        yield (
            "",
            f"Once after the last round: {numbers(erasure_shapes(plan))} numbers for the site erasure, how "
            f"many patients and the sums of their content codes (each at most {code_bound(size):.3g} long) "
            f"and of their pooled content (each at most {pooled_bound(plan):.3g} long).",
        )
        yield _told(
            "with some certainty, whether a person whose scan somebody else holds is among yours: the more, "
            f"the fewer you have. So codes leave only from {fewest_for_means(size)} patients and pooled "
            f"content from {fewest_for_means(numbers_told(plan))}, or where site.yaml agrees "
            "(allow_exact_sums); otherwise your site says so and the run goes on."
        )
    if plan.audit_counts is not None:
        cell = cell_of(plan)
        yield (
            "",
            "Once after the last round: how many of your patients an attack on the final weights, and one on "
            "your style sums, claims and misses at one threshold each, of those trained on and of others, "
            "and the same of a classifier that sees scans and nothing released, each of these "
            f"{len(TRIED) * CELLS} counts rounded down to whole cells of {cell}. No score leaves. Half of "
            "those who stayed out fix the thresholds and are not counted.",
        )
        yield _told(_CLAIMS_TELL.format(cell=cell))
    yield from diffusion_words(plan)
    yield from _how_often(plan)
    yield from _until(plan)
    yield (
        "Noise",
        "None is added anywhere: what leaves is bounded, not differentially private (epsilon infinite).",
    )


def _until(plan: RunPlan) -> Iterator[Line]:
    """Until when it may be used."""
    if day := plan.release.expires:
        yield (
            "Until when",
            f"What leaves, and what is made of it, may be used until {day}. After that day no site answers "
            "under this plan, nothing more is trained on it, and whoever loads it with FedMeDUET is told.",
        )


def _how_often(plan: RunPlan) -> Iterator[Line]:
    """How often each thing may be asked, in all."""
    counted = (
        ("survey", SURVEY),
        ("ages and sexes", DEMOGRAPHICS),
        ("style code", STYLE_CODE),
        ("rounds of training", PRETRAINING),
        ("rounds of noisy steps", PRIVATE_ROUNDS),
        ("rounds of training as secure sums", SUM_MASKED),
        ("noisy steps as secure sums", SUM_PRIVATE),
        ("probes (two questions each)", PROBES),
        ("site erasure", ERASURE),
        ("counts of your own audit", AUDIT_COUNTS),
        ("releases of latents", LATENTS),
        ("synthetic latents", SYNTHETIC_LATENTS),
        ("moments of latents", LATENT_MOMENTS),
        ("rounds of the diffusion model", DIFFUSION),
    )
    asked = [f"{name}: {times}" for name, one in counted if (times := len(one.rounds(plan)))]
    yield "How often", f"In all: {', '.join(asked)}. {ONCE}"


def _told(what: str) -> Line:
    return "", f"  What that can tell: {what}"


def _few(width: int, where: str = "") -> str:
    return (
        "over few patients, exactly whether a person whose scan somebody else holds is among yours, and what "
        f"was measured of that patient. So they leave only from {fewest_patients(width)} patients{where}, or "
        "where site.yaml agrees (allow_exact_sums); otherwise your site says so and the run goes on. Larger "
        "sums blur that; they do not rule it out."
    )


def _round(plan: RunPlan) -> Iterator[Line]:
    method = plan.aggregation.method
    if method == "alone":
        yield "", "Each round: no weights; losses, seconds, and how many scans were trained on."
        return
    travels = shared(plan)
    values = sum(tensor.numel() for tensor in travels.values())
    size = num_bytes(travels, plan.release.wire_dtype)
    what = "of the content branch" if method == "content_share" else "of the network"
    what += "; your style branch stays here" if plan.style.head == "local" else ", style branch included"
    clipped = f"clipped to a length of {plan.release.update_clip_norm:g} times how many scans were trained on"
    if plan.aggregation.secure_sum:
        layout = layout_of(plan)
        yield "", f"Each round: the change of {values:,} weights {what}, {clipped}, {_summed(plan, layout)}"
        yield _told("of the sum over all sites, the fewer the more: " + _UPDATE_TELLS)
        return
    yield (
        "",
        f"Each round: the change of {values:,} weights {what} ({size / 1e6:.1f} MB, "
        f"{plan.release.wire_dtype}), {clipped}; that number; losses and seconds.",
    )
    yield _told(_UPDATE_TELLS)


def _summed(plan: RunPlan, layout: SumLayout) -> str:
    """What a secure sum means for who says yes to it."""
    num_sites, cap = len(plan.sites), plan.aggregation.weight_cap
    least = threshold(num_sites)
    loss = "the loss of any one stops the" if least == num_sites else "with fewer there is no"
    together = "two that collude know" if num_sites == 3 else "all others together know"
    return (
        f"MASKED ({layout.size * 4 / 1e6:.1f} MB): the centre reads the sum over the sites, with the numbers "
        f"of scans and the losses in it, and no site's own. At most {cap:,} scans of a site count; the sum "
        f"is rounded to steps of {2.0**-layout.bits:g} over their number. {least} of {num_sites} sites "
        f"must answer four questions: {loss} sum; a round that is lost after the third is not repeated. Of "
        f"{num_sites} sites, {together} yours from the sum. Nothing at the centre judges a single site's "
        "change any more: one that lies can spoil the model. Style sums, probes and site erasure are still "
        "your own, not summed."
    )


_NETWORKS = {
    "tokens": "The network reads latents.",
    "volume_unet": "The network is a U-Net that reads the prepared volumes themselves",
    "joined": "The network is a U-Net that reads the prepared volumes themselves, and latents",
}
_STARTS = {
    "canonical": "; it starts from public anatomy, in which no patient is.",
    "shapes": "; it starts from random shapes, in which no patient is.",
    "none": "; it starts from random numbers.",
}


def _finetuning(plan: RunPlan, finetuning: FinetunePlan) -> Iterator[Line]:
    from meduet_models.downstream.tasks import task_of  # MONAI takes seconds to import

    local = finetuning.local
    trained = "the head alone" if local.encoder == "frozen" else "encoder and head"
    target = task_of(local.task).words(finetuning.named)
    labels = ", ".join(f"{value} as {label}" for value, label in local.label_values.items())
    labels = f", label values {labels}, all others as 0" if labels else ""
    yield "Who", f"{len(plan.sites)} sites: {', '.join(plan.sites)}."
    yield (
        "What",
        f"Fine-tuning of run {plan.sha256[:12]}… with your labels: {trained} learn to predict {target} "
        f"(task {local.task}, {local.classes} outputs{labels}). {_NETWORKS[local.network]}"
        f"{_STARTS[finetuning.anatomy_start] if local.sees_volumes else ''}",
    )
    kept = " The prepared volumes are kept beside the latents, on this site." if local.sees_volumes else ""
    yield "On which data", f"{_data(plan)} Of those with a label, {finetuning.label_share:.0%}.{kept}"
    yield (
        "How long",
        f"{finetuning.rounds} rounds of {local.steps} steps; a round waits at most "
        f"{plan.aggregation.deadline_s:g} s.",
    )
    if finetuning.privacy is not None:
        yield from noisy_finetuning(finetuning, finetuning.privacy, trained)
        yield "How often", f"In all: rounds of fine-tuning: {finetuning.rounds}. {ONCE}"
        return
    yield (
        "What leaves",
        f"Each round: the change of the weights of {trained}, clipped to a length of "
        f"{finetuning.update_clip_norm:g} times how many scans were trained on; that number; losses and "
        "seconds.",
    )
    yield _told(_UPDATE_TELLS)
    yield "How often", f"In all: rounds of fine-tuning: {finetuning.rounds}. {ONCE}"
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
    extent = (
        f"the central {shape} voxels"
        if volumes.extent == "crop"
        else f"all of their foreground; a training step reads a crop of {shape} voxels anywhere in it (at "
        f"least {volumes.crop_foreground:.0%} of the crop foreground), and what asks for one crop of a scan "
        "gets the one around the foreground's centre"
    )
    return (
        f"Your scans of modality {modalities} under data_root, of the patients that your site "
        f"assigned to training; {window}, {spacing} mm, {extent}."
    )


def _whose(plan: RunPlan) -> str:
    return "training patients" if plan.probes.patients == "train" else "patients of validation and test"


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
