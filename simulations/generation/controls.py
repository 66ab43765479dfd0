"""Consistency of controls: is the patient asked for in the sample, and the site's style on it?

Read by the model's own frozen encoder and by a probe that was fitted on real training scans. What stands in
the floor's place is what is possible without a generator: real held-out scans, or their latents moved to the
style asked for. What this file does not do: it samples nothing (`generation.py`).

Axes: b = samples, s = numbers in a style code, c d h w = latents.
"""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from meduet_models.diffusion.conditioner import Conditioner
from meduet_models.probes.recognition import recognised
from simulations.generation.quality import ENCODER, UNKNOWN, QualityRow, averaged, quality_row

_BATCH = 16


def content_rows(
    conditioner: Conditioner,
    samples: Float[Tensor, "b c d h w"],
    asked: Float[Tensor, "b c d h w"],
    stand_in: Float[Tensor, "b c d h w"] | None,
    patient: Sequence[str],
    kind: str,
    *,
    resamples: int,
    seed: int,
) -> list[QualityRow]:
    """Sample i was asked for the content of scan i: is that patient the nearest of all asked, and how near?

    `stand_in`: the asked scans moved to the style that the samples were asked for, without a generator.
    Contents are pooled tokens less their mean over the asked scans; cosine 1 is the same content.
    """
    gallery = _pooled(conditioner, asked)
    centre = gallery.mean(0)
    chance = float(np.mean([np.mean([other == name for other in patient]) for name in patient]))
    rows = []
    contents = [None if part is None else _pooled(conditioner, part) for part in (samples, stand_in)]
    for measure in ("found", "cosine"):
        told_of = []
        for content in contents:
            if content is None:
                told_of.append(UNKNOWN)
                continue
            if measure == "found":
                values = recognised(content - centre, gallery - centre, patient, patient).double()
            else:
                values = F.cosine_similarity(content - centre, gallery - centre).double()
            told_of.append(averaged(values, patient, resamples, seed))
        name = f"patient found by content (chance {chance:.0%})" if measure == "found" else "content, cosine"
        rows.append(quality_row(name, ENCODER, kind, *told_of, samples=len(samples), real=len(asked)))
    return rows


def site_row(
    conditioner: Conditioner,
    samples: Float[Tensor, "b c d h w"],
    asked: Sequence[int],
    patient: Sequence[str],
    training: tuple[Float[Tensor, "n c d h w"], Sequence[int]],
    held: tuple[Float[Tensor, "m c d h w"], Sequence[int], Sequence[str]],
    kind: str,
    *,
    resamples: int,
    seed: int,
) -> QualityRow | None:
    """Share of samples of which a linear probe of style codes, fitted on real training scans, says the site
    asked for; the floor is its accuracy on real held-out scans. None where training shows one site only.
    """
    latents, sites = training
    if len(set(sites)) < 2:
        return None
    probe = make_pipeline(
        StandardScaler(), LogisticRegression(C=0.1, class_weight="balanced", max_iter=5000)
    ).fit(_styles(conditioner, latents).numpy(), np.asarray(sites))

    def right(scans: Tensor, expected: Sequence[int]) -> list[float]:
        said = probe.predict(_styles(conditioner, scans).numpy())
        return [float(one == other) for one, other in zip(said, expected, strict=True)]

    value, floor = (
        averaged(torch.tensor(right(scans, expected)), names, resamples, seed)
        for scans, expected, names in ((samples, asked, patient), held)
    )
    name = f"site asked for, by a probe (chance {1 / len(set(sites)):.0%})"
    return quality_row(name, ENCODER, kind, value, floor, samples=len(samples), real=len(held[0]))


def style_gap_row(
    conditioner: Conditioner,
    samples: Float[Tensor, "b c d h w"],
    source: Float[Tensor, "b c d h w"],
    asked: Float[Tensor, "b s"],
    stand_in: Float[Tensor, "b c d h w"] | None,
    patient: Sequence[str],
    kind: str,
    *,
    resamples: int,
    seed: int,
) -> QualityRow:
    """Share of the distance between a scan's style code and the one asked for that its sample has covered."""
    before = (_styles(conditioner, source) - asked.cpu()).norm(dim=1)

    def closed(latents: Tensor) -> Tensor:
        left: Tensor = (_styles(conditioner, latents) - asked.cpu()).norm(dim=1) / before.clamp(min=1e-9)
        return 1 - left

    value, floor = (
        UNKNOWN if part is None else averaged(closed(part).double(), patient, resamples, seed)
        for part in (samples, stand_in)
    )
    return quality_row(
        "style gap closed", ENCODER, kind, value, floor, samples=len(samples), real=len(source)
    )


def _pooled(conditioner: Conditioner, latents: Tensor) -> Tensor:
    return torch.cat([conditioner.content(x).mean(1).cpu() for x in torch.split(latents, _BATCH)])


def _styles(conditioner: Conditioner, latents: Tensor) -> Tensor:
    return torch.cat([conditioner.style(x).cpu() for x in torch.split(latents, _BATCH)])
