"""Membership of a diffusion model: three scores of a scan, from the same draws for every scan.

`loss`: error of the velocity. `sima`: the length of the noise that the model sees in the clean scan. `pia`:
the scan's own noise, as the model sees it at the end of the path, put back along it: how far is the noise
that is seen there from it? Of each the mean square is told, smaller for whom the model was trained on.

A scan of little variance has little of all three, seen or not; so each is held against the same over the
scan's own variance (`controlled`).

What this file does not do: sample, or look for copies (`memorisation.py`).

Source: Matsumoto et al. 2023, Carlini et al. 2023 (arXiv:2301.13188); SimA: arXiv:2509.25003; PIA: Kong et
al. 2024 (arXiv:2305.18355).

Axes: b = scans at once, n = scans, c d h w = latents.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from audit.attacks.membership import scores_of
from audit.attacks.scores import Scores, judged
from audit.cohort import Cohort
from audit.findings import Finding
from meduet_models.diffusion.artefact import DIFFUSION_MODEL, GenerativeModel
from meduet_models.diffusion.conditions import UNKNOWN, Condition, Conditions, Examples
from meduet_models.diffusion.path import Path

FEWEST_DRAWS = 8
_SCANS_AT_ONCE = 32
_NEAR_DATA = (0.5, 1.0)  # times of `sima` and `pia`: before one half a scan is mostly noise
SAYS: Mapping[str, str] = {
    "diffusion_loss": "a low loss",
    "diffusion_sima": "little noise seen in the clean scan",
    "diffusion_pia": "the scan's own noise found again along the path",
}


@torch.no_grad()
def denoising(
    model: GenerativeModel, examples: Examples, names: Sequence[Condition], draws: int, seed: int = 0
) -> dict[str, Float[Tensor, " n"]]:
    """Mean squares of each scan by the name of the attack, told the conditions in `names`; and `variance`,
    its own."""
    transformer, path = model.transformer, Path(model.transformer.config.path)
    draws, generator = max(draws, FEWEST_DRAWS), torch.Generator().manual_seed(seed)
    shape = (draws, transformer.config.latent_channels, *transformer.config.latent_grid)
    noises, jitter = torch.randn(shape, generator=generator), torch.rand(draws, generator=generator)
    shares = (torch.arange(draws) + jitter) / draws  # a time in each of as many equal shares
    parts: dict[str, list[Tensor]] = {name: [] for name in (*SAYS, "variance")}
    for rows in torch.split(torch.arange(len(examples)), _SCANS_AT_ONCE):
        some = examples.rows(rows)
        told = model.conditioner.conditions(some, names)
        data = transformer.standardise(some.latents)

        own = _noise(model, data, 1.0, told)
        loss, sima, pia = (torch.zeros(len(data)) for _ in range(3))
        for noise, share in zip(noises, shares.tolist(), strict=True):
            whole, time = noise.expand_as(data), torch.full((len(data),), share)
            velocity = transformer(path.noisy(data, whole, time), time, told)
            loss += _square(velocity - path.velocity(data, whole, time))
            near = _NEAR_DATA[0] + share * (_NEAR_DATA[1] - _NEAR_DATA[0])
            sima += _square(_noise(model, data, near, told))
            on_path = path.noisy(data, own, torch.full((len(data),), near))
            pia += _square(_noise(model, on_path, near, told) - own)
        measured = (loss / draws, sima / draws, pia / draws, data.flatten(1).var(1))
        for name, values in zip(parts, measured, strict=True):
            parts[name].append(values)
    return {name: torch.cat(each).double() for name, each in parts.items()}


def examples_of(cohort: Cohort, site: int) -> Examples:
    """Candidates as the model is told of them: nothing is known but the scan and its site."""
    count = len(cohort.latents)
    unknown = torch.full((count,), UNKNOWN)
    return Examples(
        latents=cohort.latents,
        site=torch.full((count,), site),
        body_part=unknown,
        spacing=torch.full((count, 3), torch.nan),
        category=unknown,
    )


def controlled(
    cohorts: Sequence[Cohort],
    measured: Mapping[str, Mapping[str, Float[Tensor, " n"]]],
    attack: str,
    told: str,
    without: Scores,
    began: float,
) -> tuple[Finding, Scores]:
    """The finding of one score of `measured`, by site; void where the scan's variance alone tells as much."""

    def scores(of: str, over: str = "") -> Scores:
        values = {s: one[of] / one[over] if over else one[of] for s, one in measured.items()}
        return scores_of(cohorts, {site: -one for site, one in values.items()})

    plain = scores(attack)
    sentence = f"Whoever has the model takes {SAYS[attack]}, told {told}, for membership."
    finding = judged(DIFFUSION_MODEL, attack, plain, sentence, without, began)
    relative = judged(DIFFUSION_MODEL, attack, scores(attack, over="variance"), "", without)
    spread = judged(DIFFUSION_MODEL, attack, scores("variance"), "")
    if relative.value is not None and spread.value is not None:
        finding = replace(
            finding,
            sentence=f"{finding.sentence} Over the scan's own variance {relative.value:.2f}; by the variance "
            f"alone {spread.value:.2f}.",
        )
    if (finding.verdict, spread.verdict) == ("found", "found") and relative.verdict != "found":
        said = "Void: the scan's variance alone tells as much."
        finding = replace(finding, verdict="void", sentence=f"{finding.sentence} {said}", epsilon_low=None)
    return finding, plain


def _noise(
    model: GenerativeModel, sample: Float[Tensor, "b c d h w"], at: float, told: Conditions
) -> Float[Tensor, "b c d h w"]:
    """The noise that the model sees in a sample at one time."""
    time, path = torch.full((len(sample),), at), Path(model.transformer.config.path)
    return path.noise_in(sample, model.transformer(sample, time, told), time)


def _square(error: Float[Tensor, "b c d h w"]) -> Float[Tensor, " b"]:
    return error.square().flatten(1).mean(1)
