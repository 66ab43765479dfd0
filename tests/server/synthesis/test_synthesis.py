"""`meduet-server synthesize`: what is told is what is drawn; resumable to the byte; marked."""

import csv
import dataclasses
import json
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch

import server.synthesis.synthesis
from meduet_models.diffusion.artefact import GenerativeModel, save_generative_model
from meduet_models.diffusion.sampling import SamplingSettings
from meduet_models.encoded_scan import EncodedScan, save_encoded_scan
from meduet_models.tokenizer.tokenizer import Tokenizer, save_tokenizer
from scans.volume_plan import VolumePlan
from server.cli import main
from server.synthesis.synthesis import SynthesisRequest, interpolate, synthesise
from tests.generative_models import VOLUMES, small_model, small_tokenizer
from tests.meduet_models.diffusion.small_models import small_latents

FEW = SamplingSettings(steps=2, solver="euler")


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return small_tokenizer()


@pytest.fixture(scope="module")
def model(tokenizer: Tokenizer) -> GenerativeModel:
    return small_model(tokenizer)


def encoded(tokenizer: Tokenizer, seed: int = 0) -> EncodedScan:
    return EncodedScan(
        small_latents(1, seed)[0], tokenizer.sha256, dataclasses.asdict(VOLUMES), {}, (1.0, 1.0, 1.0)
    )


def a_request(**changes: Any) -> SynthesisRequest:
    return SynthesisRequest(**{"count": 5, "batch_size": 2, "sampling": FEW, "seed": 3} | changes)


def table(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.read_text().splitlines()))


def volumes(paths: list[Path]) -> np.ndarray:
    return np.stack([nib.load(path).get_fdata() for path in paths])


def test_volumes_have_the_plans_spacing_point_to_ras_and_are_centred(
    model: GenerativeModel, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    paths = synthesise(model, tokenizer, a_request(count=2), tmp_path / "any")
    assert [path.name for path in paths] == ["sample-0001.nii.gz", "sample-0002.nii.gz"]
    for path in paths:
        image = nib.load(path)
        assert image.shape == VOLUMES.shape and nib.aff2axcodes(image.affine) == ("R", "A", "S")
        assert image.header.get_zooms() == VOLUMES.spacing_mm and image.header.get_xyzt_units()[0] == "mm"
        middle = (np.array(image.shape) - 1) / 2
        assert np.allclose(nib.affines.apply_affine(image.affine, middle), 0)
        assert 0 <= image.get_fdata().min() and image.get_fdata().max() <= 1
        assert b"not acquired" in bytes(image.header["descrip"])
        assert b"PATIENT" not in bytes(image.header["descrip"])  # a federated model, told nothing of a scan
    assert not np.array_equal(*volumes(paths)), "two noises, two volumes"
    rows = table(tmp_path / "any" / "samples.csv")
    assert [row["file"] for row in rows] == [path.name for path in paths]
    assert [row["noise"] for row in rows] == ["0", "1"] and {row["mode"] for row in rows} == {"unconditional"}


def test_a_ct_model_gives_hounsfield_units(tokenizer: Tokenizer, tmp_path: Path) -> None:
    plan = VolumePlan(modality="ct", window="ct_hu", shape=(16, 24, 16), spacing_mm=(2.0, 2.0, 2.0))
    ct = small_model(tokenizer, volumes=dataclasses.asdict(plan))
    mr = synthesise(small_model(tokenizer), tokenizer, a_request(count=1), tmp_path / "mr")
    values = volumes(synthesise(ct, tokenizer, a_request(count=1), tmp_path / "ct"))
    assert np.allclose(values, -175 + 425 * volumes(mr), atol=1e-2)


def test_an_interrupted_request_ends_in_the_files_of_one_that_never_stopped(
    model: GenerativeModel, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    whole = synthesise(model, tokenizer, a_request(), tmp_path / "whole")

    def stop(done: int, total: int) -> None:
        if done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        synthesise(model, tokenizer, a_request(), tmp_path / "torn", report=stop)
    (tmp_path / "torn" / "sample-0002.nii.gz").unlink()  # of a batch whose other volume is there
    kept = tmp_path / "torn" / "sample-0001.nii.gz"
    before = kept.stat().st_mtime_ns
    assert not (tmp_path / "torn" / "sample-0005.nii.gz").exists()
    gone_on = synthesise(model, tokenizer, a_request(), tmp_path / "torn")
    assert kept.stat().st_mtime_ns == before
    for a, b in zip(whole, gone_on, strict=True):
        assert a.read_bytes() == b.read_bytes()
    for name in ("samples.csv", "samples.json", "request.json", "README.txt"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "torn" / name).read_bytes()


def test_a_finished_request_draws_nothing_again(
    model: GenerativeModel, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synthesise(model, tokenizer, a_request(count=2), tmp_path / "a")
    monkeypatch.setattr(server.synthesis.synthesis, "sample", None)
    assert len(synthesise(model, tokenizer, a_request(count=2), tmp_path / "a")) == 2


def test_a_folder_of_another_request_or_with_other_files_is_refused(
    model: GenerativeModel, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    synthesise(model, tokenizer, a_request(count=1), tmp_path / "a")
    for change, word in (({"seed": 4}, "seed"), ({"style": "north"}, "another"), ({"count": 2}, "count")):
        with pytest.raises(ValueError, match=word):
            synthesise(model, tokenizer, a_request(**{"count": 1} | change), tmp_path / "a")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "thesis.tex").write_text("")
    with pytest.raises(ValueError, match="other files"):
        synthesise(model, tokenizer, a_request(), tmp_path / "b")


def test_what_is_told_changes_the_volume_and_the_noise_is_the_same(
    model: GenerativeModel, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    scan = encoded(tokenizer)
    asked: list[dict[str, Any]] = [
        {},
        {"style": "north"},
        {"style": "south"},
        {"content": scan},
        {"content": scan, "style": "south"},
        {"body_part": "head"},
        {"category": "ill"},
        {"spacing_mm": (0.5, 0.5, 3.0)},
    ]
    made = [
        volumes(synthesise(model, tokenizer, a_request(count=1, **options), tmp_path / str(i)))
        for i, options in enumerate(asked)
    ]
    for i in range(len(made)):
        for j in range(i):
            assert not np.array_equal(made[i], made[j]), (asked[i], asked[j])
    request = json.loads((tmp_path / "4" / "samples.json").read_text())
    assert request["request"]["mode"] == "content and style"
    assert request["samples"][0]["content_sha256"] == [scan.sha256]


def test_a_way_between_two_scans_has_their_own_renderings_at_its_ends(
    model: GenerativeModel, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    a, b = encoded(tokenizer, 0), encoded(tokenizer, 1)
    way = volumes(
        synthesise(model, tokenizer, a_request(count=1, between=(a, b), points=5), tmp_path / "way")
    )
    ends = [
        volumes(synthesise(model, tokenizer, a_request(count=1, content=x), tmp_path / x.sha256))[0]
        for x in (a, b)
    ]
    assert np.allclose(way[0], ends[0], atol=1e-4) and np.allclose(way[-1], ends[1], atol=1e-4)
    steps = np.abs(np.diff(way, axis=0)).mean((1, 2, 3))
    assert (steps > 0).all() and steps.max() < 5 * steps.min(), "an even way: no jump and no rest"
    rows = table(tmp_path / "way" / "samples.csv")
    assert [float(row["share"]) for row in rows] == [0.0, 0.25, 0.5, 0.75, 1.0]


def test_a_move_along_a_covariate_of_nothing_is_the_scan_itself(
    model: GenerativeModel, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    options = {"content": encoded(tokenizer), "along": "age", "amounts": (-10.0, 10.0), "points": 3}
    moved = volumes(synthesise(model, tokenizer, a_request(count=1, **options), tmp_path / "age"))
    plain = volumes(
        synthesise(model, tokenizer, a_request(count=1, content=options["content"]), tmp_path / "plain")
    )[0]
    assert np.allclose(moved[1], plain, atol=1e-4)
    assert np.abs(moved[0] - plain).max() > 1e-3 < np.abs(moved[2] - plain).max()
    rows = table(tmp_path / "age" / "samples.csv")
    assert [float(row["amount"]) for row in rows] == [-10.0, 0.0, 10.0]


def test_spherical_ways_keep_lengths_and_turn_evenly() -> None:
    a, b = torch.tensor([[2.0, 0.0], [1.0, 0.0]]), torch.tensor([[0.0, 2.0], [3.0, 0.0]])
    half = interpolate(a, b, 0.5, "spherical")
    assert torch.allclose(half[0], torch.full((2,), 2**0.5)) and torch.allclose(
        half[1], torch.tensor([2.0, 0.0])
    )
    assert torch.allclose(interpolate(a, b, 0.5, "linear")[0], torch.ones(2))
    third = interpolate(a, b, 1 / 3, "spherical")[0]
    assert float(torch.atan2(third[1], third[0])) == pytest.approx(np.pi / 6)
    opposite = interpolate(a[:1], -a[:1], 0.25, "spherical")
    assert torch.isfinite(opposite).all() and torch.allclose(opposite, 0.5 * a[:1])


def test_volumes_of_a_model_of_raw_latents_and_of_a_patients_content_are_marked(
    model: GenerativeModel, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    raw = dataclasses.replace(model, policy="raw", patient_data=True)
    cases = {
        "raw": (raw, {}, "raw latents"),
        "content": (model, {"content": encoded(tokenizer)}, "a real scan"),
    }
    for name, (which, options, why) in cases.items():
        (path,) = synthesise(which, tokenizer, a_request(count=1, **options), tmp_path / name)
        assert b"PATIENT DATA" in bytes(nib.load(path).header["descrip"])
        assert "PATIENT DATA" in (tmp_path / name / "README.txt").read_text()
        assert why in (tmp_path / name / "README.txt").read_text()
        sample = json.loads((tmp_path / name / "samples.json").read_text())["samples"][0]
        assert why in sample["patient_data"]
        assert path.stat().st_mode & 0o077 == 0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"style": "east"}, "north, south"),
        ({"along": "age", "points": 3}, "give --content"),
        ({"along": "height", "points": 3, "content": 0}, r"\(age\)"),
        ({"content": 0, "points": 3}, "--points"),
        ({"between": 0, "points": 1}, "--points"),
        ({"category": "dead"}, "ill, well"),
        ({"body_part": "knee"}, "head"),
        ({"spacing_mm": (1.0, 0.0, 1.0)}, "positive"),
        ({"count": 0}, "at least one"),
        ({"sampling": SamplingSettings(guidance={"style": 2.0})}, "no effect"),
    ],
)
def test_a_request_that_makes_no_sense_is_refused_before_anything_is_written(
    model: GenerativeModel, tokenizer: Tokenizer, tmp_path: Path, options: dict[str, Any], words: str
) -> None:
    scan = encoded(tokenizer)
    if "content" in options:
        options = options | {"content": scan}
    if "between" in options:
        options = options | {"between": (scan, scan)}
    with pytest.raises(ValueError, match=words) as raised:
        synthesise(model, tokenizer, a_request(**options), tmp_path / "out")
    assert "\n" not in str(raised.value) and not (tmp_path / "out").exists()


def test_scans_of_another_tokenizer_are_refused(
    model: GenerativeModel, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    other = dataclasses.replace(encoded(tokenizer), tokenizer_sha256="f" * 64)
    with pytest.raises(ValueError, match="encoded by tokenizer"):
        synthesise(model, tokenizer, a_request(content=other), tmp_path / "out")


def test_the_command_draws_and_refuses_in_one_line(
    model: GenerativeModel, tokenizer: Tokenizer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_generative_model(tmp_path / "model.safetensors", model)
    save_tokenizer(tmp_path / "tokenizer.safetensors", tokenizer, {})
    save_encoded_scan(tmp_path / "scan.safetensors", encoded(tokenizer))

    def run(*arguments: str) -> tuple[int, str]:
        typed = [str(tmp_path / a[1:]) if a.startswith("@") else a for a in arguments]
        status = main(["synthesize", *typed, "--tokenizer", str(tmp_path / "tokenizer.safetensors")])
        said = capsys.readouterr()
        return status, said.out + said.err

    common = ("--model", "@model.safetensors", "--steps", "2", "--device", "cpu")
    status, said = run(*common, "-o", "@out", "--content", "@scan.safetensors", "--along", "age",
                       "--range", "-2", "2", "--points", "3", "--style", "south")  # fmt: skip
    assert status == 0 and "3 volumes" in said and "patient data" in said
    assert len(list((tmp_path / "out").glob("sample-*.nii.gz"))) == 3
    refused = {
        "--range": (*common, "-o", "@b", "--content", "@scan.safetensors", "--along", "age"),
        "--bank and --key have no effect": (*common, "-o", "@b", "--bank", "@bank"),
        "Expected --bank FOLDER": (*common, "-o", "@b", "--content", "bank:1234"),
        "--points has no effect": (*common, "-o", "@b", "--points", "3"),
        "--interpolation has no effect": (*common, "-o", "@b", "--interpolation", "linear"),
        "Expected a weights file": (*common[2:], "-o", "@b", "--model", "@none.safetensors"),
        "Expected scan.safetensors": (*common[2:], "-o", "@b", "--model", "@scan.safetensors"),
        "to be an encoded scan": (*common, "-o", "@b", "--content", "@model.safetensors"),
    }
    for words, arguments in refused.items():
        status, said = run(*arguments)
        if words == "Expected scan.safetensors":
            words = "scan.safetensors"
        assert status == 2 and words in said and len(said.strip().splitlines()) == 1, said
        assert not (tmp_path / "b").exists()
