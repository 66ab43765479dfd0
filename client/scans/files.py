"""Every file below a data root and what its first bytes say: the walk that nothing on a disk ends.

Names may be in any encoding. Only regular files are opened: a pipe would block for ever. A link to a file
inside the data root is that file (DataLad keeps all files so); a link that leads out of the root, or to a
folder, is counted, and followed only when the site says so (`follow_links`). What cannot be read is an
exclusion, never the end.
"""

import os
from dataclasses import dataclass, field
from pathlib import Path

from scans.scans import Exclusion, FileKind, Reason, UnusableScan, file_kind

_ANNEX = "annex/objects/"


@dataclass(frozen=True)
class Files:
    """What lies below a root."""

    root: Path
    kinds: dict[Path, FileKind] = field(default_factory=dict)
    """Readable, visible files in alphabetical order, with what their first bytes say."""
    exclusions: list[Exclusion] = field(default_factory=list)
    """All others."""


def walk(root: Path, follow_links: bool = False) -> Files:
    """All files below `root`, each in `kinds` or `exclusions`; links as the module says."""
    found = Files(root)
    inside = Path(os.path.realpath(root))
    seen = {os.path.realpath(root)}

    def unreadable(error: OSError) -> None:
        found.exclusions.append(
            Exclusion(Path(os.fsdecode(error.filename)), Reason.UNREADABLE, f"errno {error.errno}")
        )

    for folder, folders, names in os.walk(root, onerror=unreadable, followlinks=follow_links):
        folders.sort()
        for name in [name for name in folders if Path(folder, name).is_symlink()]:
            target = os.path.realpath(Path(folder, name))
            if not follow_links or target in seen or _within(Path(target), inside):
                found.exclusions.append(Exclusion(Path(folder, name), Reason.LINKED_FOLDER))
                folders.remove(name)
            seen.add(target)
        hidden = any(part.startswith(".") for part in Path(folder).relative_to(root).parts)
        for name in sorted(names):
            path = Path(folder, name)
            if hidden or name.startswith("."):
                found.exclusions.append(Exclusion(path, Reason.HIDDEN))
                continue
            try:
                if path.is_symlink():
                    _check_link(path, inside, follow_links)
                found.kinds[path] = file_kind(path)
            except UnusableScan as error:
                found.exclusions.append(Exclusion(path, error.reason, error.detail))
    return found


def _check_link(path: Path, inside: Path, follow_links: bool) -> None:
    target = Path(os.path.realpath(path))
    if not target.exists():
        annexed = _ANNEX in path.readlink().as_posix()
        raise UnusableScan(Reason.NOT_FETCHED if annexed else Reason.BROKEN_LINK)
    if not follow_links and not _within(target, inside):
        raise UnusableScan(Reason.LINKED_FILE)


def _within(path: Path, root: Path) -> bool:
    return path == root or root in path.parents
