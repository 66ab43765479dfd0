"""Files of patients on disk: written whole or not at all, and readable by their owner alone.

The one home of whole-file writing, on the ground floor, since models, books, site, centre and simulations all
write files. A program calls `keep_to_owner` first: whatever it or a library creates from then on (tables,
figures, logs, databases) is 0600 in folders of 0700. `private_folder` does the same to a folder that was
there before, made by somebody with a wider umask.

Does not do: encrypt (that is the disk's), or append (journals and ledgers: `privacy/chain.py`).
"""

import os
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

OWNER, PUBLIC = 0o600, 0o644
"""Mode of a file that its owner alone may read, and of one (a certificate, say) that anybody may."""
_FOLDER = 0o700


def keep_to_owner() -> None:
    """From now on this process, and what it starts, creates files that its own account alone can read."""
    os.umask(0o077)


def private_folder(folder: Path) -> Path:
    """Make `folder` and its parents, or close a folder that is there to all but its owner; returns it.

    Raises `ValueError` where that cannot be: another account's folder, or one that everybody shares (/tmp).
    """
    folder.mkdir(parents=True, exist_ok=True, mode=_FOLDER)
    state = folder.stat()
    if not state.st_mode & 0o077:
        return folder
    if state.st_uid != os.geteuid() or state.st_mode & stat.S_ISVTX:
        raise ValueError(
            f"Expected {folder} to be a folder of this account alone, since patient data goes there; others "
            f"may enter it (mode {stat.S_IMODE(state.st_mode):o}). Name another folder, or give it to this "
            f"account: chown, then chmod 700 {folder}"
        )
    folder.chmod(_FOLDER)
    return folder


@contextmanager
def whole_file(path: Path, mode: int = OWNER) -> Iterator[IO[bytes]]:
    """A file to write to that takes the place of `path` at the end: a reader sees the old one or the new one.

    Folders that are missing are made. On the disk when this returns, its name too (fsync of file and folder).
    Whatever is raised meanwhile, a full disk say, leaves the old file as it was and nothing beside it.
    """
    path.parent.mkdir(parents=True, exist_ok=True, mode=_FOLDER)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)  # 0600
    temporary = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fchmod(file.fileno(), mode)
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _keep_name(path)


def write_whole(path: Path, content: str | bytes, mode: int = OWNER) -> None:
    """Write a file (text as UTF-8) as `whole_file` does."""
    with whole_file(path, mode) as file:
        file.write(content.encode("utf-8") if isinstance(content, str) else content)


def move_whole(source: Path, path: Path) -> None:
    """Let a file that was written whole take the place of `path`, on the same disk; both names survive a
    power cut as they are then."""
    source.replace(path)
    _keep_name(path)


def write_once(path: Path, content: bytes) -> None:
    """Write a file that is made once and never replaced, for its owner alone: a secret, a key.

    Folders that are missing are made. On the disk when this returns. Raises `FileExistsError` when there is a
    file, which stays as it is: of two that make one at the same time, one does.
    """
    path.parent.mkdir(parents=True, exist_ok=True, mode=_FOLDER)
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, OWNER)
    with os.fdopen(handle, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    _keep_name(path)


def _keep_name(path: Path) -> None:
    """The file's name, too, survives a power cut."""
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
