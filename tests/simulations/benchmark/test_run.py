"""The benchmark, tiny: cells, stopped and resumed, failed and listed; and the whole command."""

import csv
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from meduet_models.meduet import MeDUET
from server.config import compose_config, plain
from simulations.benchmark.cell import Instruments, make_data_set, run_cell
from simulations.benchmark.run import run_benchmark
from simulations.benchmark.settings import Cell, Task, benchmark_settings, cells_of
from simulations.downstream.evaluate import DownstreamRow, DownstreamSettings, Evaluated, LabelledScans
from simulations.hospitals.held_out import Held
from tests.small_simulation import SMALL_NETWORK

ROOT = Path(__file__).resolve().parents[3]
TINY = (
    "hospitals.num_hospitals=3", "held_out=[valley]", "hospitals.patients=12", "hospitals.paired=3",
    "hospitals.resolution_mm=4", *SMALL_NETWORK, "training.rounds=2", "training.steps_per_round=2",
    "training.batch_size=4",
)  # fmt: skip
BENCHMARK = ("data=[phantoms]", "device=cpu", "sizes.small.phantoms.tasks=[]")


def overrides(*more: str) -> str:
    return "overrides=[" + ",".join(f'"{name}"' for name in (*TINY, *more)) + "]"


def cells_in(folder: Path, methods: str, *more: str) -> dict[str, Cell]:
    chosen = [*BENCHMARK, f"folder={folder}", f"methods=[{methods}]", overrides(*more)]
    sets, cells = cells_of(benchmark_settings(plain(compose_config(chosen, name="benchmark"))))
    for made in sets:
        make_data_set(made)
    return {cell.method: cell for cell in cells}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("benchmark")


@pytest.fixture(scope="module")
def cells(folder: Path) -> dict[str, Cell]:
    return cells_in(folder, "meduet,no_erasure,pooled,alone,random,scratch")


class Seen:
    """Instruments that remember what they were given and tell simple numbers of it."""

    def __init__(self) -> None:
        self.probed: list[tuple[MeDUET, Held, int, bool]] = []
        self.trained: list[tuple[MeDUET | None, dict[str, LabelledScans], DownstreamSettings]] = []

    def probes(
        self, model: MeDUET, plan: Any, held: Held, training: Any, thorough: bool, tokenizer: Any
    ) -> dict[str, float]:
        assert (tokenizer is not None) == thorough
        self.probed.append((model, held, len(training), thorough))
        measured = {
            "patients": 3.0,
            "content": float(model.pooled_content(held.latents).detach().abs().mean()),
        }
        return measured | ({"slow": 1.0} if thorough else {"odd": float("nan")})

    def downstream(
        self,
        model: MeDUET | None,
        train: LabelledScans,
        validation: LabelledScans,
        tests: Mapping[str, LabelledScans],
        settings: DownstreamSettings,
        seed: int,
        *,
        groups: Any = None,
    ) -> Evaluated:
        self.trained.append((model, {"train": train, "validation": validation, **tests}, settings))
        value = float(len(self.trained))
        assert set(groups or {}) == set(tests)
        row = DownstreamRow(
            settings.task,
            settings.modes[0],
            "100%",
            "seen",
            "dice",
            value,
            0.0,
            9.0,
            3,
            0,
            9,
            first_value=value,
        )
        return Evaluated([row], [])

    @property
    def instruments(self) -> Instruments:
        return Instruments(self.probes, self.downstream)


def numbers(measured: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in measured.items() if name != "seconds"}


def test_a_cell_measures_hospitals_that_took_part_and_then_all(cells: dict[str, Cell]) -> None:
    seen = Seen()
    measured = run_cell(cells["meduet"], seen.instruments)
    assert set(measured["measures"]) == {"seen", "all"}
    assert [(sorted(set(held.site)), n) for _, held, n, _ in seen.probed] == [([0, 1], 2)] * 2 + [
        ([0, 1, 2], 3)
    ] * 2
    assert [thorough for *_, thorough in seen.probed] == [True, False] * 2, (
        "content is shared: once is enough"
    )
    assert measured["measures"]["seen"]["slow"] == 1.0 and "odd" not in measured["measures"]["seen"]
    assert set(measured["seconds"]) == {"training", "probes", "downstream", "total"}
    valley = Path(cells["meduet"].config["folder"]) / "sites" / "valley" / "journal.jsonl"
    assert not valley.is_file() or '"kind"' not in valley.read_text()


def test_without_erasure_the_same_run_is_measured_as_it_was_before(cells: dict[str, Cell]) -> None:
    ours, seen = Seen(), Seen()
    run_cell(cells["meduet"], ours.instruments)
    run_cell(cells["no_erasure"], seen.instruments)
    with_erasure, without = ours.probed[0][0], seen.probed[0][0]
    assert torch.equal(without.erasure_matrix, torch.eye(24))
    assert not torch.equal(with_erasure.erasure_matrix, torch.eye(24))
    assert torch.equal(with_erasure.embed.weight, without.embed.weight)


def test_each_site_alone_is_measured_by_each_content_and_pooled_sees_as_many_scans(
    cells: dict[str, Cell],
) -> None:
    alone = Seen()
    run_cell(cells["alone"], alone.instruments)
    assert [thorough for *_, thorough in alone.probed] == [True] * 4
    run_cell(cells["pooled"], Seen().instruments)
    plan = json.loads((Path(cells["pooled"].config["folder"]) / "plan.json").read_text())
    assert plan["training"]["steps_per_round"] == 2 * 2, "two sites take two steps each"


def test_an_untrained_network_has_its_start_and_the_federated_scale(cells: dict[str, Cell]) -> None:
    random, ours = Seen(), Seen()
    run_cell(cells["random"], random.instruments)
    run_cell(cells["meduet"], ours.instruments)
    (start, *_), (trained, *_) = random.probed[0], ours.probed[0]
    assert torch.allclose(start.latent_deviation, trained.latent_deviation, rtol=1e-5)
    assert not torch.equal(start.embed.weight, trained.embed.weight)
    assert not list(Path(cells["random"].config["folder"]).rglob("checkpoints"))


def test_downstream_gets_labels_by_split_and_the_hospital_held_out_whole(cells: dict[str, Cell]) -> None:
    whole: dict[str, Any] = {"label_shares": (1.0,), "steps": 1}
    tasks = (
        Task(task="segmentation", classes=5, **whole),
        Task(task="classification", classes=2, target="disease", values=("no", "yes"), **whole),
    )
    seen = Seen()
    measured = run_cell(dataclasses.replace(cells["scratch"], tasks=tasks), seen.instruments)
    assert measured["measures"] == {}
    (model, parts, settings), (_, classes, _) = seen.trained
    assert model is None and settings.modes == (
        "label_map", "ridge", "ridge_neighbours", "scratch", "unet", "unet_volume",
    )  # fmt: skip
    assert parts["train"].volumes is not None and parts["train"].volumes.shape[2:] == (32, 24, 24)
    assert set(parts) == {"train", "validation", "seen", "held_out"}
    patients = {name: set(part.patient) for name, part in parts.items()}
    assert len(patients["train"] | patients["validation"] | patients["seen"]) == 24
    assert not patients["train"] & patients["seen"] and not patients["train"] & patients["validation"]
    assert set(parts["held_out"].site) == {2} and len(parts["held_out"].patient) == 12
    assert parts["train"].answers.shape[2:] == (32, 24, 24)
    assert set(classes["train"].answers.tolist()) <= {0, 1}
    assert [row["value"] for row in measured["downstream"]] == [1.0, 2.0]
    alone = Seen()
    measured = run_cell(dataclasses.replace(cells["alone"], tasks=tasks[:1]), alone.instruments)
    assert [row["value"] for row in measured["downstream"]] == [1.5], "the mean over the sites' encoders"
    random = Seen()
    run_cell(dataclasses.replace(cells["random"], tasks=tasks), random.instruments)
    assert [settings.modes for *_, settings in random.trained] == [
        ("frozen", "finetuned"), ("frozen", "frozen_tokens", "finetuned"),
    ], "a class is read from the code and from all tokens"  # fmt: skip


def test_settings_are_chosen_without_opening_anybody_held_out(folder: Path) -> None:
    made = cells_in(folder, "meduet", "site.split_fractions=[0.5,0.4,0.1]")["meduet"]
    task = Task(task="segmentation", classes=5, label_shares=(1.0,), steps=1)
    cell = dataclasses.replace(made, patients="validation", tasks=(task,))
    seen = Seen()
    measured = run_cell(cell, seen.instruments)
    assert set(measured["measures"]) == {"seen"}
    assert {site for _, held, *_ in seen.probed for site in held.site} == {0, 1}
    (_, parts, _) = seen.trained[0]
    assert set(parts) == {"train", "validation", "seen"}
    assert parts["seen"].patient == parts["validation"].patient


def test_a_killed_cell_goes_on_to_the_same_numbers(
    tmp_path: Path, folder: Path, cells: dict[str, Cell]
) -> None:
    seen = Seen()
    whole = run_cell(cells["meduet"], seen.instruments)
    run = tmp_path / "run"
    cell = dataclasses.replace(
        cells["meduet"],
        config={**cells["meduet"].config, "folder": str(run)},
        result=str(tmp_path / "r.json"),
    )
    file = tmp_path / "cell.json"
    file.write_text(cell.to_json())
    command = [sys.executable, "-m", "simulations.benchmark.cell", "cell", str(file)]
    with (tmp_path / "out").open("w") as out:
        process = subprocess.Popen(command, cwd=ROOT, stdout=out, stderr=out, env={**os.environ})
        deadline = time.monotonic() + 240
        while not list((run / "checkpoints").glob("round-0001*")) and time.monotonic() < deadline:
            assert process.poll() is None, (tmp_path / "out").read_text()
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert not Path(cell.result).exists()
    again = Seen()
    assert numbers(run_cell(cell, again.instruments)) == numbers(whole)


def test_a_cell_of_a_data_set_that_was_not_made_says_so(tmp_path: Path, cells: dict[str, Cell]) -> None:
    cell = dataclasses.replace(cells["meduet"], made=str(tmp_path))
    with pytest.raises(ValueError, match="Expected a data set in"):
        run_cell(cell, Seen().instruments)


def command(*settings: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "simulations.cli", "--config-name", "benchmark", *settings],
        cwd=ROOT, capture_output=True, text=True, check=False, timeout=600,
    )  # fmt: skip


@pytest.mark.slow  # half a dozen processes begin
def test_the_command_makes_one_table_and_one_page_lists_failures_and_does_only_what_is_missing(
    tmp_path: Path, folder: Path, cells: dict[str, Cell]
) -> None:
    shutil.copytree(folder / "data", tmp_path / "data", symlinks=True)
    for made in (tmp_path / "data").glob("*/hospitals.json"):
        made.write_text(made.read_text().replace(str(folder), str(tmp_path)))
    small = (*BENCHMARK, f"folder={tmp_path}", "methods=[random,meduet]", "workers=2")
    broken = command(*small, overrides("style.minimum_cohort=50"))
    assert broken.returncode == 1, broken.stderr
    assert "1 of 2 cells failed" in broken.stderr
    first = json.loads((tmp_path / "benchmark.json").read_text())
    assert list(first["failed"]) == ["phantoms meduet, seed 1"]
    assert "failed: " in (tmp_path / "benchmark.md").read_text()
    whole = compose_config([*small, overrides()], name="benchmark")
    run_benchmark(whole)  # as the command does: a process of its own takes seconds to begin
    written = json.loads((tmp_path / "benchmark.json").read_text())
    assert written["failed"] == {} and {n["method"] for n in written["numbers"]} == {"meduet", "random"}
    with (tmp_path / "benchmark.csv").open(newline="") as stream:
        assert {row["measure"] for row in csv.DictReader(stream)} >= {
            "seen.site_from_content",
            "seconds.total",
        }
    page = (tmp_path / "benchmark.html").read_text()
    assert page.count("data:image/png;base64,") == 2 and "What failed" not in page
    stamps = {p: p.stat().st_mtime_ns for p in (tmp_path / "results").glob("*.json")}
    run_benchmark(whole)
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "results").glob("*.json")} == stamps
