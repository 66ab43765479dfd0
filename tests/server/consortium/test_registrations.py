"""A node is the site whose key it is registered with, and no name can make it another."""

from pathlib import Path

import pytest
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from flwr.proto.node_pb2 import NodeInfo

from federation.keys.certificates import (
    PublicKey,
    certificate_pem,
    key_fingerprint,
    make_request,
    new_key,
    public_key_of,
    read_certificate,
    utc_now,
)
from server.consortium.provisioning import ConsortiumSettings, Office, SiteEntry, provision
from server.consortium.registrations import Registrations


@pytest.fixture
def office(tmp_path: Path) -> Office:
    sites = (SiteEntry(name="north"), SiteEntry(name="south", key="site"))
    settings = ConsortiumSettings(name="test", server="centre.example:443", sites=sites)
    return provision(settings, tmp_path / "consortium").office


def registered(key: PublicKey, name: str = "") -> NodeInfo:
    """As SuperLink says it: PEM, whatever name somebody gave."""
    pem = key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    return NodeInfo(node_id=7, public_key=pem, name=name)


def test_a_node_is_the_site_of_its_key_whatever_name_it_is_registered_under(office: Office) -> None:
    key = public_key_of(read_certificate((office.folder / "sites" / "north" / "site.pem").read_bytes()))
    site_of = Registrations(office.folder)
    assert site_of(registered(key)) == "north"
    assert site_of(registered(key, "south")) == "north"
    assert site_of(registered(new_key().public_key(), "north")) == ""
    assert site_of(NodeInfo(node_id=7, name="north")) == ""


def test_a_key_that_is_replaced_or_revoked_counts_at_once(office: Office) -> None:
    site_of = Registrations(office.folder)
    keys = [new_key(), new_key()]
    for own in keys:
        request = certificate_pem(make_request("south", own))
        office.approve(request, key_fingerprint(own.public_key()), utc_now())
        assert site_of(registered(own.public_key())) == "south"
    assert site_of(registered(keys[0].public_key())) == ""
    office.revoke("south", utc_now())
    assert site_of(registered(keys[1].public_key())) == ""


def test_a_folder_that_is_no_consortium_names_nobody_and_says_so(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Expected a consortium's folder"):
        Registrations(tmp_path)
