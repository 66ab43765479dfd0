"""What a plan, or a fine-tuning, with privacy promises, in plain words: what leaves with which noise, and
what epsilon is against whom.

For the person at a hospital who says yes or no. Does not do: recommend; say what a plan is otherwise
(`plan_words.py`).
"""

import math
from collections.abc import Iterator

from torch import Tensor

from client.commands.latent_words import after_the_pretraining, diffusion_words
from federation.exchanges.finetuning import FinetunePlan
from federation.exchanges.private_rounds import latents_promise, run_epsilon, steps_promise, travelling_keys
from federation.exchanges.style_code import code_promise, code_shapes, privacy_of
from federation.plan.canary_plan import AuditCanariesPlan, in_words, pull_on_steps, pull_on_style
from federation.plan.finetuning_privacy import FinetunePrivacy, all_rounds, round_promise
from federation.plan.plan import RunPlan
from federation.summed_noise import check_summed, colluding, hiding, summed_epsilon
from federation.wire.sum_layout import SumLayout
from meduet_models.meduet import MeDUET
from privacy.secure_sum.transcript import threshold

_YOUR_CEILING = (
    "Your own ceiling wins (site.yaml: epsilon_ceiling, delta_ceiling): it holds for all plans together; "
    "meduet-site ledger show says what is spent."
)

_OUTPUT_LAYER = (
    "The steps at your site train the output layer alone (level adapters), the last map from decoded tokens "
    "to latents. They improve reconstructions and swaps of style, as far as noise lets them, and change "
    "nothing that is read from content: encoder, content code and style stay as the phantoms made them."
)

_REPLACED = (
    "Your patients take part in groups of {size}, put together once by a secret of your site; public scans "
    "fill the last. So THE PROMISE IS ABOUT REPLACING A PATIENT by another, not about her being there or "
    "not: it hides what her scans show, and who among such people she is. HOW MANY PATIENTS YOU HAVE IS NOT "
    "HIDDEN. In your ledger all that ever left counts in this way then, which is more than before."
)

Line = tuple[str, str]
"""A heading (empty: the paragraph before goes on) and a sentence."""


def protected(plan: RunPlan) -> Iterator[Line]:
    """What a plan with privacy makes leave, and what it promises."""
    privacy, noisy, promise = privacy_of(plan), privacy_of(plan).noisy, code_promise(plan)
    yield (
        "How long",
        f"One question, answered within {plan.aggregation.deadline_s:g} s. Then the centre trains for "
        f"{plan.total_steps:,} steps on {privacy.public_scans} phantoms, in which no patient is, restyled to "
        "the sites' styles; "
        + (
            after_the_pretraining(plan)
            if noisy is None
            else f"then your site takes {noisy.steps} steps on its patients, in {noisy.rounds} rounds, each "
            f"answered within {plan.aggregation.deadline_s:g} s."
        ),
    )
    if privacy.level == "adapters":
        yield "What for", _OUTPUT_LAYER
    yield (
        "What leaves",
        f"Once: {numbers(code_shapes(plan))} numbers with noise, which say how your scanner's images look "
        f"on average and about how many patients you have (level {privacy.level}). "
        + ("No weights, no losses, no " if noisy is None else "Later the weights below. No losses, no ")
        + f"counts, {plan.latent_policy.beside_sums}.",
    )
    if noisy is not None:
        values = sum(tensor.numel() for tensor in shared(plan).values())
        yield (
            "",
            f"In each of {noisy.rounds} rounds: by how much {values:,} weights changed in "
            f"{noisy.steps_per_round} steps, in each of which about {noisy.sampling_rate:.0%} of your "
            "patients, drawn in secret, take part and noise is added. Beside them whole seconds, and the "
            "number of patients that the style code told, noise included.",
        )
        if noisy.partners == "private":
            yield "", _REPLACED.format(size=noisy.group_size)
    if plan.diffusion is not None:
        yield from diffusion_words(plan)
    yield (
        "Promise",
        f"Each patient, with all her scans: epsilon {run_epsilon(plan)} at delta {privacy.delta:g} for the "
        f"whole run. {promise.sentence()}",
    )
    if noisy is not None:
        yield "", f"Of a round: {steps_promise(plan).sentence()}"
    if plan.latent_policy.noised:
        yield "", f"For the diffusion model: {latents_promise(plan).sentence()}"
    if plan.aggregation.secure_sum:
        yield "", _summed_noise(plan)
    if plan.audit_canaries is not None:
        yield from _canaries(plan.audit_canaries)
    yield "", _YOUR_CEILING


def _canaries(canaries: AuditCanariesPlan) -> Iterator[Line]:
    """Who is in the sums beside the patients."""
    yield (
        "Canaries",
        f"THIS IS AN AUDIT RUN: your site adds made-up contributors to its sums, {in_words(canaries)}, all "
        "public. Each is in or out by a coin that your site throws and tells nobody; your own audit "
        "(meduet-site audit) looks how many coins can be guessed from what left, which must be few if the "
        "promise holds. No patient's draw, group, cut or noise changes, and what she is charged is the same "
        "with canaries and without.",
    )
    yield (
        "",
        "The weights hold the canaries, are marked as made with them, and are the worse for it: on average "
        f"they pull on a step as {pull_on_steps(canaries):.0f} patients do who all pull one way, and on your "
        f"style as {pull_on_style(canaries):.0f}. With few more patients than that they drown the training.",
    )


def _summed_noise(plan: RunPlan) -> str:
    """What secure sums add to a promise with noise."""
    num_sites, layout = len(plan.sites), layout_of(plan)
    check_summed(plan, layout)
    others = "one other site that works" if colluding(plan) == 1 else f"{colluding(plan)} sites that work"
    return (
        f"These changes leave MASKED ({layout.size * 4 / 1e6:.1f} MB): the centre reads the sum over the "
        f"sites, with the noise of all in it, and takes the step along it. So against the centre, and "
        f"{others} with it, a patient is protected with epsilon {summed_epsilon(plan)} for the whole "
        f"run, style code included, as long as {hiding(plan)} sites, yours among them, add their noise as "
        "they say. Against "
        "everybody, and whatever becomes of the masks, it is the epsilon above, by your own noise alone. "
        f"{threshold(num_sites)} of {num_sites} sites must answer four questions a round; a round that is "
        "lost after the third is not repeated: a second vector would be a second charge."
    )


def noisy_finetuning(finetuning: FinetunePlan, privacy: FinetunePrivacy, trained: str) -> Iterator[Line]:
    """What a fine-tuning with privacy makes leave, and what it promises."""
    yield (
        "What leaves",
        f"Each round: the change of the weights of {trained} in {finetuning.local.steps} steps, in each of "
        f"which about {privacy.sampling_rate:.0%} of your patients with labels, drawn in secret, take part, "
        f"each cut to a length of {privacy.clip_norm:g}, and noise is added; all of it clipped to a length "
        f"of {finetuning.update_clip_norm:g}. Beside it whole seconds, and {privacy.expected_patients:,} as "
        "number of patients, which the plan says of every site. No losses, no counts of yours; a label that "
        "is none of the plan's classes refuses nothing, its scan is left out.",
    )
    yield (
        "Promise",
        f"Each patient, with all her scans: epsilon {all_rounds(finetuning)} at delta {privacy.delta:g} for "
        f"the whole fine-tuning. Of a round: {round_promise(finetuning).sentence()}",
    )
    yield "", _YOUR_CEILING


def shared(plan: RunPlan) -> dict[str, Tensor]:
    """The weights that travel."""
    network = MeDUET(plan.network, len(plan.sites), seed=0)
    whole = network.state_dict()
    return {name: whole[name] for name in travelling_keys(plan, network)}


def layout_of(plan: RunPlan) -> SumLayout:
    """The vector of a secure sum of them."""
    return SumLayout.of(plan, {name: tensor.shape for name, tensor in shared(plan).items()})


def numbers(shapes: dict[str, tuple[int, ...]]) -> str:
    """How many there are in all, for people."""
    return f"{sum(math.prod(shape) for shape in shapes.values()):,}"
