"""Bytes from elsewhere with anything changed in them: read as they are, or refused in one line; never more.

Seeded: a bit, a byte, a stretch or the length of what is honest is changed. What a reader may raise is
`ValueError` alone; what it says is one line.
"""

import base64
import io
import json
import random
import shutil
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

import client.cli
import server.cli
from client.consent.approvals import Approvals
from client.settings import load_site_config
from client.site import load_plan
from federation.bundle import running_bundle
from federation.journal import Journal, journal_lines, read_journal
from federation.keys.certificates import (
    Authority,
    certificate_pem,
    check_certificate,
    crl_pem,
    expiry,
    fingerprint,
    key_pem,
    make_request,
    new_key,
    public_key_of,
    read_certificate,
    read_key,
    read_request,
    read_revocations,
    site_of,
    utc_now,
)
from federation.keys.kits import (
    AUTHORITY,
    CERTIFICATE,
    CONNECTION,
    README,
    SETTINGS,
    Connection,
    pack_kit,
    unpack_kit,
)
from federation.plan.plan import RunPlan
from federation.published_plan import PublishedPlan
from forms.json_text import read_json
from forms.yaml_text import read_yaml
from meduet_models.encoded_scan import load_encoded_scan
from meduet_models.published.pretrained import load_pretrained
from meduet_models.tokenizer.tokenizer import load_tokenizer_file
from meduet_models.weights import load_weights, save_weights
from server.checkpoints import Checkpoint, Checkpoints
from server.config import compose_config, plain, plan_from
from server.consortium.provisioning import load_consortium
from server.deployment.config import load_server_config

NOW = utc_now()
SITE = b"name: a\ndata_root: absent\nstate_dir: state\nminimum_cohort: 12\nsplit_fractions: [0.8, 0.1, 0.1]\n"
CONSORTIUM = b"name: c\nserver: centre.example:443\nsites:\n- {name: a, expires: 2027-06-30}\n- name: b\n"
SERVER = b"state_dir: state\nconsortium: consortium\nport: 18443\nhealth_port: 18444\npublic_port: 18445\n"


NASTY = (b"[" * 2000, b'{"a":' * 2000, b"9" * 5000, b"\x1b[2J", b"1e999", b"NaN", b"\xe2\x80\xae")


def mutations(content: bytes, count: int, seed: int) -> list[bytes]:
    """`content` with one thing changed, `count` times."""
    draw = random.Random(seed)
    changed = []
    for _ in range(count):
        at = draw.randrange(len(content))
        match draw.randrange(6):
            case 0:
                new = bytes([content[at] ^ 1 << draw.randrange(8)])
            case 1:
                new = bytes([draw.randrange(256)])
            case 2:
                new = draw.choice(NASTY)
            case 3:
                new = b""
            case 4:
                changed.append(content[:at])
                continue
            case _:
                end = min(len(content), at + draw.randrange(1, 60))
                new = content[at:end] * 2
        changed.append(content[:at] + new + content[at + 1 :])
    return changed


def refused_in_one_line(read: Callable[[bytes], object], content: bytes) -> bool:
    """Whether `read` refuses; anything but a `ValueError` of one printable line fails the test."""
    try:
        read(content)
    except ValueError as error:
        said = str(error)
        assert said and len(said) < 1500 and "\n" not in said, said[:300]
        return True
    return False


def everything_of(pem: bytes, authority: Any) -> None:
    certificate = read_certificate(pem)
    expiry(certificate), fingerprint(certificate), public_key_of(certificate), site_of(certificate)
    check_certificate(certificate, authority, "site", NOW)


def der_mutations(pem: bytes, count: int) -> list[bytes]:
    """Changes of what a PEM text encodes, not of the text."""
    head, *lines, foot = pem.decode().strip().splitlines()
    changed = mutations(base64.b64decode("".join(lines)), count, 3)
    return [f"{head}\n{base64.encodebytes(der).decode()}{foot}\n".encode() for der in changed if der]


@pytest.fixture(scope="module")
def plan() -> RunPlan:
    settings = plain(compose_config())
    return plan_from(settings, sites=("a", "b"), tokenizer_sha256="0" * 64, latent_channels=4, stride=4)


@pytest.fixture(scope="module")
def authority() -> Authority:
    return Authority.create("c", 3650, NOW)


@pytest.mark.parametrize("read", [read_json, lambda text: read_yaml(text[:100_000])], ids=["json", "yaml"])
def test_changed_json_and_yaml(read: Callable[[bytes], object]) -> None:
    honest = json.dumps({"a": [1, 2.5e-3, None, True, "é\\u202e"], "b": {"c": {}}}, indent=1).encode()
    refused = [refused_in_one_line(read, changed) for changed in mutations(honest, 600, 1)]
    assert sum(refused) > 100


def test_changed_plans(plan: RunPlan, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"

    def read(content: bytes) -> None:
        path.write_bytes(content)
        load_plan(path)

    published = PublishedPlan(plan=plan, bundle_sha256=running_bundle()).to_json()
    assert not refused_in_one_line(read, published.encode())
    for changed in mutations(published.encode(), 300, 2):
        refused_in_one_line(read, changed)
    for changed in mutations(plan.to_json().encode(), 300, 3):
        refused_in_one_line(read, changed)


@pytest.mark.parametrize(
    ("content", "load"),
    [(SITE, load_site_config), (CONSORTIUM, load_consortium), (SERVER, load_server_config)],
    ids=["site", "consortium", "server"],
)
def test_changed_settings_of_a_machine(
    content: bytes, load: Callable[[Path], object], tmp_path: Path
) -> None:
    path = tmp_path / "settings.yaml"

    def read(content: bytes) -> None:
        path.write_bytes(content)
        load(path)

    assert sum(refused_in_one_line(read, changed) for changed in mutations(content, 300, 4)) > 50


def test_changed_certificates_keys_requests_and_revocations(authority: Authority) -> None:
    key = new_key()
    certificate = certificate_pem(authority.site("a", key.public_key(), NOW + timedelta(days=9), NOW))
    assert not refused_in_one_line(lambda pem: everything_of(pem, authority.certificate), certificate)
    readers: list[tuple[bytes, Callable[[bytes], object]]] = [
        (certificate, lambda pem: everything_of(pem, authority.certificate)),
        (certificate_pem(make_request("a", key)), read_request),
        (crl_pem(authority.revocation_list({7: NOW}, NOW)), read_revocations),
        (key_pem(key), read_key),
    ]
    for honest, read in readers:
        found = [refused_in_one_line(read, changed) for changed in mutations(honest, 150, 5)]
        found += [refused_in_one_line(read, changed) for changed in der_mutations(honest, 800)]
        assert sum(found) > 300


def test_changed_kits(authority: Authority) -> None:
    connection = Connection(consortium="c", site="a", server="centre:443")
    files = {name: b"x" * 50 for name in (AUTHORITY, CERTIFICATE, SETTINGS, README)}
    kit = pack_kit(files | {CONNECTION: connection.to_yaml()})
    assert not refused_in_one_line(unpack_kit, kit)
    for changed in mutations(kit, 2000, 6):
        refused_in_one_line(unpack_kit, changed)
    for changed in mutations(connection.to_yaml(), 300, 7):
        refused_in_one_line(Connection.from_yaml, changed)


def test_changed_journals(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    journal = Journal(path)
    for number in range(4):
        journal.append({"kind": "release", "bytes": number, "to": "centre"})
    honest = path.read_bytes()

    def read(content: bytes) -> None:
        path.write_bytes(content)
        list(journal_lines(read_journal(path)))

    assert not refused_in_one_line(read, honest)
    for changed in mutations(honest, 300, 8):
        # what ends after a whole line is a shorter journal: only a hash kept elsewhere tells
        assert refused_in_one_line(read, changed) or honest.startswith(changed)


def test_changed_files_of_weights(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    provenance = {
        "network": '{"latent_channels": 4}',
        "tokenizer_sha256": "0" * 64,
        "tokenizer": '{"a": 1}',
        "kind": "encoded scan",
    }
    save_weights(path, {"a": torch.ones(3, 4), "b": torch.zeros(2)}, provenance)
    honest = path.read_bytes()
    for changed in mutations(honest, 400, 9):
        path.write_bytes(changed)
        for load in (load_weights, load_pretrained, load_tokenizer_file, load_encoded_scan):
            refused_in_one_line(lambda content, load=load: load(path), changed)  # type: ignore[misc]


@pytest.mark.parametrize("load", [load_pretrained, load_tokenizer_file, load_encoded_scan])
@pytest.mark.parametrize(
    "value", ["[" * 5000, '{"a":' * 5000, "9" * 5000, "null", "[]", "{}", '"x"', "NaN", "{"]
)
def test_headers_that_hold_other_values(load: Callable[[Path], object], value: str, tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    names = ("network", "tokenizer", "tokenizer_sha256", "spacing_mm", "volumes", "geometry")
    save_weights(
        path, {"latents": torch.ones(1, 1, 1, 1)}, dict.fromkeys(names, value) | {"kind": "encoded scan"}
    )
    assert refused_in_one_line(lambda content: load(path), b"")


STRANGE = (
    "round-.safetensors", "round-abc.safetensors", "round-\u0663.safetensors", "round-3.safetensors",
    f"round-{'9' * 200}.safetensors", "round-00000003.safetensors", "round--001.safetensors",
)  # fmt: skip


def test_strange_files_among_checkpoints(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, "a" * 64)
    kept = Checkpoint(plan_sha256="a" * 64, round=3, shared={"w": torch.ones(2)}, optimiser={})
    path = checkpoints.save(kept)
    for name in STRANGE:
        shutil.copy(path, tmp_path / name)
    (tmp_path / "round-0009.safetensors").mkdir()
    (tmp_path / "round-0008.safetensors").symlink_to("nowhere")
    assert checkpoints.rounds() == [3]
    latest = checkpoints.latest()
    assert latest is not None and latest.round == 3
    save_weights(tmp_path / "round-0004.safetensors", {"strange:w": torch.ones(2)}, {"plan_sha256": "a" * 64})
    (tmp_path / "round-0005.safetensors").write_bytes(b"\xff" * 40)
    latest = checkpoints.latest()
    assert latest is not None and latest.round == 3 and checkpoints.damaged == [5, 4]
    checkpoints.save(kept)


def test_a_changed_plan_among_those_that_were_shown(plan: RunPlan, tmp_path: Path) -> None:
    book = Approvals(tmp_path)
    book.keep(PublishedPlan(plan=plan, bundle_sha256=running_bundle()))
    (path,) = (tmp_path / "plans").iterdir()
    honest = path.read_bytes()

    def read(content: bytes) -> None:
        path.write_bytes(content)
        list(book.kept())

    for changed in mutations(honest, 100, 10):
        refused_in_one_line(read, changed)


@pytest.mark.parametrize(
    "content", [b"", b"\xff" * 99, b'{"a":' * 9999, b"9" * 5000, b"PK\x03\x04" + b"\0" * 99]
)
@pytest.mark.parametrize("command", ["plan show", "install", "check", "journal show"])
def test_a_site_that_is_given_anything_says_one_line_and_exits_2(
    command: str, content: bytes, tmp_path: Path
) -> None:
    (tmp_path / "site.yaml").write_text("name: a\ndata_root: absent\nstate_dir: state\n")
    (tmp_path / "state").mkdir()
    given, config = tmp_path / "given", ["--config", str(tmp_path / "site.yaml")]
    typed = {
        "plan show": ["plan", "show", str(given), *config],
        "install": ["install", str(given), "--into", str(tmp_path / "keys")],
        "check": ["check", "--plan", str(given), *config],
        "journal show": ["journal", "show", *config],
    }[command]
    given.write_bytes(content)
    (tmp_path / "state" / "journal.jsonl").write_bytes(content)
    screen = io.StringIO()
    status = client.cli.main(typed, Console(file=screen, width=300))
    said = screen.getvalue()
    if command == "journal show" and not content:  # an empty journal is one
        assert (status, said) == (0, "")
        return
    assert status == 2 and said.count("\n") == 1 and said[:-1].isprintable(), said


@pytest.mark.parametrize("content", [b"\xff" * 99, b"[" * 9999, b"a: &x [*x]", b"9" * 5000, b"a: 1\na: 2"])
@pytest.mark.parametrize("command", ["provision", "approve", "publish", "start", "run"])
def test_a_centre_that_is_given_anything_says_one_line_and_exits_2(
    command: str, content: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = tmp_path / "given"
    given.write_bytes(content)
    typed = {
        "provision": ["provision", str(given), "--folder", str(tmp_path / "office")],
        "approve": ["approve", str(given), "--folder", str(tmp_path / "office")],
        "publish": ["publish", str(given), "--out", str(tmp_path / "plans")],
        "start": ["start", "--config", str(given)],
        "run": ["run", str(given), "--folder", str(tmp_path / "run"), "--config", str(given)],
    }[command]
    assert server.cli.main(typed) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and said[:-1].isprintable(), said
