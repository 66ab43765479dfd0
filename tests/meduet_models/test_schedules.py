"""Learning rates rise and fall as in every run so far, to the bit."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from meduet_models.adamw import AdamW, decay_groups
from meduet_models.objective.teacher import momentum_at
from meduet_models.schedules import cosine, rise
from server.tokenizer.training import TokenizerTraining, learning_rate_at

STEPS = (0, 150, 199, 200, 1250, 2499)


def test_a_rise_is_straight_never_zero_and_then_level() -> None:
    assert [rise(step, 4, 1e-3) for step in (0, 1, 3, 4, 19)] == [0.0002, 0.0004, 0.0008, 0.001, 0.001]
    assert rise(0, 0) == 1.0


def test_a_cosine_goes_from_first_to_last_and_is_half_way_in_the_middle() -> None:
    assert (cosine(3e-4, 1e-6, 0), cosine(3e-4, 1e-6, 1)) == (pytest.approx(3e-4), 1e-6)
    assert cosine(1.0, 0.0, 10, 20) == pytest.approx(0.5)
    assert cosine(0.0, 1.0, 0.1) < 0.1 and cosine(0.0, 1.0, 0.9) > 0.9  # level at both ends


def test_the_cosine_is_to_the_bit_what_each_schedule_wrote_out_for_itself() -> None:
    for total in (1, 37, 100, 2500):
        for step in range(total):
            share = step / total
            angle = math.pi * share
            assert momentum_at(share, 0.99, 0.9997) == (
                0.9997 - (0.9997 - 0.99) * (1.0 + math.cos(angle)) / 2.0
            )
            assert cosine(3e-4, 1e-6, share) == 1e-6 + (3e-4 - 1e-6) * (1 + math.cos(angle)) / 2
            assert cosine(1e-3, 0.0, step, total) == 1e-3 * (1 + math.cos(math.pi * step / total)) / 2


def test_a_tokenizer_learns_at_the_rates_of_those_that_are_there() -> None:
    rates = [learning_rate_at(step, TokenizerTraining()) for step in STEPS]
    assert rates == [
        1e-05, 0.0014893478970012433, 0.0019520253380811497, 0.0019515459511322021,
        0.0006311434019585612, 0.0003088655371845888,
    ]  # fmt: skip
    longer = replace(TokenizerTraining(), warmup_steps=400)
    assert learning_rate_at(199, longer) == pytest.approx(rates[2] / 2)


def test_weights_of_two_axes_or_more_are_decayed_and_no_other_and_each_is_there_once() -> None:
    network = nn.Sequential(nn.Conv3d(1, 2, 1), nn.LayerNorm(2), nn.Linear(2, 3))
    decayed, others = decay_groups(network.parameters(), 0.5)
    assert [p.shape for p in decayed["params"]] == [(2, 1, 1, 1, 1), (3, 2)]
    assert [p.ndim for p in others["params"]] == [1, 1, 1, 1]
    before = {name: p.detach().clone() for name, p in network.named_parameters()}
    for parameter in network.parameters():
        parameter.grad = torch.zeros_like(parameter)
    AdamW([decayed, others], lr=0.1).step()
    for name, parameter in network.named_parameters():
        kept = 1.0 - 0.1 * 0.5 if parameter.ndim > 1 else 1.0
        torch.testing.assert_close(parameter.detach(), kept * before[name])
