"""Expiry: a day after which what left a site, and what was made of it, is not to be used.

A plan may name one (`release.expires`); the files of its run carry it in their header, the latent bank with
its items. Whoever loads an expired file is told, by a warning in the log, as of a withdrawn one
(`withdrawals.py`); nothing new is trained on it. A day counts in UTC, and is the last on which use is agreed.

Does not do: delete anything, or reach copies under other programs.
"""

import logging
from collections.abc import Mapping
from datetime import UTC, date, datetime
from pathlib import Path

EXPIRES = "expires"
"""Name in a file's header."""
_log = logging.getLogger(__name__)


def today() -> date:
    """The day, in UTC."""
    return datetime.now(UTC).date()


def check_day(day: str) -> None:
    """Raise `ValueError` unless `day` is empty or a day of the calendar, YYYY-MM-DD."""
    try:
        good = not day or date.fromisoformat(day).isoformat() == day
    except ValueError:
        good = False
    if not good:
        raise ValueError(f"Expected release.expires to be a day as 2027-12-31, or empty; got {day[:40]!r}.")


def is_expired(day: str) -> bool:
    """Whether `day` is past; empty: never. Raises `ValueError` for a text that is no day."""
    check_day(day)
    return bool(day) and today() > date.fromisoformat(day)


def until(day: str) -> str:
    """For people: the day, and whether it is past."""
    return f"{day} (expired)" if is_expired(day) else day or "no day"


def check_unexpired(day: str, what: str) -> None:
    """Raise `ValueError` where `what` may not be used any more."""
    if is_expired(day):
        raise ValueError(
            f"Expected {what} that may still be used; use was agreed until {day} (release.expires). Ask the "
            "consortium for another plan."
        )


def warn_if_expired(path: Path, header: Mapping[str, str]) -> None:
    """Tell whoever loads the file at `path`, with this header, that its use was agreed until a day that is
    past. Raises `ValueError` for a header whose day is none."""
    if is_expired(day := header.get(EXPIRES, "")):
        _log.warning(
            "%s has expired: use of the releases it was made of was agreed until %s. Ask the consortium "
            "before you use it.",
            path.name, day,
        )  # fmt: skip
