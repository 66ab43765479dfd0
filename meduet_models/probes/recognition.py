"""Recognition: is a patient found again when her scans are restyled? Asked of content, and of style.

Content that forgot the patient also has no site in it; so this stands beside every site probe. Nearest
neighbours by cosine, nothing is fitted. What this file does not do: it renders nobody in another style.

Axes: b = scans (or renderings of scans), q = queries, g = gallery, k = features.
"""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from meduet_models.probes.quick import ProbeReading


def recognised(
    queries: Float[Tensor, "q k"],
    gallery: Float[Tensor, "g k"],
    query_patients: Sequence[str],
    gallery_patients: Sequence[str],
) -> Bool[Tensor, " q"]:
    """Whether each query's nearest gallery vector (cosine) is of the same patient."""
    same = torch.from_numpy(np.asarray(query_patients)[:, None] == np.asarray(gallery_patients)[None])  # q g
    similarity = F.normalize(queries.detach().cpu(), dim=1) @ F.normalize(gallery.detach().cpu(), dim=1).T
    return same[torch.arange(len(same)), similarity.argmax(1)]


def patient_retrieval(
    queries: Float[Tensor, "q k"],
    gallery: Float[Tensor, "g k"],
    query_patients: Sequence[str],
    gallery_patients: Sequence[str],
    centred: bool = False,
) -> ProbeReading:
    """Share of queries whose nearest gallery vector (cosine) is of the same patient; chance by guessing
    uniformly.

    Queries and gallery are different renderings of the same patients: other scanners, or other views.
    `centred` subtracts the mean of each side first, which hides a shift between scanners. A query whose
    patient is not in the gallery is not asked. Raises `ValueError` when none can be.
    """
    same = torch.from_numpy(np.asarray(query_patients)[:, None] == np.asarray(gallery_patients)[None])  # q g
    asked = same.any(1)
    if not bool(asked.any()):
        raise ValueError("Expected queries of patients that are in the gallery; got none.")
    if centred:
        queries, gallery = queries - queries.mean(0), gallery - gallery.mean(0)
    hits = recognised(queries, gallery, query_patients, gallery_patients)[asked]
    return ProbeReading(float(hits.float().mean()), float(same[asked].float().mean()))


def retrieval_across_sites(
    features: Float[Tensor, "b k"], sites: Sequence[int], patients: Sequence[str], centred: bool = False
) -> ProbeReading:
    """`patient_retrieval` averaged over ordered pairs of sites that have patients in common (simulated
    scanners).
    """
    labels, names = np.asarray(sites), np.asarray(patients)
    readings = []
    for a in np.unique(labels):
        for b in np.unique(labels):
            here, there = np.flatnonzero(labels == a), np.flatnonzero(labels == b)
            if a != b and set(names[here]) & set(names[there]):
                readings.append(
                    patient_retrieval(
                        features[torch.from_numpy(here)],
                        features[torch.from_numpy(there)],
                        list(names[here]),
                        list(names[there]),
                        centred,
                    )
                )
    if not readings:
        raise ValueError("Expected patients that were scanned at two sites; got none.")
    return ProbeReading(
        float(np.mean([r.score for r in readings])), float(np.mean([r.chance for r in readings]))
    )


def recognition_among_all(
    features: Float[Tensor, "b k"], sites: Sequence[int], patients: Sequence[str]
) -> ProbeReading:
    """Top-1 among all: is the nearest of *all* other renderings, of every patient at every site, the same
    patient's?

    Harder than `retrieval_across_sites`: other patients in the query's own style are in the gallery too, and
    a vector that knows the style finds them first. Raises `ValueError` when no patient has two renderings.
    """
    names, labels = np.asarray(patients), np.asarray(sites)
    same = torch.from_numpy(names[:, None] == names[None])
    itself = torch.from_numpy((names[:, None] == names[None]) & (labels[:, None] == labels[None]))
    asked = (same & ~itself).any(1)
    if not bool(asked.any()):
        raise ValueError("Expected patients that were scanned at two sites; got none.")
    unit = F.normalize(features.detach().cpu(), dim=1)
    nearest = (unit @ unit.T).masked_fill(itself, -torch.inf).argmax(1)
    hits = same[torch.arange(len(same)), nearest][asked]
    chance = ((same & ~itself).sum(1) / (~itself).sum(1))[asked]
    return ProbeReading(float(hits.double().mean()), float(chance.double().mean()))
