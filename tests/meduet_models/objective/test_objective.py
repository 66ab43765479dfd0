import dataclasses
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from meduet_models.factors import Factors
from meduet_models.objective.objective import StepBatch, StepDraws, draw_step
from meduet_models.objective.settings import LossWeights, ObjectiveConfig
from tests.meduet_models.objective.objective_case import PATHS, PUBLISHED, Case, reconstruction_only

ROOT = Path(__file__).parents[3]


@PATHS
def test_every_term_is_there_finite_and_weighted_in_the_total(paths: str) -> None:
    case = Case(paths)
    losses = case.losses()
    weights = dataclasses.asdict(LossWeights())

    assert set(losses.terms) == set(weights)
    torch.testing.assert_close(
        losses.total, sum(weights[name] * term for name, term in losses.terms.items()), rtol=1e-5, atol=1e-5
    )
    losses.total.backward()
    for name, parameter in case.student.named_parameters():
        assert parameter.grad is not None, name
        assert bool(parameter.grad.isfinite().all()) and parameter.grad.abs().max() > 0, name
    assert all(parameter.grad is None for parameter in case.teacher.parameters())


@PATHS
@pytest.mark.parametrize("name", [f.name for f in dataclasses.fields(LossWeights)])
def test_a_zero_weight_switches_its_term_off_and_no_other(paths: str, name: str) -> None:
    case = Case(paths)
    every = case.losses()
    some = case.losses(weights=dataclasses.replace(LossWeights(), **{name: 0.0}))

    assert set(every.terms) - set(some.terms) == {name}
    for term, value in some.terms.items():
        torch.testing.assert_close(value, every.terms[term], rtol=1e-5, atol=1e-6)


def test_nothing_to_train_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one positive weight"):
        Case().losses(weights=LossWeights(**{f.name: 0.0 for f in dataclasses.fields(LossWeights)}))


def test_invariance_without_a_restyled_scan_is_refused() -> None:
    with pytest.raises(ValueError, match=r"Expected batch\.restyled"):
        Case(restyled=False).losses(weights=LossWeights())


# Agreement with the published description, computed one pass at a time


def plain() -> ModuleType:
    spec = importlib.util.spec_from_file_location("local_step", ROOT / "bench" / "local_step.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["local_step"] = module
    spec.loader.exec_module(module)
    return module


@PATHS
@pytest.mark.parametrize("seed", [0, 1])
def test_losses_and_gradients_are_those_of_the_plain_published_step(paths: str, seed: int) -> None:
    case = Case(paths, seed=seed, restyled=False)
    terms, gradients = plain().compare(case.student, case.teacher, case.batch, case.draws)
    assert terms < 1e-5
    assert gradients < 1e-4


# Passes


def count_calls(case: Case, progress: float = 1.0, **config: object) -> dict[str, list[int]]:
    """Batch sizes of each network call."""
    calls: dict[str, list[int]] = {}
    handles = [
        module.register_forward_pre_hook(
            lambda _, inputs, name=name: calls.setdefault(name, []).append(len(inputs[0]))
        )
        for name, module in {
            "student encodes": case.student.encoder,
            "student decodes": case.student.decoder,
            "teacher encodes": case.teacher.network.encoder,
            "teacher decodes": case.teacher.network.decoder,
        }.items()
    ]
    case.losses(progress, **config)
    for handle in handles:
        handle.remove()
    return calls


@PATHS
@pytest.mark.parametrize(
    ("restyled", "progress", "config", "expected"),
    [
        # published terms: six calls; without MFTD neither its re-encoding nor the clean scans
        (False, 1.0, {}, ([1, 4], [4], [2, 2], [2])),
        (False, 0.1, {}, ([1, 2], [4], [1, 2], [2])),
        (False, 1.0, {"estimator": "one_stream"}, ([1, 2], [3], [2, 1], [1])),
        # the answer of the swap is known: the teacher decodes nothing
        (True, 1.0, {}, ([2, 4], [5], [2], [])),
        (True, 0.1, {}, ([2, 2], [5], [2], [])),
        (True, 1.0, {"estimator": "one_stream"}, ([2, 2], [4], [2], [])),
        # reconstruction alone
        (False, 1.0, {"weights": dataclasses.replace(PUBLISHED, siqc=0.0, mftd=0.0)}, ([1], [2], [], [])),
    ],
)
def test_a_step_makes_no_pass_twice(
    paths: str, restyled: bool, progress: float, config: dict[str, object], expected: tuple[list[int], ...]
) -> None:
    calls = count_calls(Case(paths, batch=6, restyled=restyled), progress, **config)
    names = ("student encodes", "student decodes", "teacher encodes", "teacher decodes")
    assert tuple(calls.get(name, []) for name in names) == tuple([6 * n for n in sizes] for sizes in expected)


@pytest.mark.parametrize(("turn", "expected"), [("mftd", ([2, 2], [3])), ("siqc", ([2, 2], [5]))])
def test_in_turn_a_step_computes_one_of_the_two(turn: str, expected: tuple[list[int], ...]) -> None:
    case = Case()
    case.draws = dataclasses.replace(case.draws, turn=turn)
    calls = count_calls(case, estimator="alternate")
    assert [n // 6 for n in calls["student encodes"]] == expected[0]
    assert [n // 6 for n in calls["student decodes"]] == expected[1]


def test_a_swap_is_asked_for_its_known_answer() -> None:
    """A network that ignores style cannot write the restyling; the term says by how much."""
    case = Case()
    term = case.losses().terms["restyled_reconstruction"]
    network, batch, draws = case.student, case.batch, case.draws
    tokens = network.embed_latents(batch.latents)
    mixed = torch.where(draws.exchanged.unsqueeze(-1), tokens[draws.partner], tokens)
    features = network.encoder(mixed)
    owned = torch.where(draws.exchanged.unsqueeze(-1), features[draws.partner], features)
    content = network.factors(batch.latents, owned).content
    style = network.encode(batch.restyled).style
    visible = torch.where(draws.show_lent.unsqueeze(1), draws.exchanged, ~draws.exchanged)
    written = network.predict_tokens(Factors(content, style), visible)
    expected = (written - network.target_tokens(batch.restyled)).square().mean()
    torch.testing.assert_close(term, expected)


# Schedules


@pytest.mark.parametrize(("progress", "on"), [(0.0, False), (0.299, False), (0.3, True), (1.0, True)])
def test_mftd_starts_after_its_warm_up(progress: float, on: bool) -> None:
    assert ("mftd" in Case().losses(progress, mftd_warmup=0.3).terms) == on


@pytest.mark.parametrize(("progress", "strength"), [(0.0, 0.0), (0.2, 0.5), (0.4, 1.0), (0.9, 1.0)])
def test_gradient_reversal_ramps_over_its_warm_up(progress: float, strength: float) -> None:
    case = Case("joint")
    only = LossWeights(**{f.name: 0.0 for f in dataclasses.fields(LossWeights)} | {"site_adversary": 1.0})

    def gradient(warmup: float) -> torch.Tensor:
        case.student.zero_grad()
        case.losses(progress, only, reversal_warmup=warmup).total.backward()
        assert case.student.content_head.linear.weight.grad is not None
        return case.student.content_head.linear.weight.grad.clone()

    whole = gradient(0.0)
    assert whole.abs().max() > 0
    torch.testing.assert_close(gradient(0.4), strength * whole)


def test_the_adversary_moves_content_up_its_loss_and_style_moves_down() -> None:
    case, before = Case("joint"), {}
    for name, sign in (("site_adversary", 1.0), ("site_from_style", -1.0)):
        only = LossWeights(**{f.name: 0.0 for f in dataclasses.fields(LossWeights)} | {name: 1.0})
        case.student.zero_grad()
        losses = case.losses(weights=only)
        losses.total.backward()
        before[name] = float(losses.total.detach())
        head = case.student.content_head if name == "site_adversary" else case.student.style_head
        with torch.no_grad():
            head.linear.weight -= 0.01 * head.linear.weight.grad
        assert sign * (float(case.losses(weights=only).total.detach()) - before[name]) > 0


@pytest.mark.parametrize(
    ("temperature", "term"),
    [
        ("temperature_content", "siqc"),
        ("temperature_style", "siqc"),
        ("temperature_invariance", "invariance"),
    ],
)
def test_every_temperature_acts_on_its_term_alone(temperature: str, term: str) -> None:
    case = Case()
    warm, cold = case.losses(), case.losses(**{temperature: 0.02})
    changed = {
        name for name in warm.terms if abs(float((warm.terms[name] - cold.terms[name]).detach())) > 1e-4
    }
    assert changed == {term}
    with pytest.raises(ValueError, match=f"objective.{temperature} from"):
        ObjectiveConfig(**{temperature: 0.0})


# What a term may depend on


@PATHS
def test_renaming_volumes_changes_nothing(paths: str) -> None:
    case = Case(paths)
    order = torch.randperm(6, generator=torch.Generator().manual_seed(3))
    where = order.argsort()
    renamed = Case(paths)
    renamed.batch = StepBatch(case.batch.latents[order], case.batch.site[order], case.batch.restyled[order])
    renamed.draws = StepDraws(
        where[case.draws.partner[order]],
        case.draws.exchanged[order],
        case.draws.show_lent[order],
        case.draws.turn,
    )
    for estimator in ("full", "one_stream"):
        ours, theirs = case.losses(estimator=estimator), renamed.losses(estimator=estimator)
        for name in ours.terms:
            torch.testing.assert_close(theirs.terms[name], ours.terms[name], rtol=1e-4, atol=1e-5)


def test_a_style_is_labelled_by_its_site_whatever_the_site_is_called() -> None:
    case = Case()
    before = case.losses().terms["siqc"]
    case.batch = dataclasses.replace(case.batch, site=torch.tensor([2, 0, 1])[case.batch.site])
    torch.testing.assert_close(case.losses().terms["siqc"], before)
    case.batch = dataclasses.replace(case.batch, site=case.batch.site.clamp(max=1))  # two sites become one
    assert abs(float((case.losses().terms["siqc"] - before).detach())) > 1e-3


def test_scans_of_one_subject_are_not_contrasted() -> None:
    case = Case(batch=4)
    apart = case.losses().terms
    case.batch = dataclasses.replace(case.batch, subject=torch.zeros(4, dtype=torch.long))
    together = case.losses().terms
    assert together["invariance"] != apart["invariance"] and together["siqc"] != apart["siqc"]
    assert together["reconstruction"] == apart["reconstruction"]


def test_hidden_tokens_of_a_scan_are_reconstructed_and_shown_ones_apart() -> None:
    case = Case(restyled=False)
    only = LossWeights(**{f.name: 0.0 for f in dataclasses.fields(LossWeights)} | {"reconstruction": 1.0})
    predicted = case.student.predict_tokens

    def knows_hidden(factors, visible=None):
        """A decoder that is right wherever it is asked and wrong where it was shown."""
        target = case.student.target_tokens(case.batch.latents).repeat(2, 1, 1)
        return torch.where(visible.unsqueeze(-1), target + 7.0, target) + 0 * predicted(factors, visible)

    case.student.predict_tokens = knows_hidden
    assert case.losses(weights=only).total == 0.0
    shown = dataclasses.replace(only, reconstruction=0.0, visible_reconstruction=1.0)
    assert float(case.losses(weights=shown).total.detach()) == pytest.approx(49.0, rel=1e-4)


# Draws


def test_draws_can_be_replayed_and_pairs_have_different_target_styles() -> None:
    config = ObjectiveConfig(mask_ratio=0.25)
    seen = torch.zeros(3)
    for seed in range(200):
        draws = draw_step(torch.Generator().manual_seed(seed), 8, 16, config, (0, 2, 5))
        again = draw_step(torch.Generator().manual_seed(seed), 8, 16, config, (0, 2, 5))
        assert torch.equal(draws.exchanged, again.exchanged) and torch.equal(
            draws.target_site, again.target_site
        )
        assert bool((draws.exchanged.sum(1) == 4).all())
        assert bool((draws.target_site != draws.target_site[draws.partner]).all())
        seen += torch.stack([(draws.target_site == site).sum() for site in (0, 2, 5)])
    assert bool((seen / seen.sum() - 1 / 3).abs().max() < 0.08)  # 1600 draws in dependent pairs; 4 deviations


def test_one_site_or_none_leaves_no_choice() -> None:
    generator = torch.Generator().manual_seed(0)
    assert draw_step(generator, 4, 16, ObjectiveConfig()).target_site is None
    only = draw_step(generator, 4, 16, ObjectiveConfig(), (3,)).target_site
    assert torch.equal(only, torch.full((4,), 3))


# Masked autoencoding


def test_masked_autoencoding_predicts_hidden_tokens_of_each_scan_from_its_visible_ones() -> None:
    case = Case("joint")
    losses = case.losses(weights=reconstruction_only(), masking="masked")
    assert set(losses.terms) == {"reconstruction"}
    network, hidden = case.student, case.draws.exchanged
    by_hand = []
    for scan, gone in zip(case.batch.latents, hidden, strict=True):
        tokens = network.embed_latents(scan[None])
        features = network.encoder.forward_visible(tokens, ~gone[None])
        predicted = network.predict_tokens(network.factors(scan[None], features), ~gone[None])
        by_hand.append((predicted - network.target_tokens(scan[None])).square().mean(-1)[0][gone])
    torch.testing.assert_close(losses.total, torch.cat(by_hand).mean())


def test_masked_autoencoding_refuses_terms_that_need_a_partner() -> None:
    with pytest.raises(ValueError, match=r"weights\.siqc needs a partner .* has none"):
        ObjectiveConfig(weights=reconstruction_only(siqc=0.3), masking="masked")
