"""A round of the federated diffusion model: the question. The answer is a `TrainReply`.

The encoder and the style bank travel with every question, so that a site conditions on what the run ended
with and on nothing it kept. What this file does not do: train (`client/exchanges/diffusion.py`), average
(`strategies/content_share.py`).
"""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from federation.exchanges.exchange import Exchange
from federation.exchanges.pretraining import TrainReply
from federation.plan.plan import RunPlan, WireDtype
from federation.wire.limits import largest_reply
from federation.wire.messages import Ask, RoundedTensors, Tensors
from meduet_models.diffusion.conditioner import condition_sizes
from meduet_models.diffusion.initialisation import first_transformer
from meduet_models.diffusion.transformer import DiffusionConfig, DiffusionTransformer
from meduet_models.meduet import FactorNetwork
from meduet_models.sharing import encoder_keys
from privacy.promise import Promise


@dataclass(frozen=True, kw_only=True)
class DiffusionAsk(Ask, kind="diffusion_ask"):
    """Train the diffusion model for a round from these weights, conditioned by this encoder and bank."""

    round: int
    shared: RoundedTensors
    encoder: Tensors
    bank: Tensors
    wire_dtype: WireDtype = "float32"
    """How the diffusion model's weights travel."""


def encoder_of(plan: RunPlan, tensors: Mapping[str, Tensor]) -> FactorNetwork:
    """The frozen network with these weights; a style head that stayed at the sites is left as it started.

    Raises `ValueError` naming the first tensor that is missing or of another shape.
    """
    network = FactorNetwork(plan.network, seed=plan.seed)
    mine = network.state_dict()
    for name in encoder_keys(network):
        if name not in tensors or tensors[name].shape != mine[name].shape:
            raise ValueError(
                f"Expected {name!r} of shape {tuple(mine[name].shape)} among the encoder's weights; got "
                f"{tuple(tensors[name].shape) if name in tensors else 'none'}."
            )
        mine[name] = tensors[name]
    network.load_state_dict(mine)
    return network.eval().requires_grad_(False)


def transformer_of(plan: RunPlan, encoder: FactorNetwork) -> DiffusionTransformer:
    """The diffusion model at its start, the same wherever it is built. Raises `ValueError` when the plan
    starts it from the encoder and the two differ in size."""
    diffusion = plan.diffusion
    if diffusion is None:
        raise ValueError("Expected a plan with a diffusion model; this one has diffusion=none.")
    config = DiffusionConfig(
        latent_channels=plan.network.latent_channels,
        latent_grid=plan.network.latent_grid,
        shape=diffusion.transformer,
        sizes=condition_sizes(
            plan.network,
            diffusion.conditions,
            maps=plan.volumes.registered,
            body_parts=len(plan.style.body_parts),
            categories=len(diffusion.categories),
            labels=diffusion.labels,
        ),
        path=diffusion.training.path,
    )
    return first_transformer(config, encoder, diffusion.training, seed=plan.seed)


def diffusion_rounds(plan: RunPlan) -> range:
    """The rounds of a plan with a federated diffusion model."""
    if plan.diffusion is None or plan.diffusion.release.trained_at != "sites":
        return range(0)
    return range(1, plan.diffusion.rounds + 1)


def diffusion_promise(plan: RunPlan, ask: DiffusionAsk) -> Promise:
    """A site's mean update is clipped at the gate. Raises `ValueError` without a diffusion model."""
    if plan.diffusion is None:
        raise ValueError("Expected a plan with a diffusion model; this one has diffusion=none.")
    return Promise(
        kind="diffusion", bound=plan.diffusion.update_clip_norm, unit="site update", enforcement="clip"
    )


DIFFUSION = Exchange(
    route="train.diffusion",
    ask=DiffusionAsk,
    reply=TrainReply,
    rounds=diffusion_rounds,
    largest=lambda plan, ask: largest_reply(ask.shared, ask.wire_dtype),
    promise=diffusion_promise,
)
