"""Where a network with a U-Net on the volume starts (`network.encoder=volume_unet`): picture and weights.

The picture that the U-Net sees in latents is fitted to phantoms of the plan's seed, so the centre needs the
plan's tokenizer; its weights come from a file of `meduet-server pretrain-public`, whose hash the plan names,
or from the plan's seed. No patient is in either. What this file does not do: make such a file
(`server/anatomy/`), or check what a site gets (`client/exchanges/pretraining.py`).
"""

import dataclasses
from pathlib import Path

from federation.exchanges.pretraining import LEVELS, start_sha256
from federation.plan.plan import RunPlan
from meduet_models.anatomy_start import AnatomyStart, started_unet
from meduet_models.meduet import FactorNetwork
from meduet_models.tokenizer.tokenizer import TokenizerSpec
from meduet_models.volume_embedding import VolumeEmbedding
from server.public_latents import picture_moments, plans_tokenizer

_NO_TOKENIZER = (
    "network.encoder=volume_unet sees a picture that the centre fits with a tokenizer of the package: choose "
    "tokenizer.kind=shipped, or network.encoder=vit."
)


def start_on_volumes(
    network: FactorNetwork, plan: RunPlan, tokenizer: Path | None = None, anatomy: Path | None = None
) -> None:
    """Give the U-Net of `network` its picture and its start; nothing where it has none.

    Files as in `MeduetModel`. Raises `ValueError` when the plan's tokenizer is not at hand, or the start is
    absent or not the plan's.
    """
    if network.embed_volume is None:
        return
    if (found := plans_tokenizer(plan, tokenizer)) is None:
        raise ValueError(_NO_TOKENIZER)
    network.embed_volume.set_picture(picture_moments(plan, found))
    if plan.anatomy_start == "none":
        return
    _load(network.embed_volume, plan.anatomy_start, anatomy)
    if (came := start_sha256(network.state_dict(), plan.release.wire_dtype)) != plan.anatomy_sha256:
        raise ValueError(
            f"Expected the start from public anatomy that the plan names, {str(plan.anatomy_sha256)[:12]}…; "
            f"the file has {came[:12]}…. Name its file with --anatomy."
        )


def with_start(plan: RunPlan, spec: TokenizerSpec, anatomy: Path | None) -> RunPlan:
    """The plan with the hash of its start in the file `anatomy` (none: the shipped one), if it has one.

    Raises `ValueError` when there is no such start, for a file that has no effect, and for a tokenizer of
    which the centre fits no picture.
    """
    if plan.network.encoder == "volume_unet" and spec.kind != "shipped":
        raise ValueError(_NO_TOKENIZER)
    if plan.anatomy_start == "none":
        if anatomy is not None:
            raise ValueError("anatomy has no effect without anatomy_start=canonical or shapes: leave it out.")
        return plan
    levels = started_unet(plan.anatomy_start, path=anatomy).state_dict()
    mine = VolumeEmbedding(1, 2, 1, 0).levels.state_dict()
    named = {f"{LEVELS}{name}": levels[name] for name in mine}
    return dataclasses.replace(plan, anatomy_sha256=start_sha256(named, plan.release.wire_dtype))


def _load(embedding: VolumeEmbedding, start: AnatomyStart, path: Path | None) -> None:
    weights = started_unet(start, path=path).state_dict()
    embedding.levels.load_state_dict({name: weights[name] for name in embedding.levels.state_dict()})
