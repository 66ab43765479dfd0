"""Released latents: are they the scans, and are they found again among other acquisitions of them?

The decoder is public, so a latent that left is decoded like any other. Found again: of each released latent
the most similar among latents of the same scans acquired again (shifted, other gamma, noise), by cosine after
whitening; chance is one in as many.

What this file does not do: acquire anything again (whoever opens a run does).

Axes: n = released scans, c d h w = latents, D H W = voxels.
"""

import time
from collections.abc import Iterator

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from audit.cohort import Cohort
from audit.evidence import Evidence, Release
from audit.findings import Finding
from audit.gallery import picture
from audit.statistics.intervals import wilson
from federation.exchanges.latents import BOUNDED
from meduet_models.tokenizer.tokenizer import Tokenizer

_MOST_DECODED = 16
_SHOWN = 4
_SAME_SCAN_DB = 1.0
"""Decibels by which a released latent may fall short of its scan's own round trip and still be the scan."""


def psnr(made: Float[Tensor, "n 1 D H W"], truth: Float[Tensor, "n 1 D H W"]) -> Float[Tensor, " n"]:
    """Peak signal to noise of volumes in [0, 1], in decibels."""
    error = (made.clamp(0, 1) - truth).square().flatten(1).mean(1)
    return -10 * error.clamp(min=1e-12).log10()


def found_again(
    released: Float[Tensor, "n c d h w"], gallery: Float[Tensor, "m c d h w"]
) -> Float[Tensor, "n m"]:
    """Similarity of each released latent to each of a gallery: cosine, each voxel standardised."""
    both = torch.cat([released, gallery]).flatten(1).double()
    both = (both - both.mean(0)) / both.std(0).clamp(min=1e-9)
    both = both / both.norm(dim=1, keepdim=True).clamp(min=1e-12)
    similar: Tensor = both[: len(released)] @ both[len(released) :].T
    return similar


def attack_latents(evidence: Evidence, release: Release) -> Iterator[Finding]:
    """Decoded and found again; nothing is said where the release is empty."""
    cohort, tokenizer = evidence.cohorts.get(release.site), evidence.tokenizer
    if cohort is None or tokenizer is None or release.tensors is None or not len(release.tensors[BOUNDED]):
        return
    released = release.tensors[BOUNDED].float()
    rows = np.array(release.rows)
    yield _decoded(release, released, rows, cohort, tokenizer)
    again = evidence.acquired_again(release.site)
    if again is not None:
        yield _recognised(release, released, rows, cohort, again)


def _decoded(
    release: Release, released: Tensor, rows: np.ndarray, cohort: Cohort, tokenizer: Tokenizer
) -> Finding:
    began = time.process_time()
    some = min(len(released), _MOST_DECODED)
    own = tokenizer.decode(cohort.latents[rows[:some]]).clamp(0, 1)
    made = tokenizer.decode(released[:some])
    average = tokenizer.decode(cohort.latents.mean(0, keepdim=True)).expand_as(own)
    value, guess = float(psnr(made, own).mean()), float(psnr(average, own).mean())
    same = value > guess + 10 * _SAME_SCAN_DB
    return Finding(
        artefact=release.artefact,
        attack="decode",
        measure="dB to the scan's own decoding",
        n_in=some,
        n_out=0,
        value=min(value, 120.0),
        baseline=guess,
        verdict="found" if same else "not found",
        sentence=f"The latents that {release.site} released decode to what its own latents decode to "
        f"({value:.0f} dB; the average scan {guess:.0f} dB): they are the images."
        if same
        else f"What {release.site} released decodes to {value:.0f} dB of its scans (the average scan "
        f"{guess:.0f} dB).",
        pictures=(picture("Scans, decoded; what was released of them.", [own[:_SHOWN], made[:_SHOWN]]),),
        seconds=time.process_time() - began,
    )


def _recognised(
    release: Release, released: Tensor, rows: np.ndarray, cohort: Cohort, again: Tensor
) -> Finding:
    began = time.process_time()
    first = found_again(released, again).argmax(1).numpy()
    people = np.array(cohort.patients)
    hits = int((people[first] == people[rows]).sum())
    low, high = wilson(hits, len(rows))
    chance = 1 / len(cohort.people)
    return Finding(
        artefact=release.artefact,
        attack="recognition",
        measure="share found again",
        n_in=len(rows),
        n_out=0,
        value=hits / len(rows),
        low=low,
        high=high,
        baseline=chance,
        ceiling=min(1.0, 3 / len(rows)),
        verdict="found" if low > chance else "not found",
        sentence=f"{hits} of {len(rows)} released latents of {release.site} are found again among other "
        f"acquisitions of {len(cohort.people)} patients (by guessing {chance:.3f}).",
        seconds=time.process_time() - began,
    )
