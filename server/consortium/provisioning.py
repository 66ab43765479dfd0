"""The centre's office for keys: an authority, the server's certificate, start-up kits, and a book of it all.

Everything is in one folder, mode 0700: `ca.key` (the trust root; back it up offline), `server/`, `sites/`
(each site's certificate and its public key as Flower registers it), `kits/`, `crl.pem`, and `journal.jsonl`,
the hash-chained book of every certificate issued and revoked, from which the revocation list is made. A site
has one key at a time. A key given by kit was seen by the centre; the other way is the site's own request.
Does not do: send anything, or register keys with Flower.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime, time, timedelta
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from cryptography import x509

from federation.journal import Journal
from federation.keys.certificates import (
    Authority,
    PublicKey,
    certificate_pem,
    checked_name,
    crl_pem,
    expiry,
    fingerprint,
    key_fingerprint,
    key_pem,
    new_key,
    node_public_key,
    public_key_of,
    read_certificate,
    read_key,
    read_request,
    same_fingerprint,
    utc_now,
)
from federation.keys.key_files import key_folder, read_file, read_text, refuse_work_tree
from federation.keys.kits import (
    AUTHORITY,
    CERTIFICATE,
    CONNECTION,
    KEY,
    README,
    SETTINGS,
    Address,
    Connection,
    host_and_port,
    pack_kit,
)
from forms.form import build, check
from forms.names import SiteName
from forms.ranges import Entries, Range
from forms.yaml_text import read_yaml
from server.consortium.kit_texts import readme_text, settings_text
from storage.files import PUBLIC, write_whole

CONSORTIUM = "consortium.yaml"
SERVER = "server"
"""Role and folder of the server's own certificate; no site may be called so."""


@dataclass(frozen=True, kw_only=True)
class SiteEntry:
    """One hospital in consortium.yaml."""

    name: SiteName
    """Name of the site in plans."""
    expires: date | None = None
    """Last day of its certificate; none: `valid_days` from when it is made."""
    key: Literal["kit", "site"] = "kit"
    """Where its private key is made: by the centre (`kit`), or at the site, which sends a request."""


@dataclass(frozen=True, kw_only=True)
class ConsortiumSettings:
    """What is in consortium.yaml."""

    name: SiteName
    """Name of the consortium."""
    server: Address
    """Where sites reach the centre, host:port."""
    sites: Annotated[tuple[SiteEntry, ...], Entries(1000)]
    """The hospitals."""
    valid_days: Annotated[int, Range(at_least=1, at_most=36_500)] = 365
    """Days for which the server's and the sites' certificates are made."""
    authority_valid_days: Annotated[int, Range(at_least=1, at_most=36_500)] = 3650
    """Days for which the authority is made."""

    def __post_init__(self) -> None:
        """Refuse what cannot be meant."""
        check(self, "consortium")
        host_and_port(self.server)
        names = [site.name for site in self.sites]
        if len({name.lower() for name in names}) < len(names) or SERVER in names:
            raise ValueError(f"Expected distinct sites, none called {SERVER!r}; got {', '.join(names)}.")
        if self.valid_days > self.authority_valid_days:
            raise ValueError("Expected consortium.valid_days to be at most consortium.authority_valid_days.")
        if any(isinstance(site.expires, datetime) for site in self.sites):
            raise ValueError("Expected expires to be a day (2027-06-30) without a time.")

    def entry(self, site: str) -> SiteEntry:
        """The entry of a site; raises `ValueError` when it is not listed."""
        for entry in self.sites:
            if entry.name == site:
                return entry
        listed = ", ".join(entry.name for entry in self.sites) or "nobody"
        raise ValueError(
            f"Expected a site of {CONSORTIUM}; got {site!r}, listed are {listed}. Add it there and provision "
            "again."
        )


def load_consortium(path: Path) -> ConsortiumSettings:
    """Read consortium.yaml, strictly; raises `ValueError` naming file and setting."""
    try:
        values = read_yaml(read_text(path, "the consortium's settings"), "settings")
        return build(ConsortiumSettings, values, "consortium")
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


@dataclass(frozen=True)
class Issued:
    """One certificate in the book."""

    name: str
    """The site, or `server`."""
    serial: int
    key: str
    """Fingerprint of the key."""
    not_after: datetime
    revoked: datetime | None = None


class Office:
    """The folder of a consortium's authority, opened by `open_office` or `provision`."""

    def __init__(self, folder: Path, settings: ConsortiumSettings, authority: Authority) -> None:
        self.folder, self.settings, self.authority = folder, settings, authority
        self.journal = Journal(folder / "journal.jsonl")

    @property
    def fingerprint(self) -> str:
        """Of the authority; what people compare over the telephone."""
        return fingerprint(self.authority.certificate)

    def issued(self) -> list[Issued]:
        """Every certificate of the book, in order, revoked or not."""
        found: list[Issued] = []
        revoked = self._revoked()
        for record in (entry.record for entry in self.journal.entries()):
            if record["kind"] == "certificate":
                serial = int(record["serial"], 16)
                ends = datetime.fromisoformat(record["not_after"])
                found.append(Issued(record["name"], serial, record["key"], ends, revoked.get(serial)))
        return found

    def current(self, name: str) -> Issued | None:
        """The certificate last issued to `name` and not revoked."""
        own = [one for one in self.issued() if one.name == name and one.revoked is None]
        return own[-1] if own else None

    def approve(self, request_pem: bytes, said_fingerprint: str, now: datetime) -> Path:
        """Sign a site's request whose key's fingerprint somebody read out; returns its kit, without a key.

        Earlier certificates of the site for another key are revoked. Raises `ValueError` when the fingerprint
        is another, the site is not listed, or the key was revoked.
        """
        request = read_request(request_pem)
        if not same_fingerprint(said_fingerprint, request.fingerprint):
            raise ValueError(
                f"Expected the fingerprint of the request of {request.site!r}; what was given is another. "
                "Nothing was signed. Call the site and compare."
            )
        entry = self.settings.entry(request.site)
        if any(one.key == request.fingerprint and one.revoked for one in self.issued()):
            raise ValueError(
                f"Expected a key that was not revoked; {request.site!r} asks for one that was. Let it make "
                "another: meduet-site request with a new folder."
            )
        self._revoke(request.site, now, but_key=request.fingerprint)
        certificate = self._certify(entry, request.public_key, now)
        kit = self._write_kit(entry, certificate)
        self._enter(entry.name, certificate)
        return kit

    def renew_site(self, site: str, now: datetime) -> Path:
        """A later certificate for the same key; returns its file, which is no secret.

        Raises `ValueError` when the site has none, or its was revoked.
        """
        if (last := self.current(site)) is None:
            raise ValueError(f"Expected a site with a certificate that is not revoked; {site!r} has none.")
        path = self._site_folder(site) / CERTIFICATE
        key = public_key_of(read_certificate(read_file(path, "the site's certificate")))
        if key_fingerprint(key) != last.key:
            raise ValueError(f"Expected {path} to be the certificate in the journal; it is another.")
        self._enter(site, self._certify(self.settings.entry(site), key, now))
        return path

    def renew_server(self, now: datetime) -> Path:
        """A new key and certificate for the server; returns the certificate's file."""
        key = new_key()
        host, _ = host_and_port(self.settings.server)
        not_after = now + timedelta(days=self.settings.valid_days)
        certificate = self.authority.server(key.public_key(), [host], not_after, now)
        folder = key_folder(self.folder / SERVER)
        write_whole(folder / "server.key", key_pem(key))
        write_whole(folder / "server.pem", certificate_pem(certificate), PUBLIC)
        write_whole(folder / AUTHORITY, certificate_pem(self.authority.certificate), PUBLIC)
        self._note(SERVER, certificate)
        return folder / "server.pem"

    def revoke(self, site: str, now: datetime) -> Path:
        """Revoke every certificate of a site; returns the list for the proxy. Again changes nothing.

        Raises `ValueError` when the site never had one.
        """
        if not any(one.name == site for one in self.issued()) or site == SERVER:
            raise ValueError(f"Expected a site that was given a certificate; {site!r} was not.")
        self._revoke(site, now)
        return self.folder / "crl.pem"

    def give_kit(self, entry: SiteEntry, now: datetime) -> Path:
        """Make a site's key pair and its kit; the key is in the kit alone and kept nowhere else."""
        key = new_key()
        certificate = self._certify(entry, key.public_key(), now)
        kit = self._write_kit(entry, certificate, key_pem(key))
        self._enter(entry.name, certificate)  # last: a site without an entry is given another kit
        return kit

    def write_revocations(self, now: datetime) -> None:
        """Write the revocation list as the book has it."""
        revocations = self.authority.revocation_list(self._revoked(), now)
        write_whole(self.folder / "crl.pem", crl_pem(revocations), PUBLIC)

    def _revoke(self, site: str, now: datetime, but_key: str = "") -> None:
        serials = [
            f"{one.serial:x}"
            for one in self.issued()
            if one.name == site and one.key != but_key and one.revoked is None
        ]
        if serials:
            self.journal.append(
                {"kind": "revocation", "name": site, "serials": serials, "when": now.isoformat()}
            )
        self.write_revocations(now)

    def _revoked(self) -> dict[int, datetime]:
        return {
            int(serial, 16): datetime.fromisoformat(entry.record["when"])
            for entry in self.journal.entries()
            if entry.record["kind"] == "revocation"
            for serial in entry.record["serials"]
        }

    def _certify(self, entry: SiteEntry, key: PublicKey, now: datetime) -> x509.Certificate:
        not_after = now + timedelta(days=self.settings.valid_days)
        if entry.expires is not None:
            not_after = datetime.combine(entry.expires, time(23, 59, 59), UTC)
        return self.authority.site(entry.name, key, not_after, now)

    def _enter(self, site: str, certificate: x509.Certificate) -> None:
        folder = self._site_folder(site)
        write_whole(folder / CERTIFICATE, certificate_pem(certificate), PUBLIC)
        write_whole(folder / "node.pub", node_public_key(public_key_of(certificate)), PUBLIC)
        self._note(site, certificate)

    def _write_kit(self, entry: SiteEntry, certificate: x509.Certificate, key: bytes | None = None) -> Path:
        settings = self.settings
        connection = Connection(consortium=settings.name, site=entry.name, server=settings.server)
        files = {
            AUTHORITY: certificate_pem(self.authority.certificate),
            CERTIFICATE: certificate_pem(certificate),
            CONNECTION: connection.to_yaml(),
            SETTINGS: settings_text(connection).encode(),
            README: readme_text(connection, self.fingerprint, expiry(certificate), key is not None).encode(),
        }
        path = key_folder(self.folder / "kits") / f"{entry.name}.zip"
        write_whole(path, pack_kit(files if key is None else files | {KEY: key}))
        return path

    def _site_folder(self, site: str) -> Path:
        return key_folder(self.folder / "sites" / checked_name(site))

    def _note(self, name: str, certificate: x509.Certificate) -> None:
        record: dict[str, Any] = {
            "kind": "certificate",
            "name": name,
            "serial": f"{certificate.serial_number:x}",
            "fingerprint": fingerprint(certificate),
            "key": key_fingerprint(public_key_of(certificate)),
            "not_after": expiry(certificate).isoformat(),
        }
        self.journal.append(record)


@dataclass(frozen=True)
class Provisioned:
    """What a call of `provision` did."""

    office: Office
    created: bool
    """Whether the authority is new."""
    kits: tuple[Path, ...]
    """Kits that were made now; each holds a private key."""
    awaited: tuple[str, ...]
    """Sites that make their own key and have not sent a request yet."""


def provision(settings: ConsortiumSettings, folder: Path, now: datetime | None = None) -> Provisioned:
    """Make authority, server certificate and kits in `folder`; what is there already stays as it is.

    Run again with more sites, it makes theirs. Raises `ValueError` inside of a git work tree, for the folder
    of another consortium, and for one whose authority is not whole: an authority is never overwritten.
    """
    now = now or utc_now()
    refuse_work_tree(folder)
    key_folder(folder)
    created = not (folder / "ca.key").exists()
    if created:
        if others := sorted(path.name for path in folder.iterdir()):
            raise ValueError(
                f"Expected {folder} to be empty or an authority's; it holds {others[0]!r} and no ca.key. "
                "Restore ca.key from its backup, or give another folder."
            )
        authority = Authority.create(settings.name, settings.authority_valid_days, now)
        write_whole(folder / CONSORTIUM, _canonical(settings))
        write_whole(folder / AUTHORITY, certificate_pem(authority.certificate), PUBLIC)
        write_whole(folder / "ca.key", key_pem(authority.key))
        office = Office(folder, settings, authority)
        office.journal.append({"kind": "authority", "name": settings.name, "fingerprint": office.fingerprint})
    else:
        before = open_office(folder)
        if before.settings.name != settings.name:
            raise ValueError(
                f"Expected {folder} to be of consortium {settings.name!r}; it is of "
                f"{before.settings.name!r}. An authority is not overwritten: give another folder."
            )
        write_whole(folder / CONSORTIUM, _canonical(settings))
        office = Office(folder, settings, before.authority)
        if before.settings.server != settings.server:
            office.renew_server(now)
    if office.current(SERVER) is None:
        office.renew_server(now)
    office.write_revocations(now)
    given = {one.name for one in office.issued()}
    missing = [entry for entry in settings.sites if entry.name not in given]
    kits = tuple(office.give_kit(entry, now) for entry in missing if entry.key == "kit")
    return Provisioned(office, created, kits, tuple(e.name for e in missing if e.key == "site"))


def open_office(folder: Path) -> Office:
    """The office in `folder`; raises `ValueError` when there is none or its parts do not belong together."""
    key = read_key(read_file(folder / "ca.key", "the authority's key (meduet-server provision makes it)"))
    certificate = read_certificate(read_file(folder / AUTHORITY, "the authority's certificate"))
    if public_key_of(certificate) != key.public_key():
        raise ValueError(f"Expected {folder / AUTHORITY} to be of ca.key; it is another's. Restore a backup.")
    return Office(folder, load_consortium(folder / CONSORTIUM), Authority(key, certificate))


def _canonical(settings: ConsortiumSettings) -> bytes:
    sites: Sequence[dict[str, Any]] = [
        {"name": s.name, "key": s.key} | ({} if s.expires is None else {"expires": s.expires})
        for s in settings.sites
    ]
    values = {
        "name": settings.name,
        "server": settings.server,
        "valid_days": settings.valid_days,
        "authority_valid_days": settings.authority_valid_days,
        "sites": sites,
    }
    return yaml.safe_dump(values, sort_keys=False).encode()
