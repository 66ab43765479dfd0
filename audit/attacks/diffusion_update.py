"""One site's update of a federated diffusion model, attacked: did the loss on a candidate's scan fall with
it, does it point along her own gradient?

As in a round of the pretraining (`update.py`), with the loss of the velocity (`denoising.py`), told of a scan
what the model is told. Who was in a batch of the round is not known here: members are all who were trained
on.

What this file does not do: attack the published model (`memorisation.py`).

Axes: n = scans, c d h w = latents.
"""

from collections.abc import Iterator
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from audit.attacks.denoising import denoising, examples_of
from audit.attacks.scores import Scores
from audit.attacks.update import cosines, judged_update
from audit.evidence import Evidence, Release
from audit.findings import Finding
from meduet_models.diffusion.artefact import GenerativeModel
from meduet_models.diffusion.conditions import Condition, Examples
from meduet_models.diffusion.path import Path
from meduet_models.diffusion.transformer import DiffusionTransformer

_TOLD: tuple[Condition, ...] = ("content", "style")
_TIMES = (0.25, 0.5, 0.75)
"""Of the draws behind an alignment."""


def attack_diffusion_round(
    evidence: Evidence, release: Release, draws: int, scored: list[tuple[Finding, Scores]]
) -> Iterator[Finding]:
    """The update of a round; nothing where the weights or the published model are not at hand."""
    networks, model = evidence.transformers_of(release), evidence.diffusion
    cohort = evidence.cohorts.get(release.site)
    if networks is None or cohort is None or model is None or release.site not in model.sites:
        return
    examples = examples_of(cohort, model.sites.index(release.site))
    names = [name for name in _TOLD if name in model.transformer.config.sizes.names]

    def fell() -> Tensor:
        both = (replace(model, transformer=network) for network in networks)
        before, after = (denoising(one, examples, names, draws)["diffusion_loss"] for one in both)
        return before - after

    yield from judged_update(
        release, cohort, fell, lambda: _aligned(networks, model, examples, names), scored
    )


def _aligned(
    networks: tuple[DiffusionTransformer, DiffusionTransformer],
    model: GenerativeModel,
    examples: Examples,
    names: list[Condition],
) -> Float[Tensor, " n"]:
    """`cosines` of the loss of the velocity, over the same draws for every scan."""
    before, generator = networks[0], torch.Generator().manual_seed(0)
    path, config = Path(before.config.path), before.config
    shape = (len(_TIMES), config.latent_channels, *config.latent_grid)
    noise, times = torch.randn(shape, generator=generator), torch.tensor(_TIMES)

    def loss(network: DiffusionTransformer, row: int) -> Tensor:
        some = examples.rows(torch.full((len(_TIMES),), row))
        data, told = network.standardise(some.latents), model.conditioner.conditions(some, names)
        velocity: Tensor = network(path.noisy(data, noise, times), times, told)
        error = velocity - path.velocity(data, noise, times)
        return error.square().mean()

    return cosines(*networks, loss, len(examples))
