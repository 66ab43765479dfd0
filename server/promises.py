"""What is promised of all that leaves the sites under a plan, one promise for each kind of release.

As the exchanges promise it; for people: model cards, pages. What this file does not do: probes and diffusion
models, whose answers are not in the weights that are published.
"""

from federation.exchanges import (
    audit_counts,
    demographics,
    erasure,
    pretraining,
    private_rounds,
    style_code,
    survey,
)
from federation.plan.canary_plan import in_words
from federation.plan.plan import RunPlan
from privacy.promise import Promise


def promises_of(plan: RunPlan) -> list[Promise]:
    """Under privacy the style code leaves, and what noisy steps made; else updates (masked or not), style
    sums, code sums."""
    if plan.privacy is not None:
        steps = [] if plan.privacy.noisy is None else [private_rounds.steps_promise(plan)]
        return [style_code.code_promise(plan), *steps]
    made = [pretraining.update_promise(plan)] if plan.aggregation.method != "alone" else []
    made += [survey.style_promise(plan)] if survey.SURVEY.rounds(plan) else []
    made += [demographics.counts_promise(plan)] if demographics.DEMOGRAPHICS.rounds(plan) else []
    made += [erasure.code_promise(plan)] if erasure.ERASURE.rounds(plan) else []
    made += [audit_counts.claims_promise(plan)] if audit_counts.AUDIT_COUNTS.rounds(plan) else []
    return made


def sentences(plan: RunPlan) -> list[str]:
    """Each in plain words, after the kind of release; and whether canaries are in what was released."""
    said = [f"{promise.kind}: {promise.sentence()}" for promise in promises_of(plan)]
    return said if plan.audit_canaries is None else [*said, f"audit_canaries: {made_with_canaries(plan)}"]


def made_with_canaries(plan: RunPlan) -> str:
    """That a run is one for its audit; empty where it is not."""
    if plan.audit_canaries is None:
        return ""
    return (
        f"An audit run. Made-up contributors ({in_words(plan.audit_canaries)} of each site, about half of "
        "them) are in what was released, so that its noise can be tested; they change nothing of what is "
        "promised to a patient. For use take weights of a run without."
    )
