import dataclasses

import pytest
import torch

from meduet_models.meduet import MeDUET
from meduet_models.sharing import (
    constant_keys,
    content_keys,
    home_keys,
    output_keys,
    shared_keys,
    site_keys,
    style_keys,
)
from tests.worlds import small_network

TINY = small_network(latent_grid=(4, 4, 4), style_map_grid=(1, 2, 1))
METHODS = ("content_share", "fedavg", "fedprox", "fedbn", "alone", "pooled")


@pytest.mark.parametrize("paths", ["split", "joint"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("style_head", ["local", "shared"])
def test_every_tensor_is_shared_or_at_home_and_none_is_both(paths: str, method: str, style_head: str) -> None:
    model = MeDUET(dataclasses.replace(TINY, factor_paths=paths), 3)
    shared, home = shared_keys(model, style_head, method), home_keys(model, style_head, method)
    assert sorted(shared + home) == sorted(model.state_dict())


@pytest.mark.parametrize("paths", ["split", "joint"])
def test_the_declared_parts_are_complete_and_disjoint(paths: str) -> None:
    model = MeDUET(dataclasses.replace(TINY, factor_paths=paths), 3)
    parts = [content_keys(model), style_keys(model), site_keys(model), constant_keys(model)]
    assert all(parts)
    assert sorted(name for part in parts for name in part) == sorted(model.state_dict())


def test_content_share_keeps_site_classifiers_home_and_the_style_branch_as_asked() -> None:
    model = MeDUET(TINY, 3)
    local, shared = (set(shared_keys(model, head, "content_share")) for head in ("local", "shared"))
    assert local == {*content_keys(model), *constant_keys(model)}
    assert shared - local == set(style_keys(model))
    assert not shared & set(site_keys(model))


@pytest.mark.parametrize("paths", ["split", "joint"])
@torch.no_grad()
def test_another_output_layer_reads_the_same_content_and_style_and_rebuilds_another_scan(paths: str) -> None:
    model = MeDUET(dataclasses.replace(TINY, factor_paths=paths), 3).eval()
    latents = torch.randn(2, TINY.latent_channels, *TINY.latent_grid)
    seen = torch.ones(2, TINY.num_tokens, dtype=torch.bool)
    before = model.encode(latents)
    rebuilt = model.predict_tokens(before, seen)
    for name in output_keys(model):
        model.get_parameter(name).add_(1.0)
    after = model.encode(latents)
    assert torch.equal(after.content, before.content) and torch.equal(after.style, before.style)
    assert not torch.allclose(model.predict_tokens(after, seen), rebuilt)


def test_baselines_share_everything_or_nothing() -> None:
    model = MeDUET(TINY, 3)
    for method in ("fedavg", "fedprox", "pooled"):
        assert shared_keys(model, "shared", method) == tuple(model.state_dict())
    assert shared_keys(model, "local", "alone") == ()


def test_fedbn_keeps_norm_layers_home_and_nothing_else() -> None:
    model = MeDUET(TINY, 3)
    home = home_keys(model, "shared", "fedbn")
    assert {name.rsplit(".", 1)[1] for name in home} == {"weight", "bias"}
    norms = [n for n, m in model.named_modules() if isinstance(m, torch.nn.LayerNorm)]
    assert sorted({name.rsplit(".", 1)[0] for name in home}) == sorted(norms)
    assert "encoder.norm" in norms and "decoder.blocks.0.norm1" in norms


def test_constants_take_no_gradient() -> None:
    model = MeDUET(TINY, 3)
    assert not set(constant_keys(model)) & set(dict(model.named_parameters()))


def test_unknown_words_and_undeclared_tensors_are_refused() -> None:
    model = MeDUET(TINY, 3)
    with pytest.raises(ValueError, match="style_head to be local or shared; got 'public'"):
        shared_keys(model, "public", "fedavg")
    with pytest.raises(ValueError, match="got 'gossip'"):
        shared_keys(model, "local", "gossip")
    model.extra = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"'extra\.weight' does not"):
        shared_keys(model, "local", "content_share")
