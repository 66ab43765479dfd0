"""The style code: with privacy, what a site tells first, once, with noise; with `level: sums`, all it tells.

Public scans come with the question; from them follow, at both ends, the axes and the bound of the code
(`privacy/style_code.py`). The one place where site and centre take its layout and promise from.
What this file does not do: it computes no code (`client/exchanges/style_code.py`) and reads none
(`server/protected_styles.py`).
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from federation.exchanges.exchange import Exchange
from federation.exchanges.survey import survey_layout
from federation.plan.plan import RunPlan
from federation.plan.privacy_plan import PrivacyPlan
from federation.wire.limits import Largest, largest_reply, promised
from federation.wire.messages import Ask, Reply, Tensors
from meduet_models.style.code import entry_of_scans, vector_of
from meduet_models.threads import fixed_threads
from meduet_models.weights import sha256_of_tensors
from privacy.accounting import Mechanism, Relation, gaussian_multiplier
from privacy.promise import Promise
from privacy.style_code import SHARE_BOUND, StyleCode

CODE, LATENTS = "code", "latents"
"""Names of the tensors: the sum of shares; latents of public scans."""


@dataclass(frozen=True, kw_only=True)
class StyleCodeAsk(Ask, kind="style_code_ask"):
    """Before the first step: tell the style of your scans along the axes of these public ones."""

    public: Tensors


@dataclass(frozen=True, kw_only=True)
class StyleCodeReply(Reply, kind="style_code_reply"):
    """A site's style with noise, and with it about how many patients it has."""

    code: Tensors


def privacy_of(plan: RunPlan) -> PrivacyPlan:
    """What the plan says of privacy; raises `ValueError` where it has none."""
    if plan.privacy is None:
        raise ValueError("Expected a plan with privacy; got one without.")
    return plan.privacy


def check_public(plan: RunPlan, public: Tensors) -> Tensor:
    """The plan's public latents; raises `ValueError` for any others."""
    shape = (privacy_of(plan).public_scans, plan.network.latent_channels, *plan.network.latent_grid)
    came = {name: tuple(tensor.shape) for name, tensor in public.items()}
    if came != {LATENTS: shape}:
        raise ValueError(f"Expected public scans of {shape}; got {came}.")
    if (sha256 := sha256_of_tensors(public)) != privacy_of(plan).public_sha256:
        raise ValueError(
            f"Expected the plan's public scans ({privacy_of(plan).public_sha256[:12]}…); got others "
            f"({sha256[:12]}…)."
        )
    return public[LATENTS]


def style_code(plan: RunPlan, latents: Float[Tensor, "m c d h w"]) -> StyleCode:
    """The axes of the plan's public scans; the same bits whatever the number of threads."""
    with fixed_threads(1):
        layout = survey_layout(plan)
        vectors = torch.stack([vector_of(entry_of_scans(one[None], layout)) for one in latents])
        return StyleCode.of(vectors, privacy_of(plan).style_dimensions)


def code_shapes(plan: RunPlan) -> dict[str, tuple[int, ...]]:
    """Names and shapes of what travels."""
    return {CODE: (privacy_of(plan).style_dimensions + 1,)}


def largest_code(plan: RunPlan, ask: StyleCodeAsk) -> Largest:
    """Size of a site's answer, at most."""
    return largest_reply(promised(code_shapes(plan), torch.float32))


def asked_promise(plan: RunPlan, ask: StyleCodeAsk) -> Promise:
    """The promise of a question that comes with the plan's public scans; raises `ValueError` for any others,
    before anything is reserved for them."""
    check_public(plan, ask.public)
    return code_promise(plan)


def code_promise(plan: RunPlan) -> Promise:
    """Each patient's share is bounded where it is made; the gate adds the noise that the plan's epsilon, or
    the share of it that noisy steps or noised latents leave, asks for."""
    privacy = privacy_of(plan)
    noisy, epsilon = privacy.noisy, privacy.epsilon
    if noisy is not None:
        epsilon = noisy.epsilon_style
    elif plan.diffusion is not None and plan.diffusion.epsilon_style is not None:
        epsilon = plan.diffusion.epsilon_style
    relation: Relation = "add or remove one" if noisy is None else noisy.relation
    noise = gaussian_multiplier(epsilon, privacy.delta, relation)
    return Promise(
        kind="style_code",
        bound=SHARE_BOUND,
        unit="patient",
        enforcement="check",
        relation=relation,
        mechanism=Mechanism(noise_multiplier=noise, relation=relation),
        delta=privacy.delta,
    )


STYLE_CODE = Exchange(
    route="query.style_code",
    ask=StyleCodeAsk,
    reply=StyleCodeReply,
    rounds=lambda plan: range(plan.privacy is not None),
    largest=largest_code,
    promise=asked_promise,
)
