"""One file holds a generative model; whatever is not exactly that is refused in one line."""

from pathlib import Path

import pytest
import torch

from meduet_models.diffusion.artefact import GenerativeModel, load_generative_model, save_generative_model
from meduet_models.diffusion.conditions import Conditions
from meduet_models.style.bank import StyleBank
from meduet_models.style.moments import StyleLayout, StyleMoments
from meduet_models.weights import load_weights, save_weights, sha256_of_tensors
from tests.meduet_models.diffusion.small_models import (
    NETWORK,
    awake_transformer,
    small_config,
    small_encoder,
    small_latents,
)


def model(policy: str = "raw") -> GenerativeModel:
    layout = StyleLayout(channels=2, latent_grid=(4, 6, 4), map_grid=NETWORK.style_map_grid, bound=10.0)
    moments = {s: StyleMoments.of(small_latents(3, seed), list("xyz"), layout) for seed, s in enumerate("ab")}
    return GenerativeModel(
        transformer=awake_transformer(),
        encoder=small_encoder(),
        bank=StyleBank.of(("a", "b", "c"), moments),
        sites=("a", "b", "c"),
        directions={"age": torch.linspace(0, 1, 24).expand(12, 24)},
        tokenizer_sha256="0" * 64,
        volumes={"registered": True, "shape": [16, 24, 16]},
        body_parts=("head",),
        categories=("ill", "well"),
        policy=policy,
        patient_data=policy == "raw",
        provenance={"plan": "1" * 64},
    )


@pytest.fixture
def path(tmp_path: Path) -> Path:
    save_generative_model(tmp_path / "generative.safetensors", model())
    return tmp_path / "generative.safetensors"


def rewritten(
    path: Path, change: dict[str, torch.Tensor | None], header: dict[str, str] | None = None
) -> None:
    tensors, provenance = load_weights(path)
    for name, tensor in change.items():
        tensors.pop(name, None)
        if tensor is not None:
            tensors[name] = tensor
    hashed = {"sha256": sha256_of_tensors(tensors)}
    save_weights(path, tensors, provenance | hashed | (header or {}))


def test_a_model_comes_back_whole(path: Path) -> None:
    before, after = model(), load_generative_model(path)
    noisy, time = small_latents(2), torch.tensor([0.2, 0.7])
    for latents in (small_latents(2, 5),):
        assert torch.equal(before.conditioner.content(latents), after.conditioner.content(latents))
        style = before.conditioner.style(latents)
        assert torch.equal(style, after.conditioner.style(latents))
        assert torch.equal(
            before.transformer(noisy, time, Conditions(style=style)),
            after.transformer(noisy, time, Conditions(style=style)),
        )
    assert torch.equal(before.transformer.standardise(noisy), after.transformer.standardise(noisy))
    assert after.bank is not None and after.bank.present == ("a", "b")
    for name in ("sites", "tokenizer_sha256", "volumes", "body_parts", "categories", "policy", "provenance"):
        assert getattr(after, name) == getattr(before, name)
    assert torch.equal(after.directions["age"], before.directions["age"])
    assert not after.transformer.training
    assert not any(p.requires_grad for p in [*after.transformer.parameters(), *after.encoder.parameters()])


def test_a_model_that_saw_raw_latents_says_so(path: Path) -> None:
    assert load_generative_model(path).patient_data
    assert not model("federated").patient_data


def test_a_model_without_styles_comes_back_without(tmp_path: Path) -> None:
    bare = GenerativeModel(**{**model().__dict__, "bank": None})
    save_generative_model(tmp_path / "bare.safetensors", bare)
    assert load_generative_model(tmp_path / "bare.safetensors").bank is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"transformer/predict.bias": None}, r"'predict\.bias' of \(16,\).*got none"),
        ({"encoder/embed.weight": None}, r"the encoder.*'embed\.weight'"),
        ({"transformer/more": torch.zeros(1)}, "'more' of none"),
        ({"transformer/predict.bias": torch.zeros(3)}, r"of \(16,\), as its header says; got \(3,\)"),
        ({"decoder/x": torch.zeros(1)}, "got 'decoder/x'"),
        ({"bank/count": None}, "style bank with 'count'"),
    ],
)
def test_tensors_of_another_architecture_are_refused(
    path: Path, change: dict[str, torch.Tensor | None], message: str
) -> None:
    rewritten(path, change)
    with pytest.raises(ValueError, match=message):
        load_generative_model(path)


def test_a_file_whose_header_describes_another_network_is_refused(path: Path) -> None:
    rewritten(path, {}, {"transformer": small_config(("style",)).to_json()})
    with pytest.raises(ValueError, match="another architecture"):
        load_generative_model(path)
    rewritten(path, {}, {"transformer": "{}"})
    with pytest.raises(ValueError, match="of this version"):
        load_generative_model(path)


def test_another_kind_of_file_is_refused(tmp_path: Path) -> None:
    save_weights(tmp_path / "other.safetensors", {"x": torch.zeros(1)}, {"network": "{}"})
    with pytest.raises(ValueError, match="its header says 'nothing of the kind'"):
        load_generative_model(tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="there is none"):
        load_generative_model(tmp_path / "absent.safetensors")


def test_damage_is_noticed(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-100] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match="its tensors have changed"):
        load_generative_model(path)
    path.write_bytes(content[:-1000])
    with pytest.raises(ValueError, match="whole safetensors file"):
        load_generative_model(path)
