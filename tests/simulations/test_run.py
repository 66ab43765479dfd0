"""Whole simulations, small: from settings to page, every method, both engines, stopped and resumed."""

import csv
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
from omegaconf import OmegaConf

from meduet_models.weights import load_weights
from server.config import compose_config, plain
from simulations import observer
from simulations.progress import Live
from simulations.run import Simulation, prepare, run
from tests.small_simulation import small_simulation

SMALL = small_simulation(rounds=3)


def settings(folder: Path, *more: str) -> Any:
    return compose_config([*SMALL, *more, f"folder={folder}"])


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_weights(folder / "model.safetensors")[0]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("simulation") / "undisturbed"
    run(settings(folder))
    return folder


def test_a_run_leaves_metrics_weights_figures_and_one_page(undisturbed: Path) -> None:
    metrics = json.loads((undisturbed / "metrics.json").read_text())
    assert [entry["round"] for entry in metrics["rounds"]] == [1, 2, 3]
    assert set(metrics["rounds"][0]["sites"]) == {"north", "harbour"}
    assert metrics["final"]["chance_site"] == 0.5
    with (undisturbed / "metrics.csv").open(newline="") as stream:
        assert len(list(csv.DictReader(stream))) == 3 * 3  # two sites and all of them
    page = (undisturbed / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 2 + 3  # a swap per hospital; probes, losses, traffic
    assert "http" not in page.split("</style>")[1].split("<pre>")[0]  # nothing is fetched
    assert (undisturbed / "figures" / "swap-north.png").is_file()
    for name in ("plan.json", "config.yaml", "versions.json", "journal.jsonl"):
        assert (undisturbed / name).is_file()


@pytest.mark.slow
def test_the_same_seed_gives_the_same_weights_and_another_seed_others(
    undisturbed: Path, tmp_path: Path
) -> None:
    run(settings(tmp_path / "again"))
    assert all(torch.equal(weights(undisturbed)[n], t) for n, t in weights(tmp_path / "again").items())
    run(settings(tmp_path / "other", "seed=1"))
    assert any(not torch.equal(weights(undisturbed)[n], t) for n, t in weights(tmp_path / "other").items())


@pytest.mark.parametrize("stop_after", [1, 3])
def test_a_run_that_was_interrupted_ends_in_the_same_bits(
    undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop_after: int
) -> None:
    ended = observer.Witness.on_round_end

    def interrupt(
        witness: Any, round_number: int, shared: Mapping[str, Any], metrics: Mapping[str, Any]
    ) -> Any:
        if round_number == stop_after:
            raise KeyboardInterrupt
        return ended(witness, round_number, shared, metrics)

    monkeypatch.setattr(observer.Witness, "on_round_end", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run(settings(tmp_path / "run"))
    monkeypatch.undo()
    run(settings(tmp_path / "run"))
    assert all(torch.equal(weights(undisturbed)[n], t) for n, t in weights(tmp_path / "run").items())


def alive(process_id: int) -> bool:
    try:
        return Path(f"/proc/{process_id}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_a_killed_process_goes_on_to_the_same_bits_and_leaves_no_process_behind(
    undisturbed: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    command = [sys.executable, "-m", "simulations.cli", *SMALL, "engine.workers=2", f"folder={folder}"]
    root = Path(__file__).resolve().parents[2]
    with (tmp_path / "out").open("w") as out:
        process = subprocess.Popen(command, cwd=root, stdout=out, stderr=out, env={**os.environ})
        deadline = time.monotonic() + 120
        while not list((folder / "checkpoints").glob("round-0001*")) and time.monotonic() < deadline:
            assert process.poll() is None, (tmp_path / "out").read_text()
            time.sleep(0.02)
        listed = Path(f"/proc/{process.pid}/task").glob("*/children")
        children = [int(child) for path in listed for child in path.read_text().split()]
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert len(children) == 2
    while any(map(alive, children)) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not any(map(alive, children))
    run(settings(folder))
    assert all(torch.equal(weights(undisturbed)[n], t) for n, t in weights(folder).items())


def test_a_complete_run_is_not_run_again_and_fresh_starts_over(undisturbed: Path, tmp_path: Path) -> None:
    before = (undisturbed / "model.safetensors").stat().st_mtime_ns
    run(settings(undisturbed))
    assert (undisturbed / "model.safetensors").stat().st_mtime_ns == before
    shutil.copytree(undisturbed, tmp_path / "run", symlinks=True)
    prepare(plain(settings(tmp_path / "run", "fresh=true")), Live())
    left = {path.name for path in (tmp_path / "run").iterdir()}
    assert not left & {"plan.json", "model.safetensors", "journal.jsonl", "checkpoints"}


def test_a_folder_that_holds_another_run_is_refused(undisturbed: Path) -> None:
    with pytest.raises(ValueError, match=r"plan\.json is another"):
        run(settings(undisturbed, "training.learning_rate=1e-4"))


@pytest.mark.parametrize("method", ["fedavg", "fedprox", "alone", "pooled"])
def test_every_baseline_runs_with_the_same_messages(tmp_path: Path, method: str) -> None:
    run(settings(tmp_path, f"method={method}", "training.rounds=1"))
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["rounds"][0]["loss"]["reconstruction"] > 0
    assert "site_from_content" in metrics["final"]
    if method == "alone":  # each site standardises by its own scans
        (state,) = (tmp_path / "sites" / "north" / "state").rglob("round-0001.safetensors")
        kept = load_weights(state)[0]
        (scale,) = (t for name, t in kept.items() if name.endswith("latent_deviation") and "home" in name)
        assert not torch.equal(scale, torch.ones_like(scale))


@pytest.mark.slow  # tests/rounds/test_engines.py compares the two engines in a third of the time
@pytest.mark.ray
def test_ray_ends_in_the_same_bits_as_one_process(undisturbed: Path, tmp_path: Path) -> None:
    folder = tmp_path / "ray"
    command = [
        sys.executable,
        "-m",
        "simulations.cli",
        *SMALL,
        "engine=ray",
        "engine.workers=auto",
        f"folder={folder}",
    ]
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert all(torch.equal(weights(undisturbed)[n], t) for n, t in weights(folder).items())


@pytest.mark.slow  # three processes begin
def test_several_runs_at_once_have_a_folder_each(tmp_path: Path) -> None:
    root = Path(__file__).resolve().parents[2]
    more = ["training.rounds=1", f"hydra.sweep.dir={tmp_path}", "tracking=[tensorboard]", "seed=3,4"]
    command = [sys.executable, "-m", "simulations.cli", "--multirun", *SMALL, *more]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    pages = sorted(tmp_path.rglob("report.html"))
    assert len(pages) == 2
    assert all(list(page.parent.glob("tracking/tensorboard/events.*")) for page in pages)
    assert weights(pages[0].parent).keys() == weights(pages[1].parent).keys()


def test_a_mistake_in_the_settings_is_one_line_and_exit_code_2(tmp_path: Path) -> None:
    root = Path(__file__).resolve().parents[2]
    command = [sys.executable, "-m", "simulations.cli", "root=/scans", f"folder={tmp_path / 'run'}"]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "root has no effect with hospitals=phantoms" in done.stderr
    assert "Traceback" not in done.stderr


def test_settings_are_judged_for_as_many_hospitals_as_take_part(tmp_path: Path) -> None:
    """A secure sum of four goes on with three; one of three does not."""
    summed = ["aggregation.secure_sum=true", "aggregation.norm_tolerance=0", "aggregation.quorum=0.75"]

    def prepared(number: int, *more: str) -> Simulation:
        words = [
            *small_simulation(hospitals=number, patients=2, paired=0),
            *summed,
            *more,
            f"folder={tmp_path / 'run'}",
        ]
        return prepare(plain(compose_config(words)), Live())

    for number, more in ((3, ()), (4, ("held_out=[north]",))):
        with pytest.raises(ValueError, match="a secure sum of 3 sites needs 3"):
            prepared(number, *more)
    assert not (tmp_path / "run").exists()
    assert len(prepared(4).plan.sites) == 4


def test_the_configuration_that_was_used_is_kept(undisturbed: Path) -> None:
    kept = OmegaConf.load(undisturbed / "config.yaml")
    assert kept.training.rounds == 3
    assert kept.network.width == 24
