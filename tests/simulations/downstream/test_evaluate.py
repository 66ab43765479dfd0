"""Downstream evaluation: the table, its modes, its honesty; and the command, from a run to a page."""

import csv
import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from client.latents.labelled import LabelledScans
from meduet_models.downstream.task import Target
from meduet_models.meduet import FactorNetwork
from meduet_models.volume_unet import VolumeUNet
from server.checkpoints import OtherPlan
from server.config import compose_config
from simulations.downstream import evaluate as downstream
from simulations.downstream import learning
from simulations.downstream.comparisons import compare, measured
from simulations.downstream.evaluate import MODES, DownstreamSettings, evaluate_downstream
from simulations.downstream.run import run_downstream
from simulations.downstream.settings import CLOSED_FORM, VOLUME_KINDS
from simulations.run import run
from tests.small_simulation import small_simulation
from tests.worlds import small_network

GRID = (4, 6, 4)
PRIVATE = "{epsilon: 3, clip_norm: 0.5, sampling_rate: 0.5, expected_patients: 4}"
CONFIG = small_network(width=16)
SETTINGS = DownstreamSettings(
    task="segmentation",
    classes=2,
    spacing_mm=(1.0, 1.0, 1.0),
    label_shares=(0.1, 1.0),
    steps=4,
    bootstrap=20,
)


def scans(count: int, seed: int, task: str = "segmentation") -> LabelledScans:
    draws = torch.Generator().manual_seed(seed)
    latents = torch.randn(count, 2, *GRID, generator=draws)
    target = torch.arange(count) % 2
    latents[:, 1] += (2 * target - 1).reshape(-1, 1, 1, 1) * torch.linspace(-2, 2, 4).reshape(-1, 1, 1)
    labels = (latents[:, :1] > 0.3).long()
    for axis in (2, 3, 4):
        labels = labels.repeat_interleave(4, dim=axis)
    answers = {"segmentation": labels, "classification": target, "regression": target.float() - 0.5}[task]
    return LabelledScans(latents, answers, tuple(f"{seed}-{n}" for n in range(count)), (0,) * count)


def evaluated(settings: DownstreamSettings = SETTINGS, seed: int = 0, **changes: Any) -> list[Any]:
    task = settings.task
    values: dict[str, Any] = {
        "model": FactorNetwork(CONFIG),
        "train": scans(10, 1, task),
        "validation": scans(4, 2, task),
        "tests": {"seen": scans(6, 3, task), "held_out": scans(5, 4, task)},
    }
    return evaluate_downstream(**{**values, **changes}, settings=settings, seed=seed).rows


def test_every_mode_share_and_test_is_in_the_table_once() -> None:
    rows = evaluated()
    keys = {(r.mode, r.labels, r.test, r.metric) for r in rows}
    assert len(keys) == len(rows) == 4 * 2 * 2 * 3
    assert {r.metric for r in rows} == {"dice", "surface_dice", "hd95"}
    assert {(r.labels, r.labelled) for r in rows} == {("10%", 1), ("100%", 10)}
    assert {(r.test, r.patients) for r in rows} == {("seen", 6), ("held_out", 5)}
    assert all(r.low <= r.value <= r.high for r in rows if r.metric == "dice")


@pytest.mark.slow
def test_a_table_reproduces_by_its_seed() -> None:
    assert [repr(row) for row in evaluated()] == [repr(row) for row in evaluated()]
    assert [repr(row) for row in evaluated()] != [repr(row) for row in evaluated(seed=1)]


def test_test_scans_are_looked_at_after_all_training(monkeypatch: pytest.MonkeyPatch) -> None:
    looked_at: list[str] = []
    whole, train = downstream.rows_of, learning.finetune

    def measuring(*args: Any) -> Any:
        looked_at.append("test")
        return whole(*args)

    def training(*args: Any, **more: Any) -> Any:
        looked_at.append("train")
        return train(*args, **more)

    monkeypatch.setattr(downstream, "rows_of", measuring)
    monkeypatch.setattr(learning, "finetune", training)
    evaluated()
    assert looked_at == ["train"] * 6 + ["test"] * 16  # frozen is read in closed form


def test_shares_that_come_to_the_same_patients_are_trained_once() -> None:
    done: list[str] = []
    settings = replace(SETTINGS, label_shares=(0.01, 0.05, 0.1), modes=("unet",))
    rows = evaluated(settings, progress=lambda what, step, total: done.append(what))
    assert done == ["unet, labels of 1"] * SETTINGS.steps
    assert {row.labels for row in rows} == {"1%", "5%", "10%"}


def test_without_a_pretrained_model_only_what_needs_none() -> None:
    modes = replace(SETTINGS, modes=("scratch", "unet"), network=CONFIG)
    assert {row.mode for row in evaluated(modes, model=None)} == {"scratch", "unet"}
    with pytest.raises(ValueError, match="pretrained model for frozen"):
        evaluated(model=None)
    with pytest.raises(ValueError, match="Expected network for mode scratch"):
        evaluated(replace(modes, network=None), model=None)
    with pytest.raises(ValueError, match="network has no effect"):
        evaluated(replace(SETTINGS, network=CONFIG))


def test_a_planted_class_is_recognised_by_the_logistic_regression_of_frozen_content() -> None:
    modes: Any = ("frozen", "frozen_tokens")
    settings = replace(SETTINGS, task="classification", label_shares=(1.0,), modes=modes)
    rows = evaluated(
        settings, train=scans(40, 1, "classification"), tests={"seen": scans(30, 3, "classification")}
    )
    assert [row.mode for row in rows] == list(modes) and {row.metric for row in rows} == {"auc"}
    assert min(row.value for row in rows) > 0.9


OF_SCANS: Any = tuple(mode for mode in MODES if mode not in VOLUME_KINDS)
OF_VOXELS: Any = tuple(mode for mode in OF_SCANS if mode != "frozen_tokens")
EVERY = replace(
    SETTINGS, modes=OF_VOXELS, label_counts=(1, 2), label_shares=(0.5, 1.0), draws=3, trained_draws=2, steps=1
)


def with_volumes(count: int, seed: int, task: str = "segmentation") -> LabelledScans:
    own = scans(count, seed, task)
    volumes = torch.nn.functional.interpolate(own.latents[:, :1], scale_factor=4)
    return replace(own, volumes=volumes)


@pytest.mark.parametrize("task", ["segmentation", "classification", "regression"])
def test_closed_forms_have_many_draws_trained_ones_few_and_everybody_one(task: str) -> None:
    settings = replace(EVERY, task=task, modes=OF_VOXELS if task == "segmentation" else OF_SCANS)
    if task == "regression":
        settings = replace(settings, classes=1, target=Target("score", ("-1", "1")))
    sets = {"train": with_volumes(10, 1, task), "validation": with_volumes(4, 2, task)}
    rows = evaluated(settings, tests={"seen": with_volumes(6, 3, task)}, **sets)
    assert {row.mode for row in rows} == set(settings.modes)
    main = [row for row in rows if row.resamples]
    assert {(row.mode in CLOSED_FORM, row.labels == "100%", row.draws) for row in main} == {
        (True, False, 3), (True, True, 1), (False, False, 2), (False, True, 1),
    }  # fmt: skip
    labels = {row.labels: row.labelled for row in main if row.mode == "ridge"}
    per_class = 2 if task == "classification" else 1
    assert labels == {"1": per_class, "2": 2 * per_class, "50%": 5, "100%": 10}
    assert {len(row.resamples) for row in main} == {settings.bootstrap}


def test_numbers_of_patients_that_there_are_not_enough_for_are_left_out() -> None:
    rows = evaluated(replace(EVERY, modes=("ridge",), label_counts=(3, 11)))
    assert {row.labels for row in rows} == {"3", "50%", "100%"}


def test_the_mean_label_map_says_the_same_of_any_scan_and_the_others_do_not() -> None:
    fitted = learning.fitted_mode
    train, held = with_volumes(10, 1), with_volumes(4, 2)
    settings = replace(EVERY, label_counts=(), label_shares=(1.0,))
    for mode in OF_VOXELS:
        (own,) = fitted(mode, FactorNetwork(CONFIG), train, held, settings, 0, None, lambda *_: None)
        one, other = (own.predictors[0](with_volumes(2, seed)) for seed in (7, 8))
        assert torch.equal(one, other) == (mode == "label_map"), mode


def test_the_random_encoder_is_the_plans_start_read_by_the_probe_of_the_pretrained_one() -> None:
    trained = FactorNetwork(CONFIG, seed=5)
    settings = replace(EVERY, modes=("random", "frozen"), plan_seed=9)
    rows = evaluated(settings, model=trained)
    start = evaluated(replace(settings, modes=("frozen",)), model=FactorNetwork(CONFIG, seed=9))
    values = {mode: [row.value for row in rows if row.mode == mode] for mode in ("random", "frozen")}
    assert values["random"] == [row.value for row in start] != values["frozen"]


def test_planted_labels_are_found_by_ridge_on_raw_latents_and_not_by_the_mean_label_map() -> None:
    settings = replace(
        EVERY, modes=("label_map", "ridge"), label_counts=(), label_shares=(1.0,), bootstrap=200
    )
    rows = evaluated(settings, train=scans(60, 1), tests={"seen": scans(20, 3)})
    mean, ridge = (next(row for row in rows if row.mode == mode and row.resamples) for mode in settings.modes)
    apart = compare(*(measured(asdict(row), row.mode) for row in (ridge, mean)), "label_map")
    assert apart.above and ridge.value > mean.value + 0.1


def test_modes_without_what_they_read_are_said() -> None:
    with pytest.raises(ValueError, match="prepared volumes for mode unet_volume"):
        evaluated(EVERY)
    with pytest.raises(ValueError, match="Expected network for mode ridge"):
        evaluated(replace(EVERY, modes=("ridge",)), model=None)
    with pytest.raises(ValueError, match="to be at least 1"):
        replace(EVERY, draws=0)


def test_the_score_of_fairness_is_told_over_sites_and_given_groups() -> None:
    settings = replace(EVERY, modes=("ridge",), label_shares=(1.0,), label_counts=())
    tests = {"seen": replace(scans(8, 3), site=(0, 1) * 4)}
    evaluated_once = evaluate_downstream(
        FactorNetwork(CONFIG), scans(10, 1), scans(4, 2), tests, settings, 0,
        groups={"seen": {"sex": ("F",) * 4 + ("M",) * 3 + ("",)}},
    )  # fmt: skip
    assert {(one.grouping, tuple(one.patients.values())) for one in evaluated_once.fairness} == {
        ("site", (4, 4)), ("sex", (4, 3)),
    }  # fmt: skip
    assert all(0 < one.score <= 1 for one in evaluated_once.fairness)


def test_labels_of_one_class_only_tell_nothing_apart() -> None:
    settings = replace(SETTINGS, task="classification", label_shares=(0.1,), modes=("frozen",))
    (row,) = evaluated(settings, tests={"seen": scans(6, 3, "classification")})
    assert (row.value, row.labelled) == (0.5, 1)


def test_a_class_out_of_range_is_said_before_anything_is_trained() -> None:
    done: list[str] = []
    with pytest.raises(ValueError, match="classes from 0 to 1"):
        train = scans(10, 1)
        wrong = replace(train, answers=train.answers * 5)
        evaluated(train=wrong, progress=lambda what, step, total: done.append(what))
    assert done == []


SMALL = [*small_simulation(patients=16, paired=0, rounds=1), "site.split_fractions=[0.5,0.2,0.3]"]


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("downstream") / "run"
    run(compose_config([*SMALL, f"folder={folder}"]))
    return folder


def command(pretrained: Path, folder: Path, *more: str) -> Path:
    fixed = [
        f"pretrained={pretrained}",
        f"folder={folder}",
        "steps=4",
        "bootstrap=20",
        "label_shares=[0.1,1]",
        "label_counts=[]",
        "draws=2",
    ]
    return run_downstream(compose_config([*fixed, *more], name="downstream"))


def test_a_run_becomes_a_table_a_figure_and_a_page(pretrained: Path, tmp_path: Path) -> None:
    page = command(pretrained, tmp_path, "federated=true", "rounds=2", "label_shares=[1]", "steps=2")
    assert "fine-tuned in the federation" in page.read_text()
    written = json.loads((tmp_path / "downstream.json").read_text())
    assert written["classes"] == 5
    assert len(written["federated"]) == 2
    modes = {row["mode"] for row in written["rows"]}
    assert modes == {*OF_VOXELS, "federated"}
    with (tmp_path / "downstream.csv").open(newline="") as stream:
        assert len(list(csv.DictReader(stream))) == len(written["rows"])
    assert (tmp_path / "downstream.png").stat().st_size > 10_000
    journal = (pretrained / "sites" / "north" / "journal.jsonl").read_text()
    assert '"kind":"finetuning"' in journal.replace(" ", "")


def test_labels_of_one_hospital_and_the_bank_reach_the_other(pretrained: Path, tmp_path: Path) -> None:
    command(pretrained, tmp_path, "label_sites=[north]", "bank=true", "modes=[unet]")
    rows = json.loads((tmp_path / "downstream.json").read_text())["rows"]
    assert {row["test"] for row in rows} == {"seen", "unlabelled"}


def test_a_hospital_that_the_run_held_out_is_tested_on_whole(pretrained: Path, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(pretrained, copy)
    config = OmegaConf.load(copy / "config.yaml")
    config["hospitals"]["num_hospitals"] = 3
    config["held_out"] = ["valley"]
    OmegaConf.save(config, copy / "config.yaml")
    command(copy, tmp_path / "table", "modes=[unet]", "label_shares=[1]")
    written = json.loads((tmp_path / "table" / "downstream.json").read_text())
    tested = {row["test"]: row["patients"] for row in written["rows"]}
    assert tested.keys() == {"seen", "held_out"}
    assert tested["held_out"] == 16
    assert written["training_patients"] < 32


def test_a_covariate_is_classified(pretrained: Path, tmp_path: Path) -> None:
    classes = ["task=classification", "target=sex", "target_values=[F,M]", "modes=[frozen,unet]"]
    command(pretrained, tmp_path, *classes)
    rows = json.loads((tmp_path / "downstream.json").read_text())["rows"]
    assert {row["metric"] for row in rows} == {"auc"}


def test_a_number_is_predicted_at_every_mode_and_in_the_federation(pretrained: Path, tmp_path: Path) -> None:
    age = ["task=regression", "target=age", "target_values=[20,90]", "federated=true", "rounds=2"]
    page = command(pretrained, tmp_path, *age)
    written = json.loads((tmp_path / "downstream.json").read_text())
    assert written["classes"] == 1
    assert {row["metric"] for row in written["rows"]} == {"mae", "r2"}
    assert {row["mode"] for row in written["rows"]} == {*OF_VOXELS, "federated"}
    errors = [row["value"] for row in written["rows"] if row["metric"] == "mae"]
    assert all(0 < error < 70 for error in errors)  # years
    assert "mean absolute error" in page.read_text()


@pytest.mark.parametrize(
    ("more", "what"),
    [
        (["task=regression", "target=age"], "lowest and the highest"),
        (["task=guessing"], "task to be one of segmentation, classification, regression"),
        (["rounds=3"], "no effect without federated"),
        ([f"privacy={PRIVATE}"], "no effect without federated"),
        (["federated=true", f"privacy={PRIVATE}", "label_shares=[0.5]"], "with privacy leave it out"),
        (["label_sites=[atlantis]"], "label_sites among"),
        (["target=sex"], "no effect with task=segmentation"),
        (["task=classification", "classes=2"], "target covariate"),
        (["federated=true", "bank=true"], "leave out"),
        (["classes=3"], "classes from 0 to 2"),
        (["task=classification", "target=hair", "target_values=[red,black]"], "training patients with hair"),
    ],
)
def test_wrong_settings_are_said_in_one_line(
    pretrained: Path, tmp_path: Path, more: list[str], what: str
) -> None:
    with pytest.raises(ValueError, match=what):
        command(pretrained, tmp_path, *more)


def test_a_folder_without_a_finished_run_is_said(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="finished run"):
        command(tmp_path, tmp_path)


def test_another_fine_tuning_beside_the_first_disturbs_nothing(pretrained: Path, tmp_path: Path) -> None:
    few = ["modes=[unet]", "label_shares=[1]", "federated=true"]
    command(pretrained, tmp_path, *few, "rounds=1")
    try:
        command(pretrained, tmp_path, *few, "rounds=2", "encoder=frozen")
    except OtherPlan:
        pytest.fail("another fine-tuning has another folder")
    assert len(list(tmp_path.glob("federated-*/finetuned.safetensors"))) == 2


def test_networks_on_the_volume_are_rows_of_the_table_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        learning, "started_unet", lambda start, seed: VolumeUNet(seed=seed + (start != "none"))
    )

    def seen(count: int, seed: int) -> LabelledScans:
        own = scans(count, seed)
        volumes = torch.nn.functional.interpolate(own.latents[:, :1], scale_factor=4.0).sigmoid()
        return replace(own, volumes=volumes.half())

    modes = ("volume_unet", "volume_start", "joined")
    settings = replace(SETTINGS, modes=modes, anatomy_start="canonical", label_shares=(1.0,), steps=2)
    rows = evaluated(settings, train=seen(6, 1), validation=seen(2, 2), tests={"seen": seen(3, 3)})
    dice = {row.mode: row.value for row in rows if row.metric == "dice"}
    assert set(dice) == set(modes) and dice["volume_start"] != dice["volume_unet"]


def test_a_start_that_nothing_starts_from_is_refused() -> None:
    with pytest.raises(ValueError, match="anatomy_start has no effect"):
        evaluated(replace(SETTINGS, anatomy_start="canonical"))
    with pytest.raises(ValueError, match="Expected anatomy_start for mode volume_start"):
        evaluated(replace(SETTINGS, modes=("volume_start",)))
