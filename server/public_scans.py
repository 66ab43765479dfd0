"""Public scans of a plan with privacy: latents of phantoms, from which no patient can be told.

Seed, number and tokenizer of the plan give the same file on one kind of machine; its hash stands in the plan.
They are what the centre trains on, in the sites' styles, and they give the axes of the style code. The file
lies in the run's folder; where it is missing it is drawn again.

What this file does not do: draw one phantom (`server/public_latents.py`), or restyle it
(`meduet_models/style/restyling.py`).

Axes: m = phantoms, c d h w = latents.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path

from jaxtyping import Float
from torch import Tensor

from federation.exchanges.style_code import LATENTS, check_public, privacy_of
from federation.plan.plan import RunPlan
from forms.json_text import canonical, sha256_of
from meduet_models.seeds import generator_of
from meduet_models.threads import fixed_threads
from meduet_models.tokenizer.tokenizer import Tokenizer
from meduet_models.weights import load_weights, save_weights, sha256_of_tensors
from server.public_latents import phantom_latents, plans_tokenizer

PUBLIC_SCANS = "public_scans.safetensors"
"""Name of the file, in the run's folder."""
_DRAWN_FROM = "drawn_from"


def drawn_public_scans(
    plan: RunPlan,
    tokenizer: Tokenizer,
    path: Path,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> str:
    """Draw the public scans that a plan describes into `path`, unless they are there; returns their hash.

    The hash in the plan is not looked at: this is how it is found.
    """
    drawn_from = _drawn_from(plan)
    if path.is_file():
        tensors, provenance = load_weights(path)
        if provenance.get(_DRAWN_FROM) == drawn_from:
            return sha256_of_tensors(tensors)
    number = privacy_of(plan).public_scans
    with fixed_threads(1):  # sums of floats depend on it
        draws = generator_of("public scans", plan.seed)
        latents = phantom_latents(plan, tokenizer, number, draws, progress)[:number].clone()
    tensors = {LATENTS: latents}
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    save_weights(path, tensors, {_DRAWN_FROM: drawn_from})
    return sha256_of_tensors(tensors)


def public_scans(plan: RunPlan, folder: Path, tokenizer: Path | None) -> Float[Tensor, "m c d h w"]:
    """The plan's public scans, from the run's folder, or drawn there with the plan's tokenizer (in the file
    `tokenizer`; none: the package's).

    Raises `ValueError` where they cannot be drawn, or are others than the plan's.
    """
    path = folder / PUBLIC_SCANS
    if not path.is_file():
        known = plans_tokenizer(plan, tokenizer)
        if known is None:
            raise ValueError(
                f"Expected the plan's tokenizer, to draw its public scans, or these in {path}; neither is at "
                "hand. Name the tokenizer's file (tokenizer=FILE)."
            )
        drawn_public_scans(plan, known, path)
    try:
        return check_public(plan, load_weights(path)[0])
    except ValueError as error:
        raise ValueError(
            f"{path}: {error} Drawn on another kind of machine? Put the file there that was made with the "
            "plan (meduet-server public-scans)."
        ) from None


def _drawn_from(plan: RunPlan) -> str:
    """Hash of everything that the scans are drawn from."""
    return sha256_of(
        canonical(
            {
                "seed": plan.seed,
                "number": privacy_of(plan).public_scans,
                "tokenizer": plan.tokenizer_sha256,
                "volumes": dataclasses.asdict(plan.volumes),
            }
        )
    )
