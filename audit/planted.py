"""Faults that are built in on purpose, which the audit must find, and sound pieces that it must not accuse.

An audit that finds nothing is believed only from a tool that finds these. They are run with every audit, in
seconds, by the functions that audit the run.

What this file does not do: touch the run.
"""

import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

from audit.attacks.memorisation import copying
from audit.attacks.scores import Scores, blind_from, judged
from audit.books import read_books
from audit.evidence import SiteBooks
from audit.findings import Finding
from audit.record.record import Planted
from audit.statistics.honest_canaries import told, told_with_known_draws, told_with_noise_twice
from audit.statistics.intervals import ONE_SIDE
from audit.statistics.mechanisms import audit_mechanism, moved_most, noise_repeats
from audit.statistics.one_run import Guesses
from federation.journal import Journal
from privacy.accounting import Mechanism
from privacy.ledger import Ledger, Place
from privacy.promise import Promise

_PROMISED = 4.3772  # of the Gaussian mechanism at sigma 1, delta 1e-5
_NUMBERS = 8
_CANARIES = 1500
_GAUSSIAN = Mechanism(noise_multiplier=1.3902)
"""Epsilon 3."""
_HALVED = replace(_GAUSSIAN, noise_multiplier=_GAUSSIAN.noise_multiplier / 2)
_STEPS = Mechanism(noise_multiplier=3.1581, sampling_rate=0.1, steps=60)
_RARE = Mechanism(noise_multiplier=0.91, sampling_rate=0.01, steps=100)
"""Both epsilon 1."""


def _clipped(rows: np.ndarray, clip: float = 1.0) -> np.ndarray:
    length = np.linalg.norm(rows, axis=1, keepdims=True)
    shorter: np.ndarray = rows * np.minimum(1.0, clip / np.maximum(length, 1e-12))
    return shorter


def _noised(sigma: float, clip: float = 1.0) -> bool:
    """Whether a Gaussian mechanism of this sigma and clip is accused of breaking sigma 1, clip 1."""

    def mechanism(rows: np.ndarray, draws: int, generator: np.random.Generator) -> np.ndarray:
        made: np.ndarray = _clipped(rows, clip).sum(0) + sigma * generator.normal(size=(draws, _NUMBERS))
        return made

    return audit_mechanism(mechanism, 100.0 * np.eye(_NUMBERS)[0], _PROMISED).contradicts


def _repeated(first: int, second: int) -> bool:
    """Whether the noise from two seeds is taken for the same."""
    draws = [np.random.default_rng(seed).normal(size=1000) for seed in (first, second)]
    return noise_repeats(*draws)


def _coupled(of: Callable[[np.ndarray], np.ndarray]) -> bool:
    """Whether leaving out one of 32 patients, one of them far out, moves a sum, clipped at 1, by more."""
    rows = np.random.default_rng(0).normal(size=(32, _NUMBERS))
    rows[0] *= 100
    return moved_most(of, rows) > 1 + 1e-9


def _mixed_by_sample(rows: np.ndarray) -> np.ndarray:
    """A loss that mixes each patient with the one at the other end, clipped patient by patient."""
    sum_: np.ndarray = _clipped(rows + rows[::-1]).sum(0)
    return sum_


def _groups_of_the_batch(rows: np.ndarray) -> np.ndarray:
    """Groups of four cut from whoever is there, clipped group by group."""
    groups = [rows[first : first + 4].sum(0) for first in range(0, len(rows), 4)]
    sum_: np.ndarray = _clipped(np.stack(groups)).sum(0)
    return sum_


def _own_style(rows: np.ndarray) -> np.ndarray:
    """Each patient less the exact mean and deviation of all, then clipped."""
    sum_: np.ndarray = _clipped((rows - rows.mean(0)) / rows.std(0) + 1.0).sum(0)
    return sum_


def _by_patient(rows: np.ndarray) -> np.ndarray:
    sum_: np.ndarray = _clipped(rows).sum(0)
    return sum_


def _guessed(
    scores: Callable[[np.ndarray, np.random.Generator], np.ndarray], promised: float, gaussian: bool = False
) -> bool:
    """Whether the coins of canaries are guessed so often from these scores that the promise cannot hold."""
    generator = np.random.default_rng(0)
    coins = generator.random(_CANARIES) < 0.5
    return Guesses.of(scores(coins, generator), coins).lower(gaussian=gaussian) > promised


def _books(fault: str) -> bool:
    """Whether books are accused: whole ones, or with a fault."""
    with tempfile.TemporaryDirectory() as folder:
        books = SiteBooks(Path(folder) / "journal.jsonl", Path(folder) / "ledger.jsonl")
        ledger, journal = Ledger(books.ledger), Journal(books.journal)
        promise = Promise(kind="round", bound=1.0, unit="site update", enforcement="clip")
        for number in (1, 2):
            place = Place(plan_sha256="0" * 64, kind="round", round=number)
            charge = ledger.settle(ledger.reserve(place, "a", promise), 1.0, f"{number}" * 64)
            line = {**place.record(), "question": "a", "sha256": f"{number}" * 64, "ledger": charge}
            journal.append(line)
        if fault == "forgets":
            books.ledger.write_bytes(b"\n".join(books.ledger.read_bytes().split(b"\n")[:2]) + b"\n")
        if fault == "two questions":
            journal.append({**line, "question": "b"})
        return bool(read_books(books).problems)


def _copies(share: float) -> bool:
    """Whether a generator that copies this share of its samples from training is found out."""
    draws = torch.Generator().manual_seed(0)
    training, held_out, samples = (torch.randn(60, 64, generator=draws) for _ in range(3))
    copied = round(share * len(samples))
    samples[:copied] = training[:copied] + 0.1 * samples[:copied]
    return copying(samples, training, held_out).chance < ONE_SIDE


def _scanners(shift: float) -> Finding:
    """Members from one scanner, others from another, and a score that reads nothing but the scanner."""
    draws = np.random.default_rng(0)
    member, site = np.arange(120) < 60, np.zeros(120, int)
    features = draws.normal(size=(120, 6)) + shift * member[:, None]
    blind = blind_from(features, member, site)
    return judged("planted", "loss", Scores(features[:, 0], member, site), "", blind)


FAULTS: dict[str, Callable[[], bool]] = {
    "no noise": lambda: _noised(0.0),
    "half sigma": lambda: _noised(0.5),
    "wrong clip": lambda: _noised(1.0, clip=3.0),
    "a seed reused between rounds": lambda: _repeated(7, 7),
    "a mask key shared by two sites": lambda: _repeated(11, 11),
    "per-sample clipping of a loss that mixes": lambda: _coupled(_mixed_by_sample),
    "groups cut from the batch": lambda: _coupled(_groups_of_the_batch),
    "own style by exact moments": lambda: _coupled(_own_style),
    "a ledger that forgets a round": lambda: _books("forgets"),
    "half sigma, by canaries": lambda: _guessed(partial(told, _HALVED), 3.0, gaussian=True),
    "per-sample clipping, by canaries": lambda: _guessed(
        partial(told, _GAUSSIAN, length=2.6), 3.0, gaussian=True
    ),
    "noise of two rounds alike, by canaries": lambda: _guessed(partial(told_with_noise_twice, _STEPS), 1.0),
    "draws that are no secret, by canaries": lambda: _guessed(partial(told_with_known_draws, _RARE), 1.0),
    "two questions under one reservation": lambda: _books("two questions"),
    "raw latents labelled synthetic": lambda: _copies(1.0),
    "a generator that copies": lambda: _copies(0.5),
    "members and others from different scanners": lambda: _scanners(1.5).verdict == "void",
}
SOUND: dict[str, Callable[[], bool]] = {
    "the Gaussian mechanism": lambda: _noised(1.0),
    "a Gaussian sum with canaries": lambda: _guessed(partial(told, _GAUSSIAN), 3.0, gaussian=True),
    "noisy steps with canaries": lambda: _guessed(partial(told, _STEPS), 1.0),
    "noise of two seeds": lambda: _repeated(7, 8),
    "clipping patient by patient": lambda: _coupled(_by_patient),
    "books that hold": lambda: _books(""),
    "a generator that does not copy": lambda: _copies(0.0),
    "members and others from one scanner": lambda: _scanners(0.0).verdict in ("void", "found"),
}


def planted() -> Planted:
    """Run them all: which faults were found, and who was accused without one."""
    found = {name: flagged() for name, flagged in FAULTS.items()}
    accused = {name: flagged() for name, flagged in SOUND.items()}
    missed = [name for name, flagged in found.items() if not flagged]
    wrongly = [name for name, flagged in accused.items() if flagged]
    return Planted(
        faults=len(found),
        found=len(found) - len(missed),
        sound=len(accused),
        accused=len(wrongly),
        missed=(*missed, *wrongly),
    )
