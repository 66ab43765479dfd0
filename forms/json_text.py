"""JSON: read strictly, written in one way only, hashed as it is written.

Read: no key twice, no NaN or infinity, bounded length, depth and digits. Whoever reads what another machine
or another person wrote reads it here, so that two readers never understand two things, and so that every bad
text ends in one line. Written: sorted keys, no spaces; what is hashed is that.

Does not do: say what the values mean (`forms/form.py`).
"""

import hashlib
import json
import math
import re
from typing import Any

LONGEST = 8_000_000
"""Characters of a text, unless its reader says otherwise."""
DEEPEST = 32
"""Lists and mappings within each other, at most."""
_DIGITS = 40  # of a number; 64 bits and the longest repr of a float stay below
_MARKS = re.compile(r'"(?:[^"\\]|\\.)*"?|[\[{]|[\]}]', re.DOTALL)


def canonical(value: Any) -> str:
    """JSON with sorted keys and no spaces; NaN and infinity raise `ValueError` (write them as words)."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False, ensure_ascii=True)


def sha256_of(text: str) -> str:
    """Hash of a canonical text, 64 hex digits."""
    return hashlib.sha256(text.encode()).hexdigest()


def read_json(text: str | bytes, what: str = "JSON", longest: int = LONGEST) -> Any:
    """The value that `text` (UTF-8) holds; raises `ValueError` in one line that names `what` was expected."""
    if len(text) > longest:
        raise ValueError(f"Expected {what} of at most {longest:,} characters; got {len(text):,}.")
    try:
        plain = text if isinstance(text, str) else text.decode("utf-8")
        plain.encode("utf-8")
    except UnicodeError:
        raise ValueError(f"Expected {what} in UTF-8; got other bytes.") from None
    _check_depth(plain, what)
    try:
        return json.loads(
            plain,
            object_pairs_hook=_distinct,
            parse_int=_integer,
            parse_float=_finite,
            parse_constant=_no_constant,
        )
    except json.JSONDecodeError as error:
        raise ValueError(
            f"Expected {what}; it is not JSON ({error.msg}, line {error.lineno}, column {error.colno})."
        ) from None
    except ValueError as error:
        raise ValueError(f"Expected {what}; {error}.") from None


def _check_depth(text: str, what: str) -> None:
    depth = 0
    for found in _MARKS.finditer(text):
        mark = found.group()
        depth += (mark in "[{") - (mark in "]}")
        if depth > DEEPEST:
            raise ValueError(f"Expected {what} of at most {DEEPEST} levels; got more.")


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{twice[:60]!r} is there twice")
    return values


def _integer(digits: str) -> int:
    if len(digits) > _DIGITS:
        raise ValueError(f"it holds a number of {len(digits)} digits")
    return int(digits)


def _finite(digits: str) -> float:
    if len(digits) > _DIGITS or not math.isfinite(value := float(digits)):
        raise ValueError(f"it holds the number {digits[:_DIGITS]}, which is too large or too long")
    return value


def _no_constant(word: str) -> float:
    raise ValueError(f"it holds {word}, which is no number")
