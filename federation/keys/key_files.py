"""Files of keys on disk: readable by their owner alone, never where git would pick them up.

Does not do: know what is in them (`federation/keys/certificates.py`), or encrypt them.
"""

from pathlib import Path

from storage.files import private_folder

_LONGEST = 1_000_000  # bytes of a key, certificate, kit, plan, or settings


def key_folder(folder: Path) -> Path:
    """Make `folder` and its parents, and open `folder` to its owner only (mode 0700); returns it.

    Raises `ValueError` inside of a git work tree, and as `private_folder`.
    """
    refuse_work_tree(folder)
    return private_folder(folder)


def refuse_work_tree(folder: Path) -> None:
    """Raise `ValueError` when `folder` lies in a git work tree: keys there get committed in the end."""
    resolved = folder.resolve()
    for parent in (resolved, *resolved.parents):
        if (parent / ".git").exists():
            raise ValueError(
                f"Expected a folder outside of any git work tree; {folder} lies in that of {parent}. Keys "
                "must not be committed: give another folder."
            )


def read_file(path: Path, what: str) -> bytes:
    """The content of a file of at most a megabyte; raises `ValueError` saying `what` was expected there."""
    try:
        if path.exists() and not path.is_file():
            raise ValueError(f"Expected {what} at {path}; it is not a file.")
        with path.open("rb") as file:
            content = file.read(_LONGEST + 1)
        if len(content) > _LONGEST:
            raise ValueError(f"Expected {what} at {path}; it is over {_LONGEST:,} bytes long.")
        return content
    except OSError as error:
        raise ValueError(f"Expected {what} at {path}; {error.strerror}.") from None


def read_text(path: Path, what: str) -> str:
    """The same as UTF-8 text."""
    try:
        return read_file(path, what).decode("utf-8")
    except UnicodeDecodeError:
        raise ValueError(f"Expected {what} at {path}; it is not text in UTF-8.") from None
