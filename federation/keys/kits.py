"""The start-up kit of a site: a zip of a few small files with their checksums, and where the centre is.

Centre and site agree here on names and format. A kit that holds the site's private key travels like one: by
hand or encrypted. Does not do: make keys (`server/consortium/provisioning.py`) or install them
(`client/connection/keys.py`).
"""

import hashlib
import io
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass

import yaml

from federation.plan import build

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
_EPOCH = (1980, 1, 1, 0, 0, 0)  # the same content is the same zip


@dataclass(frozen=True, kw_only=True)
class Connection:
    """Where a site connects, and as whom."""

    consortium: str
    """Name of the consortium."""
    site: str
    """Name of the site in plans."""
    server: str
    """Host and port, host:port."""

    def to_yaml(self) -> bytes:
        """As connection.yaml holds it."""
        values = {"consortium": self.consortium, "site": self.site, "server": self.server}
        return yaml.safe_dump(values, sort_keys=False).encode()

    @staticmethod
    def from_yaml(text: bytes) -> "Connection":
        """Back from connection.yaml; raises `ValueError`."""
        try:
            values = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ValueError(f"Expected {CONNECTION} to be YAML; {' '.join(str(error).split())}.") from None
        connection = build(Connection, values, CONNECTION)
        host_and_port(connection.server)
        return connection


def host_and_port(address: str) -> tuple[str, int]:
    """The parts of `host:port` ([address]:port for IPv6); raises `ValueError`."""
    host, _, port = address.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not host or any(c.isspace() for c in host) or not port.isdecimal() or not 0 < int(port) < 65536:
        raise ValueError(f"Expected the server's address as host:port; got {address!r}.")
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
                odd = sorted(names ^ (NEEDED | {CHECKSUMS}) - {KEY}) or sorted(names)
                raise ValueError(
                    f"Expected a kit's files and no others; {odd[0][:60]!r} is too many or lacks."
                )
            if max(entry.file_size for entry in entries) > _LARGEST:
                raise ValueError(f"Expected files of at most {_LARGEST} bytes in a kit; got a larger one.")
            files = {entry.filename: archive.read(entry) for entry in entries}
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError) as error:
        raise ValueError(f"Expected a start-up kit (zip); {error}. Ask the centre for it again.") from None
    said = dict(line.split("  ", 1)[::-1] for line in files.pop(CHECKSUMS).decode().splitlines())
    for name in sorted(set(said) | set(files)):
        if name not in files or said.get(name) != hashlib.sha256(files[name]).hexdigest():
            raise ValueError(
                f"Expected {name!r} of the kit to have the checksum in {CHECKSUMS}; it has another. Ask the "
                "centre for the kit again."
            )
    return files
