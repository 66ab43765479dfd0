"""What a plan says of canaries: made-up contributors of public shares, by which noise is audited in one run.

What this file does not do: make them (`federation/canaries.py`), or guess who was in (`audit/`).
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from forms.ranges import Range

if TYPE_CHECKING:
    from federation.plan.plan import RunPlan

_FEWEST = 2
"""One is guessed to be in, one to be out."""


@dataclass(frozen=True, kw_only=True)
class AuditCanariesPlan:
    """Canaries of each site. Each is in or out by a coin of the site's own; of each kind none, or at least
    two."""

    style_code: Annotated[int, Range(at_least=0, at_most=256)] = 0
    """In the style code: a share as long as a patient's may be, along an axis of its own."""
    steps: Annotated[int, Range(at_least=0, at_most=10_000)] = 0
    """In the noisy steps: a gradient as long as a patient's may be, along a weight of its own."""
    inputs: Annotated[int, Range(at_least=0, at_most=4096)] = 0
    """In the noisy steps: a phantom with an odd mark, in a group of its own with public scans."""


def contradictions(plan: "RunPlan") -> Iterator[str]:
    """Say what canaries a plan cannot have; one line each."""
    canaries, privacy = plan.audit_canaries, plan.privacy
    assert canaries is not None
    if privacy is None:
        yield (
            "audit_canaries tests a promise of privacy, and a plan without noise promises none: set privacy, "
            "or audit_canaries=null."
        )
        return
    counts = (canaries.style_code, canaries.steps, canaries.inputs)
    if not any(counts) or any(0 < count < _FEWEST for count in counts):
        yield (
            f"Expected at least {_FEWEST} canaries of a kind in audit_canaries, or none of it, and some of "
            f"one; got style_code={counts[0]}, steps={counts[1]}, inputs={counts[2]}."
        )
    if canaries.style_code > privacy.style_dimensions:
        yield (
            f"Expected audit_canaries.style_code of at most privacy.style_dimensions="
            f"{privacy.style_dimensions}, an axis for each; got {canaries.style_code}."
        )
    if privacy.noisy is None and (canaries.steps or canaries.inputs):
        yield (
            f"privacy.level={privacy.level} has no noisy steps for audit_canaries.steps and inputs: set them "
            "to 0."
        )
    if canaries.steps or canaries.inputs:
        if plan.aggregation.secure_sum:
            yield (
                "A secure sum shows no site's update, by which audit_canaries.steps and inputs are guessed: "
                "set aggregation.secure_sum=false, or them to 0."
            )
        if privacy.noisy is not None and privacy.noisy.partners == "private":
            yield (
                "privacy.noisy.partners=private promises of replacing a patient, and audit_canaries.steps "
                "and inputs are there or not: set partners to public, or them to 0."
            )
    if canaries.steps > (most := _output_numbers(plan)):
        yield (
            f"Expected audit_canaries.steps of at most {most:,}, the numbers of the output layer; got "
            f"{canaries.steps:,}."
        )
    if canaries.inputs > privacy.public_scans:
        yield (
            f"Expected audit_canaries.inputs of at most privacy.public_scans={privacy.public_scans}, of "
            f"which they are made; got {canaries.inputs}."
        )


def in_words(canaries: AuditCanariesPlan) -> str:
    """How many of which, of each site."""
    kinds = {
        "shares of a style code": canaries.style_code,
        "gradients": canaries.steps,
        "phantoms with an odd mark": canaries.inputs,
    }
    return ", ".join(f"{count:,} {kind}" for kind, count in kinds.items() if count)


def pull_on_steps(canaries: AuditCanariesPlan) -> float:
    """How many patients, whose gradients all point one way, pull as strongly on a step as the canaries do on
    average."""
    return math.sqrt(canaries.steps / 2) + canaries.inputs / 2


def pull_on_style(canaries: AuditCanariesPlan) -> float:
    """The same of the style code."""
    return math.sqrt(canaries.style_code / 2)


def _output_numbers(plan: "RunPlan") -> int:
    network = plan.network
    return (network.decoder_width + 1) * network.latent_channels * network.patch_size**3
