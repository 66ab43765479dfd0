"""The start-up kit of a site: a zip of a few small files with their checksums, and where the centre is.

Centre and site agree here on names and format. A kit that holds the site's private key travels like one: by
hand or encrypted. Does not do: make keys (`server/consortium/provisioning.py`) or install them
(`client/connection/keys.py`).
"""

import hashlib
import io
import re
import struct
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

import yaml

from forms.form import build
from forms.names import Letters, SiteName
from forms.ranges import brief, shown
from forms.yaml_text import read_yaml

AUTHORITY = "ca.pem"
CERTIFICATE = "site.pem"
KEY = "site.key"
CONNECTION = "connection.yaml"
SETTINGS = "site.yaml"
README = "README.txt"
CHECKSUMS = "SHA256SUMS"
NEEDED = frozenset({AUTHORITY, CERTIFICATE, CONNECTION, SETTINGS, README})
"""In every kit; the private key is in those for which the centre made it."""

_LARGEST = 100_000  # bytes of a file in a kit
_HOST = re.compile(r"[A-Za-z0-9._:-]{1,253}")
_PORT = re.compile(r"[0-9]{1,5}")
Address = Annotated[str, Letters(r"[A-Za-z0-9._:\[\]-]{1,261}", "host:port")]
"""Where a server is reached."""
_DAMAGED = (
    zipfile.BadZipFile, zlib.error, struct.error, NotImplementedError, RuntimeError, EOFError, OSError,
    OverflowError, UnicodeDecodeError,
)  # fmt: skip
_EPOCH = (1980, 1, 1, 0, 0, 0)  # the same content is the same zip


@dataclass(frozen=True, kw_only=True)
class Connection:
    """Where a site connects, and as whom."""

    consortium: SiteName
    """Name of the consortium."""
    site: SiteName
    """Name of the site in plans."""
    server: Address
    """Host and port, host:port."""

    def to_yaml(self) -> bytes:
        """As connection.yaml holds it."""
        values = {"consortium": self.consortium, "site": self.site, "server": self.server}
        return yaml.safe_dump(values, sort_keys=False).encode()

    @staticmethod
    def from_yaml(text: bytes) -> "Connection":
        """Back from connection.yaml; raises `ValueError`."""
        connection = build(Connection, read_yaml(text, CONNECTION), CONNECTION)
        host_and_port(connection.server)
        return connection


def host_and_port(address: str) -> tuple[str, int]:
    """The parts of `host:port` ([address]:port for IPv6); raises `ValueError`."""
    host, _, port = address.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not _HOST.fullmatch(host) or not _PORT.fullmatch(port) or not 0 < int(port) < 65536:
        raise ValueError(f"Expected the server's address as host:port; got {shown(address)}.")
    return host, int(port)


def pack_kit(files: Mapping[str, bytes]) -> bytes:
    """A kit of `files`, with their checksums as `sha256sum --check` reads them."""
    sums = "".join(f"{hashlib.sha256(files[name]).hexdigest()}  {name}\n" for name in sorted(files))
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in sorted({**files, CHECKSUMS: sums.encode()}.items()):
            entry = zipfile.ZipInfo(name, _EPOCH)
            entry.external_attr = (0o600 if name == KEY else 0o644) << 16
            archive.writestr(entry, content)
    return packed.getvalue()


def unpack_kit(packed: bytes) -> dict[str, bytes]:
    """The files of a kit, each as its checksum says; raises `ValueError` for anything else.

    The checksums find damage on the way, not a forger: against forgers people compare fingerprints.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(packed)) as archive:
            entries = archive.infolist()
            names = {entry.filename for entry in entries}
            if not NEEDED | {CHECKSUMS} <= names <= NEEDED | {CHECKSUMS, KEY} or len(names) < len(entries):
                odd = sorted(names ^ (NEEDED | {CHECKSUMS}) - {KEY}) or sorted(names) or ["everything"]
                raise ValueError(
                    f"Expected a kit's files and no others; {odd[0][:60]!r} is too many or lacks."
                )
            if any(
                entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) for entry in entries
            ):
                raise ValueError("Expected a kit in plain zip; it is packed in another way.")
            if max(entry.file_size for entry in entries) > _LARGEST:
                raise ValueError(f"Expected files of at most {_LARGEST} bytes in a kit; got a larger one.")
            files = {entry.filename: archive.read(entry) for entry in entries}
    except _DAMAGED as error:
        raise ValueError(
            f"Expected a start-up kit (zip); {brief(error)}. Ask the centre for it again."
        ) from None
    said = _checksums(files.pop(CHECKSUMS))
    for name in sorted(set(said) | set(files)):
        if name not in files or said.get(name) != hashlib.sha256(files[name]).hexdigest():
            raise ValueError(
                f"Expected {name!r} of the kit to have the checksum in {CHECKSUMS}; it has another. Ask the "
                "centre for the kit again."
            )
    return files


def _checksums(text: bytes) -> dict[str, str]:
    """Checksum by name, as `sha256sum` writes them; raises `ValueError`."""
    found = {}
    for line in text.decode("ascii", "replace").splitlines():
        match = re.fullmatch(r"([0-9a-f]{64})  ([A-Za-z0-9.]{1,60})", line)
        if match is None or match[2] in found:
            raise ValueError(f"Expected {CHECKSUMS} of the kit to hold a checksum and a name in each line.")
        found[match[2]] = match[1]
    return found
