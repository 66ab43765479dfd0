"""Training the small tokenizer on phantoms, measuring it, and the commands that do so."""

import dataclasses
import re
import subprocess
import sys
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch

from meduet_models.tokenizer.patch_pca import PatchMoments
from meduet_models.tokenizer.tokenizer import TokenizerSpec, load_tokenizer, pca_tokenizer
from meduet_models.weights import load_weights
from server import cli
from server.tokenizer.quality import list_scans, measure, read_volumes
from server.tokenizer.random_phantoms import draw_recipe, make_phantom
from server.tokenizer.training import (
    TokenizerTraining,
    draw_recipes,
    held_out_phantoms,
    linear_tokenizers,
    train_tokenizer,
    training_phantoms,
)

TINY = TokenizerTraining(channels=4, steps=6, num_phantoms=6, batch_size=4, warmup_steps=2)


class StoppedError(Exception):
    """Stands for the power cut."""


def ignore(step: int, psnr_db: float) -> None:
    """Watch a run without a word."""


def write_nifti(path: Path, values: np.ndarray) -> None:
    nibabel.save(nibabel.Nifti1Image(values.astype(np.float32), np.eye(4)), path)


def test_a_recipe_makes_the_same_phantom_each_time_and_another_seed_makes_another() -> None:
    recipe = draw_recipe(torch.Generator().manual_seed(3))
    first = make_phantom(recipe, (16, 20, 12))
    assert torch.equal(make_phantom(recipe, (16, 20, 12)), first)
    changed = dataclasses.replace(recipe, seed=recipe.seed + 1)
    assert not torch.equal(make_phantom(changed, (16, 20, 12)), first)


def test_every_phantom_is_finite_in_range_and_not_empty() -> None:
    for recipe in draw_recipes(7, "test", 40):
        phantom = make_phantom(recipe, (20, 20, 20))
        assert phantom.shape == (1, 20, 20, 20)
        assert torch.isfinite(phantom).all()
        assert 0.0 <= float(phantom.min()) < float(phantom.max()) <= 1.0


def test_held_out_phantoms_are_never_training_phantoms() -> None:
    training = {recipe.seed for recipe in draw_recipes(0, "training", 500)}
    held_out = {recipe.seed for recipe in draw_recipes(0, "held out", 500)}
    assert len(training) == len(held_out) == 500
    assert not training & held_out


def test_a_run_that_was_stopped_and_resumed_ends_with_the_same_weights(tmp_path: Path) -> None:
    def stop(step: int, psnr_db: float) -> None:
        if step == 5:
            raise StoppedError

    straight = train_tokenizer(TINY, tmp_path / "straight.safetensors", ignore)
    out = tmp_path / "resumed.safetensors"
    with pytest.raises(StoppedError):
        train_tokenizer(TINY, out, stop, checkpoint_every=3)
    assert not out.exists()
    steps: list[int] = []
    resumed = train_tokenizer(TINY, out, lambda step, psnr_db: steps.append(step), checkpoint_every=3)
    assert steps == [4, 5, 6]
    assert resumed.sha256 == straight.sha256
    assert out.read_bytes() == (tmp_path / "straight.safetensors").read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["resumed.safetensors", "straight.safetensors"]


def test_a_checkpoint_of_other_settings_is_refused(tmp_path: Path) -> None:
    def stop(step: int, psnr_db: float) -> None:
        if step == 4:
            raise StoppedError

    out = tmp_path / "t.safetensors"
    with pytest.raises(StoppedError):
        train_tokenizer(TINY, out, stop, checkpoint_every=3)
    with pytest.raises(ValueError, match="of a run with these settings"):
        train_tokenizer(dataclasses.replace(TINY, seed=1), out, ignore)


def test_the_written_file_is_the_returned_tokenizer_and_says_how_it_was_made(tmp_path: Path) -> None:
    tokenizer = train_tokenizer(TINY, tmp_path / "t.safetensors", ignore)
    loaded = load_tokenizer(TokenizerSpec(kind="file", path=str(tmp_path / "t.safetensors"), channels=4))
    assert loaded.sha256 == tokenizer.sha256
    tensors, provenance = load_weights(tmp_path / "t.safetensors")
    assert {t.dtype for t in tensors.values()} == {torch.float16}
    assert '"steps": 6' in provenance["settings"]
    assert "no scan of a patient" in provenance["data"]


def test_training_does_not_touch_the_global_random_numbers(tmp_path: Path) -> None:
    before = torch.random.get_rng_state()
    train_tokenizer(dataclasses.replace(TINY, steps=1), tmp_path / "t.safetensors", ignore)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_training_improves_on_the_linear_tokenizers_it_starts_from(tmp_path: Path) -> None:
    settings = dataclasses.replace(
        TINY, channels=8, steps=100, num_phantoms=50, warmup_steps=20, learning_rate=1e-3
    )
    trained = train_tokenizer(settings, tmp_path / "t.safetensors", ignore)
    volumes = held_out_phantoms(1, 8, (24, 24, 24))
    pca, linear = linear_tokenizers(8, training_phantoms(settings))
    alone, around, end = (measure(tokenizer, volumes).psnr_db for tokenizer in (pca, linear, trained))
    assert around > alone + 0.3
    assert end > around + 0.05


@pytest.mark.parametrize(
    "settings", [{"channels": 0}, {"channels": 33}, {"steps": 0}, {"num_phantoms": 0}, {"batch_size": 0}]
)
def test_settings_that_cannot_train_are_refused(settings: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=next(iter(settings))):
        TokenizerTraining(**settings)


def test_quality_is_perfect_only_for_what_comes_back_unchanged() -> None:
    flat = [torch.full((1, 16, 16, 16), level) for level in (0.2, 0.7)]
    linear = pca_tokenizer(PatchMoments.of(torch.rand(4, 1, 16, 16, 16)), 64)
    perfect = measure(linear, flat)
    assert perfect.psnr_db > 80
    assert perfect.ssim == pytest.approx(1.0, abs=1e-4)
    noisy = [torch.rand(1, 16, 16, 16)]
    worse = measure(pca_tokenizer(PatchMoments.of(torch.rand(4, 1, 16, 16, 16)), 4), noisy)
    decoded_variance = 10 ** (-worse.psnr_db / 10)
    assert decoded_variance == pytest.approx(1 / 12, rel=0.15)  # of uniform noise, of which 60/64 are lost
    assert worse.num_volumes == 1
    with pytest.raises(ValueError, match="at least one volume"):
        measure(linear, [])


def test_scans_are_read_windowed_and_cut_to_what_the_tokenizer_takes(tmp_path: Path) -> None:
    write_nifti(tmp_path / "a.nii.gz", np.arange(21 * 17 * 6).reshape(21, 17, 6))
    (volume,) = read_volumes(list_scans(tmp_path, "*.nii.gz"), None)
    assert volume.shape == (1, 20, 16, 12)  # the short side is padded to hold the similarity's window
    assert float(volume.min()) == 0.0
    assert float(volume.max()) <= 1.0
    (volume,) = read_volumes(list_scans(tmp_path, "*.nii.gz"), (24, 12, 12))
    assert volume.shape == (1, 24, 12, 12)


@pytest.mark.parametrize(
    "values", [np.zeros((8, 8, 8)), np.full((8, 8, 8), np.nan), np.zeros((8, 8, 8, 2)) + np.arange(2)]
)
def test_a_file_that_cannot_be_measured_is_named(tmp_path: Path, values: np.ndarray) -> None:
    write_nifti(tmp_path / "odd.nii.gz", values)
    with pytest.raises(ValueError, match=r"odd\.nii\.gz"):
        list(read_volumes([tmp_path / "odd.nii.gz"], None))


def test_a_damaged_or_absent_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "broken.nii.gz").write_bytes(b"not an image")
    with pytest.raises(ValueError, match=r"broken\.nii\.gz"):
        list(read_volumes([tmp_path / "broken.nii.gz"], None))
    with pytest.raises(ValueError, match="found none"):
        list_scans(tmp_path, "*.img")
    with pytest.raises(ValueError, match="there is none"):
        list_scans(tmp_path / "missing", "*")


def test_the_commands_train_inspect_and_evaluate_one_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "t.safetensors")
    threads = str(torch.get_num_threads())
    small = ["--steps", "2", "--phantoms", "4", "--channels", "5", "--threads", threads]
    assert cli.main(["tokenizer", "train", *small, "--out", out]) == 0
    sha256 = load_tokenizer(TokenizerSpec(kind="file", path=out, channels=5)).sha256
    assert sha256 in capsys.readouterr().out
    assert cli.main(["tokenizer", "inspect", out]) == 0
    assert sha256 in capsys.readouterr().out
    write_nifti(tmp_path / "a.nii.gz", np.arange(20 * 16 * 12).reshape(20, 16, 12))
    assert cli.main(["tokenizer", "evaluate", "--weights", out, "--data", str(tmp_path)]) == 0
    assert re.search(r"patch_vae-5ch.* 1 .*\d\d\.\d\d", capsys.readouterr().out)
    evaluate = ["tokenizer", "evaluate", "--weights", out, "--phantoms", "2", "--shape", "12", "12", "12"]
    assert cli.main([*evaluate, "--baselines", "4"]) == 0
    said = capsys.readouterr().out
    assert "held-out phantoms" in said and "floor dB" in said
    assert re.search(r"patch_vae-5ch", said) and "PCA-5ch " in said and "PCA-5ch, 27 latents" in said


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["inspect", "nowhere.safetensors"], "there is none"),
        (["train", "--steps", "1", "--out", "weights.pt"], "ends in .safetensors"),
        (["train", "--steps", "0", "--out", "a.safetensors"], "steps of at least 1"),
        (["evaluate", "--data", "nowhere"], "a folder of NIfTI files at nowhere"),
        (["evaluate", "--channels", "5", "--phantoms", "1"], "tokenizer_8ch.safetensors"),
        (["evaluate", "--maisi", "nowhere.pt", "--phantoms", "1"], "MAISI checkpoint at nowhere.pt"),
    ],
)
def test_a_command_that_cannot_run_says_why_in_one_line(
    arguments: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["tokenizer", *arguments]) == 2
    said = capsys.readouterr().err
    assert complaint in said
    assert said.count("\n") == 1


@pytest.mark.parametrize("command", ["", "tokenizer", "tokenizer train", "tokenizer evaluate"])
def test_help_is_there_for_every_command(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        cli.main([*command.split(), "--help"])
    assert f"usage: meduet-server {command}".strip() in capsys.readouterr().out


def test_help_does_not_wait_for_monai_or_nilearn() -> None:
    code = (
        "import sys, server.cli\n"
        "try:\n    server.cli.main(['--help'])\n"
        "except SystemExit:\n    assert 'server.commands.tokenizer' in sys.modules\n"
        "sys.exit(bool({'monai', 'nilearn'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("channels", [4, 8])
def test_the_shipped_ones_keep_more_of_real_scans_than_their_own_components(
    data_root: Path, channels: int
) -> None:
    paths = list_scans(data_root / "msd_hippocampus" / "images", "*.nii.gz")[:12]
    volumes = list(read_volumes(paths, (32, 48, 32)))
    linear = pca_tokenizer(PatchMoments.of(torch.stack(volumes)), channels)  # fitted to these very scans
    assert (
        measure(load_tokenizer(TokenizerSpec(channels=channels)), volumes).psnr_db
        > measure(linear, volumes).psnr_db
    )
