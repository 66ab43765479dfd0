"""Membership of a model: does its loss on a scan tell whether it was trained on?

The score is the error at hidden tokens, hidden by the same draws for every scan and every model (common
random numbers): tokens are replaced by those of a public partner, noise of the latents' own scale, and asked
back. Calibrated: less the loss of an earlier model, for which the common start is always at hand. Beside it
stand two scores of the encoder alone (`encoder.py`), and all of them together (`combined.py`).

The blind baseline (`scores.py`) sees coarse statistics of scans and no model.

What this file does not do: train shadow models.

Source: Yeom et al. 2018 (loss); Watson et al. 2021 (calibration).

Axes: n = scans, b = scans at once, t = tokens, c d h w = latents, k = statistics.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from audit.attacks.combined import judged_together
from audit.attacks.encoder import residuals, responses
from audit.attacks.scores import Scores, blind_from, judged
from audit.cohort import Cohort
from audit.evidence import Evidence
from audit.findings import Finding
from meduet_models.meduet import FactorNetwork
from meduet_models.objective.distillation import squared_distance
from meduet_models.published.pretrained import MODEL

_SCANS_AT_ONCE = 16
_HIDDEN = 0.5
_OF_THE_ENCODER: Mapping[str, tuple[Callable[[FactorNetwork, Tensor, int], Tensor], str]] = {
    "invariance": (lambda *asked: -residuals(*asked), "content that noise hardly moves"),
    "parts": (responses, "a part that is found again in the whole more sharply"),
}


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
    lent = network.seen_tokens(partner[None]).expand(len(latents), -1, -1)
    mixed = torch.where(hidden[None, :, None], lent, network.seen_tokens(latents))
    visible = (~hidden).expand(len(latents), -1)
    features = network.encoder(network.embed_tokens(mixed))
    predicted = network.predict_tokens(network.factors(latents, features), visible)
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
    """The published model: loss, loss less that of each earlier model at hand, the encoder alone; and all of
    them together."""
    assert evidence.model is not None
    network, cohorts = evidence.model, list(evidence.cohorts.values())
    without = blind(cohorts)
    each: list[Scores] = []

    def finding(attack: str, values: Mapping[str, Tensor], takes: str, began: float) -> Finding:
        each.append(scores_of(cohorts, values))
        sentence = f"Whoever has the model and a candidate's scan takes {takes} for membership."
        made = judged(MODEL, attack, each[-1], sentence, without, began)
        scored.append((made, each[-1]))
        return made

    began = time.process_time()
    last = {c.site: losses(network, c.latents, draws) for c in cohorts}
    yield finding("loss", {s: -one for s, one in last.items()}, "a low loss", began)
    for name, earlier in evidence.earlier.items():
        began = time.process_time()
        before = {c.site: losses(earlier, c.latents, draws) for c in cohorts}
        beside = f"a low loss, less that of {name},"
        yield finding("calibrated_loss", {s: before[s] - last[s] for s in last}, beside, began)
    for attack, (score, takes) in _OF_THE_ENCODER.items():
        began = time.process_time()
        yield finding(attack, {c.site: score(network, c.latents, draws) for c in cohorts}, takes, began)
    if (together := judged_together(MODEL, each, cohorts, without)) is not None:
        scored.append(together)
        yield together[0]
