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
from federation.plan import RunPlan
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
    """Each in plain words, after the kind of release."""
    return [f"{promise.kind}: {promise.sentence()}" for promise in promises_of(plan)]
