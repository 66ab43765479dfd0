"""What a name may be: of a site, a run, a modality, a class. Which letters, and how many.

Names travel: they stand in plans, start-up kits, certificates and site.yaml, and are printed where somebody
decides by them. So a name holds nothing that moves a cursor, colours a line, turns its direction, or cannot
be seen. Letters are Latin, accents included, in one spelling (NFC).

Does not do: make text from elsewhere safe to print where it is not a name (`federation/terminal.py`).
"""

import re
import unicodedata
from dataclasses import dataclass
from typing import Annotated

from forms.ranges import shown


@dataclass(frozen=True)
class Letters:
    """A class of characters, and a length."""

    pattern: str
    """Regular expression of the whole text."""
    words: str
    """The same in words, after "Expected … to be"."""

    def check(self, value: str, where: str) -> None:
        """Raise `ValueError` naming the setting `where` unless `value` is written so."""
        if not re.fullmatch(self.pattern, value) or not unicodedata.is_normalized("NFC", value):
            raise ValueError(f"Expected {where} to be {self.words}; got {shown(value)}.")


_SIMPLE = r"[A-Za-z0-9][A-Za-z0-9_.-]{0,62}"
_LETTER = r"A-Za-z0-9\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u024f"
_PHRASE = rf"[{_LETTER}][{_LETTER} _.,:+/()%°<>=-]{{0,62}}"
_SIMPLE_WORDS = "1 to 63 letters, digits, dots, hyphens and underscores that begin with a letter or digit"
_PHRASE_WORDS = "1 to 63 Latin letters, digits, spaces and _.,:+/()%°<>=- that begin with a letter or digit"

SITE = Letters(_SIMPLE, _SIMPLE_WORDS)
"""Of a site, a consortium: also a folder's name and part of a certificate."""

SiteName = Annotated[str, SITE]
"""A site's or a consortium's name."""
Phrase = Annotated[str, Letters(_PHRASE, _PHRASE_WORDS)]
"""A modality, a body part, a covariate, the name of a class, the name of a run: a few words."""
OptionalPhrase = Annotated[str, Letters(rf"(?:{_PHRASE})?", f"empty, or {_PHRASE_WORDS}")]
"""A phrase, or nothing."""
OptionalKey = Annotated[str, Letters(r"(?:[0-9a-f]{64})?", "empty, or a public key of 64 hex digits")]
"""An X25519 public key, or nothing."""
OptionalDay = Annotated[str, Letters(r"(?:[0-9]{4}-[0-9]{2}-[0-9]{2})?", "empty, or a day as 2027-12-31")]
"""A day, or none."""
Sha256 = Annotated[str, Letters(r"[0-9a-f]{64}", "a hash of 64 hex digits")]
"""A SHA-256."""
