"""Secret draws of noisy steps: as much noise as promised, nobody's draws depend on others, once only."""

from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import kstest

from privacy.randomness import SecretSource
from privacy.step_secrets import StepSecrets

FALSE_ALARM = 1e-6
ZEROS = {"a": torch.zeros(3000), "b": torch.zeros(10, 300)}


def steps(key: bytes = b"k" * 32, entry: str = "line 1", deviation: float = 1.0) -> StepSecrets:
    return StepSecrets(SecretSource(key), (entry,), deviation)


def test_noise_has_the_promised_deviation_in_every_number_and_step_and_none_repeats() -> None:
    noisy = steps(deviation=2.5)
    drawn = [noisy.noised(step, ZEROS) for step in range(3)]
    parts = [tensor.flatten().numpy() / 2.5 for step in drawn for tensor in step.values()]
    parts += [t.flatten().numpy() for t in steps(entry="line 2").noised(0, ZEROS).values()]
    parts += [t.flatten().numpy() for t in steps(key=b"o" * 32).noised(0, ZEROS).values()]
    assert kstest(np.concatenate(parts), "norm").pvalue > FALSE_ALARM
    correlation = np.corrcoef(np.stack(parts)) - np.eye(len(parts))
    assert np.abs(correlation).max() < 5.5 / np.sqrt(3000)  # 45 pairs: a false alarm in 600,000


def test_noise_is_added_to_the_sum_and_an_empty_step_gets_as_much() -> None:
    full = steps().noised(0, {name: zeros + 3.0 for name, zeros in ZEROS.items()})
    empty = steps().noised(0, ZEROS)
    assert all(torch.allclose(full[name] - empty[name], torch.tensor(3.0).double()) for name in ZEROS)
    assert float(empty["a"].std()) == pytest.approx(1.0, abs=0.1)


def test_the_same_key_draws_the_same_again_and_a_lost_one_is_seen(tmp_path: Path) -> None:
    first, again, lost = (
        StepSecrets(SecretSource.at(tmp_path / name), ("line",), 1.0) for name in ("a", "a", "b")
    )
    assert torch.equal(first.noised(1, ZEROS)["b"], again.noised(1, ZEROS)["b"])
    assert first.fingerprint == again.fingerprint != lost.fingerprint


def test_what_is_drawn_for_a_patient_is_hers_and_the_steps_alone() -> None:
    draws = {
        (step, patient): tuple(steps().of_patient(step, patient).uniforms(2))
        for step in (0, 1, 11)
        for patient in ("1", "11", "")
    }
    assert len(set(draws.values())) == 9
    assert draws[1, "11"] == tuple(steps().of_patient(1, "11").uniforms(2))


def test_steps_that_do_not_follow_each_other_are_refused() -> None:
    noisy = steps()
    noisy.noised(4, ZEROS)
    for step in (4, 6, 0):
        with pytest.raises(ValueError, match=f"Expected step 5 of the round; got {step}"):
            noisy.noised(step, ZEROS)
