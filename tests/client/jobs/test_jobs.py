"""Answers by jobs: the same bits, books and states as without; and what a job may not do."""

import dataclasses
import faulthandler
import json
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from client.declared import COUNT_NAMES
from client.jobs import asking
from client.jobs.launcher import Launcher
from client.jobs.request import ANSWER, Offer, Request, read_answer, write_answer
from client.watchdog import watchdog
from federation.exchanges.pretraining import TrainReply
from federation.exchanges.survey import SurveyReply
from federation.plan.plan import AggregationPlan, RunPlan
from federation.wire.messages import Refusal, RefusalKind, kind_of
from meduet_models.weights import load_weights
from privacy.ledger import Ledger
from tests.client.jobs.hospital import HospitalFiles, World, bits

Job = Callable[[Path], int]
AtOnce = Callable[..., None]


@pytest.fixture(autouse=True)
def this_process_lives() -> Iterator[None]:
    """The watchdog's clock would end it, in time."""
    yield
    faulthandler.cancel_dump_traceback_later()


def refused(record: Any) -> RefusalKind:
    assert kind_of(record) == "refusal"
    return Refusal.from_record(record).kind


def same_hospital(one: HospitalFiles, other: HospitalFiles) -> None:
    """The same lines in the journal, the same states, the same releases in the ledger."""
    assert one.journal() == other.journal()
    assert one.states() == other.states() != {}
    left = [
        [e.record.get("released") for e in Ledger(h.state_dir / "ledger.jsonl")._chain.entries()]
        for h in (one, other)
    ]
    assert left[0] == left[1]


def test_an_answer_by_a_job_is_the_local_one_to_the_bit_and_so_are_books_and_state(world: World) -> None:
    here, by_job = world.hospital("here"), world.hospital("by-job", "env")
    told: dict[str, list[tuple[int, float]]] = {"here": [], "by-job": []}
    for hospital in (here, by_job):
        steps = told[hospital.folder.name]
        replies = [
            hospital.answer(world.survey()),
            hospital.answer(world.round(), on_step=lambda site, step, loss, s=steps: s.append((step, loss))),
        ]
        SurveyReply.from_record(replies[0])
        TrainReply.from_record(replies[1])
        told[f"{hospital.folder.name} sent"] = [bits(reply) for reply in replies]  # type: ignore[misc]
    assert told["here sent"] == told["by-job sent"]
    assert told["here"] == told["by-job"] and len(told["here"]) == 4  # progress, step by step
    same_hospital(here, by_job)
    assert not list((by_job.state_dir / "jobs").iterdir())  # nothing of it stays


def test_a_job_reads_an_encrypted_cache_with_the_sites_key_file(world: World) -> None:
    sealed = {"cache_dir": "cache", "encrypt_cache": True, "cache_key_file": "cache.key"}
    here, by_job = world.hospital("clear"), world.hospital("sealed", "env", **sealed)
    assert bits(here.answer(world.survey())) == bits(by_job.answer(world.survey()))
    encodings = list((by_job.folder / "cache").rglob("*.safetensors"))
    assert encodings
    for path in encodings:  # the job made them, and left none in clear
        with pytest.raises(ValueError):
            load_weights(path)


def test_a_job_needs_no_network(world: World) -> None:
    without = ("unshare", "--map-root-user", "--net")
    if shutil.which("unshare") is None or subprocess.run([*without, "true"], check=False).returncode:
        pytest.skip("this machine makes no network namespaces (unshare --net)")
    with socket.create_server(("127.0.0.1", 0)) as server:
        connect = f"import socket; socket.create_connection({server.getsockname()!r}, 5)"
        assert subprocess.run([sys.executable, "-c", connect], check=False).returncode == 0
        inside = [*without, sys.executable, "-c", connect]
        assert subprocess.run(inside, check=False, capture_output=True).returncode == 1  # there is none
    here, by_job = world.hospital("with-network"), world.hospital("without-network", *without)
    assert bits(here.answer(world.round())) == bits(by_job.answer(world.round()))
    same_hospital(here, by_job)


def test_a_job_opens_no_socket(world: World, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "import pathlib, socket, sys\n"
        "def seen(event, arguments):\n"
        "    if event in ('socket.connect', 'socket.bind', 'socket.sendto', 'socket.getaddrinfo'):\n"
        "        pathlib.Path(__file__).with_name('seen').open('a').write(event + chr(10))\n"
        "sys.addaudithook(seen)\n"
    )
    watched = {"PYTHONPATH": str(tmp_path)}
    with socket.create_server(("127.0.0.1", 0)) as server:
        connect = f"import socket; socket.create_connection({server.getsockname()!r}, 5)"
        subprocess.run([sys.executable, "-c", connect], env=watched, check=True)
    assert "socket.connect" in (tmp_path / "seen").read_text()  # whoever opens one is seen
    (tmp_path / "seen").unlink()
    hospital = world.hospital("no-socket", "env", f"PYTHONPATH={tmp_path}")
    TrainReply.from_record(hospital.answer(world.round()))
    assert not (tmp_path / "seen").exists()


SCHEDULER = """\
#!/bin/sh
# a queue of one: waits its turn, starts the job, and kills the first one as soon as it has taken two steps
sleep 0.3
[ -e "{there}" ] && exec "$1"
touch "{there}"
mkfifo steps
exec 3<>steps
"$1" &
read first <&3
read second <&3
kill -9 $!
rm steps
wait $!
"""


def test_a_job_that_the_scheduler_kills_is_asked_again_and_goes_on_where_it_was(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(asking, "PAUSE_S", 0.1)
    script = tmp_path / "scheduler"
    script.write_text(SCHEDULER.format(there=tmp_path / "was-here"))
    script.chmod(0o700)
    slow = world.plan.to_json().replace('"steps_per_round":4', '"steps_per_round":60')
    plan = RunPlan.from_json(slow)
    longer = World(world.folder, plan, world.bank)
    here = longer.hospital("undisturbed", progress_every_s=0.0)
    killed = longer.hospital("killed", str(script), progress_every_s=0.0)
    assert bits(here.answer(longer.round())) == bits(killed.answer(longer.round()))
    same_hospital(here, killed)
    assert "left no answer, 1 of 3" in killed.log() and "goes on from there" in killed.log()


def test_a_job_that_never_answers_is_asked_three_times_and_no_more(world: World, at_once: AtOnce) -> None:
    asked: list[str] = []

    def job(request: Path) -> int:
        asked.append(Request.read(request).attempt)
        return 137

    at_once(job)
    hospital = world.hospital("never", "env")
    assert refused(hospital.answer(world.round())) is RefusalKind.NOT_ANSWERED
    assert len(asked) == asking.LAUNCHES == 3
    assert hospital.journal()[-1]["reason"] == "internal"
    assert not (hospital.state_dir / "state").exists() or hospital.states() == {}


def test_the_answer_to_another_request_is_refused(world: World, at_once: AtOnce) -> None:
    kept: dict[str, Path] = {}

    def job(request: Path) -> int:
        if not kept:  # the first question is answered as it should be, and its answer kept
            write_answer(request.parent, Request.read(request).sha256, an_offer(world))
            kept["answer"] = world.folder / "kept"
            shutil.copy(request.parent / ANSWER, kept["answer"])
        shutil.copy(kept["answer"], request.parent / ANSWER)
        return 0

    at_once(job)
    honest, replayed = world.hospital("honest", "env"), world.hospital("replayed", "env")
    SurveyReply.from_record(honest.answer(world.survey()))
    # the very same question, at another site or another day: it is another request
    assert refused(replayed.answer(world.survey())) is RefusalKind.NOT_ANSWERED
    assert "it is the answer to another" in replayed.log()
    assert [line["kind"] for line in replayed.journal()] == ["refusal"]


def an_offer(world: World, **changes: Any) -> Offer:
    """What a job of the survey would offer."""
    site = world.hospital("offering").site()
    from client.exchanges.survey import ANSWER as row
    from client.jobs.program import Offered, OfferingGate

    ask = world.survey()
    gate = OfferingGate(row.exchange.promise(world.plan, ask), site.state_dir)
    with pytest.raises(Offered) as offered:
        row.work(site, ask, world.plan, gate, lambda step, loss: None)
    return dataclasses.replace(offered.value.offer, **changes)


@pytest.mark.parametrize(
    ("lie", "reason"),
    [
        (lambda offer: {n: t * float("nan") for n, t in offer.tensors.items()}, "non_finite"),
        (lambda offer: {n: t * 1e6 for n, t in offer.tensors.items()}, "internal"),  # past the bound
        (lambda offer: {**offer.tensors, "scan": torch.ones(3)}, "internal"),  # not declared
    ],
    ids=["not finite", "unbounded", "undeclared"],
)
def test_what_a_job_leaves_passes_the_gate_or_does_not_leave(
    lie: Callable[[Offer], dict[str, torch.Tensor]], reason: str, world: World, at_once: AtOnce
) -> None:
    offer = an_offer(world)

    def job(request: Path) -> int:
        lying = dataclasses.replace(offer, tensors=lie(offer))
        write_answer(request.parent, Request.read(request).sha256, lying)
        # without the gate this is what would be sent
        assert read_answer(request.parent, Request.read(request).sha256).arguments()["tensors"]
        return 0

    at_once(job)
    hospital = world.hospital(f"lying-{reason}", "env")
    assert refused(hospital.answer(world.survey())) is RefusalKind.NOT_ANSWERED
    assert [(line["kind"], line["reason"]) for line in hospital.journal()][-1] == ("refusal", reason)


def test_a_jobs_words_are_counts_of_the_agreed_names_or_do_not_leave(world: World, at_once: AtOnce) -> None:
    offer = an_offer(world)
    said = {**offer.said, "counts": {**offer.said["counts"], "jane_doe": 1961}}
    at_once(lambda request: write_answer(request.parent, Request.read(request).sha256,
                                         dataclasses.replace(offer, said=said)) or 0)  # fmt: skip
    hospital = world.hospital("talking", "env")
    assert "jane_doe" not in COUNT_NAMES
    reply = hospital.answer(world.survey())
    assert refused(reply) is RefusalKind.NOT_ANSWERED and "jane" not in str(reply)


def test_an_update_that_a_job_made_too_long_leaves_clipped(world: World, at_once: AtOnce) -> None:
    at_once()
    hospital = world.hospital("long", "env")
    real = asking.read_answer
    longer = 1e6

    def stretched(folder: Path, sha256: str) -> Offer:
        offer = real(folder, sha256)
        return dataclasses.replace(offer, tensors={n: t * longer for n, t in offer.tensors.items()})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(asking, "read_answer", stretched)
        TrainReply.from_record(hospital.answer(world.round()))
    line = hospital.journal()[-1]
    assert line["clipped"] and line["norm_after"] <= line["bound"]


def test_a_jobs_refusal_is_the_sites_own_word_and_its_text_stays(world: World, at_once: AtOnce) -> None:
    at_once()
    local = world.hospital("few-here", minimum_cohort=1000)
    by_job = world.hospital("few-by-job", "env", minimum_cohort=1000)
    assert refused(local.answer(world.survey())) is RefusalKind.COHORT_TOO_SMALL
    reply = by_job.answer(world.survey())
    assert refused(reply) is RefusalKind.COHORT_TOO_SMALL
    assert str(world.folder) not in str(reply)
    assert local.journal() == by_job.journal()


def test_a_job_is_told_no_key_and_nobodys_approval(world: World) -> None:
    hospital = world.hospital("told", "env", keys_dir="keys", plan_approval="required")
    launcher = hospital.site().launcher
    assert launcher is not None
    told = json.loads(launcher.settings)
    assert (told.get("keys_dir"), told["launcher"], told["approvals"]["people"]) == (None, [], {})
    assert Path(told["data_root"]).is_absolute() and Path(told["state_dir"]).is_absolute()


def test_a_job_that_is_late_is_given_up_and_its_launcher_ends(world: World) -> None:
    plan = dataclasses.replace(world.plan, aggregation=AggregationPlan(deadline_s=2.0))
    late = World(world.folder, plan, world.bank)
    hospital = late.hospital("late", "sh", "-c", "echo $$ > ../../pid; sleep 300")
    assert refused(hospital.answer(late.survey(), watch=watchdog)) is RefusalKind.NOT_ANSWERED
    assert hospital.journal()[-1]["reason"] == "deadline"
    pid = int((hospital.state_dir / "pid").read_text())
    gone = threading.Event()
    for _ in range(100):
        if not Path(f"/proc/{pid}").exists() and not list((hospital.state_dir / "jobs").glob("*")):
            break
        gone.wait(0.1)
    assert not Path(f"/proc/{pid}").exists()
    assert not list((hospital.state_dir / "jobs").glob("*"))


def test_a_job_whose_request_is_gone_ends_at_its_next_step_and_leaves_nothing(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from client.exchanges.pretraining import ANSWER as row
    from client.jobs import program

    launcher = world.hospital("withdrawn", "env").site().launcher
    assert launcher is not None
    path = asking._request(row, launcher, world.round(), None).write(tmp_path)
    real = program._still_there
    looked: list[Path] = []

    def taken_away(request: Path) -> None:
        looked.append(request)
        if len(looked) == 2:
            request.unlink()
        real(request)

    monkeypatch.setattr(program, "_still_there", taken_away)
    monkeypatch.setattr(sys, "argv", ["program", str(path)])
    assert program.main() == 1
    assert len(looked) == 2 and not (tmp_path / ANSWER).exists()


def test_a_request_is_read_as_it_was_written_and_a_changed_one_has_another_hash(
    world: World, tmp_path: Path
) -> None:
    from client.exchanges.pretraining import ANSWER as row

    launcher = Launcher(("env",), "{}")
    request = asking._request(row, launcher, world.round(), None)
    again = Request.read(request.write(tmp_path))
    assert again == request and again.sha256 == request.sha256
    assert again.ask(row.exchange.ask).sha256() == world.round().sha256()
    other = dataclasses.replace(request, attempt="0" * 16)
    assert other.sha256 != request.sha256
    swapped = dataclasses.replace(request, message=Request.message_of(world.round(2)))
    with pytest.raises(ValueError, match="the message is another"):
        swapped.ask(row.exchange.ask)
