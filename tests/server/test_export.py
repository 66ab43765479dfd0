"""Every form of an export is loaded by the tool that it is for, and gives the run's own code."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import meduet_models
from federation.plan.plan import AggregationPlan, RunPlan, StylePlan
from meduet_models.meduet import MeDUET
from meduet_models.objective.settings import LossWeights, ObjectiveConfig
from meduet_models.published.scan_model import ScanModel
from meduet_models.weights import load_weights, save_weights, sha256_of_file, sha256_of_tensors
from scans.volumes import prepare, read_scan
from server.cli import main
from server.promises import sentences
from tests import published_weights
from tests.generative_models import small_tokenizer
from tests.published_weights import VOLUMES, a_scan, network, published, written
from tests.worlds import small_plan

SITES = ("saint-elsewhere", "north", "south")
REQUIRED = (
    "schema version monai_version pytorch_version numpy_version required_packages_version task description "
    "authors copyright network_data_format"
).split()
TENSOR = "type format num_channels spatial_shape dtype value_range".split()


def finished(folder: Path) -> Path:
    """A run's folder: small weights under the header that the centre writes."""
    tensors, told = load_weights(published(folder) / "model.safetensors")
    plan = small_plan(
        name="A small run", sites=SITES, volumes=VOLUMES, network=network().config,
        tokenizer_sha256=small_tokenizer().sha256,
    )  # fmt: skip
    erasure = {"rank": 2, "sites": {site: {"patients": 8} for site in SITES}}
    header = {
        **told,
        "plan": plan.to_json(),
        "plan_sha256": plan.sha256,
        "rounds": "3",
        "tensors_sha256": sha256_of_tensors(tensors),
        "erasure": json.dumps(erasure),
    }
    save_weights(folder / "model.safetensors", tensors, header)
    return folder


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return finished(tmp_path / "run")


@pytest.fixture
def scan(tmp_path: Path) -> Path:
    (tmp_path / "scans").mkdir()
    return written(tmp_path / "scans" / "p1.nii.gz", *a_scan())


def exported(run: Path, form: str) -> Path:
    out = run.with_name(form)
    assert main(["export", str(run), "--form", form, "--licence", "CC-BY-4.0", "-o", str(out)]) == 0
    return out


def plan_of(run: Path) -> RunPlan:
    return RunPlan.from_json(load_weights(run / "model.safetensors")[1]["plan"])


def test_a_folder_gives_the_runs_own_code_and_needs_no_other_file(run: Path, scan: Path) -> None:
    out = exported(run, "folder")
    assert {p.name for p in out.iterdir()} == {
        "README.md", "config.json", "model.safetensors", "tokenizer.safetensors", "ro-crate-metadata.json",
    }  # fmt: skip
    assert np.array_equal(meduet_models.load(out).embed(scan), meduet_models.load(run).embed(scan))


def test_safetensors_itself_reads_the_weights(run: Path) -> None:
    from safetensors.torch import load_file

    ours = load_file(run / "model.safetensors")
    theirs = load_file(exported(run, "folder") / "model.safetensors")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("form", ["folder", "bundle", "onnx"])
def test_every_form_says_plan_promise_and_licence_and_names_no_site(form: str, run: Path) -> None:
    out = exported(run, form)
    text = "".join(p.read_bytes().decode("latin-1") for p in sorted(out.rglob("*")) if p.is_file())
    assert plan_of(run).sha256 in text
    assert "bounded, not differentially private" in text
    assert "CC-BY-4.0" in text
    assert "saint-elsewhere" not in text
    assert "20 " in text and "24" in text  # 24 patients in cohorts of five: at least 20
    card = next(out.rglob("README.md")).read_text()
    assert "at least 20 (rounded down" in card and "## Not tested" in card


@pytest.mark.parametrize("form", ["folder", "bundle"])
def test_the_record_names_every_file_by_its_hash(form: str, run: Path) -> None:
    out = exported(run, form)
    crate = json.loads((out / "ro-crate-metadata.json").read_text())
    assert crate["@context"] == "https://w3id.org/ro/crate/1.1/context"
    entities = {one["@id"]: one for one in crate["@graph"]}
    assert entities["ro-crate-metadata.json"]["about"] == {"@id": "./"}
    root = entities["./"]
    assert {"name", "description", "datePublished", "license"} <= root.keys()
    there = {p.relative_to(out).as_posix() for p in out.rglob("*") if p.is_file()}
    parts = {one["@id"] for one in root["hasPart"]}
    assert parts == there - {"ro-crate-metadata.json"}
    for part in parts:
        assert entities[part]["identifier"] == f"sha256:{sha256_of_file(out / part)}"
    assert plan_of(run).sha256 in entities["#run"]["description"]


def test_monai_accepts_the_bundles_metadata_and_runs_its_inference(
    run: Path, scan: Path, tmp_path: Path
) -> None:
    """By a schema that requires what the published one, meta_schema_20240725.json, does: no network here."""
    from monai.bundle import run as run_bundle
    from monai.bundle import verify_metadata

    out = exported(run, "bundle")
    tensor = {"type": "object", "required": TENSOR}
    side = {"type": "object", "additionalProperties": tensor}
    io = {
        "type": "object",
        "properties": {"inputs": side, "outputs": side},
        "required": ["inputs", "outputs"],
    }
    schema = {"type": "object", "required": REQUIRED, "properties": {"network_data_format": io}}
    (tmp_path / "schema.json").write_text(json.dumps(schema))
    verify_metadata(
        meta_file=str(out / "configs" / "metadata.json"), filepath=str(tmp_path / "schema.json"),
        hash_val=sha256_of_file(tmp_path / "schema.json"), hash_type="sha256",
    )  # fmt: skip
    with pytest.warns(UserWarning, match="parsing config_file"):  # MONAI, of every bundle: who wrote it?
        run_bundle(
            config_file=str(out / "configs" / "inference.json"), bundle_root=str(out),
            dataset_dir=str(scan.parent), output_dir=str(tmp_path / "codes"),
        )  # fmt: skip
    code = np.load(tmp_path / "codes" / "p1.npy")
    assert np.array_equal(code, meduet_models.load(run).embed(scan))


def test_onnxruntime_computes_the_code_of_a_prepared_volume(run: Path, scan: Path) -> None:
    import onnxruntime

    graph = onnxruntime.InferenceSession(exported(run, "onnx") / "model.onnx")
    told = graph.get_modelmeta().custom_metadata_map
    assert (
        told["plan_sha256"] == plan_of(run).sha256 and json.loads(told["volumes"])["spacing_mm"] == [2.0] * 3
    )
    model: ScanModel = meduet_models.load(run)
    for name in (scan, written(scan.with_name("p2.nii.gz"), *a_scan(1))):
        volume = prepare(read_scan(name), VOLUMES).volume[None].numpy()
        (code,) = graph.run(None, {"volume": volume})
        assert np.abs(code[0] - model.embed(name)).max() < 1e-4


@pytest.mark.slow
def test_onnxruntime_computes_the_code_of_a_model_with_a_u_net(
    tmp_path: Path, scan: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import onnxruntime

    plain = published_weights.small_network

    def with_unet() -> MeDUET:
        monkeypatch.setattr(published_weights, "small_network", lambda **c: plain(encoder="volume_unet", **c))
        made = network()
        assert made.embed_volume is not None
        draws = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for tensor in (made.embed_volume.kernel, made.embed_volume.join.weight):
                tensor.copy_(torch.randn(tensor.shape, generator=draws) / 8)
        return made

    model = with_unet()
    for module in (published_weights, sys.modules[__name__]):
        monkeypatch.setattr(module, "network", lambda: model)
    run = finished(tmp_path / "run")
    loaded = meduet_models.load(run)
    assert isinstance(loaded, ScanModel)
    graph = onnxruntime.InferenceSession(exported(run, "onnx") / "model.onnx")
    (code,) = graph.run(None, {"volume": prepare(read_scan(scan), VOLUMES).volume[None].numpy()})
    assert np.abs(code[0] - loaded.embed(scan)).max() < 1e-3


def test_what_was_promised_is_what_the_plan_says_and_not_more() -> None:
    plain = sentences(small_plan())
    assert [line.partition(":")[0] for line in plain] == ["round", "survey", "erasure"]
    assert all("so epsilon is infinite" in line for line in plain)
    alone = AggregationPlan(method="alone")
    style = StylePlan(exchange="none")
    with_objective = ObjectiveConfig(weights=LossWeights(invariance=0.0, restyled_reconstruction=0.0))
    assert sentences(small_plan(aggregation=alone, style=style, objective=with_objective)) == []


def test_weights_that_changed_and_a_folder_that_is_not_empty_are_refused(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["export", str(run), "--form", "folder", "--licence", "CC0-1.0", "-o"]
    assert main([*asked, str(run)]) == 2
    assert "new or empty folder" in capsys.readouterr().err
    tensors, told = load_weights(run / "model.safetensors")
    name = min(tensors)
    save_weights(run / "model.safetensors", tensors | {name: tensors[name] + 1e-6}, told)
    assert main([*asked, str(tmp_path / "out")]) == 2
    assert "they have changed" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
