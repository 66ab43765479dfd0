"""Membership of a model: does its loss on a scan tell whether it was trained on?

The score is the error at hidden tokens, hidden by the same draws for every scan and every model (common
random numbers): tokens are replaced by those of a public partner, noise of the latents' own scale, and asked
back. Calibrated: less the loss of an earlier model, for which the common start is always at hand.

The blind baseline (`scores.py`) sees coarse statistics of scans and no model.

What this file does not do: train shadow models.

Source: Yeom et al. 2018 (loss); Watson et al. 2021 (calibration).

Axes: n = scans, b = scans at once, t = tokens, c d h w = latents, k = statistics.
"""

import time
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from audit.attacks.scores import Scores, blind_from, judged
from audit.cohort import Cohort
from audit.evidence import Evidence
from audit.findings import Finding
from meduet_models.meduet import FactorNetwork
from meduet_models.objective.distillation import squared_distance
from meduet_models.published.pretrained import MODEL

_SCANS_AT_ONCE = 16
_HIDDEN = 0.5


@torch.no_grad()
def losses(
    network: FactorNetwork, latents: Float[Tensor, "n c d h w"], draws: int, seed: int = 0
) -> Float[Tensor, " n"]:
    """Error at hidden tokens of each scan, over the same draws of tokens and public partner."""
    total = torch.zeros(len(latents), dtype=torch.float64)
    for partner, hidden in public_draws(network, draws, seed):
        for first in range(0, len(latents), _SCANS_AT_ONCE):
            chunk = latents[first : first + _SCANS_AT_ONCE]
            total[first : first + _SCANS_AT_ONCE] += hidden_error(network, chunk, partner, hidden).double()
    return total / draws


def public_draws(
    network: FactorNetwork, draws: int, seed: int = 0
) -> Iterator[tuple[Float[Tensor, "c d h w"], Bool[Tensor, " t"]]]:
    """Draws that everybody can make: a partner of noise on the latents' scale, and which tokens are its."""
    generator, config = torch.Generator().manual_seed(seed), network.config
    for _ in range(draws):
        order = torch.rand(config.num_tokens, generator=generator).argsort()
        hidden = order < round(_HIDDEN * config.num_tokens)
        noise = torch.randn(config.latent_channels, *config.latent_grid, generator=generator)
        yield network.latent_mean + network.latent_deviation[:, None, None, None] * noise, hidden


def hidden_error(
    network: FactorNetwork, latents: Float[Tensor, "b c d h w"], partner: Tensor, hidden: Tensor
) -> Float[Tensor, " b"]:
    """Error of each scan at tokens that a partner hides."""
    lent = network.embed_latents(partner[None]).expand(len(latents), -1, -1)
    mixed = torch.where(hidden[None, :, None], lent, network.embed_latents(latents))
    visible = (~hidden).expand(len(latents), -1)
    predicted = network.predict_tokens(network.factors(latents, network.encoder(mixed)), visible)
    error = squared_distance(predicted, network.target_tokens(latents))  # b t
    return error[:, hidden].mean(1)


def statistics(latents: Float[Tensor, "n c d h w"]) -> Float[Tensor, "n k"]:
    """What is seen of a scan without a model: channel means, deviations, and coarse means."""
    coarse = torch.nn.functional.adaptive_avg_pool3d(latents, (2, 2, 2)).flatten(1)
    return torch.cat([latents.mean((2, 3, 4)), latents.std((2, 3, 4)), coarse], dim=1).double()


def blind(cohorts: Sequence[Cohort]) -> Scores:
    """Scores of a classifier that sees scans and no model, site by site."""
    each = [cohort.per_person(statistics(cohort.latents)).numpy() for cohort in cohorts]
    site = np.repeat(np.arange(len(cohorts)), [len(one) for one in each])
    return blind_from(np.concatenate(each), np.concatenate([cohort.member for cohort in cohorts]), site)


def scores_of(cohorts: Sequence[Cohort], of: Mapping[str, Float[Tensor, " n"]]) -> Scores:
    """Scores of scans, by site, averaged per patient."""
    values = [cohort.per_person(of[cohort.site][:, None])[:, 0].numpy() for cohort in cohorts]
    sizes = [len(one) for one in values]
    attributes = {name for cohort in cohorts for name in cohort.groups}
    groups = {name: np.concatenate([cohort.group(name) for cohort in cohorts]) for name in attributes}
    groups["site"] = np.repeat([cohort.site for cohort in cohorts], sizes)
    return Scores(
        np.concatenate(values),
        np.concatenate([cohort.member for cohort in cohorts]),
        np.repeat(np.arange(len(cohorts)), sizes),
        groups,
    )


def attack_model(evidence: Evidence, draws: int, scored: list[tuple[Finding, Scores]]) -> Iterator[Finding]:
    """The published model: loss, and loss less that of each earlier model at hand."""
    assert evidence.model is not None
    cohorts = list(evidence.cohorts.values())
    without = blind(cohorts)
    began = time.process_time()
    last = {c.site: losses(evidence.model, c.latents, draws) for c in cohorts}
    tried = {"loss": ("loss", scores_of(cohorts, {s: -one for s, one in last.items()}))}
    for name, network in evidence.earlier.items():
        before = {c.site: losses(network, c.latents, draws) for c in cohorts}
        tried[name] = ("calibrated_loss", scores_of(cohorts, {s: before[s] - last[s] for s in last}))
    for name, (attack, scores) in tried.items():
        beside = "" if name == "loss" else f", less that of {name},"
        sentence = f"Whoever has the model and a candidate's scan takes a low loss{beside} for membership."
        finding = judged(MODEL, attack, scores, sentence, without, began)
        scored.append((finding, scores))
        yield finding
