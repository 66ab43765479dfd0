"""The wall: a message comes in, a message goes out, and nothing else does.

Flower sends the text of a ClientApp's exception to the server, and that text may name a patient or a path. So
everything is caught here, written to the site's own log, and answered with one word of a closed list. A reply
is built from what passed the gate (`client/release.py`) and from nothing else.

Does not do: decide or compute (`client/exchanges/`). Whoever makes the app says how a site is
opened, so nothing here asks whether it is simulated; `app` is the one of a deployment. An interrupt from the
keyboard passes.
"""

import errno
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from functools import cache
from pathlib import Path
from typing import Any

import torch
from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp

from client.books.refusals import note_refusal, told_as
from client.consent.exact_sums import TooFewForSums
from client.declared import GateRefusal
from client.exchanges import (
    audit_counts,
    demographics,
    diffusion,
    erasure,
    latent_moments,
    latents,
    pretraining,
    private_rounds,
    probes,
    secure_sum,
    style_code,
    survey,
    synthetic_latents,
)
from client.exchanges.exchange import Answer, AskRefused, Site, SiteAtWork
from client.jobs.asking import by_job
from client.jobs.request import JobRefused
from client.latents.labelled import NoLabels
from client.release import Gate, Released
from client.scans.cohort import NoScans
from client.site import open_site
from client.training.site_state import StateMissing
from client.training.trainee import WrongWeights
from client.watchdog import DeadlineMissed, Watch, unwatched, watchdog
from federation.exchanges.finetuning import FINETUNING
from federation.plan.optimisation import NotFinite
from federation.plan.plan import RunPlan
from federation.wire.messages import Ask, MessageError, Refusal, RefusalKind, Reply
from meduet_models.diffusion.training import LossNotFinite
from meduet_models.style.moments import CohortTooSmall
from privacy.ledger import AnsweredBefore, LedgerRefusal
from privacy.secure_sum.transcript import SumRefused
from storage.files import private_folder

LOG_NAME = "site.log"
SITE_CONFIG = "site-config"
"""Key of the SuperNode's `--node-config` that says where this hospital's site.yaml is."""
_NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EROFS})
"""What an operating system says of a disk that takes nothing more."""
_log = logging.getLogger(__name__)

_answering: ContextVar[object] = ContextVar("_answering", default=None)
"""Which message this thread is answering."""

OnStep = Callable[[str, int, float], None]
"""Called after each training step with site, step and loss; for a progress bar at the site."""


@cache
def exchanges() -> tuple[Answer[Any, Any], ...]:
    """The table of exchanges: everything that a centre may ask of a site, and how it is answered."""
    return (
        survey.ANSWER,
        demographics.ANSWER,
        style_code.ANSWER,
        pretraining.ANSWER,
        private_rounds.ANSWER,
        secure_sum.KEYS,
        secure_sum.SHARES,
        secure_sum.VECTOR,
        secure_sum.PRIVATE_VECTOR,
        secure_sum.OPENING,
        probes.ANSWER,
        erasure.ANSWER,
        audit_counts.ANSWER,
        latents.ANSWER,
        synthetic_latents.ANSWER,
        latent_moments.ANSWER,
        diffusion.ANSWER,
        Answer(FINETUNING, _answer_finetuning, pretraining.train_mail),
    )


def make_client_app(
    open_the_site: Callable[[Context], Site],
    on_step: OnStep = lambda site, step, loss: None,
    watch: Watch = unwatched,
    answers: Sequence[Answer[Any, Any]] | None = None,
) -> ClientApp:
    """A Flower ClientApp that answers each exchange of the table for the site that `open_the_site` opens.

    `watch` is put around the work; `answers` is another table than this file's.
    """
    client_app = ClientApp()
    for row in exchanges() if answers is None else answers:
        category, _, action = row.exchange.route.partition(".")
        register = client_app.query if category == "query" else client_app.train
        register(action)(_handler(row, open_the_site, on_step, watch))
    return client_app


def _handler(
    row: Answer[Any, Any], open_the_site: Callable[[Context], Site], on_step: OnStep, watch: Watch
) -> Callable[[Message, Context], Message]:
    """What Flower calls for one exchange."""

    def handle(message: Message, context: Context) -> Message:
        def answer(site: Site, content: RecordDict, asked: dict[str, Any]) -> RecordDict:
            ask = row.exchange.ask.from_record(content)
            plan = _plan(ask)
            left_s = _left_s(message.metadata.created_at, plan.aggregation.deadline_s)
            answering = by_job(row) if site.launcher is not None and row.reads_scans else row

            def tell(step: int, loss: float) -> None:
                on_step(site.name, step, loss)

            log = site.state_dir / LOG_NAME
            released = watch(log, left_s, lambda: answering.once(site, ask, plan, tell, asked))
            return _mail(row, released, ask, site.name)

        return _behind_the_wall(message, context, open_the_site, answer)

    return handle


def _behind_the_wall(
    message: Message,
    context: Context,
    open_the_site: Callable[[Context], Site],
    answer: Callable[[Site, RecordDict, dict[str, Any]], RecordDict],
) -> Message:
    site: Site | None = None
    asked: dict[str, Any] = {"to": message.metadata.message_type}
    with ExitStack() as log:
        try:
            site = open_the_site(context)
            log.enter_context(_site_log(site.state_dir / LOG_NAME))
            content = answer(site, message.content, asked)
        except Exception as error:  # noqa: BLE001, the wall: the one place where everything is caught
            kind = refusal_kind(error)
            _log.exception("Refused %s: %s.", message.metadata.message_type, kind.value)
            content = _no(site, asked, kind).to_record()
    return Message(content, reply_to=message)


def _no(site: Site | None, asked: Mapping[str, Any], kind: RefusalKind) -> Refusal:
    """The refusal, once it stands in the site's books: in one word that tells nothing of a patient."""
    if site is None:
        return Refusal(kind=told_as(kind, reserved=False))
    try:
        return Refusal(kind=note_refusal(site.journal, asked, kind), site=site.name)
    except Exception as error:  # noqa: BLE001, still the wall: what a book says when it fails stays here
        _log.exception("The refusal could not be written into the journal.")
        full = refusal_kind(error) is RefusalKind.STORAGE  # so it is whatever is asked
        return Refusal(kind=RefusalKind.STORAGE if full else RefusalKind.NOT_ANSWERED, site=site.name)


def _mail(row: Answer[Any, Any], released: object, ask: Ask, site: str) -> RecordDict:
    """A reply, from what passed the gate."""
    if not isinstance(released, Released):
        raise TypeError(f"Expected what passed the gate; got {type(released).__name__}. Nothing is sent.")
    reply: Reply = row.mail(released, ask, site)
    return reply.to_record()


def _answer_finetuning(
    site: SiteAtWork, ask: Any, plan: RunPlan, gate: Gate, on_step: Callable[[int, float], None]
) -> Released:
    from client.exchanges.finetuning import answer_finetuning  # MONAI takes seconds to import

    return answer_finetuning(site, ask, plan, gate, on_step)


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


def refusal_kind(error: Exception) -> RefusalKind:
    """Which refusal it is, for the site's own books; what leaves says `client/books/refusals.py`."""
    match error:
        case MessageError() | GateRefusal() | AskRefused() | JobRefused():
            return error.kind
        case LedgerRefusal():
            return RefusalKind.BUDGET
        case AnsweredBefore():
            return RefusalKind.ANSWERED_BEFORE
        case SumRefused():
            return RefusalKind.SUM_REFUSED
        case TooFewForSums():
            return RefusalKind.TOO_FEW_FOR_SUMS
        case CohortTooSmall():
            return RefusalKind.COHORT_TOO_SMALL
        case NoScans():
            return RefusalKind.NO_SCANS
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
        case OSError() if error.errno in _NO_ROOM:
            return RefusalKind.STORAGE
        case MemoryError() | torch.OutOfMemoryError():
            return RefusalKind.OUT_OF_MEMORY
        case RuntimeError() if "can't allocate memory" in str(error):  # as PyTorch says it on a CPU
            return RefusalKind.OUT_OF_MEMORY
        case _:
            return RefusalKind.INTERNAL


class _LogFile(logging.FileHandler):
    """A log file that, when it cannot be opened, costs its lines and not the wall."""

    def emit(self, record: logging.LogRecord) -> None:
        """As any handler: what goes wrong is said on the standard error of this process."""
        try:
            super().emit(record)
        except OSError:
            self.handleError(record)


@contextmanager
def _site_log(path: Path) -> Iterator[None]:
    """Write what is logged while a message is answered, in this thread or in the watchdog's, to the site's
    own file."""
    private_folder(path.parent)
    mine = object()  # sites may share a process, but not a context
    token = _answering.set(mine)
    handler = _LogFile(path, delay=True, encoding="utf-8")
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
