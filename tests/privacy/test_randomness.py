import os
import stat
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import chi2, kstest, norm

from privacy.randomness import KEY_BYTES, SecretSource

FALSE_ALARM = 1e-6
"""Chance that a statistical test here fails although nothing is wrong; the keys are fixed, so it does not."""
KEY = b"k" * KEY_BYTES


def drawn(*words: object, key: bytes = KEY, count: int = 200_000) -> torch.Tensor:
    return SecretSource(key).stream(*words).normals((count,))


def test_normals_are_normal_in_the_middle_and_in_the_tails() -> None:
    draws = drawn("a", count=1_000_000).numpy()
    assert kstest(draws, "norm").pvalue > FALSE_ALARM
    for beyond in (2.0, 3.0, 4.0):
        share, expected = float((np.abs(draws) > beyond).mean()), 2 * norm.sf(beyond)
        assert abs(share - expected) < 5 * np.sqrt(expected / len(draws))


def test_the_variance_is_one_within_chance() -> None:
    draws = drawn("b").numpy()
    total = float((draws**2).sum())
    low, high = chi2.ppf([FALSE_ALARM / 2, 1 - FALSE_ALARM / 2], len(draws))
    assert low < total < high


@pytest.mark.parametrize("lag", [1, 2, 7])
def test_numbers_of_one_stream_do_not_know_of_each_other(lag: int) -> None:
    draws = drawn("c")
    products = (draws[lag:] * draws[:-lag]).mean() * (len(draws) - lag) ** 0.5
    assert abs(float(products)) < norm.isf(FALSE_ALARM / 2)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (("noise", "r1", "code"), ("noise", "r2", "code")),  # rounds
        (("noise", "r1", "code"), ("noise", "r1", "map")),  # tensors
        (("a", "bc"), ("ab", "c")),  # where words end
        (("a", ""), ("a",)),
    ],
)
def test_streams_of_other_words_are_independent(one: tuple[str, ...], other: tuple[str, ...]) -> None:
    first, second = drawn(*one), drawn(*other)
    correlation = float((first * second).mean()) * len(first) ** 0.5
    assert abs(correlation) < norm.isf(FALSE_ALARM / 2)


def test_another_key_is_another_noise_and_the_same_key_the_same_bits() -> None:
    assert torch.equal(drawn("a"), drawn("a"))
    correlation = float((drawn("a") * drawn("a", key=b"l" * KEY_BYTES)).mean()) * 200_000**0.5
    assert abs(correlation) < norm.isf(FALSE_ALARM / 2)


def test_no_seed_of_a_generator_moves_the_noise() -> None:
    torch.manual_seed(0)
    first = drawn("a", count=10)
    torch.manual_seed(1)
    np.random.seed(1)
    assert torch.equal(first, drawn("a", count=10))


def test_uniforms_have_53_bits_and_fill_their_range() -> None:
    draws = SecretSource(KEY).stream("u").uniforms(1_000_000)
    assert (draws * 2.0**53 == np.floor(draws * 2.0**53)).all() and draws.min() >= 0 and draws.max() < 1
    assert len(np.unique(draws)) == len(draws)
    assert kstest(draws, "uniform").pvalue > FALSE_ALARM
    odd = (np.int64(1) & (draws * 2.0**53).astype(np.int64)).mean()  # the last bit is one, too
    assert abs(odd - 0.5) * 2 * len(draws) ** 0.5 < norm.isf(FALSE_ALARM / 2)


def test_a_key_is_made_once_for_its_owner_alone_and_found_again(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "round-0001.secret"
    first = SecretSource.at(path).stream("a").normals((4,))
    assert stat.S_IMODE(path.stat().st_mode) == 0o600 and path.stat().st_size == KEY_BYTES
    assert torch.equal(SecretSource.at(path).stream("a").normals((4,)), first)
    other = SecretSource.at(tmp_path / "other.secret").stream("a").normals((4,))
    assert not torch.equal(other, first)


def test_a_key_that_a_kill_cut_is_made_anew(tmp_path: Path) -> None:
    path = tmp_path / "round-0001.secret"
    path.write_bytes(os.urandom(7))
    SecretSource.at(path)
    assert path.stat().st_size == KEY_BYTES


def test_a_key_of_another_size_is_refused() -> None:
    with pytest.raises(ValueError, match="32 bytes; got 3"):
        SecretSource(b"abc")
