"""The public scans of a plan at a site: kept as they came, for the questions that come without them.

What this file does not do: draw them (`server/public_scans.py`).

Axes: m = public scans, c d h w = latents.
"""

from pathlib import Path

from jaxtyping import Float
from torch import Tensor

from federation.exchanges.style_code import LATENTS, check_public
from federation.plan.plan import RunPlan
from federation.wire.messages import Tensors
from meduet_models.weights import load_weights, save_weights
from storage.files import private_folder

PUBLIC_SCANS = "public_scans.safetensors"
"""Name of the file, beside the states."""


def keep_public(state_dir: Path, plan: RunPlan, public: Tensors) -> Float[Tensor, "m c d h w"]:
    """What came with a question, kept. Raises `ValueError` for public scans that are not the plan's."""
    latents, path = check_public(plan, public), _path(state_dir, plan)
    private_folder(path.parent)
    save_weights(path, {LATENTS: latents}, {})
    return latents


def kept_public(state_dir: Path, plan: RunPlan) -> Float[Tensor, "m c d h w"] | None:
    """What was kept; None where nothing is, or it is damaged or another plan's."""
    try:
        return check_public(plan, load_weights(_path(state_dir, plan))[0])
    except (ValueError, OSError):
        return None


def _path(state_dir: Path, plan: RunPlan) -> Path:
    return state_dir / "state" / plan.sha256[:12] / PUBLIC_SCANS
