"""`meduet-site harmonise` and `encode`: on the scan's own grid, marked, one line per error, no server."""

import dataclasses
import io
import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from rich.console import Console

from client.cli import main
from client.products.volume_files import target_paths
from meduet_models.diffusion.artefact import save_generative_model
from meduet_models.diffusion.conditioner import entries_of_scans
from meduet_models.diffusion.harmonisation import HarmonisationSettings, harmonise, site_style
from meduet_models.diffusion.harmoniser import Harmoniser
from meduet_models.diffusion.sampling import SamplingSettings
from meduet_models.encoded_scan import load_encoded_scan
from meduet_models.style.moments import restyle
from meduet_models.tokenizer.patch_pca import PatchMoments
from meduet_models.tokenizer.tokenizer import pca_tokenizer, save_tokenizer
from scans.volumes import Geometry, intensity_range, lay_back, prepare, read_scan
from tests.generative_models import VOLUMES, models_of_whole_scans, small_model, small_tokenizer
from tests.meduet_models.diffusion.small_models import awake_transformer, small_latents

FEW = SamplingSettings(steps=3)


class Desk:
    """A folder with two scans, a model and a tokenizer."""

    def __init__(self, root: Path) -> None:
        self.root, self.tokenizer = root, small_tokenizer()
        save_tokenizer(root / "tokenizer.safetensors", self.tokenizer, {})
        self.model = small_model(self.tokenizer)
        save_generative_model(root / "model.safetensors", self.model)
        # Stored towards left, posterior, with a sheared corner and other spacings: not the model's grid.
        self.affine = np.array([[-1.5, 0.1, 0, 20], [0, -2.5, 0, 30], [0, 0, 1.0, -9], [0, 0, 0, 1]])
        for number, name in enumerate(("a", "b")):
            values = 100 + 900 * np.random.default_rng(number).random((24, 22, 40))
            nib.save(nib.Nifti1Image(values.astype(np.float32), self.affine), root / f"{name}.nii.gz")

    def run(self, *arguments: str, command: str = "harmonise") -> tuple[int, str]:
        screen = io.StringIO()
        arguments_given = [command, *(str(self.root / a[1:]) if a.startswith("@") else a for a in arguments)]
        arguments_given += (
            ["--tokenizer", str(self.root / "tokenizer.safetensors")]
            if "--tokenizer" not in arguments_given
            else []
        )
        return main(arguments_given, Console(file=screen, width=300, soft_wrap=True)), screen.getvalue()


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    return Desk(tmp_path)


def test_a_harmonised_scan_lies_on_the_scans_own_grid_and_says_what_it_is(desk: Desk) -> None:
    asked = ["--style", "south", "--steps", "3", "--seed", "5", "--guidance", "content=1.5"]
    status, said = desk.run("@a.nii.gz", "--model", "@model.safetensors", "-o", "@out.nii.gz", *asked)
    assert status == 0 and "not for diagnosis" in said
    made, scan = nib.load(desk.root / "out.nii.gz"), nib.load(desk.root / "a.nii.gz")
    assert made.shape == scan.shape and np.allclose(made.affine, scan.affine)
    assert b"not acquired" in bytes(made.header["descrip"]) and b"south" in bytes(made.header["descrip"])
    facts = json.loads((desk.root / "out.json").read_text())
    assert facts["patient_data"] is True and facts["model_policy"] == "federated"
    assert (facts["style"], facts["method"], facts["seed"], facts["steps"]) == ("south", "sample", 5, 3)
    assert facts["guidance"] == {"content": 1.5} and len(facts["model_sha256"]) == 64
    values, (low, high) = made.get_fdata(), facts["intensity_range"]
    assert low - 1e-3 <= values.min() and values.max() <= high + 1e-3
    assert 0 < facts["share_inside_crop"] < 1
    assert values[0, 0, 0] == pytest.approx(low), "outside the crop: background, not the original"
    again = desk.root / "again.nii.gz"
    desk.run("@a.nii.gz", "--model", "@model.safetensors", "-o", "@again.nii.gz", *asked)
    assert again.read_bytes() == (desk.root / "out.nii.gz").read_bytes()


def test_restyling_a_file_is_the_banks_restyling_of_its_latents(desk: Desk) -> None:
    settings = HarmonisationSettings(style="south", own_style="north", method="restyle")
    scan = read_scan(desk.root / "a.nii.gz")
    made = Harmoniser(desk.model, desk.tokenizer, settings)(scan)
    prepared = prepare(scan, VOLUMES)
    latents = desk.tokenizer.encode(prepared.volume[None])
    assert desk.model.bank is not None
    moved = desk.model.bank.restyle(latents, torch.tensor([0]), torch.tensor([1]))
    expected, _ = lay_back(desk.tokenizer.decode(moved)[0].clamp(0, 1), prepared.geometry)
    low, high = intensity_range(scan.array, VOLUMES)
    assert np.allclose(made.array, low + expected * (high - low), atol=1e-2)


def test_without_a_named_site_restyling_starts_from_the_scans_own_statistics(desk: Desk) -> None:
    latents = small_latents(2, 8)
    moved = harmonise(desk.model, latents, HarmonisationSettings(style="north", method="restyle"))
    target = site_style(desk.model, "north").each(lambda t: t.expand(2, *t.shape))
    grid = desk.model.encoder.config.style_map_grid
    assert torch.allclose(moved, restyle(latents, entries_of_scans(latents, grid), target))


def test_inversion_to_the_scans_own_style_gives_the_scan_back_and_to_another_does_not(desk: Desk) -> None:
    latents = site_like(desk)
    to = {
        site: harmonise(
            desk.model,
            latents,
            HarmonisationSettings(
                style=site, own_style="north", method="invert", sampling=SamplingSettings(steps=30)
            ),
        )
        for site in ("north", "south")
    }
    error = {site: float((x - latents).square().mean() / latents.var()) for site, x in to.items()}
    assert error["north"] < 1e-6 and error["south"] > 1e-5


def site_like(desk: Desk) -> torch.Tensor:
    return small_latents(2, 0)


def test_steps_are_counted_there_and_back(desk: Desk) -> None:
    seen: list[tuple[int, int]] = []
    settings = HarmonisationSettings(style="south", method="invert", sampling=FEW)
    harmonise(desk.model, small_latents(1), settings, on_step=lambda *x: seen.append(x))
    assert seen == [(step, 6) for step in range(1, 7)]


def test_one_unusable_scan_is_named_with_its_reason_and_the_others_go_on(desk: Desk) -> None:
    (desk.root / "torn.nii.gz").write_bytes((desk.root / "a.nii.gz").read_bytes()[:5000])
    status, said = desk.run("@a.nii.gz", "@torn.nii.gz", "@b.nii.gz", "--model", "@model.safetensors",
                            "--style", "south", "-o", "@out", "--steps", "2")  # fmt: skip
    assert status == 1 and "torn.nii.gz: truncated" in said
    assert sorted(p.name for p in (desk.root / "out").glob("*.nii.gz")) == [
        "a_as_south.nii.gz",
        "b_as_south.nii.gz",
    ]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--style", "east"], "north, south"),
        (["--style", "west"], "north, south"),
        (["--style", "south", "--own-style", "north"], "no effect with --method sample"),
        (["--style", "south", "--method", "restyle", "--steps", "5"], "--steps has no effect"),
        (["--style", "south", "--guidance", "contrast=2"], "NAME=WEIGHT"),
        (["--style", "south", "--guidance", "category=2"], "no effect"),
        (["--style", "south", "--body-part", "knee"], "(head)"),
        (["--style", "south", "--steps", "0"], "at least one"),
    ],
)
def test_a_request_that_makes_no_sense_is_refused_in_one_line(
    desk: Desk, arguments: list[str], words: str
) -> None:
    status, said = desk.run("@a.nii.gz", "--model", "@model.safetensors", "-o", "@out.nii.gz", *arguments)
    assert status == 2 and words in said and said.count("\n") == 1
    assert not (desk.root / "out.nii.gz").exists()


def test_files_that_are_missing_or_others_are_refused_in_one_line(desk: Desk) -> None:
    common = ("--style", "south", "-o", "@out.nii.gz")
    other = pca_tokenizer(PatchMoments.of(torch.rand(4, 1, 16, 16, 16)), 2)
    save_tokenizer(desk.root / "other.safetensors", other, {})
    cases = {
        "nothing is there": ("@none.nii.gz", "--model", "@model.safetensors", *common),
        "there is none": ("@a.nii.gz", "--model", "@none.safetensors", *common),
        "Expected a FedMeDUET generative model": ("@a.nii.gz", "--model", "@tokenizer.safetensors", *common),
        "model's tokenizer": (
            "@a.nii.gz", "--model", "@model.safetensors", *common, "--tokenizer", "@other.safetensors",
        ),
    }  # fmt: skip
    for words, arguments in cases.items():
        status, said = desk.run(*arguments)
        assert status == 2 and words in said and said.count("\n") == 1, said


def test_a_model_that_is_not_told_style_can_only_restyle(desk: Desk) -> None:
    model = small_model(desk.tokenizer, transformer=awake_transformer(("content",)))
    with pytest.raises(ValueError, match="told style"):
        Harmoniser(model, desk.tokenizer, HarmonisationSettings(style="south"))
    Harmoniser(model, desk.tokenizer, HarmonisationSettings(style="south", method="restyle"))
    with pytest.raises(ValueError, match="without a style bank"):
        Harmoniser(small_model(desk.tokenizer, bank=None), desk.tokenizer, HarmonisationSettings(style="a"))


def test_results_replace_neither_scans_nor_each_other(desk: Desk) -> None:
    a, b = desk.root / "a.nii.gz", desk.root / "b.nii.gz"
    with pytest.raises(ValueError, match="would be replaced"):
        target_paths([a], a, "south")
    with pytest.raises(ValueError, match="folder for 2 scans"):
        target_paths([a, b], desk.root / "out.nii.gz", "south")
    with pytest.raises(ValueError, match="different names"):
        target_paths([a, a], desk.root / "out", "south")


def test_an_encoded_scan_holds_the_latents_that_training_would_see(desk: Desk) -> None:
    def encode(scan: str, out: str) -> tuple[int, str]:
        return desk.run(scan, "--model", "@model.safetensors", "-o", out, command="encode")

    status, said = encode("@a.nii.gz", "@a.safetensors")
    assert status == 0 and "Patient data" in said
    encoded = load_encoded_scan(desk.root / "a.safetensors")
    prepared = prepare(read_scan(desk.root / "a.nii.gz"), VOLUMES)
    assert torch.equal(encoded.latents, desk.tokenizer.encode(prepared.volume[None])[0])
    assert encoded.spacing_mm == pytest.approx((1.5, np.hypot(0.1, 2.5), 1.0))
    encoded.check(desk.model.tokenizer_sha256, desk.model.volumes)
    status, said = encode("@none.nii.gz", "@x.safetensors")
    assert status == 2 and "nothing is there" in said
    status, said = encode("@model.safetensors", "@x.safetensors")
    assert status == 1 and "Not usable" in said


WHOLE = dataclasses.replace(VOLUMES, extent="scan", registered=False)


@pytest.fixture
def whole_desk(tmp_path: Path) -> Desk:
    """A desk whose model was trained on whole scans; scan `a` is larger than its grid, within air."""
    desk = Desk(tmp_path)
    desk.model = small_model(desk.tokenizer, volumes=dataclasses.asdict(WHOLE), **models_of_whole_scans())
    save_generative_model(desk.root / "model.safetensors", desk.model)
    values = np.zeros((60, 50, 90), np.float32)
    values[8:52, 6:46, 10:80] = 100 + 900 * np.random.default_rng(3).random((44, 40, 70))
    nib.save(nib.Nifti1Image(values, desk.affine), desk.root / "a.nii.gz")
    return desk


@pytest.mark.parametrize("method", ["sample", "invert", "restyle"])
def test_a_whole_scan_is_harmonised_on_the_patients_own_grid(whole_desk: Desk, method: str) -> None:
    steps = [] if method == "restyle" else ["--steps", "2"]
    asked = ["--style", "south", "--method", method, *steps, "-o", "@out.nii.gz"]
    status, said = whole_desk.run("@a.nii.gz", "--model", "@model.safetensors", *asked)
    assert status == 0, said
    made, scan = nib.load(whole_desk.root / "out.nii.gz"), nib.load(whole_desk.root / "a.nii.gz")
    assert made.shape == scan.shape and np.allclose(made.affine, scan.affine)
    facts = json.loads((whole_desk.root / "out.json").read_text())
    assert facts["share_inside_crop"] > 0.6
    inside = made.get_fdata()[10:50, 8:44, 12:78]
    assert (inside > facts["intensity_range"][0]).mean() > 0.5, "all of the patient is shown, not her centre"


def test_an_encoded_whole_scan_decodes_to_the_patients_own_grid(whole_desk: Desk) -> None:
    status, said = whole_desk.run(
        "@a.nii.gz", "--model", "@model.safetensors", "-o", "@e.safetensors", command="encode"
    )
    assert status == 0, said
    encoded = load_encoded_scan(whole_desk.root / "e.safetensors")
    encoded.check(whole_desk.tokenizer.sha256, whole_desk.model.volumes)
    geometry = Geometry.from_dict(dict(encoded.geometry))
    assert max(encoded.latents.shape[1:]) > max(WHOLE.shape) // 4
    array, affine = lay_back(whole_desk.tokenizer.decode(encoded.latents[None])[0], geometry)
    scan = read_scan(whole_desk.root / "a.nii.gz")
    assert array.shape == scan.array.shape and np.allclose(affine, scan.affine)
    assert encoded.central((4, 6, 4)).shape == (2, 4, 6, 4)
    with pytest.raises(ValueError, match=r"prepared with extent=crop"):
        encoded.check(whole_desk.tokenizer.sha256, dataclasses.asdict(VOLUMES))
