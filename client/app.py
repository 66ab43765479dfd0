"""The wall: a message comes in, a message goes out, and nothing else does.

Flower sends the text of a ClientApp's exception to the server, and that text may name a patient or a path. So
everything is caught here, written to the site's own log, and answered with one word of a closed list. A reply
is built from what passed the gate (`client/release.py`) and from nothing else.

Does not do: decide or compute (`client/exchanges/exchange.py`). Whoever makes the app says how a site is
opened, so nothing here asks whether it is simulated; `app` is the one of a deployment. An interrupt from the
keyboard passes.
"""

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import TypeVar

import torch
from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp

from client.exchanges.diffusion import answer_diffusion
from client.exchanges.exchange import (
    AskRefused,
    Site,
    answer_erasure,
    answer_probe,
    answer_round,
    answer_survey,
)
from client.exchanges.latents import answer_latents
from client.latents.labelled import NoLabels
from client.release import GateRefusal, Released
from client.site import open_site
from client.training.pretraining import NotFinite
from client.training.site_state import StateMissing
from client.training.trainee import WrongWeights
from client.watchdog import DeadlineMissed, Watch, unwatched, watchdog
from federation.exchanges.diffusion import DiffusionAsk
from federation.exchanges.finetuning import FinetuneAsk
from federation.exchanges.latents import LatentsAsk, LatentsReply, from_tensors
from federation.messages import (
    Ask,
    ErasureAsk,
    ErasureReply,
    MessageError,
    ProbeAsk,
    ProbeReply,
    Refusal,
    RefusalKind,
    SurveyAsk,
    SurveyReply,
    TrainAsk,
    TrainReply,
)
from federation.plan import RunPlan
from meduet_models.diffusion.training import LossNotFinite
from meduet_models.style.moments import CohortTooSmall
from privacy.ledger import LedgerRefusal

LOG_NAME = "site.log"
SITE_CONFIG = "site-config"
"""Key of the SuperNode's `--node-config` that says where this hospital's site.yaml is."""
_log = logging.getLogger(__name__)

_answering: ContextVar[object] = ContextVar("_answering", default=None)
"""Which message this thread is answering."""

AskKind = TypeVar("AskKind", bound=Ask)
OnStep = Callable[[str, int, float], None]
"""Called after each training step with site, step and loss; for a progress bar at the site."""


def make_client_app(
    open_the_site: Callable[[Context], Site],
    on_step: OnStep = lambda site, step, loss: None,
    watch: Watch = unwatched,
) -> ClientApp:
    """A Flower ClientApp that answers "query.survey", "train.round", "query.probe", "query.erasure",
    "train.finetune", "train.diffusion" and "query.latents" for the site that `open_the_site` opens.

    `watch` is put around the work.
    """
    client_app = ClientApp()

    def reply(
        message: Message,
        context: Context,
        read: Callable[[RecordDict], AskKind],
        work: Callable[[Site, AskKind, RunPlan], Released],
    ) -> Message:
        def answer(site: Site, content: RecordDict) -> RecordDict:
            ask = read(content)
            plan = _plan(ask)
            left_s = _left_s(message.metadata.created_at, plan.aggregation.deadline_s)
            released = watch(site.state_dir / LOG_NAME, left_s, lambda: work(site, ask, plan))
            return _mail(released, ask.plan_sha256, site.name)

        return _behind_the_wall(message, context, open_the_site, answer)

    def steps_of(site: Site) -> Callable[[int, float], None]:
        return lambda step, loss: on_step(site.name, step, loss)

    @client_app.query("survey")
    def survey(message: Message, context: Context) -> Message:
        return reply(message, context, SurveyAsk.from_record, answer_survey)

    @client_app.train("round")
    def round(message: Message, context: Context) -> Message:
        def work(site: Site, ask: TrainAsk, plan: RunPlan) -> Released:
            return answer_round(site, ask, plan, steps_of(site))

        return reply(message, context, TrainAsk.from_record, work)

    @client_app.train("finetune")
    def finetune(message: Message, context: Context) -> Message:
        from client.exchanges.finetuning import answer_finetuning  # MONAI takes seconds to import

        def work(site: Site, ask: FinetuneAsk, plan: RunPlan) -> Released:
            return answer_finetuning(site, ask, plan, steps_of(site))

        return reply(message, context, FinetuneAsk.from_record, work)

    @client_app.train("diffusion")
    def diffusion(message: Message, context: Context) -> Message:
        def work(site: Site, ask: DiffusionAsk, plan: RunPlan) -> Released:
            return answer_diffusion(site, ask, plan, steps_of(site))

        return reply(message, context, DiffusionAsk.from_record, work)

    @client_app.query("erasure")
    def erasure(message: Message, context: Context) -> Message:
        return reply(message, context, ErasureAsk.from_record, answer_erasure)

    @client_app.query("probe")
    def probe(message: Message, context: Context) -> Message:
        return reply(message, context, ProbeAsk.from_record, answer_probe)

    @client_app.query("latents")
    def latents(message: Message, context: Context) -> Message:
        return reply(message, context, LatentsAsk.from_record, answer_latents)

    return client_app


def _behind_the_wall(
    message: Message,
    context: Context,
    open_the_site: Callable[[Context], Site],
    answer: Callable[[Site, RecordDict], RecordDict],
) -> Message:
    name = ""
    with ExitStack() as log:
        try:
            site = open_the_site(context)
            name = site.name
            log.enter_context(_site_log(site.state_dir / LOG_NAME))
            content = answer(site, message.content)
        except Exception as error:  # noqa: BLE001, the wall: the one place where everything is caught
            kind = _kind(error)
            _log.exception("Refused %s: %s.", message.metadata.message_type, kind.value)
            content = Refusal(kind=kind, site=name).to_record()
    return Message(content, reply_to=message)


def _mail(released: object, plan_sha256: str, site: str) -> RecordDict:
    """A reply, from what passed the gate."""
    if not isinstance(released, Released):
        raise TypeError(f"Expected what passed the gate; got {type(released).__name__}. Nothing is sent.")
    tensors = dict(released.tensors)
    match released.promise.kind:
        case "survey":
            return SurveyReply(
                plan_sha256=plan_sha256,
                site=site,
                moments=tensors,
                num_patients=released.counts["num_patients"],
                num_scans=released.counts["num_scans"],
            ).to_record()
        case "round" | "diffusion" | "finetuning":
            return TrainReply(
                plan_sha256=released.record["plan"],  # what was agreed to: the plan, or the fine-tuning
                site=site,
                round=released.record["round"],
                examples=released.counts["examples"],
                update=tensors,
                metrics=dict(released.metrics),
                wire_dtype=released.wire_dtype,
            ).to_record()
        case "erasure":
            return ErasureReply(plan_sha256=plan_sha256, site=site, moments=tensors).to_record()
        case "probe" | "probe_hits":
            return ProbeReply(
                plan_sha256=plan_sha256, site=site, round=released.record["round"], sums=tensors
            ).to_record()
        case "latents":
            return LatentsReply(
                plan_sha256=plan_sha256,
                site=site,
                round=released.record["round"],
                first=released.counts["first_item"],
                total=released.counts["num_items"],
                items=tuple(released.record["items"]),
                examples=from_tensors(tensors),
                wire_dtype=released.wire_dtype,
            ).to_record()


def _plan(ask: Ask) -> RunPlan:
    try:
        plan = ask.plan()
    except ValueError as error:
        raise AskRefused(str(error), RefusalKind.PLAN_NOT_ACCEPTED) from error
    if plan.sha256 != ask.plan_sha256:
        text = "Expected the plan's canonical JSON; it says the same in other words, under another hash."
        raise AskRefused(text, RefusalKind.MALFORMED)
    return plan


def _left_s(asked: float, deadline_s: float) -> float:
    """Seconds left of the deadline of a question that was asked at this time (of the centre's clock):
    fetching it and starting this process took some. A clock that is behind takes none."""
    return deadline_s - min(max(time.time() - asked, 0.0), deadline_s)


def _kind(error: Exception) -> RefusalKind:
    """The one word that leaves the site."""
    match error:
        case MessageError() | GateRefusal() | AskRefused():
            return error.kind
        case LedgerRefusal():
            return RefusalKind.BUDGET
        case CohortTooSmall():
            return RefusalKind.COHORT_TOO_SMALL
        case NoLabels():
            return RefusalKind.NO_LABELS
        case StateMissing():
            return RefusalKind.OUT_OF_ORDER
        case WrongWeights():
            return RefusalKind.MALFORMED
        case NotFinite() | LossNotFinite():
            return RefusalKind.NON_FINITE
        case DeadlineMissed():
            return RefusalKind.DEADLINE
        case MemoryError() | torch.OutOfMemoryError():
            return RefusalKind.OUT_OF_MEMORY
        case RuntimeError() if "can't allocate memory" in str(error):  # as PyTorch says it on a CPU
            return RefusalKind.OUT_OF_MEMORY
        case _:
            return RefusalKind.INTERNAL


@contextmanager
def _site_log(path: Path) -> Iterator[None]:
    """Write what is logged while a message is answered, in this thread or in the watchdog's, to the site's
    own file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    mine = object()  # sites may share a process, but not a context
    token = _answering.set(mine)
    handler = logging.FileHandler(path, delay=True, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s %(message)s"))
    handler.addFilter(lambda record: _answering.get() is mine)
    root = logging.getLogger("client")
    root.addHandler(handler)
    try:
        yield
    finally:
        _answering.reset(token)
        root.removeHandler(handler)
        handler.close()


def open_site_from_context(context: Context) -> Site:
    """The site whose site.yaml the SuperNode names: `--node-config 'site-config="/path/to/site.yaml"'`."""
    path = context.node_config.get(SITE_CONFIG)
    if not isinstance(path, str):
        raise ValueError(
            f"Expected the path of site.yaml in the SuperNode's --node-config ({SITE_CONFIG}); got {path!r}."
        )
    return open_site(Path(path))


app = make_client_app(open_site_from_context, watch=watchdog)
