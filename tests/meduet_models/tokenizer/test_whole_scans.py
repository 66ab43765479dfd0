"""A window that slides over a whole scan: exact where the codec's reach is known, blended elsewhere."""

import itertools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from meduet_models.tokenizer import whole_scans
from meduet_models.tokenizer.maisi import load_maisi
from meduet_models.tokenizer.patch_pca import PatchMoments
from meduet_models.tokenizer.patch_vae import PatchVAE, PatchVAEConfig
from meduet_models.tokenizer.tokenizer import (
    Tokenizer,
    TokenizerSpec,
    load_tokenizer,
    pca_tokenizer,
    vae_tokenizer,
)
from meduet_models.tokenizer.whole_scans import decode_whole, encode_whole, reach_of
from meduet_models.windows import window_starts
from tests.meduet_models.tokenizer.test_maisi import NARROW, narrow_state


def volume(*sides: int) -> Tensor:
    return torch.rand(1, *sides, generator=torch.Generator().manual_seed(3))


def linear() -> Tokenizer:
    return pca_tokenizer(PatchMoments.of(volume(16, 16, 16)[None]), 3)


def awake() -> Tokenizer:
    """A small VAE none of whose convolutions is zero."""
    config = PatchVAEConfig(channels=2, encoder_width=6, encoder_blocks=1, decoder_width=6, decoder_blocks=1)
    vae, draws = PatchVAE(config), torch.Generator().manual_seed(1)
    for weight in vae.parameters():
        nn.init.normal_(weight, std=0.2, generator=draws)
    return vae_tokenizer(vae, config, 1.0)


def shipped() -> Tokenizer:
    return load_tokenizer(TokenizerSpec())


@pytest.mark.parametrize("make", [linear, awake, shipped])
def test_a_whole_scan_by_windows_is_the_whole_scan_at_once(
    make: Callable[[], Tokenizer], monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = make()
    for encoder in (True, False):
        reach = reach_of(tokenizer, encoder=encoder)
        assert reach is not None
        # Sides of 18, 17 and 7 cells: odd remainders.
        monkeypatch.setattr(whole_scans, "WINDOW", 2 * reach + 3)
        x = volume(72, 68, 28)
        if encoder:
            at_once, by_windows = tokenizer.encode(x[None])[0], encode_whole(tokenizer, x)
        else:
            latents = tokenizer.encode(x[None])[0]
            at_once, by_windows = tokenizer.decode(latents[None])[0], decode_whole(tokenizer, latents)
        torch.testing.assert_close(by_windows, at_once, rtol=0, atol=2e-6)


def test_without_a_known_reach_blending_is_not_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer, x = awake(), volume(72, 68, 28)
    at_once = tokenizer.encode(x[None])[0]
    monkeypatch.setattr(whole_scans, "reach_of", lambda tokenizer, encoder: None)
    monkeypatch.setattr(whole_scans, "WINDOW_OF_OTHERS", 7)
    error = (encode_whole(tokenizer, x) - at_once).abs()
    assert 1e-3 < float(error.max()), "what a known reach spares us"
    assert float(error.square().mean().sqrt()) < 0.05 * float(at_once.std()), "and what blending leaves"


def test_the_reach_is_how_far_a_voxel_is_felt() -> None:
    tokenizer, x = awake(), volume(60, 60, 60)
    changed = x.clone()
    changed[0, 28:32, 28:32, 28:32] = 0.0  # cell 7
    for encoder, function in ((True, tokenizer.encode), (False, tokenizer.decode)):
        one, two = (function(v[None])[0] for v in ((x, changed) if encoder else (_cells(x), _cells(changed))))
        felt = (one != two).any(dim=0).nonzero()
        cell = 1 if encoder else 4
        furthest = (felt // cell - 7).abs().max()
        assert int(furthest) == reach_of(tokenizer, encoder=encoder)


def _cells(x: Tensor) -> Tensor:
    return nn.functional.avg_pool3d(x[None], 4)[0].repeat(2, 1, 1, 1)


def test_windows_named_by_the_tokenizer_are_taken_and_too_small_ones_are_blended() -> None:
    whole = awake()
    x = volume(48, 40, 24)
    named = Tokenizer(whole.codec, whole.description["architecture"], sliding_window=(24, 24, 24))
    torch.testing.assert_close(encode_whole(named, x), whole.encode(x[None])[0], rtol=0, atol=2e-6)
    tiny = Tokenizer(whole.codec, whole.description["architecture"], sliding_window=(16, 16, 16))
    error = (encode_whole(tiny, x) - whole.encode(x[None])[0]).abs().max()  # 4 cells, 2 + 2 of them margin
    assert 1e-4 < float(error) < 1.0


def test_maisi_differs_from_the_whole_at_once_as_much_as_is_stated(tmp_path: Path) -> None:
    """Normalised over its window, it has no reach; docs/intake.md tells how much that changes."""
    torch.save(narrow_state(), tmp_path / "a.pt")
    codec = load_maisi(str(tmp_path / "a.pt"), NARROW)
    tokenizer = Tokenizer(codec, {"kind": "maisi", "channels": 4}, sliding_window=(32, 32, 32))
    assert reach_of(tokenizer, encoder=True) is None and reach_of(tokenizer, encoder=False) is None
    x = volume(48, 48, 40)
    blended = encode_whole(tokenizer, x)
    assert torch.equal(blended, tokenizer.encode(x[None])[0]), "as the tokenizer's own sliding window"
    with torch.no_grad():
        at_once = codec.posterior_mean(x[None])[0]
    error = (blended - at_once).square().mean().sqrt() / at_once.std()
    assert 0.01 < float(error) < 0.15


def test_windows_cover_a_side_whatever_it_is() -> None:
    for side in range(1, 40):
        for window in range(1, side + 1):
            for step in range(1, window + 1):
                starts = window_starts(side, window, step)
                assert starts[0] == 0 and starts[-1] + window == side
                assert all(b - a <= step for a, b in itertools.pairwise(starts))
    with pytest.raises(ValueError, match="multiples of 4"):
        encode_whole(linear(), volume(10, 8, 8))
