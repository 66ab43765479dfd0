"""An encoded scan: what is written is read, marked as patient data, and fits one tokenizer and plan only."""

import dataclasses
import stat
from pathlib import Path

import pytest
import torch

from meduet_models.encoded_scan import EncodedScan, load_encoded_scan, save_encoded_scan
from meduet_models.weights import load_weights, save_weights

VOLUMES = {"modality": "mr", "shape": (16, 24, 16), "views": 1}


def a_scan() -> EncodedScan:
    latents = torch.randn(2, 4, 6, 4, generator=torch.Generator().manual_seed(0))
    return EncodedScan(latents, "a" * 64, VOLUMES, {"source_shape": [3, 4, 5]}, (0.5, 1.0, 3.0))


def test_what_is_written_is_read_and_says_that_it_is_patient_data(tmp_path: Path) -> None:
    path = tmp_path / "scan.safetensors"
    save_encoded_scan(path, a_scan())
    back = load_encoded_scan(path)
    assert torch.equal(back.latents, a_scan().latents) and back.sha256 == a_scan().sha256
    assert back.spacing_mm == (0.5, 1.0, 3.0) and back.geometry == {"source_shape": [3, 4, 5]}
    assert "Patient data" in load_weights(path)[1]["patient_data"]
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    back.check("a" * 64, {**VOLUMES, "views": 3})  # lists for tuples, other views: the same scan


def test_another_tokenizer_or_volume_plan_is_refused_in_one_line() -> None:
    for wrong, word in (
        (("b" * 64, VOLUMES), "tokenizer"),
        (("a" * 64, VOLUMES | {"modality": "ct"}), "modality"),
    ):
        with pytest.raises(ValueError, match=word) as raised:
            a_scan().check(*wrong)
        assert "\n" not in str(raised.value) and "meduet-site encode" in str(raised.value)


def test_other_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "other.safetensors"
    save_weights(path, {"latents": torch.zeros(2, 2, 2, 2)}, {"kind": "style bank"})
    with pytest.raises(ValueError, match="another file"):
        load_encoded_scan(path)
    with pytest.raises(ValueError, match=r"\.safetensors"):
        save_encoded_scan(tmp_path / "scan.pt", a_scan())
    bad = dataclasses.replace(a_scan(), latents=torch.full((2, 4, 6, 4), torch.nan))
    save_encoded_scan(path, bad)
    with pytest.raises(ValueError, match="finite"):
        load_encoded_scan(path)
