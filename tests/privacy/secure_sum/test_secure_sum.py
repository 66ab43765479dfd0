"""Secure sum as sites and centre play it, and its attacks: each fails, and succeeds without its defence."""

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence

import numpy as np
import pytest
from scipy import stats

from privacy.secure_sum.masks import add_mask, new_secret, pair_key, pair_sign, public_key, seed_key
from privacy.secure_sum.opening import unmask
from privacy.secure_sum.party import HeldShares, Opened, Party
from privacy.secure_sum.ring import Ring, decode, encode, grid_bits, rounding_length, to_grid
from privacy.secure_sum.shares import join, seal, split, unseal
from privacy.secure_sum.transcript import (
    Announcement,
    Attempt,
    SumRefused,
    SurvivorList,
    checked_roster,
    threshold,
)

ATTEMPT = Attempt("a" * 64, 3, 1)
LOSSES = ("none", "before shares", "before vectors", "before unmasking", "everywhere")


def names(number: int) -> list[str]:
    return [f"site{i:02d}" for i in range(number)]


def vectors(sites: Sequence[str], size: int = 1000, seed: int = 0) -> dict[str, Ring]:
    draws = np.random.default_rng(seed)
    return {site: draws.integers(0, 2**32, size, dtype=np.uint32) for site in sites}


def met(
    sites: Sequence[str], sharing: Sequence[str] | None = None, attempt: Attempt = ATTEMPT
) -> dict[str, Party]:
    """Sites after stage 2; those not among `sharing` were lost before it."""
    least = threshold(len(sites))
    parties = {site: Party.new(attempt, site) for site in sites}
    roster = {site: party.announcement for site, party in parties.items()}
    texts: dict[str, dict[str, bytes]] = {}
    for site in sharing or sites:
        checked_roster(roster, sites, site, parties[site].announcement, least)
        parties[site], texts[site] = parties[site].divided(roster, least)
    return {
        site: parties[site].joined({p: texts[p][site] for p in texts if p != site}, least)
        for site in sharing or sites
    }


def masked(parties: Mapping[str, Party], plain: Mapping[str, Ring]) -> dict[str, Ring]:
    leaving = {site: plain[site].copy() for site in parties}
    for site, party in parties.items():
        party.mask(leaving[site])
    return leaving


def added(rings: Sequence[Ring]) -> Ring:
    total = np.zeros_like(rings[0])
    for one in rings:
        total += one
    return total


@pytest.mark.parametrize("number", [3, 5, 10, 20])
@pytest.mark.parametrize(
    "losses", ["none", "before shares", "before vectors", "before unmasking", "everywhere"]
)
def test_the_sum_is_the_plain_sum_of_the_survivors(number: int, losses: str) -> None:
    sites, least = names(number), threshold(number)
    spare = number - least
    before = {
        "none": (0, 0, 0),
        "before shares": (spare, 0, 0),
        "before vectors": (0, spare, 0),
        "before unmasking": (0, 0, spare),
        "everywhere": (spare // 3, spare // 3, spare // 3),
    }[losses]
    sharing = sites[before[0] :]
    parties, plain = met(sites, sharing), vectors(sites)
    left = masked({site: parties[site] for site in sharing[before[1] :]}, plain)
    said = SurvivorList(frozenset(left), frozenset(sharing) - frozenset(left))
    answering = sorted(left)[before[2] :]
    answers = {
        site: Opened.from_text(parties[site].opened(said, least).to_text(), said) for site in answering
    }
    total = added(list(left.values()))
    unmask(total, ATTEMPT, parties[sharing[0]].roster, said, answers, least)
    assert np.array_equal(total, added([plain[site] for site in left]))


def test_a_masked_vector_is_uniform() -> None:
    """Chi-squared of its bytes, 255 degrees of freedom; false alarm 1e-6 for each of four."""
    sites = names(4)
    constant = {site: np.zeros(250_000, dtype=np.uint32) for site in sites}
    limit = stats.chi2.isf(1e-6, 255)
    for vector in masked(met(sites), constant).values():
        counts = np.bincount(vector.view(np.uint8), minlength=256)
        expected = len(vector) * 4 / 256
        assert float(((counts - expected) ** 2 / expected).sum()) < limit
    counts = np.bincount(constant[sites[0]].view(np.uint8), minlength=256)  # the test can fail
    assert float(((counts - expected) ** 2 / expected).sum()) > limit


@pytest.mark.parametrize(("number", "least"), [(3, 3), (4, 3), (5, 4), (7, 5), (10, 7), (20, 14), (32, 22)])
def test_the_threshold_leaves_no_two_lists_to_fewer_than_a_third(number: int, least: int) -> None:
    assert threshold(number) == least
    assert 2 * least - number > number / 3


@pytest.mark.parametrize("number", [0, 2, 33])
def test_no_sum_of_two_and_none_of_thirty_three(number: int) -> None:
    with pytest.raises(ValueError, match="3 to 32 sites"):
        threshold(number)


@pytest.mark.parametrize(("sites", "largest"), [(20, 20.0), (3, 1.0), (32, 2.0**20 * 1e4), (4, 2.0**-10)])
def test_on_the_grid_no_sum_wraps_and_a_finer_grid_could(sites: int, largest: float) -> None:
    bits = grid_bits(sites, largest)
    assert sites * largest * 2.0**bits < 2**31 <= sites * largest * 2.0 ** (bits + 1)
    assert grid_bits(20, 20.0) == 22
    edge = np.array([largest, -largest], dtype=np.float32)
    whole = np.empty(2, dtype=np.uint32)
    encode(edge, bits, whole)
    total = added([whole] * sites)
    assert np.allclose(
        decode(total, bits), edge.astype(np.float64) * sites, rtol=1e-6, atol=sites * 2.0**-bits
    )


def test_rounding_is_within_its_length_and_exact_on_the_grid() -> None:
    values = np.random.default_rng(1).normal(size=300_001).astype(np.float32)
    on_grid = values.copy()
    to_grid(on_grid, 12)
    assert np.linalg.norm((on_grid - values).astype(np.float64)) <= rounding_length(len(values), 12)
    whole = np.empty(len(values), dtype=np.uint32)
    encode(values, 12, whole)
    assert np.array_equal(decode(whole, 12), on_grid.astype(np.float64))
    in_place = values.view(np.uint32)
    encode(values, 12, in_place)
    assert np.array_equal(in_place, whole)


@pytest.mark.parametrize("value", [np.nan, np.inf, 2.0**31])
def test_what_does_not_fit_the_ring_is_refused(value: float) -> None:
    with pytest.raises(ValueError, match="within the ring"):
        encode(np.array([0, value], dtype=np.float32), 0, np.empty(2, dtype=np.uint32))


def test_fewer_shares_than_the_threshold_say_nothing_and_as_many_say_all() -> None:
    sites, secret = names(7), new_secret()
    shares = split(secret, sites, 5)
    assert join({site: shares[site] for site in sites[2:]}, sites) == secret
    assert join({site: shares[site] for site in sites[3:]}, sites) != secret


def test_a_share_that_was_changed_or_moved_does_not_open() -> None:
    key = new_secret()
    text = seal(key, b"share", b"from a to b")
    assert unseal(key, text, b"from a to b") == b"share"
    changed = bytes([text[0] ^ 1]) + text[1:]
    for odd, context in (
        (text, b"from a to c"),
        (changed, b"from a to b"),
        (text[:-1], b"from a to b"),
        (b"", b""),
    ):
        with pytest.raises(SumRefused, match="do not"):
            unseal(key, odd, context)


def test_a_site_refuses_every_list_that_it_must_not_open() -> None:
    sites = names(5)
    party = met(sites)["site00"]
    a, b, c, d, e = sites

    def ask(survivors: Sequence[str], lost: Sequence[str]) -> None:
        party.opened(SurvivorList(frozenset(survivors), frozenset(lost)), threshold(5))

    ask([a, b, c, d], [e])
    for survivors, lost, why in (
        ([a, b, c, d], [d, e], "named as both"),
        ([a, b, c, d], [], "exactly those"),
        ([a, b, c, d, "other"], [e], "exactly those"),
        ([b, c, d, e], [a], "who is asked"),
        ([a, b, c], [d, e], "at least 4 survivors"),
    ):
        with pytest.raises(SumRefused, match=why):
            ask(survivors, lost)


def test_a_site_refuses_every_roster_among_which_it_must_not_share() -> None:
    sites = names(4)
    own = Party.new(ATTEMPT, "site00")
    roster = {site: Party.new(ATTEMPT, site).announcement for site in sites} | {"site00": own.announcement}

    def ask(changed: Mapping[str, Announcement]) -> None:
        checked_roster(changed, sites, "site00", own.announcement, threshold(4))

    ask(roster)
    stranger = Party.new(ATTEMPT, "site09").announcement
    mirrored = dataclasses.replace(roster["site01"], share_key=own.announcement.mask_key)
    for changed, why in (
        (roster | {"site09": stranger}, "'site09' is none"),
        (roster | {"site00": stranger}, "another's"),
        ({name: one for name, one in roster.items() if name != "site00"}, "missing"),
        ({name: roster[name] for name in sites[:2]}, "at least 3"),
        (roster | {"site01": roster["site02"]}, "there twice"),
        (roster | {"site01": mirrored}, "twice"),
    ):
        with pytest.raises(SumRefused, match=why):
            ask(changed)


def test_a_site_joins_no_attempt_of_too_few_strangers_or_itself() -> None:
    sites = names(4)
    parties = {site: Party.new(ATTEMPT, site) for site in sites}
    roster = {site: party.announcement for site, party in parties.items()}
    divided = {site: party.divided(roster, 3) for site, party in parties.items()}
    texts = {peer: divided[peer][1]["site00"] for peer in sites[1:]}
    one = divided["site00"][0]
    one.joined(texts, 3)
    own = divided["site01"][1]["site02"]
    for odd, why in (
        ({"site01": texts["site01"]}, "at least 3"),
        (texts | {"other": own}, "others on the roster"),
        (texts | {"site00": own}, "others on the roster"),
        (texts | {"site01": own}, "do not"),
    ):
        with pytest.raises(SumRefused, match=why):
            one.joined(odd, 3)


def test_a_key_with_which_nothing_can_be_agreed_is_refused() -> None:
    with pytest.raises(SumRefused, match="X25519"):
        pair_key(new_secret(), "a", bytes(32), "b", ATTEMPT)


def test_keys_differ_between_attempts_rounds_plans_and_purposes() -> None:
    secret, peer = new_secret(), public_key(new_secret())
    others = [
        ATTEMPT,
        dataclasses.replace(ATTEMPT, number=2),
        dataclasses.replace(ATTEMPT, round=4),
        dataclasses.replace(ATTEMPT, plan_sha256="b" * 64),
    ]
    assert len({pair_key(secret, "a", peer, "b", one) for one in others}) == len(others)
    assert seed_key(secret, ATTEMPT, "a") != seed_key(secret, ATTEMPT, "b")


def test_secrets_kept_on_disk_are_those_that_were_drawn() -> None:
    party = met(names(4))["site01"]
    assert Party.from_text(party.to_text()) == party
    assert party.mask_secret.hex() not in repr(party)
    for odd in (
        "",
        "[]",
        "{}",
        party.to_text()[:-2],
        party.to_text().replace('"number":1', '"number":"1","x":2'),
    ):
        with pytest.raises(SumRefused):
            Party.from_text(odd)


def test_a_wrong_share_is_left_out_and_too_many_are_noticed() -> None:
    sites, least = names(7), threshold(7)
    parties, plain = met(sites), vectors(sites)
    left = masked(parties, plain)
    said = SurvivorList(frozenset(sites), frozenset())
    answers = {site: party.opened(said, least) for site, party in parties.items()}
    lie = Opened({site: bytes(32) for site in sites}, {})
    total = added(list(left.values()))
    unmask(total, ATTEMPT, parties["site00"].roster, said, answers | {"site00": lie}, least)
    assert np.array_equal(total, added(list(plain.values())))
    lies = {site: lie for site in sites[:3]}
    masked_sum = added(list(left.values()))
    with pytest.raises(SumRefused, match="too many are wrong"):
        unmask(masked_sum, ATTEMPT, parties["site00"].roster, said, answers | lies, least)
    assert np.array_equal(masked_sum, added(list(left.values())))
    with pytest.raises(SumRefused, match="at least 5"):
        unmask(masked_sum, ATTEMPT, parties["site00"].roster, said, {s: answers[s] for s in sites[:4]}, least)


@pytest.mark.parametrize("odd", ["", "[]", '{"seeds": {}}', '{"seeds": {"a": 1}, "mask_keys": {}}'])
def test_an_answer_that_is_none_is_refused(odd: str) -> None:
    with pytest.raises(SumRefused):
        Opened.from_text(odd, SurvivorList(frozenset({"a"}), frozenset()))


def test_two_lists_read_a_vector_of_sites_that_answer_both_and_none_of_sites_that_answer_one() -> None:
    """The centre calls a site lost to three sites and a survivor to three, and has both of its secrets."""
    sites = names(4)
    victim, least = "site03", threshold(4)
    parties, plain = met(sites), vectors(sites)
    left = masked(parties, plain)
    as_lost = SurvivorList(frozenset(sites[:3]), frozenset({victim}))
    as_survivor = SurvivorList(frozenset(sites), frozenset())

    def read(first: Mapping[str, Opened], second: Mapping[str, Opened]) -> Ring:
        roster = parties[victim].roster
        secret = join({site: one.mask_keys[victim] for site, one in first.items()}, sites)
        seed = join({site: one.seeds[victim] for site, one in second.items()}, sites)
        vector = left[victim].copy()
        add_mask(vector, seed_key(seed, ATTEMPT, victim), -1)
        for site in sites[:3]:
            add_mask(
                vector,
                pair_key(secret, victim, roster[site].mask_key, site, ATTEMPT),
                -pair_sign(victim, site),
            )
        return vector

    def answers(said: SurvivorList, asked: Sequence[str]) -> dict[str, Opened]:
        return {site: parties[site].opened(said, least) for site in asked}

    # Without the rule of one list, which the ledger keeps: seen to succeed.
    assert np.array_equal(read(answers(as_lost, sites[:3]), answers(as_survivor, sites[:3])), plain[victim])
    # With it no site answers both, and two honest answers to each list are all there can be.
    with_rule = read(answers(as_lost, sites[:2]), answers(as_survivor, sites[2:]))
    assert not np.array_equal(with_rule, plain[victim])
    with pytest.raises(SumRefused):
        unmask(
            added([left[s] for s in sites[:3]]),
            ATTEMPT,
            parties[victim].roster,
            as_lost,
            answers(as_lost, sites[:2]),
            least,
        )


def test_a_vector_that_comes_late_is_read_where_there_are_only_pairwise_masks() -> None:
    """The centre gives an attempt up because one site is late, and begins again without it. Then the vector
    comes: with pairwise masks alone the first sum is whole, and the difference of the two sums is the late
    site's vector. With masks of their own nobody opens the first attempt any more."""
    sites, late = names(4), "site03"
    plain = vectors(sites)
    rest = [site for site in sites if site != late]

    def pairwise_only(parties: Mapping[str, Party]) -> dict[str, Ring]:
        leaving = masked(parties, plain)
        for site, party in parties.items():
            add_mask(leaving[site], seed_key(party.seed, party.attempt, site), -1)
        return leaving

    again = dataclasses.replace(ATTEMPT, number=2)
    first, second = met(sites), met(sites, rest, again)
    naive = added(list(pairwise_only(first).values())) - added(list(pairwise_only(second).values()))
    assert np.array_equal(naive, plain[late])
    attempt = masked(first, plain)
    whole = added(list(attempt.values()))  # all four vectors of the first attempt, the late one too
    total = added(list(masked(second, plain).values()))
    said, least = SurvivorList(frozenset(rest), frozenset()), threshold(4)
    unmask(
        total, again, second["site00"].roster, said, {s: second[s].opened(said, least) for s in rest}, least
    )
    assert np.array_equal(total, added([plain[site] for site in rest]))
    assert not np.array_equal(whole - total, plain[late])


def test_shares_are_what_they_say() -> None:
    held = HeldShares(b"a" * 32, b"b" * 32)
    assert HeldShares.from_bytes(held.to_bytes()) == held
    with pytest.raises(SumRefused, match="64 bytes"):
        HeldShares.from_bytes(b"a" * 63)


def test_an_announcement_with_one_key_for_both_purposes_is_refused() -> None:
    key = public_key(new_secret())
    with pytest.raises(SumRefused, match="two different keys"):
        Announcement(key, key, hashlib.sha256(b"").digest())
    with pytest.raises(SumRefused, match="32 bytes"):
        Announcement(key[:-1], key, hashlib.sha256(b"").digest())
