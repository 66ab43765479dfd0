"""What leaves for a diffusion model, in plain words: a part of a published plan as people read it.

Does not do: the rest of a plan (`plan_words.py`), or decide (`federation/plan/release_policy.py`).
"""

from collections.abc import Iterator

from federation.exchanges.synthetic_latents import worth_at_home
from federation.plan.latent_privacy import SyntheticPlan
from federation.plan.plan import RunPlan
from privacy.worth import DROWNED, LITTLE


def diffusion_words(plan: RunPlan) -> Iterator[tuple[str, str]]:
    """Headings and sentences; policy, guarantee, what is not covered, smallest cohort, expected quality."""
    diffusion, policy = plan.diffusion, plan.latent_policy
    if diffusion is None:
        yield "", policy.sentence
        return
    amount = f"at most {diffusion.items_per_site}" if diffusion.items_per_site else "all"
    conditions = ", ".join(diffusion.conditions) or "nothing"
    yield "", policy.sentence.format(diffusion=diffusion, amount=amount, told=conditions)
    yield (
        "",
        f"Policy {policy.name}. Guaranteed: {policy.guarantee}. Not covered: {policy.not_covered}. Smallest "
        f"cohort: {policy.smallest_cohort}.",
    )
    if diffusion.synthetic is not None:
        yield "", _expected_quality(plan, diffusion.synthetic)
    if plan.volumes.extent == "scan" and policy.releases_latents:
        yield "", "Of each scan that is the crop around its foreground's centre, never more of it."


def after_the_pretraining(plan: RunPlan) -> str:
    """What a site is asked once the centre has trained, where it takes no noisy steps for the network."""
    if not plan.latent_policy.noised:
        return "your site is asked nothing more."
    return (
        f"then your site is asked once more, within {plan.aggregation.deadline_s:g} s, for the diffusion "
        "model."
    )


def _expected_quality(plan: RunPlan, synthetic: SyntheticPlan) -> str:
    """What samples are worth, told before anybody is asked."""
    worth = worth_at_home(plan, float(synthetic.expected_patients))
    verdict = (
        "Noise drowns the steps, and the plan wants them all the same (although_noise_wins): expect samples "
        "that show phantoms, not your patients."
        if worth < DROWNED
        else "Expect samples that show little beyond phantoms."
        if worth < LITTLE
        else "Samples are expected to show what your patients have in common."
    )
    return (
        f"Expected quality: with {synthetic.expected_patients:,} patients at a site the signal of a step is "
        f"at most {worth:.2f} times its noise. {verdict}"
    )
