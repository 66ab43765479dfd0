import dataclasses

import pytest
import torch

from meduet_models.factors import Factors
from meduet_models.meduet import MeDUET, NetworkConfig, layer_normed
from tests.worlds import small_network

TINY = small_network(width=24, style_map_grid=(1, 3, 1))
PAPER = NetworkConfig(
    latent_channels=4,
    latent_grid=(24, 24, 24),
    patch_size=4,
    width=768,
    depth=12,
    heads=12,
    decoder_width=384,
    decoder_depth=8,
    decoder_heads=12,
    factor_paths="joint",
)
PATHS = pytest.mark.parametrize("paths", ["split", "joint"])


def network(paths: str, seed: int = 0, **changes: str) -> MeDUET:
    return MeDUET(dataclasses.replace(TINY, factor_paths=paths, **changes), 3, seed=seed)


def scans(count: int = 3, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, 2, 4, 6, 4, generator=torch.Generator().manual_seed(seed))


@PATHS
def test_latents_become_factors_and_latents_again(paths: str) -> None:
    net, latents = network(paths), scans()

    factors = net.encode(latents)

    assert factors.content.shape == (3, 12, 24)
    assert factors.style.shape == (3, 12, 6)
    assert net.decode(factors).shape == latents.shape
    assert net.pooled_content(latents).shape == (3, 24)
    assert net.pooled_style(latents).shape == (3, 6)


def test_split_content_forgets_channel_scale_and_shift_and_split_style_does_not() -> None:
    net, latents = network("split"), scans()
    net.set_latent_scale(scans(1, seed=5)[0], torch.tensor([0.7, 1.4]))
    restyled = latents * torch.tensor([1.5, 0.6]).reshape(2, 1, 1, 1) + torch.tensor([0.4, -1.0]).reshape(
        2, 1, 1, 1
    )

    before, after = net.encode(latents), net.encode(restyled)

    torch.testing.assert_close(after.content, before.content, rtol=1e-3, atol=1e-3)
    assert (after.style - before.style).abs().max() > 0.1


def test_split_style_reads_statistics_alone() -> None:
    net, latents = network("split"), scans()
    order = torch.randperm(32, generator=torch.Generator().manual_seed(0))
    cells = (
        latents.reshape(3, 2, 4, 3, 2, 4).transpose(2, 3).reshape(3, 2, 3, 32)
    )  # by cell of the coarse map
    shuffled = cells[..., order].reshape(3, 2, 3, 4, 2, 4).transpose(2, 3).reshape(latents.shape)

    torch.testing.assert_close(net.encode(shuffled).style, net.encode(latents).style, rtol=1e-4, atol=1e-4)
    assert (net.encode(shuffled).content - net.encode(latents).content).abs().max() > 0.1
    assert torch.equal(
        net.style_of_statistics(net.style_meter(latents)), net.encode(latents).style
    )  # so a bank entry becomes style tokens by the same head


def test_the_decoder_predicts_in_units_of_the_federated_centre_and_scale() -> None:
    net, latents = network("joint"), scans()
    centre, scale = scans(1, seed=7)[0], torch.tensor([0.5, 3.0])
    net.set_latent_scale(centre, scale)

    torch.testing.assert_close(net.standardise(latents), (latents - centre) / scale.reshape(2, 1, 1, 1))
    torch.testing.assert_close(net.tokens_to_latents(net.target_tokens(latents)), latents)
    with pytest.raises(ValueError, match="positive latent deviations"):
        net.set_latent_scale(centre, torch.tensor([1.0, 0.0]))


def test_erasure_is_the_identity_until_fitted_and_then_the_last_layer_of_content() -> None:
    net, latents = network("split"), scans()
    plain, style = net.pooled_content(latents), net.pooled_style(latents)
    torch.testing.assert_close(plain, layer_normed(net.encode(latents).content).mean(1))
    mean, matrix = torch.randn(24), torch.randn(24, 24)

    net.set_erasure(mean, matrix)

    torch.testing.assert_close(
        net.pooled_content(latents), mean + (plain - mean) @ matrix.T, rtol=1e-4, atol=1e-4
    )
    assert torch.equal(net.pooled_style(latents), style)
    reloaded = network("split", seed=3)
    reloaded.load_state_dict(net.state_dict())
    assert torch.equal(reloaded.pooled_content(latents), net.pooled_content(latents))


@PATHS
def test_blocks_that_start_as_the_identity_add_nothing_and_the_centre_is_predicted(paths: str) -> None:
    net, latents = network(paths, blocks_start="identity"), scans()
    net.set_latent_scale(scans(1, seed=5)[0], torch.tensor([0.7, 1.4]))
    tokens = net.embed_latents(latents)
    assert torch.equal(net.encoder(tokens), net.encoder.norm(tokens + net.encoder.positions))
    torch.testing.assert_close(net.decode(net.encode(latents)), net.latent_mean.expand_as(latents))
    other = network(paths).state_dict()
    changed = {name for name, t in net.state_dict().items() if not torch.equal(t, other[name])}
    assert {n.rsplit(".", 2)[-2] for n in changed if not n.startswith("latent_")} == {
        "proj",
        "contract",
        "predict",
    }


def test_weights_follow_the_seed_and_no_global_generator() -> None:
    torch.manual_seed(1)
    first = network("split", seed=4).state_dict()
    torch.manual_seed(2)
    again, other = network("split", seed=4).state_dict(), network("split", seed=5).state_dict()

    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_nothing_in_the_network_takes_a_site() -> None:
    net, latents = network("joint"), scans()
    with torch.no_grad():
        for part in net.SITE_PARTS:
            for parameter in net.get_submodule(part).parameters():
                before = net.decode(net.encode(latents))
                parameter.add_(1.0)
                assert torch.equal(net.decode(net.encode(latents)), before)


def test_paper_sizes_are_those_published() -> None:
    with torch.device("meta"):
        net = MeDUET(PAPER, 10)
        latents = torch.zeros(2, 4, 24, 24, 24)
    factors = net.encode(latents)

    def millions(*parts: str) -> float:
        return sum(p.numel() for part in parts for p in net.get_submodule(part).parameters()) / 1e6

    assert factors.content.shape == (2, 216, 768)
    assert factors.style.shape == (2, 216, 192)
    assert net.decode(factors).shape == latents.shape
    assert millions("embed") == pytest.approx(0.197, abs=0.001)
    assert millions("encoder") == pytest.approx(85.05, abs=0.02)
    assert millions("content_head") == pytest.approx(0.590, abs=0.001)
    assert millions("style_head") == pytest.approx(0.148, abs=0.002)
    assert millions("fuse") == pytest.approx(0.738, abs=0.001)
    assert millions("decoder") == pytest.approx(14.6, abs=0.1)
    assert millions("site_from_content", "site_from_style") == pytest.approx(3.78, abs=0.01)
    assert millions("") == pytest.approx(105.15, abs=0.05)  # trainable, as published


@PATHS
def test_bf16_autocast_stays_near_float32(paths: str) -> None:
    net, latents = network(paths), scans()
    exact = net.decode(net.encode(latents))
    with torch.autocast("cpu", torch.bfloat16):
        rough = net.decode(net.encode(latents))

    assert rough.dtype == torch.float32
    assert (rough - exact).norm() < 0.05 * exact.norm()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"latent_grid": (4, 7, 4)}, "multiples of network.patch_size 2"),
        ({"width": 25}, "width to be a multiple of its 2 heads"),
        ({"decoder_heads": 5}, "decoder_width to be a multiple of its 5 heads"),
        ({"style_ratio": 0.001}, "at least one style channel"),
        ({"style_map_grid": (2, 4, 2)}, "style_map_grid between 1 and"),
    ],
)
def test_a_network_that_cannot_be_built_is_refused(change: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        dataclasses.replace(TINY, **change)


def test_a_model_of_no_site_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one site"):
        MeDUET(TINY, 0)


def test_factors_of_another_scan_can_be_fused() -> None:
    net, latents = network("split"), scans()
    factors = net.encode(latents)
    swapped = net.decode(Factors(factors.content, factors.style.flip(0)))
    assert not torch.allclose(swapped[0], net.decode(factors)[0])
    torch.testing.assert_close(swapped[1], net.decode(factors)[1])
