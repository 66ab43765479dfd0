"""Whole rounds with a U-Net on the volume as encoder, from a start that the plan names."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from flwr.app import Context
from torch import Tensor

from client.app import make_client_app
from federation.exchanges.pretraining import LEVELS
from federation.plan.plan import ReleasePlan, RunPlan, TrainingPlan
from meduet_models.anatomy_start import save_start
from meduet_models.published.pretrained import load_pretrained
from meduet_models.tokenizer.patch_pca import PatchMoments
from meduet_models.tokenizer.tokenizer import TokenizerSpec, pca_tokenizer
from meduet_models.volume_unet import VolumeUNet
from meduet_models.weights import save_weights
from server import public_latents, volume_start
from server.app import run
from server.model import MeduetModel
from server.public_scans import PUBLIC_SCANS
from server.volume_start import with_start
from simulations.engines.in_process import InProcessGrid
from strategies.quorum import RoundFailed
from tests.worlds import Hospital, Latents, protected_plan, small_network, small_plan
from tests.worlds import public_latents as worlds_public_latents

PICTURE = "embed_volume.kernel"


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("starts") / "shapes.safetensors"
    save_start(path, "shapes", VolumeUNet(seed=3).state_dict(), {})
    return path


@pytest.fixture(autouse=True)
def _tokenizer_of_two_channels(monkeypatch: pytest.MonkeyPatch) -> None:
    moments = PatchMoments.of(torch.rand(2, 1, 16, 24, 16, generator=torch.Generator().manual_seed(0)))
    tokenizer = pca_tokenizer(moments, 2)
    monkeypatch.setattr(volume_start, "plans_tokenizer", lambda plan, path: tokenizer)
    monkeypatch.setattr(public_latents, "_IN_PICTURE", 8)


def planned(start: Path, **release: str) -> RunPlan:
    plan = small_plan(
        network=small_network(encoder="volume_unet"),
        anatomy_start="shapes",
        anatomy_sha256="0" * 64,
        training=TrainingPlan(rounds=2, steps_per_round=1, batch_size=4, warmup=0.0),
        release=ReleasePlan(**release),  # type: ignore[arg-type]
    )
    return with_start(plan, TokenizerSpec(), start)


def federation(plan: RunPlan, folder: Path, steps: Callable[[], None] = lambda: None) -> InProcessGrid:
    def open_site(context: Context) -> Hospital:
        index = int(context.node_config["partition-id"])
        name = plan.participants[index]
        ceiling = None if plan.privacy is None else 8.0
        return Hospital(folder / "sites" / name, Latents([index], 40), name, epsilon_ceiling=ceiling)

    client = make_client_app(open_site, on_step=lambda site, step, loss: steps())
    return InProcessGrid(client, len(plan.participants), through_wire=True)


def pretrained(plan: RunPlan, folder: Path, start: Path, **more: Callable[[], None]) -> dict[str, Tensor]:
    model = MeduetModel(plan, anatomy=start)
    return dict(run(federation(plan, folder, **more), plan, folder, model=model).shared)


@pytest.mark.slow
def test_sites_train_the_u_net_from_the_start_and_a_killed_run_ends_in_the_same_bits(
    start: Path, tmp_path: Path
) -> None:
    plan, taken = planned(start), 0
    began = MeduetModel(plan, anatomy=start).start()[0]
    levels = {name for name in began if name.startswith(LEVELS)}
    assert torch.equal(began[f"{LEVELS}down_deep.2.norm.weight"], torch.ones(96))
    whole = pretrained(plan, tmp_path / "whole", start)
    assert levels and not any(torch.equal(whole[name], began[name]) for name in levels)
    assert torch.equal(whole[PICTURE], began[PICTURE]) and bool(began[PICTURE].any())

    def dies() -> None:
        nonlocal taken
        taken += 1
        if taken == 5:  # round 2, the second site
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pretrained(plan, tmp_path / "killed", start, steps=dies)
    resumed = pretrained(plan, tmp_path / "killed", start)
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)
    found = load_pretrained(tmp_path / "whole" / "model.safetensors").network
    assert found.config.encoder == "volume_unet"
    latents = torch.randn(2, 2, 4, 6, 4)
    assert found.content_code(latents).shape == (2, plan.network.code_size)


@pytest.mark.parametrize("wire_dtype", ["float32", "mxint8"])
def test_a_start_that_was_not_approved_is_refused_by_every_site(
    start: Path, tmp_path: Path, wire_dtype: str
) -> None:
    class Other(MeduetModel):
        def start(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
            shared, home = super().start()
            name = f"{LEVELS}stem.0.convolution.weight"
            return shared | {name: shared[name] + 0.5}, home

    plan = planned(start, wire_dtype=wire_dtype)
    with pytest.raises(RoundFailed, match="plan_not_accepted"):
        run(federation(plan, tmp_path), plan, tmp_path, model=Other(plan, anatomy=start))


def test_with_privacy_the_centre_trains_the_u_net_from_the_start(start: Path, tmp_path: Path) -> None:
    public = worlds_public_latents()
    of_encoder = {"network": small_network(encoder="volume_unet"), "anatomy_start": "shapes"}

    def make(**changes: object) -> RunPlan:
        training = TrainingPlan(rounds=1, steps_per_round=2, batch_size=4, warmup=0.0)
        return small_plan(**changes, **of_encoder, anatomy_sha256="0" * 64, training=training)

    plan = with_start(protected_plan(public, make), TokenizerSpec(), start)
    save_weights(tmp_path / PUBLIC_SCANS, {"latents": public}, {})
    began = MeduetModel(plan, anatomy=start).start()[0]
    shared = pretrained(plan, tmp_path, start)
    name = f"{LEVELS}down_deep.2.convolution.weight"
    assert torch.equal(shared[PICTURE], began[PICTURE]) and bool(began[PICTURE].any())
    moved = (shared[name] - began[name]).abs().max()
    assert 0 < moved < 0.1 * began[name].abs().max()


def test_the_centre_begins_with_no_other_file_and_no_other_tokenizer(
    start: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, other = planned(start), tmp_path / "other.safetensors"
    save_start(other, "shapes", VolumeUNet(seed=4).state_dict(), {})
    with pytest.raises(ValueError, match="Expected the start from public anatomy that the plan names"):
        MeduetModel(plan, anatomy=other).start()
    monkeypatch.setattr(volume_start, "plans_tokenizer", lambda plan, path: None)
    with pytest.raises(ValueError, match=r"choose tokenizer\.kind=shipped"):
        MeduetModel(plan, anatomy=start).start()
    with pytest.raises(ValueError, match=r"choose tokenizer\.kind=shipped"):
        with_start(plan, TokenizerSpec(kind="maisi", path="maisi.pt"), start)
    nothing = dataclasses.replace(plan, anatomy_start="none", anatomy_sha256=None)
    with pytest.raises(ValueError, match="anatomy has no effect"):
        with_start(nothing, TokenizerSpec(), start)
    assert with_start(nothing, TokenizerSpec(), None) is nothing
