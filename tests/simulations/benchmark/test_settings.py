"""What the benchmark is told: every method composes on every data set; cells know what they follow from."""

from pathlib import Path
from typing import Any

import pytest

from federation.plan.plan import RunPlan
from meduet_models.tokenizer.tokenizer import load_tokenizer
from server.config import compose_config, plain, plan_from
from simulations.benchmark.settings import (
    BenchmarkSettings,
    Cell,
    Task,
    Variant,
    benchmark_settings,
    cells_of,
)
from simulations.settings import settings_from

METHODS = (
    "meduet", "pooled", "pooled_split", "joint", "no_erasure", "no_invariance", "no_style_exchange",
    "no_mftd", "no_siqc", "no_adversary", "all_shared", "fedavg", "fedavg_mae", "fedprox", "fedbn", "alone",
    "random", "scratch",
)  # fmt: skip


def benchmark(*overrides: str) -> BenchmarkSettings:
    return benchmark_settings(plain(compose_config(overrides, name="benchmark")))


def plan_of(cell: Cell) -> RunPlan:
    tokenizer = load_tokenizer(settings_from(cell.config)[0].tokenizer)
    return plan_from(
        cell.config,
        sites=("a", "b", "c"),
        tokenizer_sha256=tokenizer.sha256,
        latent_channels=tokenizer.latent_channels,
        stride=tokenizer.stride,
    )


@pytest.fixture(scope="module")
def cells() -> dict[str, Cell]:
    every = benchmark("data=[phantoms]", f"methods=[{','.join(METHODS)}]")
    return {cell.method: cell for cell in cells_of(every)[1]}


@pytest.fixture(scope="module")
def plans(cells: dict[str, Cell]) -> dict[str, RunPlan]:
    return {method: plan_of(cell) for method, cell in cells.items()}


def test_every_method_of_the_benchmark_makes_a_plan_of_its_own(plans: dict[str, RunPlan]) -> None:
    assert set(plans) == set(METHODS) == set(benchmark().table) and set(benchmark().methods) < set(METHODS)
    trained = {m: p for m, p in plans.items() if m not in ("no_erasure", "random", "scratch")}
    hashes = {RunPlan.from_json(plan.to_json()).sha256 for plan in trained.values()}
    assert len(hashes) == len(trained)
    assert {(p.training.rounds, p.training.steps_per_round) for p in plans.values()} == {(14, 6)}


def test_each_ablation_differs_from_ours_in_what_it_is_named_after(plans: dict[str, RunPlan]) -> None:
    ours = plans["meduet"]
    for name, term in {"no_mftd": "mftd", "no_siqc": "siqc", "no_adversary": "site_adversary",
                       "no_invariance": "invariance"}.items():  # fmt: skip
        weights, own = plans[name].objective.weights, ours.objective.weights
        assert getattr(weights, term) == 0 < getattr(own, term)
        changed = {n for n in vars(own) if getattr(own, n) != getattr(weights, n)}
        assert changed == {term} and plans[name].style == ours.style
    assert plans["joint"].network.factor_paths == "joint" != ours.network.factor_paths
    assert plans["no_style_exchange"].style.exchange == "none"
    assert plans["all_shared"].style.head == "shared" and plans["all_shared"].style.exchange == "bank"
    assert plans["pooled_split"].network.factor_paths == "split"
    assert plans["pooled"].network.factor_paths == "joint"
    assert plans["pooled"].objective.weights.visible_reconstruction == 0
    assert plans["fedavg_mae"].objective.masking == "masked"
    assert plans["fedbn"].aggregation.method == "fedbn"


def test_cells_of_the_same_weights_share_a_run_and_others_do_not(cells: dict[str, Cell]) -> None:
    runs = {method: cell.config["folder"] for method, cell in cells.items()}
    assert runs["no_erasure"] == runs["meduet"]
    others = [run for method, run in runs.items() if method != "no_erasure"]
    assert len(set(others)) == len(others)
    assert not cells["no_erasure"].variant.erasure and cells["meduet"].variant.erasure
    assert (
        len({cell.key for cell in cells.values()})
        == len({cell.result for cell in cells.values()})
        == len(METHODS)
    )
    assert all(Cell.from_json(cell.to_json()) == cell for cell in cells.values())


def test_the_key_follows_from_what_decides_about_the_numbers_and_from_nothing_else() -> None:
    def key(*overrides: str) -> str:
        (cell,) = cells_of(benchmark("data=[phantoms]", "methods=[meduet]", *overrides))[1]
        return cell.key

    assert key() == key("folder=/elsewhere") == key("workers=5") == key("table.meduet.title=Ours")
    others = [
        key("seeds=[2]"), key('overrides=["training.learning_rate=1e-3"]'), key("patients=validation"),
        key("sizes.small.phantoms.tasks=[]"), key("size=full"), key("+table.meduet.erasure=false"),
    ]  # fmt: skip
    assert len({key(), *others}) == 7


def test_real_data_sets_need_the_folder_of_the_scans(data_root: Path) -> None:
    with pytest.raises(ValueError, match="Expected root=FOLDER with hospitals=split"):
        cells_of(benchmark("data=[hippocampus]", "methods=[meduet]"))
    root = f"root={data_root / 'msd_hippocampus'}"
    sets, cells = cells_of(
        benchmark("data=[hippocampus,hippocampus_scanners]", "methods=[meduet]", "seeds=[0,1]", root)
    )
    assert len(sets) == len(cells) == 4
    hospitals = [cell.config["hospitals"] for cell in cells]
    assert [h["by"] for h in hospitals] == ["appearance"] * 2 + ["random"] * 2
    assert [h["styles_on_top"] for h in hospitals] == [False] * 2 + [True] * 2
    assert all(cell.config["held_out"] == ["island"] for cell in cells)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("methods=[meduet,magic]", "Expected methods among .*; got 'magic'"),
        ("methods=[meduet,meduet]", "Expected methods to name one or more, each once"),
        ("data=[]", "Expected data to name one or more"),
        ("data=[moon]", "Expected data among phantoms, hippocampus, hippocampus_scanners, ixi; got 'moon'"),
        ("size=huge", "Expected size among small, full; got 'huge'"),
        ("seeds=[]", "Expected seeds to name one or more"),
        ("workers=0", "Expected workers to be at least 1"),
        ("patients=train", "Expected benchmark.patients to be one of test, validation"),
        ("table.random.erasure=true", "erasure has no effect on weights=untrained"),
        ("table.random.like=magic", "Expected conf/method/magic.yaml"),
    ],
)
def test_settings_that_make_no_sense_are_refused(override: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        benchmark(override)


def test_a_mistake_in_the_settings_of_a_cell_is_said_before_anything_is_made(tmp_path: Path) -> None:
    settings = benchmark(f"folder={tmp_path / 'b'}", 'overrides=["training.batch_size=5"]', "data=[phantoms]")
    with pytest.raises(ValueError, match=r"training\.batch_size"):
        cells_of(settings)
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize(
    "values",
    [
        {"task": "classification", "classes": 2},
        {"task": "segmentation", "classes": 2, "target": "disease", "values": ("no", "yes")},
        {"task": "classification", "classes": 3, "target": "disease", "values": ("no", "yes")},
    ],
)
def test_tasks_that_contradict_themselves_are_refused(values: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"Expected|no effect"):
        Task(**values, label_shares=(1.0,), steps=1)


def test_a_variant_without_weights_has_no_erasure() -> None:
    with pytest.raises(ValueError, match="weights=none"):
        Variant(title="x", weights="none")
