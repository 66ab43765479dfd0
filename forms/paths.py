"""Paths in settings: relative ones start at the settings' own folder, and each can be a path at all.

Does not do: look whether something is there.
"""

import os
import unicodedata
from collections.abc import Iterable
from pathlib import Path
from typing import Any


def resolve_paths(values: dict[str, Any], names: Iterable[str], folder: Path, where: str) -> None:
    """Make paths of the texts of these settings in `values`; raises `ValueError` for what can be none."""
    for name in names:
        if isinstance(values.get(name), str):
            values[name] = path_from(values[name], folder, f"{where}.{name}")


def path_from(text: str, folder: Path, where: str) -> Path:
    """The path that `text` means, seen from `folder`; raises `ValueError` naming the setting `where`."""
    unseen = any(unicodedata.category(character)[0] == "C" for character in text)
    if not text or unseen or len(os.fsencode(text)) > 1024 or max(map(len, text.split("/"))) > 200:
        raise ValueError(f"Expected {where} to be a path; got one that is empty, too long, or not visible.")
    try:
        return folder / Path(text).expanduser()
    except RuntimeError:  # ~somebody who has no home
        raise ValueError(f"Expected {where} to be a path; it begins with an unknown person's home.") from None
