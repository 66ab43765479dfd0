"""A fine-tuning that was published and approved, in a consortium of real processes over TLS: only hospitals
that approved it take part, and an application that is killed goes on to the same bits."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from client.app import make_client_app
from federation.published_plan import PublishedPlan
from meduet_models.threads import fixed_threads
from meduet_models.weights import load_weights
from server.config import compose_config, plain
from server.deployment.status import read_status
from server.exchanges.finetuning import FINETUNED, pretrained_of, run_finetuning
from simulations.engines.in_process import FixedThreads, InProcessGrid
from simulations.poc import SMALL
from simulations.progress import Live
from simulations.run import Made, prepare
from tests.faults.consortium import (
    TINY,
    Consortium,
    Weights,
    command,
    consortium,
    kill,
    same_bits,
    site_command,
    undisturbed,
)
from tests.faults.page import Book

pytestmark = pytest.mark.faults

PLAN = (
    "hospitals.num_hospitals=2",
    "training.rounds=1",
    "aggregation.deadline_s=300",
    "aggregation.optimiser=momentum",
)
SETTINGS = ("local.task=segmentation", "local.classes=5", "local.steps=4", "local.batch_size=4", "rounds=3")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Consortium, Path, Weights]]:
    """Hospitals that ask to be asked; the published fine-tuning; the weights that it comes to elsewhere."""
    folder = tmp_path_factory.mktemp("finetuning")
    made, _ = undisturbed(folder / "undisturbed", PLAN)
    pretrained = folder / "undisturbed" / "run"
    whole = consortium(folder, PLAN, made, {}, runs=False)
    agreed = folder / "finetuning.json"
    done = command("server.cli", "finetuning", str(pretrained), *SETTINGS, "--out", str(agreed))
    assert done.returncode == 0, done.stderr
    plan = str(folder / "plan.json")
    done = command(
        "server.cli", "publish", plan, "--finetuning", str(agreed), "--out", str(folder / "published")
    )
    assert done.returncode == 0, done.stderr
    (published,) = (folder / "published").iterdir()
    for path in whole.poc.site_yamls.values():
        values = yaml.safe_load(path.read_text()) | {"plan_approval": "required"}
        path.write_text(yaml.safe_dump(values, sort_keys=False))
    expected = elsewhere(folder / "elsewhere", made, published, pretrained)
    with whole.supervisor:
        yield whole, published, expected


def elsewhere(folder: Path, made: Made, published: Path, pretrained: Path) -> Weights:
    """The same fine-tuning in this process, never stopped."""
    settings = plain(compose_config([*SMALL, *TINY, *PLAN, f"folder={folder / 'run'}"]))
    document = PublishedPlan.from_json(published.read_text())
    assert document.finetuning is not None
    with fixed_threads(1), Live() as live:
        simulation = prepare(settings, live, made)
        assert simulation.plan.sha256 == document.plan.sha256
        app = make_client_app(simulation.consortium.open_by_context)
        grid = InProcessGrid(FixedThreads(app, 1), len(simulation.plan.sites))
        network = pretrained_of(pretrained).network
        done = run_finetuning(grid, document.plan, document.finetuning, network, folder / "fine")
    return done.network.state_dict()


def test_a_published_fine_tuning_runs_where_it_was_approved_and_survives_a_kill(
    run: tuple[Consortium, Path, Weights], book: Book
) -> None:
    whole, published, expected = run
    folder = whole.poc.folder / "fine"
    typed = ("run", str(published), "--folder", str(folder), "--config", str(whole.poc.server_yaml))
    mistaken = command("server.cli", *typed)
    assert mistaken.returncode == 2 and "--pretrained" in mistaken.stderr
    pretrained = whole.poc.folder / "undisturbed" / "run"
    command_line = [sys.executable, "-m", "server.cli", *typed, "--pretrained", str(pretrained)]

    with subprocess.Popen(command_line, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as runs:

        def put_aside() -> bool:
            status = read_status(folder) or {}
            return status.get("state") == "failed"

        whole.until(put_aside, "a run that nobody approved", longest_s=200)
        assert "plan_not_accepted" in (read_status(folder) or {})["reason"]
        assert not (folder / "checkpoints" / "round-0001.safetensors").is_file()
        sha256 = published.name.removesuffix(".plan.json")
        for path in whole.poc.site_yamls.values():
            shown = site_command("plan", "show", str(published), config=path)
            assert shown.returncode == 0 and "Fine-tuning of run" in shown.stdout
            assert site_command("plan", "approve", sha256[:12], config=path).returncode == 0
        whole.until((folder / "checkpoints" / "round-0001.safetensors").is_file, "round 1", longest_s=200)
        kill((read_status(folder) or {})["pid"])
        whole.until(lambda: runs.poll() is not None, "the end", longest_s=300)
        said = runs.stdout.read() if runs.stdout is not None else ""
    assert runs.returncode == 0, said
    assert said.count("submitted") >= 3
    status = read_status(folder) or {}
    assert (status["state"], status["plan"], status["rounds"]) == ("complete", sha256, 3)
    metrics = json.loads((folder / "metrics.json").read_text())
    assert [entry["round"] for entry in metrics["rounds"]] == [1, 2, 3]
    assert same_bits(load_weights(folder / FINETUNED)[0], expected)
    for path in whole.poc.site_yamls.values():
        assert site_command("journal", "verify", config=path).returncode == 0
    book.note(
        "a fine-tuning: nobody approved it; then approved, and its server application, `kill -9`",
        "sites refuse until they approved it; it is submitted again and goes on after the last checkpoint",
        "the work of the round under way; same bits",
    )
