"""Sites in processes of their own: the same bits whatever their number, and no process is left behind."""

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from client.scans.cohort import NoScans
from meduet_models.weights import load_weights
from server.app import RunObserver
from server.config import compose_config, plain
from simulations.consortium import Consortium
from simulations.engines import side_by_side as engine
from simulations.engines.frames import read_frame, write_frame
from simulations.engines.side_by_side import SideBySide, SiteProcessEnded, num_processes
from simulations.hospitals.make import make_hospitals
from simulations.progress import Live
from simulations.run import Made, Simulation, _read, prepare, simulate
from simulations.run import side_by_side as processes_of
from simulations.settings import settings_from
from tests.small_simulation import small_simulation

SMALL = small_simulation(hospitals=3, paired=0, rounds=3)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    folder = tmp_path_factory.mktemp("hospitals")
    hospitals = make_hospitals(settings_from(plain(compose_config(SMALL)))[1], folder / "hospitals")
    return Made(hospitals, folder / "cache")


def run(
    made: Made,
    folder: Path,
    workers: int | str,
    *,
    observer: RunObserver | None = None,
    on_step: Callable[[list[int], int], None] = lambda process_ids, steps: None,
) -> list[int]:
    """Run, or go on, without a page; the ids of the processes that worked."""
    config = plain(compose_config([*SMALL, f"engine.workers={workers}", f"folder={folder}"]))
    steps: list[int] = []
    process_ids: list[int] = []

    class Watched(Live):
        def on_step(self, site: str, step: int, loss: float) -> None:
            super().on_step(site, step, loss)
            steps.append(step)
            on_step(process_ids, len(steps))

    with Watched() as live:
        simulation = prepare(config, live, made)
        live.begin(simulation.plan)
        with processes_of(simulation) as processes:
            _read(simulation, live, processes)
            process_ids += [] if processes is None else processes.process_ids
            simulate(simulation, live, observer or RunObserver(), processes)
    return process_ids


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_weights(folder / "model.safetensors")[0]


def same(one: Path, other: Path) -> bool:
    first, second = weights(one), weights(other)
    return set(first) == set(second) and all(torch.equal(first[name], second[name]) for name in first)


def what_was_written(folder: Path) -> Any:
    """What the run tells in the order in which it tells it, but for times."""
    metrics = json.loads((folder / "metrics.json").read_text())
    for entry in metrics["rounds"]:
        del entry["seconds"]
        for site in entry["sites"].values():
            site.pop("seconds", None)
    return json.dumps(metrics)


@pytest.fixture(scope="module")
def alone(made: Made, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with all sites in this process."""
    folder = tmp_path_factory.mktemp("runs") / "alone"
    assert run(made, folder, 1) == []
    return folder


def alive(process_id: int) -> bool:
    try:
        os.kill(process_id, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.parametrize("workers", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_the_bits_and_the_metrics_do_not_depend_on_the_number_of_processes(
    made: Made, alone: Path, tmp_path: Path, workers: int
) -> None:
    process_ids = run(made, tmp_path, workers)
    assert len(process_ids) == min(workers, 3)
    assert not any(map(alive, process_ids))
    assert same(tmp_path, alone)
    assert what_was_written(tmp_path) == what_was_written(alone)


def test_a_process_that_is_killed_ends_the_run_in_one_line_and_it_goes_on_to_the_same_bits(
    made: Made, alone: Path, tmp_path: Path
) -> None:
    def kill(process_ids: list[int], steps: int) -> None:
        if steps == 8:  # of 18: in the second round
            os.kill(process_ids[0], signal.SIGKILL)

    with pytest.raises(SiteProcessEnded) as ended:
        run(made, tmp_path, 2, on_step=kill)
    line = str(ended.value)
    assert line.count("\n") == 0
    assert "north, valley ended (signal SIGKILL)" in line and "no memory left" in line
    assert "give the same command again" in line
    assert not (tmp_path / "model.safetensors").exists()
    run(made, tmp_path, 1)
    assert same(tmp_path, alone)


def test_an_interrupt_leaves_no_process_behind(made: Made, tmp_path: Path) -> None:
    seen: list[int] = []

    class Interrupting(RunObserver):
        def on_site_reply(self, round_number: int, site: str, report: Any) -> None:
            raise KeyboardInterrupt

    def note(process_ids: list[int], steps: int) -> None:
        seen[:] = process_ids

    with pytest.raises(KeyboardInterrupt):
        run(made, tmp_path, 2, observer=Interrupting(), on_step=note)
    assert len(seen) == 2 and not any(map(alive, seen))


def test_what_is_wrong_with_a_hospital_is_said_as_in_one_process(made: Made, tmp_path: Path) -> None:
    config = plain(compose_config([*SMALL, "engine.workers=2", f"folder={tmp_path}"]))
    with Live() as live:
        simulation = prepare(config, live, made)
        empty = tmp_path / "empty"
        empty.mkdir()
        (empty / "notes.txt").write_text("no scans here")
        configs = simulation.consortium.configs
        broken = [*configs[:2], configs[2].__class__(**{**vars(configs[2]), "data_root": empty})]
        consortium = Consortium(simulation.plan, tuple(broken), simulation.consortium.state)
        wrong = Simulation(
            simulation.plan, simulation.settings, consortium, simulation.hospitals, tmp_path, False
        )
        with processes_of(wrong) as processes, pytest.raises((NoScans, ValueError)) as error:
            _read(wrong, live, processes)
    assert not isinstance(error.value, SiteProcessEnded)
    assert "empty" in str(error.value) or "scan" in str(error.value)


def test_processes_that_nobody_asks_any_more_end_by_themselves(made: Made, tmp_path: Path) -> None:
    config = plain(compose_config([*SMALL, "engine.workers=2", f"folder={tmp_path}"]))
    with Live() as live:
        simulation = prepare(config, live, made)
    processes = SideBySide(simulation.consortium, 1, 1, tmp_path / "logs")
    process = processes._process(0)
    process._opened.result()
    assert process.child.stdin is not None
    process.child.stdin.close()  # as the system does when whoever started it is killed
    deadline = time.monotonic() + 30
    while process.child.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    assert process.child.returncode == 0
    process.end()


@pytest.mark.parametrize(
    ("asked", "sites", "cores", "threads", "on_gpu", "number"),
    [
        ("auto", 4, 2, 1, False, 2),
        ("auto", 3, 2, 1, False, 3),  # one turn and a half, not two
        ("auto", 5, 2, 1, False, 3),
        ("auto", 5, 2, 2, False, 1),
        ("auto", 3, 1, 1, False, 1),
        ("auto", 3, 16, 1, False, 3),
        ("auto", 3, 16, 1, True, 1),
        (2, 3, 16, 1, True, 2),
        (8, 3, 2, 1, False, 3),
    ],
)
def test_auto_follows_the_cores_and_never_exceeds_the_sites(
    monkeypatch: pytest.MonkeyPatch,
    asked: int | str,
    sites: int,
    cores: int,
    threads: int,
    on_gpu: bool,
    number: int,
) -> None:
    monkeypatch.setattr(engine, "cores", lambda: cores)
    assert num_processes(asked, sites, threads, on_gpu) == number


def test_workers_beside_ray_are_refused_and_so_is_any_other_word() -> None:
    for more, message in (
        (["engine=ray", "engine.workers=2"], "no effect with engine=ray"),
        (["engine.workers=many"], "engine.workers to be auto or a number; got 'many'"),
        (["engine.workers=0"], "engine.workers"),
        (["engine.workers=1.5"], "engine.workers"),
    ):
        with pytest.raises(ValueError, match=message):
            settings_from(plain(compose_config(more)))


def test_a_consortium_travels_as_json_and_comes_back_equal(made: Made, tmp_path: Path) -> None:
    config = plain(compose_config([*SMALL, f"folder={tmp_path}"]))
    with Live() as live:
        consortium = prepare(config, live, made).consortium
    back = Consortium.from_json(consortium.to_json())
    assert (back.plan, back.configs, back.state) == (consortium.plan, consortium.configs, consortium.state)


def test_frames_come_out_as_they_went_in_and_an_end_in_the_middle_is_an_end(tmp_path: Path) -> None:
    path = tmp_path / "pipe"
    with path.open("wb") as stream:
        write_frame(stream, b"A", b"\x00" * 70_000)
        write_frame(stream, b"D")
        write_frame(stream, b"A", b"cut short")
    path.write_bytes(path.read_bytes()[:-3])
    with path.open("rb") as stream:
        assert read_frame(stream) == (b"A", b"\x00" * 70_000)
        assert read_frame(stream) == (b"D", b"")
        with pytest.raises(EOFError):
            read_frame(stream)
