"""The centre's side of the last stage: from shares to masks, and the masks out of the sum.

Of each survivor the seed of its own mask is put together from shares, and of each lost site the key of the
masks that survivors shared with it. What is put together is held against what the site announced; a share
that is wrong is left out, if enough others are there.

Does not do: ask anybody, or decide who survived (`server/exchanges/secure_sum.py`).
"""

import hashlib
from collections.abc import Callable, Mapping
from functools import partial
from itertools import combinations, islice

from privacy.secure_sum.masks import add_mask, pair_key, pair_sign, public_key, seed_key
from privacy.secure_sum.party import Opened
from privacy.secure_sum.ring import Ring
from privacy.secure_sum.shares import join
from privacy.secure_sum.transcript import Attempt, Roster, SumRefused, SurvivorList

_MOST_TRIES = 200
"""Choices of answers that are tried for one secret: enough to find a wrong one among 20."""


def unmask(
    total: Ring,
    attempt: Attempt,
    roster: Roster,
    said: SurvivorList,
    answers: Mapping[str, Opened],
    least: int,
) -> None:
    """Take all masks out of the sum of the survivors' vectors, in place.

    `answers`: what at least `least` survivors opened. Raises `SumRefused`, and leaves the sum as it was, when
    a secret cannot be put together.
    """

    def announced(site: str, seed: bytes) -> bool:
        return hashlib.sha256(seed).digest() == roster[site].seed_sha256

    def of_key(site: str, secret: bytes) -> bool:
        return public_key(secret) == roster[site].mask_key

    opened = {site: one for site, one in answers.items() if site in said.survivors}
    if len(opened) < least:
        raise SumRefused(f"Expected shares of at least {least} sites; got {len(opened)}.")
    seeds, secrets = dict[str, bytes](), dict[str, bytes]()
    for site in sorted(said.survivors):
        shares = {by: one.seeds[site] for by, one in opened.items()}
        seeds[site] = _joined(shares, roster, least, partial(announced, site))
    for site in sorted(said.lost):
        shares = {by: one.mask_keys[site] for by, one in opened.items()}
        secrets[site] = _joined(shares, roster, least, partial(of_key, site))
    for site, seed in seeds.items():
        add_mask(total, seed_key(seed, attempt, site), -1)
    for lost, secret in secrets.items():
        for site in sorted(said.survivors):
            key = pair_key(secret, lost, roster[site].mask_key, site, attempt)
            add_mask(total, key, pair_sign(lost, site))  # what the lost site would have added


def _joined(shares: Mapping[str, bytes], roster: Roster, least: int, right: Callable[[bytes], bool]) -> bytes:
    for chosen in islice(combinations(sorted(shares), least), _MOST_TRIES):
        secret = join({site: shares[site] for site in chosen}, list(roster))
        if right(secret):
            return secret
    raise SumRefused("Expected shares that give what was announced; too many are wrong.")
