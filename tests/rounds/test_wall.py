"""Nothing that a site's own failures say crosses: whole runs in which sites fail with patients' names."""

import dataclasses
import logging
from collections import Counter
from pathlib import Path
from typing import Any, NoReturn

import flwr
import pytest
import torch
from flwr.app import ArrayRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from client.app import LOG_NAME, make_client_app
from federation.exchanges.erasure import ERASURE
from federation.exchanges.finetuning import FINETUNING, FinetunePlan, LocalFinetuning
from federation.exchanges.pretraining import PRETRAINING
from federation.exchanges.probes import PROBES
from federation.exchanges.survey import SURVEY
from federation.journal import Journal
from federation.keys.identity import SiteIdentity
from federation.plan.plan import ProbePlan, RunPlan, TrainingPlan
from meduet_models.meduet import FactorNetwork
from privacy.ledger import Ledger
from server.app import run
from server.exchanges.finetuning import pretrained_sha256, run_finetuning
from simulations.consortium import simulated_identity
from simulations.engines.in_process import InProcessGrid
from tests.worlds import KnownScans

SECRET = "Mustermann born-1961-04-12 /mnt/pacs/mustermann.dcm"  # words that no hash spells by chance
SITES = ("oslo", "lyon", "turin", "basel")


class MustermannError(RuntimeError):
    """An exception whose very name is a patient's."""


class Hospital:
    """A site in a folder that fails at `place` while `fails`."""

    def __init__(self, folder: Path, name: str, number: int, place: str, fails: bool) -> None:
        self.name, self.state_dir, self._number = name, folder, number
        self.device, self.compile, self.minimum_cohort = torch.device("cpu"), False, 0
        self.progress_every_s, self.exact_sums, self.secret, self.launcher = 30.0, True, b"1" * 32, None
        self.ledger, self.journal = Ledger(folder / "ledger.jsonl"), Journal(folder / "journal.jsonl")
        self._place = place if fails else ""
        if self._place == "reserve":
            self.ledger.reserve = self._fail  # type: ignore[method-assign]
        if self._place == "append":
            self.journal.append = self._fail  # type: ignore[method-assign]

    def _fail(self, *given: object, **named: object) -> NoReturn:
        logging.getLogger("client.training.pretraining").error("about to fail: %s", SECRET)
        raise MustermannError(f"cannot read {SECRET}") from OSError(2, SECRET, SECRET)

    def identity(self) -> SiteIdentity:
        return simulated_identity(self.name)

    def accept(self, plan: RunPlan, finetuning_sha256: str = "") -> None:
        if self._place == "accept":
            self._fail()

    def scans(self, plan: RunPlan) -> Any:
        if self._place == "scans":
            self._fail()
        return KnownScans(self._number, 18, labelled=18)


class Sites(ClientApp):
    """The sites' app, which fails as `failures` says: site -> (kind of question, which of its kind)."""

    def __init__(self, folder: Path, place: str, failures: dict[str, list[tuple[str, int]]]) -> None:
        super().__init__()
        self.folder, self.place, self.failures = folder, place, failures
        self.asked: Counter[tuple[str, str]] = Counter()
        self.failed: set[tuple[str, int]] = set()
        self.sent = ""
        self._fails = False
        self._app = make_client_app(self._open)

    def _open(self, context: Context) -> Any:
        number = int(context.node_config["partition-id"])
        own = self.folder / "sites" / SITES[number]
        return Hospital(own, SITES[number], number, self.place, self._fails)

    def __call__(self, message: Message, context: Context) -> Message:
        site, kind = SITES[int(context.node_config["partition-id"])], message.metadata.message_type
        self.asked[site, kind] += 1
        question = (kind, self.asked[site, kind])
        self._fails = question in self.failures.get(site, [])
        reply = self._app(message, context)
        if self._fails:
            assert reply.content["head"]["reason"] == "not_answered", dict(reply.content["head"])
            self.failed.add(question)
        self.sent += written(reply.content)
        return reply


def written(record: RecordDict) -> str:
    """All that a reply holds, as text."""
    parts = [f"{name} {dict(part)}" for name, part in record.items() if not isinstance(part, ArrayRecord)]
    arrays = [part for part in record.values() if isinstance(part, ArrayRecord)]
    return " ".join([*parts, *(repr(array.data) for part in arrays for array in part.values())])


def central(folder: Path, caplog: pytest.LogCaptureFixture) -> str:
    """Everything that the centre has: its files, and what a ServerApp's process logs (Flower uploads
    that)."""
    files = [path for path in folder.rglob("*") if path.is_file() and "sites" not in path.parts]
    logged = [record for record in caplog.records if not record.name.startswith("client")]
    assert any("not_answered" in record.getMessage() for record in logged)  # the centre was told that much
    handler = logging.Formatter("%(name)s %(message)s")
    return " ".join([*(path.read_bytes().decode("latin-1") for path in files), *map(handler.format, logged)])


def assert_nothing_crossed(sites: Sites, text: str) -> None:
    for word in (*SECRET.split(), "MustermannError"):
        assert word not in sites.sent and word not in text
    logs = [p.read_text() for p in (sites.folder / "sites").glob(f"*/{LOG_NAME}")]
    assert any(SECRET in log and "MustermannError" in log for log in logs)  # the hospital itself can find out


@pytest.fixture
def plan(miniature: Any) -> RunPlan:
    plan: RunPlan = miniature.plan(deadline_s=300.0, quorum=0.5)
    network = dataclasses.replace(plan.network, width=16)  # room for a code of four sites
    plan = dataclasses.replace(plan, sites=SITES, network=network)
    training = TrainingPlan(rounds=2, steps_per_round=1, batch_size=4, warmup=0.0)
    return dataclasses.replace(plan, training=training, probes=ProbePlan(every_rounds=1, folds=3))


@pytest.mark.parametrize("place", ["accept", "reserve", "scans", "append"])
def test_no_failure_of_a_site_is_told_in_its_own_words_at_any_question(
    plan: RunPlan, tmp_path: Path, caplog: pytest.LogCaptureFixture, place: str
) -> None:
    failures = {
        "lyon": [(SURVEY.route, 1), (PROBES.route, 1)],
        "turin": [(PRETRAINING.route, 2)],
        "basel": [(PROBES.route, 2), (ERASURE.route, 1)],
    }
    sites = Sites(tmp_path, place, failures)
    result = run(InProcessGrid(sites, 4, through_wire=True), plan, tmp_path)
    assert sites.failed == {question for questions in failures.values() for question in questions}
    assert result.model is not None  # and the run came to its end
    assert_nothing_crossed(sites, central(tmp_path, caplog))
    if place == "append":
        return
    for (
        site
    ) in SITES:  # the centre's line of a reply and the site's line of the release name the same tensors
        books = [e.record for e in Journal(tmp_path / "sites" / site / "journal.jsonl").entries()]
        left = [record for record in books if record["kind"] != "refusal"]
        lines = [e.record for e in Journal(tmp_path / "journal.jsonl").entries()]
        came = [record for record in lines if record["kind"] == "reply" and record["site"] == site]
        assert [(r["sha256"], r["bytes"], r["tensors"]) for r in came] == [
            (r["sha256"], r["bytes"], r["tensors"]) for r in left
        ]
        assert {record["plan"] for record in came} == {plan.sha256}
    rounds = [r for r in came if r["to"] == PRETRAINING.route]
    assert [r["round"] for r in rounds] == [1, 2] and all(r["norm"] > 0 for r in rounds)


@pytest.mark.parametrize("place", ["accept", "scans", "append"])
def test_nor_when_it_is_asked_to_fine_tune(
    plan: RunPlan, tmp_path: Path, caplog: pytest.LogCaptureFixture, place: str
) -> None:
    pretrained = FactorNetwork(plan.network, seed=5)
    local = LocalFinetuning(task="segmentation", classes=2, steps=1, encoder="frozen")
    finetuning = FinetunePlan(
        run_sha256=plan.sha256, pretrained_sha256=pretrained_sha256(pretrained), local=local, rounds=1
    )
    sites = Sites(tmp_path, place, {"lyon": [(FINETUNING.route, 1)]})
    grid = InProcessGrid(sites, 4, through_wire=True)
    run_finetuning(grid, plan, finetuning, pretrained, tmp_path / "fine")
    assert sites.failed == {(FINETUNING.route, 1)}
    assert_nothing_crossed(sites, central(tmp_path, caplog))


def test_flower_uploads_no_log_of_a_site() -> None:
    """Of the pinned version: the ServerApp's log goes to the SuperLink, a ClientApp's goes nowhere."""
    root = Path(flwr.__file__).parent
    centre = (root / "superlink" / "runtime" / "run_serverapp.py").read_text()
    assert "start_log_uploader" in centre  # the name to look for is still this one
    site = [*(root / "supernode").rglob("*.py"), *(root / "clientapp").rglob("*.py")]
    assert len(site) > 10
    assert [
        path for path in site if "log_uploader" in path.read_text() or "push_logs" in path.read_text()
    ] == []
