"""Canaries of a site, guessed: whose coin came up, from what left, and what that proves of the noise.

Canaries of the style code and of the steps have a public direction each: the score is what the release has
along it, less what the patients have there, whom the worst reader knows. For an input canary it is by how
much her loss fell. How many coins are guessed is fixed beforehand
(`audit/statistics/one_run.py`).

The bound holds for any mechanism; where the promise is one of a Gaussian mechanism itself (the style code,
steps in which everybody is), the one within that family is taken. What a correct mechanism would have shown
stands beside it.

What this file does not do: know a coin that the site does not tell.

Axes: m = canaries, r = rounds.
"""

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from audit.attacks.membership import losses
from audit.books import Charged
from audit.evidence import Evidence, Release
from audit.findings import CanaryBounds, Finding, Verdict
from audit.record.artefacts import not_audited
from audit.statistics.honest_canaries import expected_lower
from audit.statistics.one_run import LEVEL, Guesses
from federation.canaries import Kind, coordinates, marked_phantoms, own_weights
from federation.exchanges.private_rounds import mechanisms
from federation.exchanges.style_code import CODE, style_code
from federation.exchanges.survey import survey_layout
from meduet_models.meduet import MeDUET
from meduet_models.style.code import entry_of_scans, vector_of
from privacy.accounting import Mechanism

_NAMES: dict[Kind, str] = {
    "style_code": "canaries of the style code",
    "steps": "canaries of the steps",
    "inputs": "input canaries",
}

_DRAWS = 16
"""Draws of hidden tokens behind a loss."""
_NO_SCANS = "the plan's public scans are not at hand."
_MISSING: dict[Kind, str] = {
    "style_code": _NO_SCANS,
    "steps": "nothing of them is at hand.",
    "inputs": "the weights before a round, or the plan's public scans, are not at hand; the centre has them.",
}


def attack_canaries(evidence: Evidence, releases: Sequence[Release], charged: Charged) -> Iterator[Finding]:
    """Of all releases of one kind that are at hand: a finding for each kind of canary in them."""
    releases = [one for one in releases if one.site in evidence.coins]
    own = {one.round: one for one in releases if one.record["plan"] == evidence.plan.sha256}
    releases = list(own.values())  # what left again is the same
    if not releases:
        return
    site, of_code = releases[0].site, releases[0].kind == "style_code"
    if not of_code and releases[0].kind != "private_round":
        return
    kinds: tuple[Kind, ...] = ("style_code",) if of_code else ("steps", "inputs")
    asked: list[Kind] = [kind for kind in kinds if len(evidence.coins[site].get(kind, ()))]
    for kind in asked:
        began = time.process_time()
        scores = _scores(evidence, releases, kind)
        if scores is None:
            yield not_audited(releases[0].artefact, f"{_NAMES[kind].capitalize()}: {_MISSING[kind]}")
        else:
            coins = np.array(evidence.coins[site][kind], dtype=bool)
            mechanism = _mechanism(evidence, releases, kind)
            made = judged_coins(releases, kind, scores, coins, mechanism, charged, LEVEL / len(asked))
            yield replace(made, seconds=time.process_time() - began)


def _scores(evidence: Evidence, releases: Sequence[Release], kind: Kind) -> np.ndarray | None:
    match kind:
        case "style_code":
            return _of_style(evidence, releases[-1])
        case "steps":
            return _of_steps(evidence, releases)
        case "inputs":
            return _of_inputs(evidence, releases)


def _of_style(evidence: Evidence, release: Release) -> np.ndarray | None:
    """What stands along each canary's axis, less the patients' own sum."""
    cohort, public, plan = evidence.cohorts.get(release.site), evidence.public, evidence.plan
    if cohort is None or public is None or release.tensors is None:
        return None
    code, layout = style_code(plan, public), survey_layout(plan)
    people = [name for name, took_part in zip(cohort.people, cohort.member, strict=True) if took_part]
    rows = [cohort.rows(name) for name in people]
    patients = code.total(
        vector_of(entry_of_scans(cohort.latents[own], layout))
        for own in rows
        if bool(torch.isfinite(cohort.latents[own]).all())
    )
    told: Tensor = release.tensors[CODE].double() - patients
    return told[: len(evidence.coins[release.site]["style_code"])].numpy()


def _of_steps(evidence: Evidence, releases: Sequence[Release]) -> np.ndarray:
    """How far the updates went down each canary's own weight, in units of what their tensor moved."""
    plan = evidence.plan
    weights = own_weights(plan, MeDUET(plan.network, len(plan.sites), seed=plan.seed))
    moved = []
    for release in releases:
        assert release.tensors is not None, "only releases at hand are attacked"
        parts = [release.tensors[name].double().flatten() for name in weights]
        moved.append(torch.cat([part / part.square().mean().sqrt().clamp(min=1e-30) for part in parts]))
    return -torch.stack(moved).sum(0)[coordinates(plan, weights)].numpy()  # a step goes down the gradient


def _of_inputs(evidence: Evidence, releases: Sequence[Release]) -> np.ndarray | None:
    """By how much each marked phantom's loss fell with the updates, over the rounds whose weights are known;
    None where none is."""
    if evidence.public is None:
        return None
    phantoms = marked_phantoms(evidence.plan, evidence.public)
    known = [networks for one in releases if (networks := evidence.before_after(one)) is not None]
    if not known:
        return None
    fell = [losses(before, phantoms, _DRAWS) - losses(after, phantoms, _DRAWS) for before, after in known]
    return torch.stack(fell).sum(0).numpy()


def _mechanism(evidence: Evidence, releases: Sequence[Release], kind: Kind) -> Mechanism:
    """What was promised of the releases at hand, together."""
    promised = mechanisms(evidence.plan)
    if kind == "style_code":
        return promised[0]
    noisy = evidence.plan.privacy and evidence.plan.privacy.noisy
    assert noisy, "only noisy steps have canaries of their own"
    return replace(promised[1], steps=noisy.steps_per_round * len(releases))


def judged_coins(
    releases: Sequence[Release],
    kind: Kind,
    scores: np.ndarray,
    coins: np.ndarray,
    mechanism: Mechanism,
    charged: Charged,
    level: float,
) -> Finding:
    """What guesses of the coins show. Where every canary is in every step the promise is one of a Gaussian
    mechanism, whose bound is then the row's; where steps are drawn that would be an assumption."""
    guesses, delta = Guesses.of(scores, coins), charged.delta
    lower, gaussian = guesses.lower(delta, level), guesses.lower(delta, level, gaussian=True)
    exact = mechanism.sampling_rate == 1
    taken = gaussian if exact else lower
    bounds = CanaryBounds(
        canaries=len(coins),
        guesses=tuple(r for r, _ in guesses.tried),
        right=tuple(v for _, v in guesses.tried),
        releases=len(releases),
        promised=charged.epsilon if math.isfinite(charged.epsilon) else None,
        epsilon_low=lower,
        epsilon_low_gaussian=gaussian,
        ceiling=guesses.ceiling(delta, level),
        expected=expected_lower(mechanism, len(coins), delta, level),
        expected_gaussian=expected_lower(mechanism, len(coins), delta, level, gaussian=True),
    )
    verdict: Verdict = (
        "found" if taken > charged.epsilon
        else "under-powered" if bounds.ceiling <= charged.epsilon
        else "not found"
    )  # fmt: skip
    return Finding(
        artefact=releases[0].artefact,
        attack="input_canaries" if kind == "inputs" else "canaries",
        measure="epsilon",
        n_in=int(coins.sum()),
        n_out=int((~coins).sum()),
        verdict=verdict,
        value=taken,
        epsilon_low=taken,
        canaries=bounds,
        sentence=_said(kind, bounds, charged.epsilon, exact),
    )


def _said(kind: Kind, bounds: CanaryBounds, promised: float, exact: bool) -> str:
    """The sentence of the page."""
    least, other = (
        (bounds.epsilon_low_gaussian, f"whatever the mechanism is, {bounds.epsilon_low:.2f}")
        if exact
        else (bounds.epsilon_low, f"if the mechanism is a Gaussian one, {bounds.epsilon_low_gaussian:.2f}")
    )
    expected = bounds.expected_gaussian if exact else bounds.expected
    tries = ", ".join(f"{v} of {r}" for r, v in zip(bounds.guesses, bounds.right, strict=True))
    against = (
        f"MORE THAN THE {promised:.2f} THAT IS PROMISED"
        if least > promised
        else f"promised is {promised:.2f}"
    )
    could = "" if bounds.ceiling > promised else " So few could not have contradicted the promise."
    return (
        f"Of {bounds.canaries} coins of {_NAMES[kind]}, guessed from {bounds.releases} releases, were right: "
        f"{tries}. That shows an epsilon of at least {least:.2f} (95%); {against}. As a bound {other}. All "
        f"guesses right would show {bounds.ceiling:.2f}; where the promise holds, the noisy sums themselves "
        f"show {expected:.2f} on average.{could}"
    )
