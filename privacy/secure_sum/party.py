"""One site's side of an attempt: what it keeps to itself, and what it says in each of the four stages.

1. It announces two fresh public keys and the hash of a fresh seed. 2. It divides the private half of its mask
key, and the seed, among everybody on the roster. 3. It adds to its vector a mask of its own (from the seed)
and one with each site whose shares it holds. 4. For one list it gives away, of each survivor, a share of the
seed, and of each lost site a share of the mask key: never both of one site, and never for a second list.

Why two masks: pairwise masks alone would cancel as well, but a site that was believed lost, and whose key was
therefore put together, would be read when its vector comes after all. The mask of its own is opened for
survivors only.

Guarantee: with at most a third of the plan's sites colluding with the centre, nothing of a site's vector is
learnt beyond the sum over at least `threshold` survivors (X25519, HKDF, ChaCha20, AES-GCM as assumed; centre
that deviates included, as long as keys are a site's own: `federation/keys/identity.py`). Not covered: what
the sum itself tells; with three sites, two that collude know the third's vector from the sum. A site that
sends another vector than it should spoils the sum.

Does not do: keep itself on disk (`client/secrets/sum_secrets.py`), or remember which list was answered beyond
this attempt (the ledger does).
"""

import dataclasses
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from forms.json_text import canonical
from privacy.secure_sum.masks import (
    KEY_BYTES,
    add_mask,
    agreed_key,
    new_secret,
    pair_key,
    pair_sign,
    public_key,
    seed_key,
)
from privacy.secure_sum.ring import Ring
from privacy.secure_sum.shares import SHARE_BYTES, seal, split, unseal
from privacy.secure_sum.transcript import (
    Announcement,
    Attempt,
    Roster,
    SumRefused,
    SurvivorList,
    by_name,
    checked_fields,
    from_hex,
    read_said,
)


@dataclass(frozen=True)
class HeldShares:
    """What a site holds of another: a share of each of its two secrets."""

    mask_key: bytes
    seed: bytes

    def to_bytes(self) -> bytes:
        """As they are encrypted."""
        return self.mask_key + self.seed

    @staticmethod
    def from_bytes(content: bytes) -> "HeldShares":
        """Back from `to_bytes`; raises `SumRefused`."""
        if len(content) != 2 * SHARE_BYTES:
            raise SumRefused(f"Expected shares of {2 * SHARE_BYTES} bytes; got {len(content)}.")
        return HeldShares(content[:SHARE_BYTES], content[SHARE_BYTES:])


@dataclass(frozen=True)
class Opened:
    """A site's answer to one list: shares of survivors' seeds, and of lost sites' mask keys."""

    seeds: Mapping[str, bytes]
    mask_keys: Mapping[str, bytes]

    def to_text(self) -> str:
        """As it travels."""
        parts = {"seeds": self.seeds, "mask_keys": self.mask_keys}
        return canonical({name: _hexed(part) for name, part in parts.items()})

    @staticmethod
    def from_text(text: str, said: SurvivorList) -> "Opened":
        """Back from `to_text`, for this list; raises `SumRefused`."""
        fields = checked_fields(read_said(text, "shares"), {"seeds", "mask_keys"}, "shares")
        seeds, mask_keys = (
            {site: from_hex(share) for site, share in by_name(fields[name], "shares").items()}
            for name in ("seeds", "mask_keys")
        )
        if set(seeds) != said.survivors or set(mask_keys) != said.lost:
            raise SumRefused("Expected a share for each site on the list; got others.")
        if any(len(share) != SHARE_BYTES for share in [*seeds.values(), *mask_keys.values()]):
            raise SumRefused(f"Expected shares of {SHARE_BYTES} bytes; got another length.")
        return Opened(seeds, mask_keys)


@dataclass(frozen=True)
class Party:
    """A site in one attempt, with everything that it must not tell."""

    attempt: Attempt
    site: str
    mask_secret: bytes = field(repr=False)
    share_secret: bytes = field(repr=False)
    seed: bytes = field(repr=False)
    roster: Roster = field(default_factory=dict)
    """Among whom it divided its secrets; empty before."""
    held: Mapping[str, HeldShares] = field(default_factory=dict, repr=False)
    """Whose shares it holds, its own among them: those with whom it masks."""

    @staticmethod
    def new(attempt: Attempt, site: str) -> "Party":
        """With fresh secrets."""
        return Party(attempt, site, new_secret(), new_secret(), new_secret())

    @property
    def announcement(self) -> Announcement:
        """Stage 1."""
        seed_sha256 = hashlib.sha256(self.seed).digest()
        return Announcement(public_key(self.mask_secret), public_key(self.share_secret), seed_sha256)

    def divided(self, roster: Roster, least: int) -> tuple["Party", dict[str, bytes]]:
        """Stage 2: after it has divided its secrets among a roster that was checked, and the text for each
        other site. Every call divides anew."""
        mask_keys, seeds = (split(secret, list(roster), least) for secret in (self.mask_secret, self.seed))
        shares = {site: HeldShares(mask_keys[site], seeds[site]) for site in roster}
        texts = {
            peer: seal(
                self._share_key(peer, roster, to_peer=True),
                shares[peer].to_bytes(),
                self.attempt.context("shares", self.site, peer),
            )
            for peer in roster
            if peer != self.site
        }
        return dataclasses.replace(self, roster=roster, held={self.site: shares[self.site]}), texts

    def joined(self, texts: Mapping[str, bytes], least: int) -> "Party":
        """Before stage 3: holding the shares in the texts of other sites, with whom it masks from now on.

        Raises `SumRefused` when a text does not open, is of nobody on the roster, or too few came.
        """
        if strangers := sorted(set(texts) - set(self.roster) | ({self.site} & set(texts))):
            raise SumRefused(f"Expected shares of others on the roster; got {strangers[0][:60]!r}'s.")
        if len(texts) + 1 < least:
            raise SumRefused(f"Expected shares of at least {least} sites, own ones included; got fewer.")
        held = {
            peer: HeldShares.from_bytes(
                unseal(
                    self._share_key(peer, self.roster, to_peer=False),
                    text,
                    self.attempt.context("shares", peer, self.site),
                )
            )
            for peer, text in texts.items()
        }
        return dataclasses.replace(self, held={self.site: self.held[self.site], **held})

    def mask(self, vector: Ring) -> None:
        """Stage 3: add its own mask, and one with each site whose shares it holds, in place."""
        add_mask(vector, seed_key(self.seed, self.attempt, self.site), 1)
        for peer in sorted(self.held):
            if peer != self.site:
                key = pair_key(self.mask_secret, self.site, self.roster[peer].mask_key, peer, self.attempt)
                add_mask(vector, key, pair_sign(self.site, peer))

    def opened(self, said: SurvivorList, least: int) -> Opened:
        """Stage 4: its shares for one list. Raises `SumRefused` for a list that it may not open."""
        said.checked(self.held, self.site, least)
        return Opened(
            seeds={site: self.held[site].seed for site in said.survivors},
            mask_keys={site: self.held[site].mask_key for site in said.lost},
        )

    def to_text(self) -> str:
        """Everything, for a file that only its owner reads."""
        return canonical(
            {
                "attempt": dataclasses.asdict(self.attempt),
                "site": self.site,
                "secrets": [one.hex() for one in (self.mask_secret, self.share_secret, self.seed)],
                "roster": {name: one.to_json() for name, one in self.roster.items()},
                "held": {name: one.to_bytes().hex() for name, one in self.held.items()},
            }
        )

    @staticmethod
    def from_text(text: str) -> "Party":
        """Back from `to_text`; raises `SumRefused` when it is not what was written."""
        names = {"attempt", "site", "secrets", "roster", "held"}
        fields = checked_fields(read_said(text, "a site's secrets"), names, "a site's secrets")
        try:
            mask_secret, share_secret, seed = (from_hex(one) for one in fields["secrets"])
            attempt, site = Attempt(**fields["attempt"]), str(fields["site"])
        except (TypeError, ValueError) as error:
            raise SumRefused("Expected a site's secrets; got something else.") from error
        if {len(mask_secret), len(share_secret), len(seed)} != {KEY_BYTES}:
            raise SumRefused("Expected three secrets of 32 bytes; got others.")
        roster = {n: Announcement.from_json(one) for n, one in by_name(fields["roster"], "keys").items()}
        held = {
            n: HeldShares.from_bytes(from_hex(one)) for n, one in by_name(fields["held"], "shares").items()
        }
        return Party(attempt, site, mask_secret, share_secret, seed, roster, held)

    def _share_key(self, peer: str, roster: Roster, to_peer: bool) -> bytes:
        one, other = (self.site, peer) if to_peer else (peer, self.site)
        return agreed_key(self.share_secret, roster[peer].share_key, self.attempt, "shares", one, other)


def _hexed(values: Mapping[str, bytes]) -> dict[str, Any]:
    return {name: value.hex() for name, value in values.items()}
