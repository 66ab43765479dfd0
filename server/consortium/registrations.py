"""Who a connected node is: the site whose key it proves, by the consortium's own folder.

Flower's SuperLink lets a node in only with the private key of what is registered, and says of each node with
which public key that was. The office's folder says whose key that is (`sites/<name>/node.pub`). Read anew
each time, so that a key that was replaced or revoked while a run is under way counts at once.

Does not do: believe a name, neither a message's nor the one under which a node was registered. Registers
nothing (`server/deployment/control.py`).
"""

from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import load_pem_public_key, load_ssh_public_key
from cryptography.x509 import Certificate
from flwr.proto.node_pb2 import NodeInfo

from federation.keys.certificates import checked_key, key_fingerprint, read_certificate, read_revocations
from federation.keys.key_files import read_file
from federation.keys.kits import AUTHORITY, CERTIFICATE

REVOKED = "crl.pem"


def site_keys(consortium: Path) -> dict[str, Path]:
    """Public key of each site that may take part, as Flower registers it: those with a certificate that is
    not on the list of revoked ones."""
    revocations = read_revocations(read_file(consortium / REVOKED, "the list of revoked certificates"))
    found = {}
    for path in sorted(consortium.glob(f"sites/*/{CERTIFICATE}")):
        serial = read_certificate(read_file(path, "a site's certificate")).serial_number
        if revocations.get_revoked_certificate_by_serial_number(serial) is None:
            found[path.parent.name] = path.with_name("node.pub")
    return found


class Registrations:
    """Names of nodes by their keys, from the folder that `meduet-server provision` made."""

    def __init__(self, consortium: Path) -> None:
        """Raises `ValueError` when the folder is not a consortium's."""
        if not (consortium / REVOKED).is_file():
            raise ValueError(f"Expected a consortium's folder with {REVOKED}; got {consortium}.")
        self._consortium = consortium

    @property
    def authority(self) -> Certificate:
        """Who certified the sites' keys. Raises `ValueError` where it is not there."""
        return read_certificate(read_file(self._consortium / AUTHORITY, "the authority's certificate"))

    def __call__(self, node: NodeInfo) -> str:
        """The site whose key `node` is registered with; empty when it is nobody's."""
        try:
            theirs = key_fingerprint(checked_key(load_pem_public_key(node.public_key)))
        except (ValueError, UnsupportedAlgorithm):
            return ""
        for name, path in site_keys(self._consortium).items():
            if (
                key_fingerprint(checked_key(load_ssh_public_key(read_file(path, "a site's public key"))))
                == theirs
            ):
                return name
        return ""
