"""The four answers of a site: survey, round, probe, erasure. Each reserves, reads, computes and releases.

In this order, always: is the plan one that this site accepts, a place in the ledger, and only then the first
scan. Each function returns what passed the gate, and nothing else can be sent (`client/app.py`).

Does not do: know Flower's messages, or catch anything.
Source: docs/architecture.md, "One round".
"""

import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from client.latents.batches import Batches, TrainingScans
from client.latents.style_moments import own_moments, survey
from client.partial_round import cohort_sha256
from client.probing import probe_hits, probe_sums, probed_patients
from client.release import Gate, Released
from client.training.pretraining import train_round
from client.training.site_state import StateFolder
from client.training.trainee import Trainee, student_of
from client.watchdog import DEADLINE_SHARE
from federation.erasure import content_bound, erasure_shapes, erasure_tensors, renders, share_bound
from federation.journal import Journal
from federation.messages import ErasureAsk, ProbeAsk, SurveyAsk, TrainAsk
from federation.plan import RunPlan
from federation.probing import HITS_BOUND, UNBOUNDED, hits_shapes, sums_bound, sums_shapes
from federation.survey import smallest_cohort, survey_layout
from federation.wire import RefusalKind
from meduet_models.content_code import RenderingMoments
from meduet_models.erasure import ErasureMoments
from meduet_models.style.bank import StyleBank
from meduet_models.style.moments import CohortTooSmall
from meduet_models.weights import sha256_of_tensors
from privacy.clipping import clip_factor
from privacy.ledger import Ledger
from privacy.promise import Promise

_log = logging.getLogger(__name__)
_SCANS_AT_ONCE = 16


class AskRefused(ValueError):
    """This site does not do what it is asked; `kind` is what the centre is told."""

    def __init__(self, text: str, kind: RefusalKind) -> None:
        super().__init__(text)
        self.kind = kind


@runtime_checkable
class Site(Protocol):
    """What the answers need of an open site (`client/site.py`)."""

    @property
    def name(self) -> str:
        """The site's name in plans."""

    @property
    def state_dir(self) -> Path:
        """Where the site keeps its ledger, journal and states."""

    @property
    def device(self) -> torch.device:
        """Where it trains."""

    @property
    def compile(self) -> bool:
        """Whether it compiles the network."""

    @property
    def minimum_cohort(self) -> int:
        """The site's own smallest cohort; the stricter of it and the plan's wins."""

    @property
    def progress_every_s(self) -> float:
        """Seconds between two writes of a round under way; 0: after each step."""

    @property
    def ledger(self) -> Ledger:
        """What its patients have been charged."""

    @property
    def journal(self) -> Journal:
        """What left it."""

    def accept(self, plan: RunPlan, finetuning_sha256: str = "") -> None:
        """Raise `AskRefused` unless this site takes part in `plan` now, with the plan's tokenizer; when a
        fine-tuning is asked for, in that one. Opens no scan."""

    def scans(self, plan: RunPlan) -> TrainingScans:
        """The site's latents, encoding what is not cached yet."""


def answer_survey(site: Site, ask: SurveyAsk, plan: RunPlan) -> Released:
    """Sums that describe the appearance of the training scans. Raises `CohortTooSmall` below the minimum."""
    site.accept(plan)
    promise = Promise(
        kind="survey", bound=plan.release.style_clip, unit="patient statistics", enforcement="check"
    )
    reservation = site.ledger.reserve(ask.plan_sha256, 0, promise)
    scans = site.scans(plan)
    moments = survey(scans, plan, site.minimum_cohort)
    rows = scans.indices("train")
    num_patients = len({scans.patients[row] for row in rows})
    return Gate(site.ledger, site.journal).release(
        reservation,
        moments.to_tensors(),
        survey_layout(plan).shapes(),
        weight=float(num_patients),
        counts={"num_patients": num_patients, "num_scans": len(rows)},
        not_covered=frozenset({"count"}),
    )


def answer_round(
    site: Site, ask: TrainAsk, plan: RunPlan, on_step: Callable[[int, float], None] = lambda step, loss: None
) -> Released:
    """Train a round and release examples · (shared weights after - before).

    The state that the round began from is never changed: asked again, the site answers the same, from what it
    kept if it was done, and goes on where a process that was killed left the round. Raises `AskRefused` when
    the round is not one of the plan's or does not end within `DEADLINE_SHARE` of the plan's deadline.
    """
    on_step = before_deadline(plan.aggregation.deadline_s, on_step)
    site.accept(plan)
    if not 1 <= ask.round <= plan.training.rounds:
        raise AskRefused(
            f"Expected a round from 1 to {plan.training.rounds}; got round {ask.round}.",
            RefusalKind.MALFORMED,
        )
    promise = Promise(
        kind="round", bound=plan.release.update_clip_norm, unit="site update", enforcement="clip"
    )
    reservation = site.ledger.reserve(ask.plan_sha256, ask.round, promise)

    states = StateFolder(site.state_dir / "state", ask.plan_sha256)
    if ask.home is not None and (ask.round == 1 or not states.rounds()):  # else it is old news
        alone = plan.aggregation.method == "alone"
        states.begin(_own_scale(ask.home, site.scans(plan), plan) if alone else ask.home)
    kept = states.before(ask.round)
    trainee = Trainee.of(plan, ask.shared, kept, site.device, site.compile)

    scans, shared_sha256 = site.scans(plan), sha256_of_tensors(ask.shared)
    question = {
        "shared_sha256": shared_sha256,
        "bank_sha256": sha256_of_tensors(ask.bank),
        "cohort_sha256": cohort_sha256(scans),
    }
    keep = states.result(ask.round, kept, question)
    before = keep.read()
    result = before or train_round(
        trainee,
        Batches(scans, plan, bank_of(plan, ask.bank)),
        plan,
        ask.round,
        plan.participants.index(site.name),
        states.start().home,
        on_step,
        states.partial(ask.round, kept, question, site.progress_every_s),
    )
    norm = result.metrics["update_norm"]
    released = Gate(site.ledger, site.journal).release(
        reservation,
        result.update,
        {name: tuple(tensor.shape) for name, tensor in ask.shared.items()},
        weight=float(result.examples),
        counts={"examples": result.examples},
        metrics=result.metrics | {"clip_factor": clip_factor(norm, promise.bound)},
        wire_dtype=plan.release.wire_dtype,
    )
    if before is None:
        states.save(trainee.state(plan, ask.round, kept.round), shared_sha256)
        keep.write(result)
    return released


def answer_probe(site: Site, ask: ProbeAsk, plan: RunPlan) -> Released:
    """Sums of the factors of this site's patients after a round; asked with fitted probes, their hits.

    Raises `CohortTooSmall` when a fold would hold fewer than the minimum, `AskRefused` for a plan without
    probes, a round that is not one of its, or probes of other shapes.
    """
    site.accept(plan)
    if not plan.probes.every_rounds or not 1 <= ask.round <= plan.training.rounds:
        raise AskRefused(
            f"Expected a plan with probes and one of its rounds; got round {ask.round}.",
            RefusalKind.MALFORMED,
        )
    fitted = bool(ask.probe)
    promise = Promise(
        kind="probe_hits" if fitted else "probe",
        bound=HITS_BOUND if fitted else sums_bound(plan),
        unit="patient statistics",
        enforcement="check",
    )
    reservation = site.ledger.reserve(ask.plan_sha256, ask.round, promise)
    states = StateFolder(site.state_dir / "state", ask.plan_sha256)
    student = student_of(plan, ask.shared, states.before(ask.round + 1)).to(site.device).eval()
    bank, index = bank_of(plan, ask.bank), plan.sites.index(site.name)
    scans = site.scans(plan)
    probed = probed_patients(scans, plan, site.minimum_cohort)
    if fitted:
        try:
            tensors = probe_hits(student, scans, probed, plan, ask.probe, index)
        except ValueError as error:
            raise AskRefused(str(error), RefusalKind.MALFORMED) from error
    else:
        tensors = probe_sums(student, scans, probed, plan, bank, index)
    return Gate(site.ledger, site.journal).release(
        reservation,
        tensors,
        hits_shapes() if fitted else sums_shapes(plan),
        weight=float(len(probed.folds)),
        not_covered=UNBOUNDED & set(tensors),
    )


def answer_erasure(site: Site, ask: ErasureAsk, plan: RunPlan) -> Released:
    """Sums of pooled content over the training patients, under the run's last weights: in their own style,
    and how it varies when they wear every style of the bank.

    Raises `CohortTooSmall` below the minimum.
    """
    site.accept(plan)
    promise = Promise(kind="erasure", bound=share_bound(plan), unit="patient statistics", enforcement="check")
    reservation = site.ledger.reserve(ask.plan_sha256, plan.training.rounds, promise)
    states = StateFolder(site.state_dir / "state", ask.plan_sha256)
    student = student_of(plan, ask.shared, states.before(plan.training.rounds + 1)).to(site.device).eval()
    width = plan.network.width
    student.set_erasure(torch.zeros(width), torch.eye(width))  # content before any erasure, whatever came

    scans = site.scans(plan)
    rows = list(scans.indices("train"))
    patients = [scans.patients[row] for row in rows]
    least = smallest_cohort(plan, site.minimum_cohort)
    if (came := len(set(patients))) < least:
        raise CohortTooSmall(f"Expected at least {least} patients behind content sums; got {came}.")

    def content(read: Callable[[list[int]], Tensor]) -> Tensor:
        chunks = [rows[first : first + _SCANS_AT_ONCE] for first in range(0, len(rows), _SCANS_AT_ONCE)]
        with torch.no_grad():
            return torch.cat([student.pooled_content(read(chunk).to(site.device)).cpu() for chunk in chunks])

    bound = content_bound(plan)
    moments = ErasureMoments.of(content(scans.latents), patients, bound)
    renderings = None
    if renders(plan):
        dressed = Batches(scans, plan, bank_of(plan, ask.bank))
        worn = [content(lambda chunk, s=s: dressed.in_style(chunk, s)) for s in dressed.styles]  # type: ignore[misc]
        if not worn:
            raise AskRefused("Expected the run's style bank; got an empty one.", RefusalKind.MALFORMED)
        renderings = RenderingMoments.of(torch.stack(worn), patients, bound)
    return Gate(site.ledger, site.journal).release(
        reservation, erasure_tensors(moments, renderings), erasure_shapes(plan), weight=float(came)
    )


def _own_scale(home: dict[str, Tensor], scans: TrainingScans, plan: RunPlan) -> dict[str, Tensor]:
    """The start of a site that is alone: nobody told it the latent scale, so it takes its own."""
    mean, deviation = own_moments(scans, plan).latent_scale()
    return home | {"latent_mean": mean, "latent_deviation": deviation}


def bank_of(plan: RunPlan, tensors: dict[str, Tensor]) -> StyleBank | None:
    """The style bank that came with a question; None where the plan exchanges none. Raises `AskRefused`."""
    if plan.style.exchange == "none" or not tensors:
        return None
    try:
        return StyleBank.from_tensors(tensors, plan.sites)
    except ValueError as error:
        raise AskRefused(str(error), RefusalKind.MALFORMED) from error


def before_deadline(deadline_s: float, on_step: Callable[[int, float], None]) -> Callable[[int, float], None]:
    """Call `on_step` until `DEADLINE_SHARE` of the deadline has passed from now; then the round is given up,
    in time to say so."""
    end = time.monotonic() + DEADLINE_SHARE * deadline_s

    def checked(step: int, loss: float) -> None:
        if time.monotonic() > end:
            raise AskRefused(
                f"Expected the round to end within {DEADLINE_SHARE:g} of aggregation.deadline_s "
                f"({deadline_s:g} s); it was at step {step}.",
                RefusalKind.DEADLINE,
            )
        on_step(step, loss)

    return checked
