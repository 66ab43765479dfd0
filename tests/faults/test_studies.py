"""Two plans at once at the same hospitals, one of which has its work done by jobs without a network, and one
of those is killed: both runs end in the bits of runs on which nothing happened."""

import json
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path

import pytest
import yaml

from federation.journal import Journal
from meduet_models.weights import load_weights
from server.deployment.status import read_status
from tests.faults.consortium import (
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
from tests.faults.test_strangers import running

pytestmark = pytest.mark.faults

FIRST = ("hospitals.num_hospitals=2", "training.rounds=2", "aggregation.deadline_s=900")
SECOND = (*FIRST, "name=second", "training.steps_per_round=3")
WITHOUT_NETWORK = ("unshare", "--map-root-user", "--net")
LONGEST_S = 1200.0


@pytest.fixture(scope="module")
def studies(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Consortium, Path, list[Weights]]]:
    """The consortium, the second plan as it was published, and what both plans come to elsewhere."""
    folder = tmp_path_factory.mktemp("studies")
    made, first = undisturbed(folder / "first", FIRST)
    _, second = undisturbed(folder / "second", SECOND)
    whole = consortium(folder, FIRST, made, {}, runs=False)
    plan = str(folder / "second" / "run" / "plan.json")
    done = command("server.cli", "publish", plan, "--out", str(folder / "published"))
    assert done.returncode == 0, done.stdout + done.stderr
    (published,) = (folder / "published").iterdir()
    path = next(iter(whole.poc.site_yamls.values()))
    there = shutil.which("unshare") and not subprocess.run([*WITHOUT_NETWORK, "true"], check=False).returncode
    launcher = [*WITHOUT_NETWORK] if there else ["env"]
    path.write_text(
        yaml.safe_dump(yaml.safe_load(path.read_text()) | {"launcher": launcher}, sort_keys=False)
    )
    with whole.supervisor:
        yield whole, published, [first, second]


def jobs() -> list[int]:
    """Process ids of jobs that are at work."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            line = (folder / "cmdline").read_bytes()
        except OSError:
            continue
        if b"client.jobs.program" in line and b"request.safetensors" in line:
            found.append(int(folder.name))
    return found


def test_two_plans_at_once_end_as_each_would_alone_with_jobs_and_a_job_that_was_killed(
    studies: tuple[Consortium, Path, list[Weights]], book: Book
) -> None:
    whole, published, expected = studies
    name, path = next(iter(whole.poc.site_yamls.items()))
    folders = [whole.poc.folder / "run-first", whole.poc.folder / "run-second"]
    with ExitStack() as runs:
        for plan, folder in zip((whole.poc.plan_path, published), folders, strict=True):
            runs.enter_context(running(whole, plan, folder))
        whole.until(
            lambda: any((whole.config(name).state_dir / "state").rglob("round-0001.partial.safetensors")),
            "a job that trains",
            LONGEST_S,
        )
        kill(*jobs())
        for folder in folders:
            whole.until(
                lambda f=folder: (read_status(f) or {}).get("state") == "complete", folder.name, LONGEST_S
            )
    for folder, weights in zip(folders, expected, strict=True):
        assert same_bits(load_weights(folder / "model.safetensors")[0], weights)
    for config in whole.poc.site_yamls.values():
        assert site_command("journal", "verify", config=config).returncode == 0
    assert "left no answer, 1 of 3" in whole.site_log(name)
    lines = [e.record for e in Journal(whole.config(name).state_dir / "journal.jsonl").entries()]
    plans = [line["plan"] for line in lines if "promise" in line]
    assert len(set(plans)) == 2
    turns = sum(one != other for one, other in pairwise(plans))
    assert turns >= 3  # neither waited until the other was done
    listed = json.loads(site_command("releases", "--json", config=path).stdout)
    assert {one["plan_sha256"] for one in listed} == set(plans)
    book.note(
        "two plans at once; at one hospital work is done by jobs without a network, and a job is killed",
        "the question is given to the launcher again and goes on where it was; the plans take turns",
        "nothing; same bits, both",
    )
