"""40,000 replies that were changed at random, to every question: put aside, or what the plan allows.

The way of each is the real one but for the network: Flower's objects, the wall, the checks of its exchange,
the sum. What was accepted is judged again by other code than that of the checks, and what is computed of it
afterwards must not fail either. `pytest -m slow` sends the larger part.
"""

import dataclasses
import json
import logging
import random
import resource
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from federation.exchanges.diffusion import DIFFUSION
from federation.exchanges.erasure import ERASURE
from federation.exchanges.finetuning import FINETUNING
from federation.exchanges.latents import LATENTS, LatentsAsk, ToldLatents, largest_latents, latent_bound
from federation.exchanges.pretraining import PRETRAINING, TrainReply
from federation.exchanges.probes import (
    ANATOMY,
    FACTORS,
    HITS,
    PROBES,
    RECOGNITION,
    SWAPPED,
    SWAPPED_PATIENTS,
    ProbeReply,
    anatomy_bound,
    joint_bound,
    joint_width,
    style_vector,
    sums_shapes,
)
from federation.exchanges.survey import SURVEY, survey_layout
from federation.plan.diffusion_plan import DiffusionPlan
from federation.plan.plan import ProbePlan, ReleasePlan, RunPlan
from federation.reply_book import ReplyBook
from federation.wire.limits import MOST_PATIENTS, MOST_SCANS, Largest, largest_reply, promised
from federation.wire.messages import METRIC_NAMES
from meduet_models.content_code import code_bound
from meduet_models.diffusion.conditions import Examples
from meduet_models.diffusion.settings import DiffusionTraining, TransformerShape
from meduet_models.erasure import ErasureMoments
from meduet_models.style.bank import StyleBank
from meduet_models.style.moments import StyleMoments
from server.exchanges.latents import check_reply
from server.exchanges.probes import FederatedProbes, fitted_probes, readings_of_hits, readings_of_sums
from server.latent_bank.bank import LatentBank
from server.model import MeduetModel
from simulations.engines.in_process import InProcessGrid
from strategies.aggregation import Bounds, ReplyRefused, StreamingSum
from strategies.content_share import ContentShare, Task
from strategies.quorum import Roster, numbered
from strategies.reply_pull import inflated
from strategies.reply_wall import ReplyWall
from strategies.style_bank import StyleSurvey
from tests.rounds.mutated_replies import Mutator
from tests.rounds.test_model import content, surveyed
from tests.worlds import RECIPIENT, bank_key_in

NODE, SITE, HONEST = 7, "lyon", "oslo"


def registered(sites: tuple[str, ...]) -> Roster:
    """A roster that knows which site the node is."""
    roster = Roster(sites)
    roster.asked([numbered(NODE, sites.index(SITE))])
    return roster


GROWTH_BYTES = 300 << 20
Settle = Callable[[Any], None]


class Unwritten(ReplyBook):
    """A book whose lines are made and not kept."""

    def enter(self, draft: dict[str, Any]) -> None:
        json.dumps(draft, allow_nan=False)


@dataclasses.dataclass
class Case:
    """A question, a valid reply to it, and how a reply is taken and judged."""

    valid: Any
    largest: Largest
    begin: Callable[[], tuple[ReplyWall[Any], Settle]]
    """A wall, and what is called with the reply that it let through, or with None."""

    def answered(self, draws: random.Random) -> bool:
        """Send one changed reply; whether it was accepted."""
        message, contents = Mutator(draws).reply(self.valid)
        wall, settle = self.begin()
        try:
            reply = wall.take(NODE, inflated(message, contents, self.largest))
        except ReplyRefused as reason:
            reply = None
            wall.put_aside(NODE, str(reason))
        assert (reply is None) == bool(wall.refused)
        assert all(why.isprintable() and len(why) < 500 for why in wall.refused.values())
        settle(reply)
        return reply is not None


def finite(tensors: dict[str, torch.Tensor]) -> NDArray[np.float64]:
    values = np.concatenate([t.double().numpy().ravel() for t in tensors.values()] or [np.zeros(0)])
    assert np.isfinite(values).all()
    return values


def possible_metrics(metrics: dict[str, float]) -> None:
    assert set(metrics) <= METRIC_NAMES
    assert all(isinstance(v, float) and abs(v) <= 1e12 for v in metrics.values())
    assert all(v >= 0 for name, v in metrics.items() if not name.startswith("loss."))


def possible_sums(vector: torch.Tensor, width: int, bound: float) -> float:
    """Judge count, sum and outer products, written as `ErasureMoments` are; the count."""
    values = vector.double().numpy()
    outer = np.zeros((width + 1, width + 1))
    outer[0, 0], outer[0, 1:] = values[0], values[1 : width + 1] / np.sqrt(2)
    rows, columns = np.triu_indices(width)
    outer[1 + rows, 1 + columns] = values[width + 1 :] / np.where(rows == columns, 1.0, np.sqrt(2))
    outer = outer + np.triu(outer, 1).T
    assert 0 <= values[0] <= MOST_PATIENTS and values[0] == np.round(values[0])
    least, *_, largest = np.linalg.eigvalsh(outer)
    assert least >= -1e-5 * abs(largest)
    assert np.trace(outer[1:, 1:]) <= values[0] * bound**2 * (1 + 1e-5)
    return float(values[0])


def update_case(plan: RunPlan, folder: Path, finetuning: bool = False, diffusion: bool = False) -> Case:
    """A round of pretraining, of the diffusion model, or of fine-tuning."""
    draws = torch.Generator().manual_seed(3)
    shared = {"weight": torch.randn(3, 4, generator=draws), "constant": torch.zeros(2)}
    changes: dict[str, Any] = {
        "plan_sha256": plan.sha256,
        "site": SITE,
        "round": 1,
        "examples": 20,
        "update": {name: 2 * torch.randn(t.shape, generator=draws) for name, t in shared.items()},
        "metrics": {"seconds": 0.5, "loss.total": 1.0, "steps": 4.0},
    }
    wire_dtype = "float32" if finetuning else plan.release.wire_dtype
    valid = TrainReply(**changes, wire_dtype=wire_dtype).to_record()
    exchange: Any = FINETUNING if finetuning else DIFFUSION if diffusion else PRETRAINING
    bounds = Bounds(num_replies=3, max_norm=20.0, max_examples=MOST_SCANS)
    honest = {name: torch.randn(t.shape, generator=draws) for name, t in shared.items()}
    task = Task(
        message_type=exchange.route,
        sha256=plan.sha256,
        rounds=1,
        max_norm=20.0,
        question=lambda round_number, start: valid,
        wire_dtype=wire_dtype,
    )
    strategy = ContentShare(
        plan, shared, task, roster=registered(plan.sites), folder=folder, book=Unwritten()
    )

    def begin() -> tuple[ReplyWall[Any], Settle]:
        total, roster = StreamingSum(shared, bounds), registered(plan.sites)
        total.fold(HONEST, honest, 30)
        before = [one.integers.copy() for one in total._sum]
        strategy.roster = roster
        wall = strategy._wall(1, total)

        def settle(reply: Any) -> None:
            if reply is None:
                assert (total.examples, total.num_replies) == (30, 1)
                after = [one.integers for one in total._sum]
                assert all(np.array_equal(a, b) for a, b in zip(before, after, strict=True))
                return
            assert reply.site in plan.sites and 1 <= reply.examples <= 1 << 20
            assert reply.round == 1 and reply.wire_dtype == wire_dtype
            assert {n: t.shape for n, t in reply.update.items()} == {n: t.shape for n, t in shared.items()}
            assert np.linalg.norm(finite(reply.update)) <= 20.0 * reply.examples * 1.01
            possible_metrics(reply.metrics)
            assert total.examples == 30 + reply.examples
            finite(total.mean())

        return wall, settle

    return Case(valid, largest_reply(shared, wire_dtype), begin)


def survey_case(plan: RunPlan) -> Case:
    model, honest = MeduetModel(plan), surveyed(plan, HONEST, 0)

    def begin() -> tuple[ReplyWall[Any], Settle]:
        model._survey = StyleSurvey(plan)
        model.check_survey(honest)
        wall = ReplyWall(
            "survey", SURVEY.route, plan.sha256, registered(plan.sites), Unwritten(),
            SURVEY.reply.from_record, model.check_survey,
        )  # fmt: skip

        def settle(reply: Any) -> None:
            if reply is None:
                assert model._survey.answered == (HONEST,)
                return
            assert 5 <= reply.num_patients <= min(reply.num_scans, 1 << 20) and reply.num_scans <= 1 << 20
            finite(reply.moments)
            (count,) = reply.moments["count"].tolist()
            assert 5 <= count <= reply.num_patients and count == round(count)
            mean, square = (reply.moments[n].double().numpy() for n in ("mean", "mean_square"))
            assert (square * count >= mean**2 * (1 - 1e-3)).all()
            bank: StyleBank = model._survey.bank()
            alone = StyleMoments.from_tensors(honest.moments, survey_layout(plan)).latent_scale()[1]
            assert bool(torch.isfinite(bank.centre).all())
            assert bool((bank.scale >= alone / 2.001).all())  # whatever it claims

        return wall, settle

    return Case(surveyed(plan, SITE, 1).to_record(), SURVEY.largest(plan, None), begin)  # type: ignore[arg-type]


def erasure_case(plan: RunPlan) -> Case:
    model, honest = MeduetModel(plan), content(plan, HONEST, 0)
    shared, book, sha256 = model.with_code(model.start()[0], {}), Unwritten(), plan.sha256

    def begin() -> tuple[ReplyWall[Any], Settle]:
        wall = ReplyWall(
            "erasure", ERASURE.route, sha256, registered(plan.sites), book,
            ERASURE.reply.from_record, model.check_erasure,
        )  # fmt: skip

        def settle(reply: Any) -> None:
            if reply is None:
                return
            count, *total = reply.moments["sums"].tolist()
            assert 5 <= count <= MOST_PATIENTS and count == round(count)
            assert np.linalg.norm(total) <= count * code_bound(plan.network.code_size) * (1 + 1e-5)
            after, _ = model.after_erasure(shared, {HONEST: honest, "turin": reply})
            finite({name: after[name] for name in ("erasure_matrix", "code_matrix")})

        return wall, settle

    return Case(content(plan, SITE, 1).to_record(), ERASURE.largest(plan, None), begin)  # type: ignore[arg-type]


def probe_reply(plan: RunPlan, site: str, seed: int) -> ProbeReply:
    """What a site with six patients in each fold would tell."""
    draws = torch.Generator().manual_seed(seed)
    names, width = [str(n) for n in range(6)], joint_width(plan)
    folds = [torch.randn(6, width, generator=draws) for _ in range(plan.probes.folds)]
    ages = torch.rand(6, 1, generator=draws) * 2 - 1
    factors = [ErasureMoments.of(fold, names, joint_bound(plan)).to_vector() for fold in folds]
    anatomy = [
        ErasureMoments.of(torch.cat([fold, ages], dim=1), names, anatomy_bound(plan)).to_vector()
        for fold in folds
    ]
    latents = torch.randn(18, 2, 4, 6, 4, generator=draws)
    swapped = style_vector(StyleMoments.of(latents, [str(n) for n in range(18)], survey_layout(plan)))
    others = torch.tensor([float(other != site) for other in plan.sites], dtype=torch.float64)
    sums = {
        FACTORS: torch.stack(factors),
        ANATOMY: torch.stack(anatomy),
        SWAPPED: others[:, None] * swapped,
        SWAPPED_PATIENTS: 18 * others,
        RECOGNITION: torch.tensor([20.0, 10.0, 36.0, 2.0], dtype=torch.float64),
    }
    assert {name: tuple(tensor.shape) for name, tensor in sums.items()} == sums_shapes(plan)
    return ProbeReply(plan_sha256=plan.sha256, site=site, round=1, sums=sums)


def probe_case(plan: RunPlan, hits: bool) -> Case:
    roster, book, sha256 = registered(plan.sites), Unwritten(), plan.sha256
    probes = FederatedProbes(InProcessGrid(lambda m, c: m, 1), roster, plan, book)  # type: ignore[arg-type]
    probes._round = 1
    honest = probe_reply(plan, HONEST, 0)
    layout = survey_layout(plan)
    latents = torch.randn(6, 2, 4, 6, 4, generator=torch.Generator().manual_seed(5))
    moments = StyleMoments.of(latents, [str(n) for n in range(6)], layout)
    bank = StyleBank.of(plan.sites, {site: moments for site in plan.sites}).to_tensors()
    valid = probe_reply(plan, SITE, 1)
    if hits:
        counts = torch.tensor([9.0, 5.0, 18.0], dtype=torch.float64)
        valid = dataclasses.replace(valid, sums={HITS: counts})

    def begin() -> tuple[ReplyWall[Any], Settle]:
        probes._patients = {site: 18.0 for site in plan.sites} if hits else {}
        wall = ReplyWall(
            "probe", PROBES.route, sha256, registered(plan.sites), book,
            PROBES.reply.from_record, probes._check_hits if hits else probes._check_sums,
        )  # fmt: skip

        def settle(reply: Any) -> None:
            if reply is None:
                return
            finite(reply.sums)
            if hits:
                content, style, patients = reply.sums[HITS].tolist()
                assert patients == 18.0 and 0 <= content <= 18 and 0 <= style <= 18
                readings = readings_of_hits({SITE: reply.sums})
            else:
                width = joint_width(plan)
                assert all(possible_sums(row, width, joint_bound(plan)) >= 5 for row in reply.sums[FACTORS])
                for row in reply.sums[ANATOMY]:
                    possible_sums(row, width + 1, anatomy_bound(plan))
                both = {HONEST: honest.sums, "turin": reply.sums}
                finite(fitted_probes(both, plan))
                readings = readings_of_sums(both, bank, plan)
            json.dumps(readings, allow_nan=False)

        return wall, settle

    return Case(valid.to_record(), PROBES.largest(plan, None), begin)  # type: ignore[arg-type]


def latents_case(plan: RunPlan, folder: Path) -> Case:
    bank, count = LatentBank(folder / "bank", bank_key_in(folder / "bank.key")), 4
    told: list[ToldLatents] = []
    book, sha256 = Unwritten(), plan.sha256
    ask = LatentsAsk(plan_json=plan.to_json(), round=1, first=0, count=count)
    draws = torch.Generator().manual_seed(8)
    grid = plan.network.latent_grid
    examples = Examples(
        latents=torch.randn(count, 2, *grid, generator=draws),
        site=torch.full((count,), plan.sites.index(SITE)),
        body_part=torch.full((count,), -1),
        spacing=torch.full((count, 3), 1.5),
        category=torch.tensor([0, 1, 0, -1]),
    )
    valid = ToldLatents(
        plan_sha256=plan.sha256,
        site=SITE,
        round=1,
        first=0,
        total=9,
        items=tuple(f"{n:032x}" for n in range(count)),
        examples=examples,
    )

    def check(reply: Any) -> None:
        told.append(bank.opened(reply))
        check_reply(told[-1], ask, plan, bank)

    def begin() -> tuple[ReplyWall[Any], Settle]:
        wall = ReplyWall(
            "latents", LATENTS.route, sha256, registered(plan.sites), book,
            LATENTS.reply.from_record, check,
        )  # fmt: skip

        def settle(reply: Any) -> None:
            if reply is None:
                return
            reply = told[-1]
            assert 0 <= reply.total <= 1 << 20
            assert len(reply.items) == len(set(reply.items)) == min(count, reply.total)
            assert reply.examples.latents.shape == (len(reply.items), 2, *grid)
            lengths = np.linalg.norm(reply.examples.latents.double().numpy().reshape(-1, 2 * 96), axis=1)
            assert (lengths <= latent_bound(plan) * 1.001).all()
            assert set(reply.examples.category.tolist()) <= {-1, 0, 1}
            assert set(reply.examples.site.tolist()) <= {plan.sites.index(reply.site)}

        return wall, settle

    return Case(valid.sealed_to(RECIPIENT).to_record(), largest_latents(plan, ask), begin)


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """Thousands of warnings would take longer than what they warn of."""
    log = logging.getLogger("strategies.reply_wall")
    log.disabled = True
    yield
    log.disabled = False


@pytest.fixture(scope="module")
def cases(miniature: Any, tmp_path_factory: pytest.TempPathFactory) -> list[Case]:
    """Valid replies to every question under tiny plans."""
    folder = tmp_path_factory.mktemp("mutated")
    plan: RunPlan = miniature.plan(rounds=1)
    probed = dataclasses.replace(
        plan, probes=ProbePlan(every_rounds=1, folds=3, anatomy={"age": (0.0, 100.0)})
    )
    raw = dataclasses.replace(
        plan,
        diffusion=DiffusionPlan(
            policy="raw",
            transformer=TransformerShape(patch_size=2, width=12, depth=1, heads=2),
            training=DiffusionTraining(),
            conditions=("content", "category"),
            category="sex",
            categories=("F", "M"),
        ),
    )
    byte = dataclasses.replace(plan, release=ReleasePlan(wire_dtype="mxint8"))
    half = dataclasses.replace(plan, release=ReleasePlan(wire_dtype="bfloat16"))
    return [
        update_case(plan, folder / "a"),
        update_case(byte, folder / "b"),
        update_case(half, folder / "c", diffusion=True),
        update_case(plan, folder / "d", finetuning=True),
        survey_case(plan),
        erasure_case(plan),
        probe_case(probed, hits=False),
        probe_case(probed, hits=True),
        latents_case(raw, folder / "e"),
    ]


def memory() -> int:
    """Bytes that this process held at once, at most, since it began."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def send(cases: list[Case], seeds: range) -> None:
    """A reply for each seed, to each question in turn."""
    accepted, before = 0, memory()
    for seed in seeds:
        try:
            accepted += cases[seed % len(cases)].answered(random.Random(seed))
        except Exception as error:
            raise AssertionError(f"reply {seed} got past the wall") from error
    assert 0.02 * len(seeds) < accepted < 0.6 * len(seeds)  # both ways are taken
    assert memory() - before < GROWTH_BYTES


def test_every_valid_reply_is_accepted_as_it_is(cases: list[Case]) -> None:
    class Still(random.Random):
        def random(self) -> float:
            return 0.9  # neither records nor objects are changed

    assert all(case.answered(Still()) for case in cases)


def test_of_1500_changed_replies_none_is_accepted_that_the_plan_forbids(cases: list[Case]) -> None:
    send(cases, range(1500))


@pytest.mark.slow
@pytest.mark.parametrize("first", range(1500, 39500, 9500))
def test_of_38000_more_none_is_accepted_that_the_plan_forbids(cases: list[Case], first: int) -> None:
    send(cases, range(first, first + 9500))


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(draws=st.randoms(use_true_random=False), number=st.integers(0, 8))
def test_nor_of_those_that_hypothesis_looks_for(cases: list[Case], draws: random.Random, number: int) -> None:
    cases[number].answered(draws)


def test_what_a_question_promises_is_the_size_of_what_is_sent(cases: list[Case]) -> None:
    for case in [*cases[:7], *cases[8:]]:  # hits are smaller than the sums before them
        sent = sum(record.count_bytes() for record in case.valid.array_records.values())
        assert sent <= case.largest.array_bytes < sent + 4096
    assert largest_reply(promised({"x": (3,)}, torch.float64)).array_bytes > 24
