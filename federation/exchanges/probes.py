"""Federated probes: after a round, sums of what the factors of a site's patients say, then hits of fitted
probes. Where site and centre take the shapes and bounds of probe sums from.

Content is read as the code (`meduet_models/content_code.py`), whose axes come with the weights.
First exchange, per fold of a site's patients: `factors`, the `ErasureMoments` of (code, style) of each
patient; `anatomy`, those of (code, style, targets) of the patients of whom every target is known (zeros
where too few are); with a style bank also `swapped`, style sums of the scans swapped to each other site's
style, and the counts `swapped_patients` and `recognition`. Second exchange: the fitted site probes go out,
`hits` comes back.

What this file does not do: it computes no sums (`client/exchanges/probes.py`) and reads none
(`server/exchanges/probes.py`).

Axes: f = folds, s = the plan's sites, v = sums.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from federation.exchanges.exchange import Exchange
from federation.exchanges.survey import survey_layout
from federation.plan.plan import RunPlan
from federation.wire.limits import Largest, largest_reply, promised
from federation.wire.messages import Ask, Reply, Tensors
from meduet_models.content_code import code_bound
from meduet_models.erasure import ErasureMoments, erasure_length
from meduet_models.style.moments import StyleLayout, StyleMoments
from privacy.promise import Promise

FACTORS, ANATOMY, HITS = "factors", "anatomy", "hits"
SWAPPED, SWAPPED_PATIENTS, RECOGNITION = "swapped", "swapped_patients", "recognition"
UNBOUNDED = frozenset({SWAPPED_PATIENTS, RECOGNITION})
"""Counts that the bound leaves out. `recognition` is no sum over patients: who is recognised depends on who
else is there."""
RECOGNISED = ("content", "style", "asked", "chance")
"""Numbers in `recognition`: queries recognised by content and by style, queries, expected by guessing."""
_HITS = ("content", "style", "patients")
HITS_BOUND = math.sqrt(len(_HITS))
"""L2 norm of one patient's share of `hits`: patients read as their own site's, by factor, and patients."""
NEVER = -1e30
"""Bias of a site whose sums did not come: no patient is read as one of its."""


@dataclass(frozen=True, kw_only=True)
class ProbeAsk(Ask, kind="probe_ask"):
    """After a round: tell the sums of your factors under these weights, or the hits of the fitted `probe`."""

    round: int
    """The round whose weights these are; the last plus one: the last's, with the erasure."""
    shared: Tensors
    bank: Tensors
    probe: Tensors
    """Empty in the first exchange; in the second the site probes that were fitted from the sums."""


@dataclass(frozen=True, kw_only=True)
class ProbeReply(Reply, kind="probe_reply"):
    """A site's sums, or its hits."""

    round: int
    sums: Tensors


def joint_width(plan: RunPlan) -> int:
    """Coordinates of a patient's (code, style)."""
    return plan.network.code_size + plan.network.style_width


def content_part(plan: RunPlan) -> slice:
    """Where the content code is in the joint vector."""
    return slice(0, plan.network.code_size)


def style_part(plan: RunPlan) -> slice:
    """Where style is."""
    return slice(plan.network.code_size, joint_width(plan))


def joint_bound(plan: RunPlan) -> float:
    """L2 norm to which a patient's (code, style) is scaled: the bounds of a code and of pooled style."""
    return math.hypot(code_bound(plan.network.code_size), math.sqrt(plan.network.style_width))


def anatomy_bound(plan: RunPlan) -> float:
    """The same with the targets, each within [-1, 1]."""
    return math.hypot(joint_bound(plan), math.sqrt(len(plan.probes.anatomy)))


def widest_sums(plan: RunPlan) -> int:
    """Numbers of the longest vector whose products with itself are summed."""
    return joint_width(plan) + len(plan.probes.anatomy)


def told_of_swaps(plan: RunPlan) -> bool:
    """Whether there are styles of other sites to restyle to: a bank, of one entry per site."""
    return plan.style.exchange == "bank" and not plan.style.body_parts


def sums_shapes(plan: RunPlan) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the first exchange."""
    folds, sites, targets = plan.probes.folds, len(plan.sites), len(plan.probes.anatomy)
    shapes: dict[str, tuple[int, ...]] = {FACTORS: (folds, erasure_length(joint_width(plan)))}
    if targets:
        shapes[ANATOMY] = (folds, erasure_length(joint_width(plan) + targets))
    if told_of_swaps(plan):
        length = sum(math.prod(shape) for shape in _style_blocks(survey_layout(plan)).values())
        shapes |= {SWAPPED: (sites, length), SWAPPED_PATIENTS: (sites,), RECOGNITION: (len(RECOGNISED),)}
    return shapes


def sums_bound(plan: RunPlan) -> float:
    """L2 norm of one patient's share of the first exchange, `UNBOUNDED` left out."""
    squares = [(joint_bound(plan) ** 2 + 1) ** 2]
    if plan.probes.anatomy:
        squares.append((anatomy_bound(plan) ** 2 + 1) ** 2)
    if told_of_swaps(plan):
        squares.append((len(plan.sites) - 1) * plan.release.style_clip**2)
    return math.sqrt(sum(squares))


def probe_shapes(plan: RunPlan) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the fitted site probes, as they go out with the second exchange."""
    folds, sites = plan.probes.folds, len(plan.sites)
    size, style = plan.network.code_size, plan.network.style_width
    return {
        "content_weight": (folds, size, sites),
        "content_bias": (folds, sites),
        "style_weight": (folds, style, sites),
        "style_bias": (folds, sites),
    }


def hits_shapes() -> dict[str, tuple[int, ...]]:
    """Names and shapes of the second exchange."""
    return {HITS: (len(_HITS),)}


def largest_probe(plan: RunPlan, ask: ProbeAsk) -> Largest:
    """Size of a site's answer in either exchange, at most."""
    return largest_reply(promised(sums_shapes(plan), torch.float64))


def fold_moments(tensors: Mapping[str, Tensor], name: str, plan: RunPlan) -> list[ErasureMoments]:
    """`factors` or `anatomy`, fold by fold."""
    width, bound = joint_width(plan), joint_bound(plan)
    if name == ANATOMY:
        width, bound = width + len(plan.probes.anatomy), anatomy_bound(plan)
    return [ErasureMoments.from_vector(row, width, bound) for row in tensors[name]]


def known_sites(sums: Mapping[str, Tensors], plan: RunPlan) -> dict[str, list[ErasureMoments]]:
    """`anatomy`, fold by fold, of the sites that told it of some patients in every fold."""
    sites = {site: fold_moments(own, ANATOMY, plan) for site, own in sums.items() if ANATOMY in own}
    return {site: folds for site, folds in sites.items() if min(float(f.count) for f in folds) >= 1}


def style_vector(moments: StyleMoments) -> Tensor:
    """The sums that a style entry follows from, as one vector."""
    return torch.cat([moments.sums[name][0].flatten() for name in _style_blocks(moments.layout)])


def style_moments(vector: Tensor, count: Tensor, plan: RunPlan) -> StyleMoments:
    """Back from `style_vector`; the full-resolution centre, which no entry needs, is zero."""
    layout = survey_layout(plan)
    moments = StyleMoments.none(layout)
    moments.sums["count"][0] = count
    blocks = _style_blocks(layout)
    parts = torch.split(vector.double(), [math.prod(shape) for shape in blocks.values()])
    for (name, shape), part in zip(blocks.items(), parts, strict=True):
        moments.sums[name][0] = part.reshape(shape)
    return moments


def _style_blocks(layout: StyleLayout) -> dict[str, tuple[int, ...]]:
    """Blocks of a part's sums, less the count and the centre."""
    return {name: shape[1:] for name, shape in layout.shapes().items() if name not in ("count", "centre")}


def probe_promise(plan: RunPlan, ask: ProbeAsk) -> Promise:
    """One patient's share of the sums, or of the hits, is bounded where they are made."""
    return Promise(
        kind="probe_hits" if ask.probe else "probe",
        bound=HITS_BOUND if ask.probe else sums_bound(plan),
        unit="patient statistics",
        enforcement="check",
    )


def probed_rounds(plan: RunPlan) -> tuple[int, ...]:
    """The rounds after which a plan has probes: every few of them and the last, and once more under the
    number that follows, when the weights hold the erasure."""
    every, last = plan.probes.every_rounds, plan.training.rounds
    return (*range(every, last, every), last, last + 1) if every else ()


PROBES = Exchange(
    route="query.probe",
    ask=ProbeAsk,
    reply=ProbeReply,
    rounds=probed_rounds,
    largest=largest_probe,
    promise=probe_promise,
)
