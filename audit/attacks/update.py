"""One site's update, attacked: does it point where a candidate's scan would have moved the weights?

Two scores of a candidate: her loss before the update less her loss after it, and the cosine between the
update and the descent of her own loss, averaged over draws that everybody can make (`membership.py`). In a
round that left masked nobody has a site's update; what is attacked then is the sum of all sites. Members are
those whom the round's steps drew, where that is known, and else all who were trained on.

What this file does not do: turn an update back into scans (`inversion.py`).

Source: gradient scores: Nasr, Shokri, Houmansadr 2019 (arXiv:1812.00910).

Axes: n = scans, c d h w = latents.
"""

import copy
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from audit.attacks.membership import blind, hidden_error, losses, public_draws, scores_of
from audit.attacks.scores import Scores, judged
from audit.cohort import Cohort
from audit.evidence import Evidence, Release
from audit.findings import Finding
from meduet_models.meduet import FactorNetwork

Network = TypeVar("Network", bound=nn.Module)
_PARTNERS = 2
"""Draws of a public partner behind an alignment."""


def alignment(
    before: FactorNetwork, after: FactorNetwork, latents: Float[Tensor, "n c d h w"], seed: int = 0
) -> Float[Tensor, " n"]:
    """`cosines` of the error at hidden tokens."""
    draws = list(public_draws(before, _PARTNERS, seed))

    def loss(network: FactorNetwork, row: int) -> Tensor:
        scan = latents[row : row + 1]
        return torch.stack([hidden_error(network, scan, *draw).mean() for draw in draws]).mean()

    return cosines(before, after, loss, len(latents))


def cosines(
    before: Network, after: Network, loss: Callable[[Network, int], Tensor], count: int
) -> Float[Tensor, " n"]:
    """Cosine between what changed and the descent of each scan's own loss where it began; `loss`: of a
    network, and the number of a scan."""
    network = copy.deepcopy(before).requires_grad_(True)
    then, now = ({n: p.detach() for n, p in one.named_parameters()} for one in (before, after))
    moved = {name: now[name] - then[name] for name in then if not torch.equal(now[name], then[name])}
    parameters = [parameter for name, parameter in network.named_parameters() if name in moved]
    length = torch.stack([one.norm() for one in moved.values()]).norm() if moved else torch.ones(())
    found = []
    for row in range(count):
        slopes = torch.autograd.grad(loss(network, row), parameters, allow_unused=True) if parameters else ()
        pairs = [(s, m) for s, m in zip(slopes, moved.values(), strict=True) if s is not None]
        along = -sum(float((slope * way).sum()) for slope, way in pairs)
        steep = float(torch.stack([slope.norm() for slope, _ in pairs]).norm()) if pairs else 1.0
        found.append(along / max(steep * float(length), 1e-30))
    return torch.tensor(found, dtype=torch.float64)


def attack_round(
    evidence: Evidence, release: Release, draws: int, scored: list[tuple[Finding, Scores]]
) -> Iterator[Finding]:
    """The update of a round, or the sum that it left in."""
    networks = evidence.before_after(release)
    cohort = evidence.cohorts.get(release.site)
    if networks is None or cohort is None:
        return
    if release.rows:
        cohort = cohort.drawn(release.rows)

    def fell() -> Tensor:
        before, after = (losses(network, cohort.latents, draws) for network in networks)
        return before - after

    yield from judged_update(release, cohort, fell, lambda: alignment(*networks, cohort.latents), scored)


def judged_update(
    release: Release,
    cohort: Cohort,
    fell: Callable[[], Float[Tensor, " n"]],
    aligned: Callable[[], Float[Tensor, " n"]],
    scored: list[tuple[Finding, Scores]],
) -> Iterator[Finding]:
    """Both findings of one update: by how much each scan's loss fell with it, and how far it points along
    each scan's own descent."""
    masked = "masked" in release.record
    whose = "the sum of all sites' updates" if masked else f"the update of {release.site}"
    without = blind([cohort])
    for attack, measured, asks in (
        ("update", fell, "on which candidates the loss fell with it"),
        ("alignment", aligned, "along whose own gradient it points"),
    ):
        began = time.process_time()
        scores = scores_of([cohort], {cohort.site: measured()})
        sentence = f"Round {release.round}: whoever sees {whose} asks {asks}."
        made = judged(release.artefact, attack, scores, sentence, without, began)
        scored.append((made, scores))
        yield made
