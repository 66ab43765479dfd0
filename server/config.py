"""From YAML to a plan: the one place where Hydra's configuration becomes a `RunPlan`.

YAML says what, never which class: nothing in it is imported or instantiated. Three numbers are not asked for
because they follow: the latent channels from the tokenizer, the latent grid from the volume's shape, and,
unless it is set, the bound of a patient's style from the channels.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf

from federation.exchanges.private_rounds import with_noise
from federation.plan.plan import RunPlan, StylePlan
from forms.form import build
from forms.ranges import shown
from scans.volume_plan import VolumePlan

CONF = Path(__file__).resolve().parent.parent / "conf"
FROM_CONFIG = (
    "name",
    "seed",
    "volumes",
    "objective",
    "anatomy_start",
    "training",
    "style",
    "aggregation",
    "release",
    "probes",
    "demographics",
    "audit_counts",
    "diffusion",
    "privacy",
    "audit_canaries",
)
"""Parts of a plan that are settings of the same name."""
STYLE_CLIP = 5.0
"""`release.style_clip` over the square root of the latent channels: latents are scaled to unit variance, and
all but a few in 100 public phantoms are shorter (`tests/server/test_style_clip.py`)."""


def compose_config(overrides: Sequence[str] = (), name: str = "config") -> DictConfig:
    """Compose `conf/<name>.yaml` with `overrides` (``["training.rounds=3"]``) outside of a Hydra app."""
    with initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        composed: DictConfig = compose(config_name=name, overrides=list(overrides))
    return composed


def plain(config: DictConfig) -> dict[str, Any]:
    """`config` as nested dicts with every reference resolved."""
    container = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    assert isinstance(container, dict)
    return {str(key): value for key, value in container.items()}


def plan_from(
    settings: Mapping[str, Any],
    *,
    sites: Sequence[str],
    tokenizer_sha256: str,
    latent_channels: int,
    stride: int,
    public_sha256: str = "0" * 64,
    recipient: str = "",
    anatomy_sha256: str = "0" * 64,
) -> RunPlan:
    """Build the plan that `settings` (see `plain`) describe; `public_sha256` is the hash of its public scans,
    where it has privacy (`server/public_scans.py`), `recipient` the public key of its latent bank, where
    sites release latents (`server/latent_bank/records.py`), `anatomy_sha256` that of its start from public
    anatomy, where it has one (`server/volume_start.py`). The noise of steps at the sites is found here.

    Raises `ValueError` naming the setting that is unknown, missing, ill-typed, or contradicts another.
    """
    volumes = build(VolumePlan, settings["volumes"], "volumes")
    style = build(StylePlan, settings["style"], "style")
    if not isinstance(settings["network"], Mapping):
        raise ValueError(f"Expected network to be a mapping; got {shown(settings['network'])}.")
    shape = volumes.shape
    if any(size % stride for size in shape):
        raise ValueError(
            f"Expected volumes.shape to be multiples of the tokenizer's stride {stride}; got {list(shape)}."
        )
    network = {
        **settings["network"],
        "latent_channels": latent_channels,
        "latent_grid": [size // stride for size in shape],
        "style_map_grid": list(style.map_grid),
    }
    values = {key: settings[key] for key in FROM_CONFIG}
    values["release"] = _release(values["release"], latent_channels, values["privacy"] is not None)
    if isinstance(values["privacy"], Mapping):
        values["privacy"] = {**values["privacy"], "public_sha256": public_sha256}
    if isinstance(values["diffusion"], Mapping) and recipient:
        values["diffusion"] = {**values["diffusion"], "recipient": recipient}
    if values["anatomy_start"] != "none":
        values["anatomy_sha256"] = anatomy_sha256
    values |= {"network": network, "sites": list(sites), "tokenizer_sha256": tokenizer_sha256}
    return with_noise(build(RunPlan, values))


def _release(settings: Any, latent_channels: int, private: bool) -> Any:
    """With the bound of a patient's style where none is set; with privacy it has no effect, and stays out."""
    if not isinstance(settings, Mapping) or settings.get("style_clip", 0) is not None:
        return settings
    others = {name: value for name, value in settings.items() if name != "style_clip"}
    return others if private else {**others, "style_clip": round(STYLE_CLIP * latent_channels**0.5, 2)}
