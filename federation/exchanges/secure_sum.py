"""A round as a secure sum: keys, shares, the masked vector, and what opens the sum of one list of sites.

Four exchanges, asked in this order, once each in an attempt; each attempt has keys of its own. The list of a
round is asked once, whatever the attempt: the place in the ledger says so. What is masked is a round of
pretraining; the plan has no unmasked one then (`federation/exchanges/pretraining.py`). With privacy it is a
noisy step, once in a round, whatever the attempt: a second vector would be a second charge. What such sums
promise: `federation/summed_noise.py`.

Does not do: the mathematics (`privacy/secure_sum/`), the meaning of the vector
(`federation/wire/sum_layout.py`). Source: Bonawitz et al., Practical Secure Aggregation (2017), figure 4, on
the complete graph, with signed keys; why no round of signatures over the list follows:
`privacy/secure_sum/transcript.py`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Annotated

import torch
from cryptography.x509 import Certificate

from federation.exchanges.exchange import Exchange
from federation.exchanges.pretraining import TrainAsk, update_promise
from federation.exchanges.private_rounds import PrivateAsk, noisy_rounds, steps_promise
from federation.keys.certificates import CertificateRefused, site_of
from federation.keys.identity import SiteIdentity, signing_key
from federation.plan.plan import RunPlan
from federation.wire.limits import Largest, largest_reply, promised
from federation.wire.messages import Arrays, Ask, Reply, Tensors
from federation.wire.sum_layout import MASKED, SumLayout
from forms.json_text import canonical
from privacy.promise import Promise
from privacy.secure_sum.transcript import (
    Announcement,
    Attempt,
    SumRefused,
    SurvivorList,
    by_name,
    checked_fields,
    from_hex,
    read_said,
)

MOST_ATTEMPTS = 99
"""Attempts at one round."""


@dataclass(frozen=True, kw_only=True)
class SumKeysAsk(Ask, kind="sum_keys_ask"):
    """Announce fresh keys for this attempt at this round."""

    round: int
    attempt: int


@dataclass(frozen=True, kw_only=True)
class SumSharesAsk(Ask, kind="sum_shares_ask"):
    """Divide your secrets among those who announced: `roster` holds what each of them said, by name."""

    round: int
    attempt: int
    roster: str


@dataclass(frozen=True, kw_only=True)
class SumMaskedAsk(TrainAsk, kind="sum_masked_ask"):
    """Train a round, and mask its vector with those whose shares for you are in `texts`, by name."""

    attempt: int
    texts: str


@dataclass(frozen=True, kw_only=True)
class SumPrivateAsk(PrivateAsk, kind="sum_private_ask"):
    """Take a noisy step, and mask its vector with those whose shares for you are in `texts`, by name."""

    attempt: int
    texts: str


@dataclass(frozen=True, kw_only=True)
class SumUnmaskAsk(Ask, kind="sum_unmask_ask"):
    """Open the sum of those who survived: `said` is the list."""

    round: int
    attempt: int
    said: str


@dataclass(frozen=True, kw_only=True)
class SumTextReply(Reply, kind="sum_text_reply"):
    """Keys, texts with shares, or shares: as JSON, hex digits in it."""

    round: int
    attempt: int
    text: str


@dataclass(frozen=True, kw_only=True)
class SumMaskedReply(Reply, kind="sum_masked_reply"):
    """A site's masked vector, uint32."""

    round: int
    attempt: int
    masked: Annotated[Tensors, Arrays(masked=True)]


SumVectorAsk = SumMaskedAsk | SumPrivateAsk
SumAsk = SumKeysAsk | SumSharesAsk | SumVectorAsk | SumUnmaskAsk


def attempt_of(ask: SumAsk) -> Attempt:
    """Which attempt is asked for."""
    return Attempt(ask.plan_sha256, ask.round, ask.attempt)


def attempt_part(plan: RunPlan, ask: SumKeysAsk | SumSharesAsk | SumMaskedAsk) -> str:
    """The part of a round's answer that an attempt is. Raises `ValueError` for an attempt too many."""
    if not 1 <= ask.attempt <= MOST_ATTEMPTS:
        raise ValueError(f"Expected an attempt from 1 to {MOST_ATTEMPTS}; got {ask.attempt}.")
    return f"attempt{ask.attempt}"


def summed_rounds(plan: RunPlan) -> range:
    """The rounds of a plan with secure sums."""
    if not plan.aggregation.secure_sum:
        return range(0)
    return range(1, plan.training.rounds + 1) if plan.privacy is None else noisy_rounds(plan)


def masked_rounds(plan: RunPlan) -> range:
    """Those whose vectors are rounds of pretraining."""
    return summed_rounds(plan) if plan.privacy is None else range(0)


def private_masked_rounds(plan: RunPlan) -> range:
    """Those whose vectors are noisy steps."""
    return range(0) if plan.privacy is None else summed_rounds(plan)


def masked_promise(plan: RunPlan, ask: SumMaskedAsk) -> Promise:
    """As unmasked: a site's mean update is clipped at the gate, and then masked."""
    return update_promise(plan)


def largest_masked(plan: RunPlan, ask: SumVectorAsk) -> Largest:
    """Four bytes for each value of the vector."""
    layout = SumLayout.of(plan, {name: tensor.shape for name, tensor in ask.shared.items()})
    return largest_reply(promised({MASKED: (layout.size,)}, torch.uint32))


def largest_text(plan: RunPlan, ask: Ask) -> Largest:
    """No arrays; texts of 32 sites fit beside the usual scalars."""
    return Largest(array_bytes=0)


def announced_text(announced: Announcement, attempt: Attempt, plan: RunPlan, by: SiteIdentity) -> str:
    """What a site announces, certified and signed, as it travels."""
    signature = by.sign(announced.signed_text(attempt, plan.sites, site_of(by.certificate)))
    said = {"keys": announced.to_json(), "certificate": by.certificate_text(), "signature": signature.hex()}
    return canonical(said)


def announced_of(text: str) -> tuple[Announcement, str, bytes]:
    """Keys, certificate and signature back from `announced_text`, not verified; raises `SumRefused`."""
    names = {"keys", "certificate", "signature"}
    fields = checked_fields(read_said(text, "what a site announces"), names, "what a site announces")
    certificate, signature = str(fields["certificate"]), from_hex(fields["signature"])
    return Announcement.from_json(fields["keys"]), certificate, signature


def roster_text(announced: Mapping[str, str]) -> str:
    """What each site announced, by name, as it travels."""
    return canonical(dict(announced))


def roster_of(
    text: str, attempt: Attempt, plan: RunPlan, reader: SiteIdentity, now: datetime
) -> tuple[dict[str, Announcement], dict[str, str]]:
    """Who announced which keys, and the fingerprints of the keys that signed, from `roster_text`.

    Raises `SumRefused` unless each was signed by the site that it names, for this attempt.
    """
    roster, fingerprints = dict[str, Announcement](), dict[str, str]()
    for site, said in by_name(read_said(text, "a roster"), "keys").items():
        roster[site], fingerprints[site] = signed_announcement(
            str(said), site, attempt, plan, reader.authority, now
        )
    return roster, fingerprints


def signed_announcement(
    text: str, site: str, attempt: Attempt, plan: RunPlan, authority: Certificate, now: datetime
) -> tuple[Announcement, str]:
    """Keys that a site announced, from `announced_text`, and the fingerprint of the key that signed them.

    Raises `SumRefused` unless the site that is named signed them, for this attempt.
    """
    keys, certificate, signature = announced_of(text)
    signed = keys.signed_text(attempt, plan.sites, site)
    try:
        return keys, signing_key(authority, site, certificate, signature, signed, now)
    except CertificateRefused as error:
        raise SumRefused(f"Expected keys that {site[:60]!r} signed. {error}") from error


def said_of(survivors: frozenset[str], lost: frozenset[str]) -> str:
    """A list as it travels."""
    return canonical({"survivors": sorted(survivors), "lost": sorted(lost)})


def list_of(said: str) -> SurvivorList:
    """Back from `said_of`; raises `SumRefused`."""
    fields = checked_fields(read_said(said, "a list of sites"), {"survivors", "lost"}, "a list of sites")
    names = [fields["survivors"], fields["lost"]]
    if not all(isinstance(part, list) and all(isinstance(one, str) for one in part) for part in names):
        raise SumRefused("Expected a list of names of sites; got something else.")
    return SurvivorList(frozenset(names[0]), frozenset(names[1]))


def texts_of(texts: Mapping[str, bytes]) -> str:
    """Texts with shares as they travel."""
    return canonical({site: text.hex() for site, text in texts.items()})


def shares_of(texts: str) -> dict[str, bytes]:
    """Back from `texts_of`; raises `SumRefused`."""
    return {site: from_hex(text) for site, text in by_name(read_said(texts, "shares"), "shares").items()}


def _of_random_numbers(kind: str) -> Promise:
    return Promise(kind=kind, bound=0.0, unit="no patient", enforcement="none")


SUM_KEYS = Exchange(
    route="train.sum_keys",
    ask=SumKeysAsk,
    reply=SumTextReply,
    rounds=summed_rounds,
    largest=largest_text,
    promise=lambda plan, ask: _of_random_numbers("sum_keys"),
    part=attempt_part,
)
SUM_SHARES = Exchange(
    route="train.sum_shares",
    ask=SumSharesAsk,
    reply=SumTextReply,
    rounds=summed_rounds,
    largest=largest_text,
    promise=lambda plan, ask: _of_random_numbers("sum_shares"),
    part=attempt_part,
)
SUM_MASKED = Exchange(
    route="train.sum_masked",
    ask=SumMaskedAsk,
    reply=SumMaskedReply,
    rounds=masked_rounds,
    largest=largest_masked,
    promise=masked_promise,
    part=attempt_part,
)
SUM_PRIVATE = Exchange(  # no part: one vector for a round, whatever the attempt
    route="train.sum_private",
    ask=SumPrivateAsk,
    reply=SumMaskedReply,
    rounds=private_masked_rounds,
    largest=largest_masked,
    promise=lambda plan, ask: steps_promise(plan),
)
SUM_UNMASK = Exchange(  # no part: one list for a round, whatever the attempt
    route="train.sum_unmask",
    ask=SumUnmaskAsk,
    reply=SumTextReply,
    rounds=summed_rounds,
    largest=largest_text,
    promise=lambda plan, ask: _of_random_numbers("sum_unmask"),
)
