"""MAISI checkpoints: both published layouts are read, anything else is refused."""

import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from meduet_models.tokenizer.maisi import Maisi, MaisiConfig, load_maisi
from meduet_models.tokenizer.tokenizer import TokenizerSpec, load_tokenizer

NARROW = MaisiConfig(widths=(8, 8, 16), blocks_per_level=(1, 1, 1), norm_groups=4)
# "name (shape)" of each of the published network's 130 tensors, one per line, sorted.
PUBLISHED_KEYS_SHA256 = "a2482751ff90dfac00449211795bc8ddccc29304690cf38c77a54e7ab7bc355c"


def narrow_state(seed: int = 0) -> dict[str, Tensor]:
    """Random weights of the narrow network."""
    generator = torch.Generator().manual_seed(seed)
    with torch.device("meta"):
        shapes = {name: t.shape for name, t in Maisi(NARROW).network.state_dict().items()}
    return {name: 0.1 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def random_volumes(side: int = 16) -> Tensor:
    return torch.rand(1, 1, side, side, side, generator=torch.Generator().manual_seed(1))


def test_the_network_has_the_published_keys_and_size() -> None:
    with torch.device("meta"):
        state = Maisi(MaisiConfig()).network.state_dict()
    assert len(state) == 130
    assert sum(t.numel() for t in state.values()) == 20_944_897
    listing = "\n".join(sorted(f"{name} {tuple(t.shape)}" for name, t in state.items()))
    assert hashlib.sha256(listing.encode()).hexdigest() == PUBLISHED_KEYS_SHA256


def test_both_published_layouts_and_safetensors_give_the_same_network(tmp_path: Path) -> None:
    state = narrow_state()
    torch.save(state, tmp_path / "plain.pt")
    torch.save({"epoch": 7, "unet_state_dict": state}, tmp_path / "wrapped.pt")
    save_file(state, tmp_path / "plain.safetensors")
    x = random_volumes()
    loaded = [load_maisi(tmp_path / name, NARROW) for name in ("plain.pt", "wrapped.pt", "plain.safetensors")]
    with torch.no_grad():
        latents = [maisi.posterior_mean(x) for maisi in loaded]
        volume = loaded[0].reconstruct(latents[0])
    assert latents[0].shape == (1, 4, 4, 4, 4)
    assert volume.shape == x.shape
    assert latents[0].std() > 0
    assert torch.equal(latents[0], latents[1])
    assert torch.equal(latents[0], latents[2])
    assert all(torch.equal(t, state[name]) for name, t in loaded[1].network.state_dict().items())


def test_the_latent_is_the_mean_and_not_a_draw(tmp_path: Path) -> None:
    torch.save(narrow_state(), tmp_path / "a.pt")
    maisi = load_maisi(tmp_path / "a.pt", NARROW)
    with torch.no_grad():
        first = maisi.posterior_mean(random_volumes())
        assert torch.equal(maisi.posterior_mean(random_volumes()), first)
        assert not torch.equal(maisi.network.encode_stage_2_inputs(random_volumes()), first)


def test_computing_in_slabs_gives_the_same_latents(tmp_path: Path) -> None:
    torch.save(narrow_state(), tmp_path / "a.pt")
    x = random_volumes(32)
    with torch.no_grad():
        whole = load_maisi(tmp_path / "a.pt", NARROW).posterior_mean(x)
        slabs = load_maisi(tmp_path / "a.pt", NARROW, num_splits=2).posterior_mean(x)
    torch.testing.assert_close(slabs, whole, rtol=1e-4, atol=1e-5)


def test_loading_draws_no_random_numbers(tmp_path: Path) -> None:
    torch.save(narrow_state(), tmp_path / "a.pt")
    before = torch.random.get_rng_state()
    load_maisi(tmp_path / "a.pt", NARROW)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_a_checkpoint_of_half_precision_becomes_float32(tmp_path: Path) -> None:
    torch.save({k: t.half() for k, t in narrow_state().items()}, tmp_path / "a.pt")
    maisi = load_maisi(tmp_path / "a.pt", NARROW)
    assert {t.dtype for t in maisi.network.state_dict().values()} == {torch.float32}


@pytest.mark.parametrize(
    ("spoil", "complaint"),
    [
        (lambda s: s.pop("quant_conv_mu.conv.bias"), "lacks 1 keys, first 'quant_conv_mu.conv.bias'"),
        (lambda s: s.update(stray=torch.zeros(1)), "1 keys too many, first 'stray'"),
        (
            lambda s: s.update({"quant_conv_mu.conv.bias": torch.zeros(8)}),
            r"'quant_conv_mu.conv.bias' should have shape \(4,\), got \(8,\)",
        ),
    ],
)
def test_a_missing_extra_or_misshapen_tensor_is_refused_by_name(
    tmp_path: Path, spoil: Any, complaint: str
) -> None:
    state = narrow_state()
    spoil(state)
    torch.save(state, tmp_path / "a.pt")
    with pytest.raises(ValueError, match=complaint) as refusal:
        load_maisi(tmp_path / "a.pt", NARROW)
    assert "\n" not in str(refusal.value)


def test_another_width_is_refused(tmp_path: Path) -> None:
    torch.save(narrow_state(), tmp_path / "a.pt")
    wider = MaisiConfig(widths=(16, 16, 32), blocks_per_level=(1, 1, 1), norm_groups=4)
    with pytest.raises(ValueError, match="should have shape"):
        load_maisi(tmp_path / "a.pt", wider)
    with pytest.raises(ValueError, match="lacks"):  # the tokenizer asks for the published network
        load_tokenizer(TokenizerSpec(kind="maisi", channels=4, path=str(tmp_path / "a.pt")))


@pytest.mark.parametrize("share", [0.0, 0.3, 0.999])
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_a_truncated_checkpoint_is_refused(tmp_path: Path, share: float, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    if suffix == ".pt":
        torch.save(narrow_state(), path)
    else:
        save_file(narrow_state(), path)
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(ValueError, match=r"cut short|truncated") as refusal:
        load_maisi(path, NARROW)
    assert "\n" not in str(refusal.value)


def test_a_flipped_bit_in_a_checkpoint_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    torch.save(narrow_state(), path)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match="cut short or foreign"):
        load_maisi(path, NARROW)


class Dangerous:
    """What a hostile checkpoint would hold: unpickling it runs a function."""

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return (Path.mkdir, (Path("never"),))


def test_a_checkpoint_that_would_run_code_is_refused_before_it_is_loaded(tmp_path: Path) -> None:
    torch.save({"unet_state_dict": Dangerous()}, tmp_path / "a.pt")
    with pytest.raises(ValueError, match="it asks to run"):
        load_maisi(tmp_path / "a.pt", NARROW)
    assert not Path("never").exists()


def test_a_checkpoint_that_is_no_state_dict_is_refused(tmp_path: Path) -> None:
    torch.save([torch.zeros(3)], tmp_path / "a.pt")
    with pytest.raises(ValueError, match="got neither"):
        load_maisi(tmp_path / "a.pt", NARROW)
    with pytest.raises(ValueError, match="there is none"):
        load_maisi(tmp_path / "b.pt", NARROW)


@pytest.mark.slow
def test_the_papers_setting_turns_96_cubed_into_4_by_24_cubed(tmp_path: Path) -> None:
    with torch.device("meta"):
        shapes = {name: t.shape for name, t in Maisi(MaisiConfig()).network.state_dict().items()}
    generator = torch.Generator().manual_seed(0)
    torch.save({n: 0.02 * torch.randn(s, generator=generator) for n, s in shapes.items()}, tmp_path / "a.pt")
    tokenizer = load_tokenizer(TokenizerSpec(kind="maisi", channels=4, path=str(tmp_path / "a.pt")))
    latents = tokenizer.encode(random_volumes(96))
    assert latents.shape == (1, 4, 24, 24, 24)
    assert torch.isfinite(latents).all()
