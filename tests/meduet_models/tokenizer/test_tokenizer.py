"""The frozen tokenizer: deterministic, pinned by its hash, and the same however it was saved or tiled."""

import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from meduet_models.tokenizer.linear_decoder import NeighbourMoments, best_decoder
from meduet_models.tokenizer.patch_pca import PatchMoments, from_patches, principal_components, to_patches
from meduet_models.tokenizer.patch_vae import POSTERIOR_DEVIATION, PatchVAE, PatchVAEConfig
from meduet_models.tokenizer.tokenizer import (
    Tokenizer,
    TokenizerSpec,
    load_tokenizer,
    pca_tokenizer,
    save_tokenizer,
    vae_tokenizer,
)
from meduet_models.weights import load_weights, save_weights

SMALL = PatchVAEConfig(channels=3, encoder_width=8, encoder_blocks=1, decoder_width=8, decoder_blocks=1)
SHIPPED = [8]


def volumes(seed: int, shape: tuple[int, int, int] = (16, 20, 12), count: int = 2) -> Tensor:
    noise = torch.rand(count, 1, *shape, generator=torch.Generator().manual_seed(seed))
    return nn.functional.avg_pool3d(noise, 3, stride=1, padding=1)


def moments() -> PatchMoments:
    return PatchMoments.of(volumes(0, count=4))


def disturbed_vae() -> PatchVAE:
    """A small VAE with nothing at zero; the same each time."""
    vae = PatchVAE(SMALL)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in vae.parameters():
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return vae


def both() -> list[Tokenizer]:
    return [pca_tokenizer(moments(), 3), vae_tokenizer(disturbed_vae(), SMALL, latent_scale=0.7)]


@pytest.mark.parametrize("index", [0, 1])
def test_latents_are_a_quarter_per_axis_and_decode_to_the_volumes_size(index: int) -> None:
    tokenizer = both()[index]
    latents = tokenizer.encode(volumes(2))
    assert latents.shape == (2, 3, 4, 5, 3)
    assert tokenizer.latent_channels == 3
    assert tokenizer.decode(latents).shape == (2, 1, 16, 20, 12)


@pytest.mark.parametrize("index", [0, 1])
def test_encoding_is_no_random_draw_and_keeps_no_gradient(index: int) -> None:
    tokenizer = both()[index]
    before = torch.random.get_rng_state()
    first = tokenizer.encode(volumes(2).requires_grad_())
    assert torch.equal(tokenizer.encode(volumes(2)), first)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert not first.requires_grad


def test_a_tokenizer_inside_a_network_that_trains_stays_frozen() -> None:
    whole = nn.ModuleDict({"tokenizer": both()[1], "head": nn.Linear(3, 3)})
    whole.train()
    assert whole["head"].training
    assert not any(module.training for module in whole["tokenizer"].modules())
    assert not any(parameter.requires_grad for parameter in whole["tokenizer"].parameters())


def test_before_training_the_small_vae_is_the_pca_decoded_by_the_best_linear_map_of_27_latents() -> None:
    vae, x = PatchVAE(SMALL), volumes(0, count=4)
    vae.start_encoder_from(principal_components(moments(), 3))
    linear = pca_tokenizer(moments(), 3)
    untrained = vae_tokenizer(vae, SMALL, latent_scale=1.0)
    latents = linear.encode(x)
    torch.testing.assert_close(untrained.encode(x), latents, rtol=1e-4, atol=1e-5)
    around = NeighbourMoments.of(latents, to_patches(x))
    vae.start_decoder_from(around)
    kernel, bias = best_decoder(around, POSTERIOR_DEVIATION)
    decoded = from_patches(nn.functional.conv3d(latents, kernel.float(), bias.float(), padding=1))
    torch.testing.assert_close(untrained.decode(latents), decoded, rtol=1e-4, atol=1e-5)
    alone, together = ((d - x).square().mean() for d in (linear.decode(latents), decoded))
    assert together < 0.95 * alone


def test_latents_of_the_pca_have_unit_root_mean_square_over_its_own_patches() -> None:
    latents = pca_tokenizer(moments(), 3).encode(volumes(0, count=4))
    centred = latents - latents.mean(dim=(0, 2, 3, 4), keepdim=True)
    assert float(centred.square().mean()) == pytest.approx(1.0, abs=1e-3)


def test_the_latent_scale_multiplies_latents_and_cancels_in_decoding() -> None:
    plain, scaled = (vae_tokenizer(disturbed_vae(), SMALL, latent_scale=s) for s in (1.0, 0.25))
    torch.testing.assert_close(scaled.encode(volumes(2)), 0.25 * plain.encode(volumes(2)))
    torch.testing.assert_close(
        scaled.decode(scaled.encode(volumes(2))), plain.decode(plain.encode(volumes(2))), rtol=1e-4, atol=1e-5
    )


def test_sides_that_are_no_multiple_of_the_stride_are_refused() -> None:
    with pytest.raises(ValueError, match=r"multiples of 4; got \(16, 18, 12\)"):
        both()[1].encode(volumes(2, (16, 18, 12)))


@pytest.mark.parametrize("window", [(8, 8, 8), (12, 16, 12), (8, 40, 12)])
def test_a_sliding_window_gives_the_linear_tokenizers_latents_exactly(window: tuple[int, int, int]) -> None:
    whole = pca_tokenizer(moments(), 3)
    tiled = Tokenizer(whole.codec, whole.description["architecture"], sliding_window=window)
    x = volumes(3, (28, 20, 24), count=1)
    torch.testing.assert_close(tiled.encode(x), whole.encode(x), rtol=1e-4, atol=1e-5)
    latents = whole.encode(x)
    torch.testing.assert_close(tiled.decode(latents), whole.decode(latents), rtol=1e-4, atol=1e-5)


def test_a_window_larger_than_the_volume_changes_nothing_for_the_vae() -> None:
    whole = both()[1]
    tiled = vae_tokenizer(disturbed_vae(), SMALL, latent_scale=0.7)
    tiled.sliding_window = (32, 32, 32)
    assert torch.equal(tiled.encode(volumes(2)), whole.encode(volumes(2)))


def test_a_window_that_cannot_be_aligned_is_refused() -> None:
    with pytest.raises(ValueError, match="sliding_window sides"):
        Tokenizer(both()[0].codec, {"kind": "patch_pca", "channels": 3}, sliding_window=(10, 8, 8))


def test_what_a_voxel_becomes_does_not_depend_on_what_is_far_from_it() -> None:
    tokenizer = both()[1]  # no normalisation layer: one patch and two more on each side are all it sees
    x = volumes(4, (48, 8, 8), count=1)
    changed = x.clone()
    changed[:, :, 24:] = 0.0
    torch.testing.assert_close(tokenizer.encode(x)[:, :, :4], tokenizer.encode(changed)[:, :, :4])


@pytest.mark.parametrize("index", [0, 1])
def test_saved_and_loaded_it_has_the_same_hash_and_latents(tmp_path: Path, index: int) -> None:
    tokenizer = both()[index]
    save_tokenizer(tmp_path / "t.safetensors", tokenizer, {"seed": "0"})
    loaded = load_tokenizer(TokenizerSpec(kind="file", path=str(tmp_path / "t.safetensors"), channels=3))
    assert loaded.sha256 == tokenizer.sha256
    assert loaded.name == tokenizer.name
    assert torch.equal(loaded.encode(volumes(2)), tokenizer.encode(volumes(2)))
    assert {t.dtype for t in loaded.state_dict().values()} == {torch.float32}


def test_half_precision_on_disk_is_refused_unless_it_is_exact(tmp_path: Path) -> None:
    vae = disturbed_vae()
    path = tmp_path / "t.safetensors"
    with pytest.raises(ValueError, match="holds exactly"):
        save_tokenizer(path, vae_tokenizer(vae, SMALL, 1.0), {}, dtype=torch.float16)
    rounded = vae_tokenizer(vae.half().float(), SMALL, 1.0)
    save_tokenizer(path, rounded, {}, dtype=torch.float16)
    loaded = load_tokenizer(TokenizerSpec(kind="file", path=str(path), channels=3))
    assert loaded.sha256 == rounded.sha256


def test_the_hash_sees_weights_scale_and_window_but_not_the_place_of_the_file(tmp_path: Path) -> None:
    base = vae_tokenizer(disturbed_vae(), SMALL, latent_scale=0.7)
    other_weights = disturbed_vae()
    with torch.no_grad():
        other_weights.correction.weight[0, 0] += 1e-4
    hashes = {base.sha256, vae_tokenizer(other_weights, SMALL, 0.7).sha256}
    hashes.add(vae_tokenizer(disturbed_vae(), SMALL, 0.8).sha256)
    for name in ("a.safetensors", "b.safetensors"):
        save_tokenizer(tmp_path / name, base, {"note": name})
        spec = TokenizerSpec(kind="file", path=str(tmp_path / name), channels=3)
        assert load_tokenizer(spec).sha256 == base.sha256
    windowed = TokenizerSpec(kind="file", path=str(tmp_path / name), channels=3, sliding_window=(8, 8, 8))
    hashes.add(load_tokenizer(windowed).sha256)
    assert len(hashes) == 4


def test_another_width_than_asked_for_is_refused(tmp_path: Path) -> None:
    save_tokenizer(tmp_path / "t.safetensors", both()[0], {})
    with pytest.raises(ValueError, match="Expected 4 latent channels"):
        load_tokenizer(TokenizerSpec(kind="file", path=str(tmp_path / "t.safetensors"), channels=4))


def test_weights_that_do_not_fit_their_own_description_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    save_tokenizer(path, both()[1], {})
    tensors, provenance = load_weights(path)
    spec = TokenizerSpec(kind="file", path=str(path), channels=3)
    save_weights(path, {k: v for k, v in tensors.items() if k != "expand.bias"}, provenance)
    with pytest.raises(ValueError, match=r"expand\.bias") as refusal:
        load_tokenizer(spec)
    assert "\n" not in str(refusal.value)
    save_weights(path, tensors, {})
    with pytest.raises(ValueError, match="header says nothing"):
        load_tokenizer(spec)


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"kind": "file"}, "Expected the path"),
        ({"kind": "maisi"}, "Expected the path"),
        ({"kind": "file", "path": "nowhere.safetensors"}, "there is none"),
        ({"kind": "shipped", "channels": 5}, "tokenizer_8ch.safetensors"),
    ],
)
def test_a_spec_that_names_no_weights_says_what_there_is(settings: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        load_tokenizer(TokenizerSpec(**settings))


def test_a_tokenizer_is_saved_only_under_the_name_of_its_format(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"ends in \.safetensors"):
        save_tokenizer(tmp_path / "t.pt", both()[0], {})


@pytest.mark.parametrize("channels", SHIPPED)
def test_the_shipped_tokenizers_are_small_say_where_they_come_from_and_beat_pca(channels: int) -> None:
    path = Path(__file__).parents[3] / "meduet_models" / "tokenizer" / f"tokenizer_{channels}ch.safetensors"
    assert path.stat().st_size < 2_000_000
    _, provenance = load_weights(path)
    assert {"command", "settings", "data", "torch"} <= provenance.keys()
    tokenizer = load_tokenizer(TokenizerSpec(channels=channels))
    smooth = volumes(5, (24, 24, 24), count=4)
    smooth = nn.functional.avg_pool3d(smooth, 3, stride=1, padding=1)
    smooth = ((smooth - 0.3) / 0.4).clamp(0.0, 1.0)
    error = (tokenizer.decode(tokenizer.encode(smooth)) - smooth).square().mean()
    linear = pca_tokenizer(PatchMoments.of(smooth), channels)  # fitted to these very volumes
    assert error < (linear.decode(linear.encode(smooth)) - smooth).square().mean()


def test_the_default_tokenizer_loads_and_encodes_in_well_under_a_second() -> None:
    begin = time.process_time()
    load_tokenizer(TokenizerSpec()).encode(volumes(6, (40, 48, 40), count=1))
    assert time.process_time() - begin < 1.0
