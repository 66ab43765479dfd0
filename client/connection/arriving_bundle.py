"""What the centre sends as the code of a run, judged before anything of it is unpacked or imported.

Flower's SuperNode fetches an application with each run and runs whatever it got: approval, gate and books
would be the sender's own. So here, in code that is installed at the site, an arriving bundle is opened in
memory and compared with what is installed: the same files, byte for byte, nothing beside them, the same
pyproject.toml, so the same entry points; and the run that it came for must be that bundle's, by hash, name
and version, and no other kind of application. Anything else is refused: no file is written, the refusal is
journaled, nothing is charged, and the centre is told one word.

Also when plans need no approval. Where they do, a plan is approved with the hash of the installed code
(`client/commands/plan.py`), so a bundle that passes here is one that was read by whoever installed it.
Does not do: protect from other processes of the site's own account, or from the rest of the Python
environment.
Source: flwr 1.41, `flwr/cli/build.py` (how a bundle is made), `flwr/cli/install.py` (how it is unpacked),
`flwr/supernode/start_client_internal.py` (how it is fetched).
"""

import hashlib
import io
import stat
import struct
import tomllib
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flwr.supercore.fab import Fab
from flwr.supercore.run import Run

from federation.bundle import ROOT, hash_of, shipped_files

SETTINGS, MANIFEST = "pyproject.toml", ".info/CONTENT"
LARGEST = 10 * 1024 * 1024
"""Bytes of a bundle, packed: Flower's own limit, which only the sender keeps."""
LARGEST_UNPACKED = 32 * 1024 * 1024
"""Bytes of all its files."""
LARGEST_SETTINGS = 64 * 1024
"""Bytes of its pyproject.toml."""
MOST_FILES = 4096
KINDS_OF_RUN = frozenset({"", "flwr-serverapp"})
"""Kinds of application that may ask: others start other programs than a client app at the site."""
_UNREADABLE = (
    zipfile.BadZipFile,
    zlib.error,
    struct.error,
    ValueError,
    RuntimeError,  # encrypted, nested without end, or packed in a way that is not known here
    EOFError,
    OSError,
    LookupError,
)
_END_OF_DIRECTORY = struct.Struct("<4s4H2LH")


class BundleRefused(Exception):
    """What arrived is not the installed code; the text says how, for the site alone. `bundle`: its hash, as
    approvals name it; empty when it could not be read."""

    def __init__(self, text: str, bundle: str = "") -> None:
        super().__init__(text)
        self.bundle = bundle


@dataclass(frozen=True)
class InstalledCode:
    """What a bundle has to be."""

    files: Mapping[str, bytes]
    """Content by path."""
    settings: Mapping[str, Any]
    """pyproject.toml, as Flower ships it: without `tool.flwr.federations`."""

    @staticmethod
    def read(root: Path = ROOT) -> "InstalledCode":
        """The code of this installation. Raises `ValueError` when it is not a checkout."""
        try:
            settings = _settings((root / SETTINGS).read_bytes())
            if settings["project"]["name"] != "fedmeduet":
                raise ValueError
        except (OSError, LookupError, ValueError):
            raise ValueError(
                f"Expected FedMeDUET's {SETTINGS} in {root}; install from a checkout "
                "(pip install -e '.[federation]')."
            ) from None
        return InstalledCode(shipped_files(root), settings)

    @property
    def bundle(self) -> str:
        """Its hash, as plans and approvals name it."""
        return hash_of(self.files)

    @property
    def name(self) -> str:
        """Publisher and name, as Flower writes it."""
        return f"{self.settings['tool']['flwr']['app']['publisher']}/{self.settings['project']['name']}"

    def check(self, run: Run, fab: Fab, run_id: int) -> None:
        """Raise `BundleRefused` unless `fab` is this code and `run`, asked for as `run_id`, runs it."""
        files = unpacked(fab.content)
        settings, manifest = files.pop(SETTINGS, b""), files.pop(MANIFEST, b"")
        bundle = hash_of(files)
        self._check_files(files, bundle)
        try:
            same = _settings(settings) == self.settings
        except (ValueError, RecursionError):
            same = False
        if not same:
            raise BundleRefused(f"Expected the installed {SETTINGS}; the bundle has another.", bundle)
        if sorted(manifest.split(b"\n")) != sorted(_manifest({**files, SETTINGS: settings})):
            raise BundleRefused(f"Expected {MANIFEST} to list the bundle's files; it does not.", bundle)
        self._check_run(run, fab, run_id, bundle)

    def _check_files(self, files: Mapping[str, bytes], bundle: str) -> None:
        for name in sorted(self.files.keys() | files.keys()):
            if name not in self.files:
                raise BundleRefused(f"Expected the installed files alone; {_shown(name)} is not one.", bundle)
            if name not in files:
                raise BundleRefused(f"Expected every installed file; {name} is missing.", bundle)
            if files[name] != self.files[name]:
                raise BundleRefused(f"Expected {name} as it is installed; it is another.", bundle)

    def _check_run(self, run: Run, fab: Fab, run_id: int, bundle: str) -> None:
        """Flower finds what it unpacked by what the centre says of the run; none of it may lead elsewhere."""
        sha256 = hashlib.sha256(fab.content).hexdigest()
        version = self.settings["project"]["version"]
        expected = (run_id, self.name, version, sha256, sha256)
        if (run.run_id, run.fab_id, run.fab_version, run.fab_hash, fab.hash_str) != expected:
            raise BundleRefused(
                "Expected the run of this bundle; number, name or hash are another's.", bundle
            )
        if run.primary_task_type not in KINDS_OF_RUN:
            raise BundleRefused(
                f"Expected a run of a server application; got {_shown(run.primary_task_type)}.", bundle
            )
        if unknown := set(run.override_config) - self.settings["tool"]["flwr"]["app"]["config"].keys():
            raise BundleRefused(f"Expected settings of {SETTINGS}; got {_shown(min(unknown))}.", bundle)


def unpacked(content: bytes) -> dict[str, bytes]:
    """The files of a bundle by name, in memory, names as they are written there. Raises `BundleRefused`."""
    if len(content) > LARGEST:
        raise BundleRefused(f"Expected at most {LARGEST} bytes; got {len(content)}.")
    _check_directory(content)
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            infos = archive.infolist()
            _check_infos(infos)
            files = {info.filename: _content(archive, info) for info in infos}
    except _UNREADABLE as error:
        raise BundleRefused(f"Expected a bundle as Flower builds it; {type(error).__name__}.") from None
    return files


def _check_directory(content: bytes) -> None:
    """How many files there are is read before Python makes an object of each."""
    end = content.rfind(b"PK\x05\x06")
    if end < 0 or len(content) - end < _END_OF_DIRECTORY.size:
        raise BundleRefused("Expected a bundle as Flower builds it; it has no directory.")
    _, _, _, _, number, size, _, comment = _END_OF_DIRECTORY.unpack_from(content, end)
    if end + _END_OF_DIRECTORY.size != len(content) or comment:
        raise BundleRefused("Expected a bundle as Flower builds it; something follows its directory.")
    if content[max(0, end - 20) : end].startswith(b"PK\x06\x07"):  # a second directory, which would count
        raise BundleRefused("Expected a bundle as Flower builds it; it is a Zip64 archive.")
    if number > MOST_FILES or size > 256 * MOST_FILES:
        raise BundleRefused(f"Expected at most {MOST_FILES} files in a bundle; it lists more.")


def _check_infos(infos: list[zipfile.ZipInfo]) -> None:
    if len(infos) > MOST_FILES or len({info.filename for info in infos}) < len(infos):
        raise BundleRefused("Expected each file once; one is there twice, or they are too many.")
    if any(info.filename != info.orig_filename for info in infos):
        raise BundleRefused("Expected plain names of files; one is written in two ways.")
    if any(info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) for info in infos):
        raise BundleRefused("Expected files as Flower packs them; one is packed in another way.")
    if any(stat.S_IFMT(info.external_attr >> 16) not in (0, stat.S_IFREG) for info in infos):
        raise BundleRefused("Expected plain files; one is a link or a folder.")
    if sum(info.file_size for info in infos) > LARGEST_UNPACKED:
        raise BundleRefused(f"Expected at most {LARGEST_UNPACKED} bytes in all files; there are more.")


def _content(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> bytes:
    """A file's content; asked for by its size, because without one Python unpacks first and cuts then."""
    with archive.open(info) as file:
        content = file.read(info.file_size)
    if len(content) != info.file_size:
        raise zipfile.BadZipFile
    return content


def _settings(content: bytes) -> dict[str, Any]:
    """pyproject.toml without what Flower leaves out; raises `ValueError`."""
    if len(content) > LARGEST_SETTINGS:
        raise ValueError
    settings = tomllib.loads(content.decode())
    tool = settings.get("tool")
    if isinstance(tool, dict) and isinstance(flower := tool.get("flwr"), dict):
        flower.pop("federations", None)
    return settings


def _manifest(files: Mapping[str, bytes]) -> list[bytes]:
    """The lines of `.info/CONTENT`."""
    return [
        f"{name},{hashlib.sha256(content).hexdigest()},{8 * len(content)}".encode()
        for name, content in files.items()
    ]


def _shown(text: str) -> str:
    """Text from elsewhere, for a log: short, and nothing in it that a terminal obeys."""
    return ascii(text[:60])
