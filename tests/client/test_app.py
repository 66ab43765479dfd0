import dataclasses
import faulthandler
import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, Metadata, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from client.app import LOG_NAME, make_client_app
from client.app import app as deployed_app
from client.declared import GateRefusal
from client.exchanges import survey as survey_exchange
from client.exchanges.exchange import AskRefused
from client.training.site_state import StateDamaged, StateFolder, StateMissing
from client.training.trainee import WrongWeights
from client.watchdog import DeadlineMissed, watchdog
from federation.exchanges.erasure import ERASURE, ErasureAsk, ErasureReply
from federation.exchanges.pretraining import PRETRAINING, TrainAsk, TrainReply
from federation.exchanges.survey import SURVEY, SurveyAsk, SurveyReply
from federation.journal import Journal
from federation.plan.optimisation import NotFinite
from federation.plan.plan import AggregationPlan, RunPlan
from federation.wire.messages import MessageError, Refusal, RefusalKind, kind_of
from meduet_models.meduet import MeDUET
from meduet_models.sharing import home_keys, shared_keys
from meduet_models.style.moments import CohortTooSmall
from meduet_models.weights import sha256_of_tensors
from privacy.ledger import LedgerRefusal
from tests.worlds import Hospital, coded, unanswered_places

SECRET = "Jane Doe 1961 /mnt/pacs/jane_doe.dcm"
PATIENTS = [f"p{n}" for n in range(8)]


def south(folder: Path, held: Any) -> Hospital:
    return Hospital(folder, held, name="south")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "south"


@pytest.fixture
def app(folder: Path, toy_scans: Any) -> ClientApp:
    return make_client_app(lambda context: south(folder, toy_scans(PATIENTS, 1)))


@pytest.fixture
def plan(toy_plan: Callable[..., RunPlan]) -> RunPlan:
    return toy_plan()


@pytest.fixture
def asks(plan: RunPlan, toy_bank: Any) -> dict[str, RecordDict]:
    model = MeDUET(plan.network, 3, seed=7)
    named = model.state_dict()
    shared = {n: named[n] for n in shared_keys(model, "local", "content_share")}
    home = {n: named[n] for n in home_keys(model, "local", "content_share")}
    text, bank = plan.to_json(), toy_bank(plan).to_tensors()
    return {
        SURVEY.route: SurveyAsk(plan_json=text).to_record(),
        PRETRAINING.route: TrainAsk(plan_json=text, round=1, shared=shared, bank=bank, home=home).to_record(),
        ERASURE.route: ErasureAsk(plan_json=text, shared=coded(plan, shared)).to_record(),
    }


def send(app: ClientApp, kind: str, content: RecordDict, ago_s: float = 0.0) -> RecordDict:
    context = Context(run_id=1, node_id=2, node_config={}, state=RecordDict(), run_config={})
    metadata = Metadata(1, "id", 1, 2, "", "", time.time() - ago_s, 60.0, kind)
    reply = app(Message(content=content, metadata=metadata), context)
    assert (reply.metadata.reply_to_message_id, reply.metadata.message_type) == ("id", kind)
    assert not reply.has_error()
    return reply.content


def everything(record: RecordDict) -> str:
    """All that a reply holds, as text."""
    parts = []
    for name, part in record.items():
        match part:
            case ConfigRecord() | MetricRecord():
                parts.append(f"{name} {dict(part)}")
            case ArrayRecord():
                parts.append(f"{name} {list(part)} {b''.join(array.data for array in part.values())!r}")
    return " ".join(parts)


def test_the_three_questions_are_answered_with_what_passed_the_gate(
    app: ClientApp, asks: dict[str, RecordDict], plan: RunPlan, folder: Path
) -> None:
    survey = SurveyReply.from_record(send(app, SURVEY.route, asks[SURVEY.route]))
    train = TrainReply.from_record(send(app, PRETRAINING.route, asks[PRETRAINING.route]))
    erasure = ErasureReply.from_record(send(app, ERASURE.route, asks[ERASURE.route]))
    assert {r.site for r in (survey, train, erasure)} == {"south"}
    assert {r.plan_sha256 for r in (survey, train, erasure)} == {plan.sha256}
    assert (survey.num_patients, survey.num_scans, train.round, train.examples) == (8, 8, 1, 8)
    lines = [entry.record for entry in Journal(folder / "journal.jsonl").entries()]
    assert [line["kind"] for line in lines] == ["survey", "round", "erasure"]
    sent = [survey.moments, train.update, erasure.moments]
    assert [line["sha256"] for line in lines] == [sha256_of_tensors(tensors) for tensors in sent]
    assert lines[1]["metrics"] == train.metrics


@pytest.mark.parametrize("kind", [SURVEY.route, PRETRAINING.route, ERASURE.route])
@pytest.mark.parametrize("where", ["open", "accept", "scans"])
def test_a_patient_name_in_an_exception_does_not_reach_the_server(
    kind: str, where: str, asks: dict[str, RecordDict], folder: Path, toy_scans: Any
) -> None:
    def fail(*_: object) -> Any:
        raise RuntimeError(f"cannot read {SECRET}") from OSError(SECRET)

    site = south(folder, toy_scans(PATIENTS))
    train = TrainAsk.from_record(asks[PRETRAINING.route])
    StateFolder(folder / "state", train.plan_sha256).enter(1, lambda: train.home or {})  # as after round 1
    if where != "open":
        setattr(site, where, fail)
    reply = send(make_client_app(fail if where == "open" else lambda _: site), kind, asks[kind])
    refusal = Refusal.from_record(reply)
    assert refusal.kind is RefusalKind.NOT_ANSWERED
    assert not any(word in everything(reply) for word in SECRET.split())
    if where != "open":
        assert SECRET in (folder / LOG_NAME).read_text()  # the site itself can find out
        assert refusal.site == "south"


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (CohortTooSmall(SECRET), RefusalKind.COHORT_TOO_SMALL),
        (LedgerRefusal(SECRET), RefusalKind.BUDGET),
        (NotFinite(SECRET), RefusalKind.NOT_ANSWERED),
        (GateRefusal(SECRET, RefusalKind.NON_FINITE), RefusalKind.NOT_ANSWERED),
        (GateRefusal(SECRET), RefusalKind.NOT_ANSWERED),
        (StateMissing(SECRET), RefusalKind.OUT_OF_ORDER),
        (StateDamaged(SECRET), RefusalKind.NOT_ANSWERED),
        (WrongWeights(SECRET), RefusalKind.MALFORMED),
        (MessageError(SECRET, RefusalKind.WRONG_VERSION), RefusalKind.WRONG_VERSION),
        (AskRefused(SECRET, RefusalKind.WRONG_TOKENIZER), RefusalKind.WRONG_TOKENIZER),
        (MemoryError(SECRET), RefusalKind.NOT_ANSWERED),
        (torch.OutOfMemoryError(SECRET), RefusalKind.NOT_ANSWERED),
        (DeadlineMissed(SECRET), RefusalKind.NOT_ANSWERED),
        (KeyError(SECRET), RefusalKind.NOT_ANSWERED),
    ],
)
def test_every_error_leaves_as_one_word_of_the_closed_list(
    error: Exception, kind: RefusalKind, asks: dict[str, RecordDict], folder: Path, toy_scans: Any
) -> None:
    site = south(folder, toy_scans(PATIENTS))

    def fail(plan: RunPlan, finetuning_sha256: str = "") -> None:
        raise error

    site.accept = fail  # type: ignore[method-assign]
    reply = send(make_client_app(lambda context: site), PRETRAINING.route, asks[PRETRAINING.route])
    assert Refusal.from_record(reply).kind is kind
    assert SECRET not in everything(reply)


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_an_interrupt_passes_the_wall(error: type[BaseException], asks: dict[str, RecordDict]) -> None:
    def interrupted(context: Context) -> Any:
        raise error

    with pytest.raises(error):
        send(make_client_app(interrupted), SURVEY.route, asks[SURVEY.route])


def test_nothing_but_what_passed_the_gate_can_be_sent(
    asks: dict[str, RecordDict], folder: Path, toy_scans: Any
) -> None:
    site = south(folder, toy_scans(PATIENTS, 1))

    class Lookalike:
        def __init__(self, real: Any) -> None:
            self.promise, self.tensors, self.counts = real.promise, real.tensors, real.counts
            self.metrics, self.record, self.wire_dtype = real.metrics, real.record, real.wire_dtype

    real = survey_exchange.answer_survey
    raw = {"mean": torch.ones(3)}
    answers: list[Callable[..., Any]] = [
        lambda *a: raw,
        lambda *a: asks[SURVEY.route],
        lambda *a: None,
        lambda *a: Lookalike(real(*a)),  # last: now an answer has left, and would leave again
    ]
    for answer in answers:
        row = dataclasses.replace(survey_exchange.ANSWER, work=answer)
        app = make_client_app(lambda context: site, answers=[row])
        assert (
            Refusal.from_record(send(app, SURVEY.route, asks[SURVEY.route])).kind is RefusalKind.NOT_ANSWERED
        )
    assert "Released" in (folder / LOG_NAME).read_text()


def test_a_question_of_another_kind_version_or_plan_is_refused_in_its_word(
    app: ClientApp, asks: dict[str, RecordDict], plan: RunPlan
) -> None:
    def refused(kind: str, record: RecordDict) -> RefusalKind:
        return Refusal.from_record(send(app, kind, record)).kind

    assert refused(SURVEY.route, asks[PRETRAINING.route]) is RefusalKind.MALFORMED
    assert refused(SURVEY.route, RecordDict({})) is RefusalKind.MALFORMED
    newer = SurveyAsk(plan_json=plan.to_json()).to_record()
    newer["head"]["wire_version"] = 99
    assert refused(SURVEY.route, newer) is RefusalKind.WRONG_VERSION
    edited = SurveyAsk(plan_json=plan.to_json()).to_record()
    edited["head"]["plan_json"] = plan.to_json().replace('"seed":7', '"seed":8')
    assert refused(SURVEY.route, edited) is RefusalKind.MALFORMED
    unknown = plan.to_json().replace('"seed":7', '"seed":7,"surprise":1')
    assert refused(SURVEY.route, SurveyAsk(plan_json=unknown).to_record()) is RefusalKind.PLAN_NOT_ACCEPTED
    spaced = plan.to_json().replace('"seed":7', '"seed": 7')
    assert refused(SURVEY.route, SurveyAsk(plan_json=spaced).to_record()) is RefusalKind.MALFORMED
    assert refused(SURVEY.route, SurveyAsk(plan_json="no json").to_record()) is RefusalKind.PLAN_NOT_ACCEPTED


def test_the_sites_log_holds_what_this_site_logged_and_not_its_neighbours(
    asks: dict[str, RecordDict], folder: Path, tmp_path: Path, toy_scans: Any
) -> None:
    site = south(folder, toy_scans(PATIENTS[:5]))
    logger = logging.getLogger("client.training.pretraining")

    def scans(plan: RunPlan) -> Any:
        logger.warning("from the inside")
        return site.held

    site.scans = scans  # type: ignore[method-assign]
    logger.warning("before")
    assert (
        kind_of(send(make_client_app(lambda context: site), SURVEY.route, asks[SURVEY.route]))
        == "survey_reply"
    )
    logger.warning("after")
    text = (folder / LOG_NAME).read_text()
    assert "from the inside" in text and "before" not in text and "after" not in text


def test_under_the_watchdog_a_site_answers_the_same_and_logs_in_its_own_file(
    app: ClientApp, asks: dict[str, RecordDict], tmp_path: Path, toy_scans: Any
) -> None:
    site = south(tmp_path / "watched", toy_scans(PATIENTS[:5], 1))
    scans = site.scans

    def logged(plan: RunPlan) -> Any:
        logging.getLogger("client.training.pretraining").warning("from the answer's thread")
        return scans(plan)

    site.scans = logged  # type: ignore[method-assign]
    watched = make_client_app(lambda context: site, watch=watchdog)
    unwatched = make_client_app(lambda context: south(tmp_path / "other", toy_scans(PATIENTS[:5], 1)))
    one, other = (
        TrainReply.from_record(send(a, PRETRAINING.route, asks[PRETRAINING.route]))
        for a in (watched, unwatched)
    )
    assert one.examples == other.examples == 5
    assert all(torch.equal(one.update[name], other.update[name]) for name in other.update)
    assert "from the answer's thread" in (tmp_path / "watched" / LOG_NAME).read_text()

    def fail(plan: RunPlan) -> Any:
        raise CohortTooSmall(SECRET)

    site.scans = fail  # type: ignore[method-assign]
    refusal = Refusal.from_record(send(watched, SURVEY.route, asks[SURVEY.route]))
    assert refusal.kind is RefusalKind.COHORT_TOO_SMALL
    assert SECRET in (tmp_path / "watched" / LOG_NAME).read_text()


@pytest.mark.parametrize(("ago_s", "taken_s"), [(0.0, 0.0), (25.0, 25.0), (-500.0, 0.0)])
def test_what_passed_before_the_process_began_is_taken_off_the_deadline(
    asks: dict[str, RecordDict], plan: RunPlan, folder: Path, toy_scans: Any, ago_s: float, taken_s: float
) -> None:
    left = []

    def watch(log: Path, deadline_s: float, work: Callable[[], Any], /) -> Any:
        left.append(plan.aggregation.deadline_s - deadline_s)
        return work()

    watched = make_client_app(lambda context: south(folder, toy_scans(PATIENTS[:5])), watch=watch)
    assert kind_of(send(watched, SURVEY.route, asks[SURVEY.route], ago_s)) == "survey_reply"
    assert left == [pytest.approx(taken_s, abs=10.0)]


def test_a_site_that_hangs_says_deadline_and_where_it_stood_stays_at_the_site(
    toy_plan: Callable[..., RunPlan], folder: Path, toy_scans: Any
) -> None:
    plan = toy_plan(aggregation=AggregationPlan(deadline_s=1.0))
    site, never = south(folder, toy_scans(PATIENTS)), threading.Event()

    def a_share_that_is_gone(plan: RunPlan) -> Any:
        never.wait(60)
        return site.held

    site.scans = a_share_that_is_gone  # type: ignore[method-assign]
    try:
        app = make_client_app(lambda context: site, watch=watchdog)
        reply = send(app, SURVEY.route, SurveyAsk(plan_json=plan.to_json()).to_record())
    finally:
        faulthandler.cancel_dump_traceback_later()
    refusal = Refusal.from_record(reply)
    assert (refusal.kind, refusal.site) == (RefusalKind.NOT_ANSWERED, "south")
    assert "a_share_that_is_gone" not in everything(reply)
    text = (folder / LOG_NAME).read_text()
    assert "a_share_that_is_gone" in text and "Refused query.survey: deadline" in text
    never.set()  # what comes now is too late
    (late,) = (thread for thread in threading.enumerate() if thread.name == "answer")
    late.join(60)
    assert not late.is_alive()
    (line,) = (entry.record for entry in site.journal.entries())
    assert (line["kind"], line["reason"], line["told"]) == ("refusal", "deadline", "not_answered")
    assert len(unanswered_places(site.state_dir / "ledger.jsonl")) == 1


def test_each_step_is_reported_with_its_sites_name(
    asks: dict[str, RecordDict], folder: Path, toy_scans: Any
) -> None:
    steps: list[tuple[str, int]] = []
    app = make_client_app(
        lambda context: south(folder, toy_scans(PATIENTS, 1)),
        lambda site, step, loss: steps.append((site, step)),
    )
    send(app, PRETRAINING.route, asks[PRETRAINING.route])
    assert steps == [("south", 1), ("south", 2)]


def test_a_supernode_without_a_site_config_is_refused(asks: dict[str, RecordDict]) -> None:
    refusal = Refusal.from_record(send(deployed_app, SURVEY.route, asks[SURVEY.route]))
    assert (refusal.kind, refusal.site) == (RefusalKind.NOT_ANSWERED, "")
