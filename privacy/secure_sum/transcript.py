"""What is said in a secure sum: which attempt it is, what a site announces, which list it is asked to open.

How many must answer: floor(2 n / 3) + 1 of the n sites of the plan, and never fewer than 3. Whoever is given
both halves of a site's protection, the seed of its own mask and the key of its masks with others, reads its
vector. A site gives away shares of one of the two, for one list of survivors, once. Both halves would take
two lists, each answered by t sites: at least 2 t - n sites, which are more than n / 3, would have to answer
both. With at most a third of the sites colluding with the centre there is no second list, and no signatures
over the list are needed.

Everything that is hashed, signed or bound to a key is written here, in one way only (canonical JSON). The
order of what is said: announcements; texts with shares; masked vectors; shares of those who are on one list.

Does not do: travel (`federation/exchanges/secure_sum.py`), or sign (`federation/keys/identity.py`).
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from forms.json_text import canonical, read_json

FEWEST_SITES, MOST_SITES = 3, 32
"""Of two sites each learns the other's vector from the sum; more than 32 would want a sparser graph."""
_HEX = frozenset("0123456789abcdef")


class SumRefused(ValueError):
    """Something in a secure sum is not as it must be; nothing more is said in this attempt."""


def threshold(num_sites: int) -> int:
    """How many sites of a plan's must answer: floor(2 n / 3) + 1, at least 3.

    Raises `ValueError` for fewer than 3 sites and for more than 32.
    """
    if not FEWEST_SITES <= num_sites <= MOST_SITES:
        raise ValueError(f"Expected {FEWEST_SITES} to {MOST_SITES} sites in a secure sum; got {num_sites}.")
    return max(FEWEST_SITES, 2 * num_sites // 3 + 1)


@dataclass(frozen=True, order=True)
class Attempt:
    """One attempt at the sum of a round; each has keys of its own."""

    plan_sha256: str
    round: int
    number: int
    """From 1."""

    def context(self, *words: str) -> bytes:
        """Bytes that no other attempt, and no other purpose (`words`), has."""
        said = ["fedmeduet secure sum", self.plan_sha256, self.round, self.number, *words]
        return canonical(said).encode()


@dataclass(frozen=True)
class Announcement:
    """What a site announces at the beginning of an attempt."""

    mask_key: bytes
    """Public X25519 key from which the masks of pairs follow."""
    share_key: bytes
    """Public X25519 key under which shares reach this site."""
    seed_sha256: bytes
    """Hash of the seed of its own mask, by which a seed put together from shares is known to be right."""

    def __post_init__(self) -> None:
        """Refuse other lengths, and one key for both purposes."""
        if {len(self.mask_key), len(self.share_key), len(self.seed_sha256)} != {32}:
            raise SumRefused("Expected keys and a hash of 32 bytes in an announcement; got other lengths.")
        if self.mask_key == self.share_key:
            raise SumRefused("Expected two different keys in an announcement; got one twice.")

    def signed_text(self, attempt: Attempt, sites: Sequence[str], site: str) -> bytes:
        """What a site signs: the plan, the round, the attempt, who may take part, and its keys."""
        return attempt.context("announcement", *sites, site, canonical(self.to_json()))

    def to_json(self) -> dict[str, str]:
        """As JSON values."""
        return {
            "mask_key": self.mask_key.hex(),
            "share_key": self.share_key.hex(),
            "seed_sha256": self.seed_sha256.hex(),
        }

    @staticmethod
    def from_json(value: object) -> "Announcement":
        """Back from `to_json`; raises `SumRefused`."""
        fields = checked_fields(value, {"mask_key", "share_key", "seed_sha256"}, "an announcement")
        mask_key, share_key, seed_sha256 = (
            from_hex(fields[n]) for n in ("mask_key", "share_key", "seed_sha256")
        )
        return Announcement(mask_key, share_key, seed_sha256)


Roster = Mapping[str, Announcement]
"""Who takes part in an attempt, by name: those who announced in time."""


def checked_roster(roster: Roster, sites: Collection[str], site: str, own: Announcement, least: int) -> None:
    """Raise `SumRefused` unless this site may share its secrets among this roster.

    `sites`: the plan's; `own`: what this site announced; `least`: the threshold.
    """
    if strangers := sorted(set(roster) - set(sites)):
        raise SumRefused(f"Expected a roster of the plan's sites; {strangers[0][:60]!r} is none.")
    if roster.get(site) != own:
        raise SumRefused(f"Expected a roster with what {site!r} announced; it is missing, or another's.")
    if len(roster) < least:
        raise SumRefused(f"Expected a roster of at least {least} sites; got {len(roster)}.")
    keys = [key for one in roster.values() for key in (one.mask_key, one.share_key)]
    if len(set(keys)) < len(keys):
        raise SumRefused("Expected a roster in which every key is one site's; one is there twice.")


@dataclass(frozen=True)
class SurvivorList:
    """Of those who masked together: whose vector is in the sum, and who was lost."""

    survivors: frozenset[str]
    lost: frozenset[str]

    def checked(self, together: Collection[str], site: str, least: int) -> None:
        """Raise `SumRefused` unless this site, which masked together with those (itself among them), may open
        the sum of this list."""
        if both := sorted(self.survivors & self.lost):
            raise SumRefused(f"Expected each site as survivor or as lost; {both[0]!r} is named as both.")
        if self.survivors | self.lost != set(together):
            raise SumRefused("Expected a list of exactly those who masked together; got others.")
        if site not in self.survivors:
            raise SumRefused(f"Expected a list with {site!r} among the survivors, who is asked.")
        if len(self.survivors) < least:
            raise SumRefused(f"Expected at least {least} survivors; got {len(self.survivors)}.")


def checked_fields(value: object, names: Collection[str], what: str) -> dict[str, Any]:
    """A JSON object with exactly these fields; raises `SumRefused`."""
    if not isinstance(value, dict) or set(value) != set(names):
        raise SumRefused(f"Expected {what} with {', '.join(sorted(names))}; got something else.")
    return value


def by_name(value: object, what: str) -> dict[str, Any]:
    """A JSON object whose keys are names of sites; raises `SumRefused`."""
    if not isinstance(value, dict):
        raise SumRefused(f"Expected {what} by site; got something else.")
    return value


def from_hex(text: object) -> bytes:
    """Bytes from lower-case hex digits; raises `SumRefused`."""
    if not isinstance(text, str) or len(text) % 2 or not _HEX.issuperset(text):
        raise SumRefused("Expected bytes as lower-case hex digits; got something else.")
    return bytes.fromhex(text)


def read_said(text: str, what: str) -> Any:
    """The JSON value in a text that came; raises `SumRefused`."""
    try:
        return read_json(text, what)
    except ValueError as error:
        raise SumRefused(str(error)) from None
