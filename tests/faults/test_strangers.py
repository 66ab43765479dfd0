"""Who must not take part does not: no registered key, another authority, an expired or revoked certificate, a
clock that is off, a plan that was changed after the hospital had agreed, another account of the machine."""

import dataclasses
import json
import os
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import pytest
import yaml

from client.connection.keys import install
from federation.keys.certificates import certificate_pem, key_pem, new_key, utc_now
from federation.keys.kits import (
    AUTHORITY,
    CERTIFICATE,
    CONNECTION,
    KEY,
    README,
    SETTINGS,
    Connection,
    pack_kit,
)
from federation.processes import die_with_parent, read_state
from federation.published_plan import PublishedPlan
from server.consortium.plans import publish
from server.consortium.provisioning import ConsortiumSettings, Office, SiteEntry, open_office, provision
from server.deployment.app_folder import ROOT
from server.deployment.control import Control
from server.deployment.status import read_status
from simulations.poc import Poc
from tests.faults.consortium import (
    SABOTEUR,
    Consortium,
    beside,
    command,
    consortium,
    reroute,
    site_command,
    undisturbed,
)
from tests.faults.page import Book
from tests.local_account import attack, family, listening

pytestmark = pytest.mark.faults

PLAN = ("hospitals.num_hospitals=2", "training.rounds=1", "aggregation.deadline_s=120")


@pytest.fixture(scope="module")
def up(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Consortium]:
    """Centre and hospitals are up; nothing runs. The hospitals approve plans themselves."""
    folder = tmp_path_factory.mktemp("strangers")
    made, _ = undisturbed(folder / "undisturbed", PLAN)
    whole = consortium(folder, PLAN, made, {}, runs=False)
    for path in whole.poc.site_yamls.values():
        path.write_text(
            yaml.safe_dump(yaml.safe_load(path.read_text()) | {"plan_approval": "required"}, sort_keys=False)
        )
    with whole.supervisor:
        log = whole.poc.config.state_dir / "superlink.log"
        whole.until(lambda: log.is_file() and whole.log("centre").count("up; sites"), "the centre")
        yield whole


def stranger(up: Consortium, name: str, office: Office, valid: timedelta = timedelta(days=30)) -> Path:
    """A site.yaml whose keys `office` certified for `name`, without entering them anywhere; its connection is
    to our centre."""
    now, key = utc_now(), new_key()
    certificate = office.authority.site(name, key.public_key(), now + valid, now)
    public = up.poc.config.public_port
    connection = Connection(consortium="poc", site=name, server=f"localhost:{public}")
    home = up.poc.folder / name
    home.mkdir()
    files = {
        AUTHORITY: certificate_pem(office.authority.certificate),
        CERTIFICATE: certificate_pem(certificate),
        CONNECTION: connection.to_yaml(),
        KEY: key_pem(key),
        SETTINGS: b"",
        README: b"",
    }
    (home / "kit.zip").write_bytes(pack_kit(files))
    install(home / "kit.zip", home, now)
    return settled(up, name, home)


def settled(up: Consortium, name: str, home: Path) -> Path:
    """Its site.yaml, otherwise as that of the first hospital."""
    first = next(iter(up.poc.site_yamls.values()))
    own = {
        "name": name,
        "state_dir": str(home / "state"),
        "keys_dir": str(home / "keys"),
    }
    (home / SETTINGS).write_text(yaml.safe_dump(yaml.safe_load(first.read_text()) | own, sort_keys=False))
    return home / SETTINGS


def office_of(poc: Poc) -> Office:
    return open_office(poc.folder / "consortium")


def test_a_key_that_is_not_registered(up: Consortium, book: Book) -> None:
    with beside(stranger(up, "unregistered", office_of(up.poc))) as said:
        up.until(lambda: "Exit Code: 305" in said(), "a refusal")
    book.note("a key that is not registered, with a valid certificate", "refused (305)", "nothing")


def test_another_authority(up: Consortium, tmp_path: Path, book: Book) -> None:
    settings = ConsortiumSettings(name="other", server="localhost:1", sites=(SiteEntry(name="a"),))
    other = provision(settings, tmp_path / "other").office
    path = stranger(up, "foreign", other)
    with beside(path) as said:
        up.until(lambda: "CERTIFICATE_VERIFY_FAILED" in said() or "Exit Code" in said(), "a refusal")
    keys = path.parent / "keys"
    (keys / AUTHORITY).write_bytes(certificate_pem(office_of(up.poc).authority.certificate))  # trusts us now
    assert "400" in answer(up, keys)
    book.note("another authority", "the site does not trust the centre, nor the proxy the site", "nothing")


def test_an_expired_certificate(up: Consortium, book: Book) -> None:
    path = stranger(up, "expired", office_of(up.poc), timedelta(seconds=10))
    assert "400" not in answer(up, path.parent / "keys")  # while it is valid
    time.sleep(12.0)
    started = site_command("start", config=path)
    assert started.returncode == 2
    assert "expired" in started.stdout or "ended" in started.stdout
    assert "400" in answer(up, path.parent / "keys")
    book.note(
        "an expired certificate", "the site does not start and says why; the proxy refuses it, too", "nothing"
    )


def answer(up: Consortium, keys: Path) -> str:
    """The status line that the proxy gives on the health route to whoever shows these keys."""
    context = ssl.create_default_context(cafile=str(up.poc.folder / "consortium" / AUTHORITY))
    context.load_cert_chain(keys / CERTIFICATE, keys / KEY)
    public = up.poc.config.public_port
    try:
        with (
            socket.create_connection(("localhost", public), timeout=20) as plain,
            context.wrap_socket(plain, server_hostname="localhost") as wire,
        ):
            wire.sendall(b"GET /v1/fleet/ HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
            return wire.recv(100).decode(errors="replace").splitlines()[0]
    except ssl.SSLError as error:
        return str(error)


def member(up: Consortium, name: str) -> Path:
    """One more hospital of the consortium, with a kit, installed; its site.yaml."""
    office = office_of(up.poc)
    entries = (*office.settings.sites, SiteEntry(name=name))
    made = provision(dataclasses.replace(office.settings, sites=entries), office.folder)
    (kit,) = made.kits
    home = up.poc.folder / name
    install(kit, home, utc_now())
    reroute(home / "keys" / CONNECTION, up.poc.config.public_port)
    return settled(up, name, home)


def online(up: Consortium, name: str) -> bool:
    """Whether SuperLink takes this hospital for connected."""
    config = up.poc.config
    known = json.loads((config.state_dir / "nodes.json").read_text())
    status = {str(node["node-id"]): node["status"] for node in Control(config)._nodes()}
    return name in known and status.get(known[name]["node"]) == "online"


def test_a_clock_that_is_ten_minutes_off(up: Consortium, book: Book) -> None:
    path = member(up, "late")
    folder = up.sabotage / "late"
    folder.mkdir()
    spoilt = {"PYTHONPATH": f"{SABOTEUR}{os.pathsep}{ROOT}", "MEDUET_SABOTAGE": str(folder)}
    up.until(lambda: "late" in up.log("centre").splitlines()[-1], "the site to be registered")
    (folder / "clock").write_text("-600")
    with beside(path, spoilt) as said:
        up.until(lambda: "Exit Code" in said(), "a refusal")
        assert not online(up, "late")
    (folder / "clock").write_text("0")
    with beside(path, spoilt):  # the same site, its clock set
        up.until(lambda: online(up, "late"), "the site to be let in")
    book.note("a site's clock 10 minutes off", "refused; let in when the clock is set", "nothing")


def test_a_revoked_site(up: Consortium, book: Book) -> None:
    path = member(up, "leaver")
    with beside(path) as said:
        up.until(lambda: online(up, "leaver"), "the site to be let in")
        assert "400" not in answer(up, path.parent / "keys")
        begun = time.monotonic()
        revoked = command("server.cli", "revoke", "leaver", "--folder", str(up.poc.folder / "consortium"))
        assert revoked.returncode == 0, revoked.stdout
        up.until(lambda: not online(up, "leaver"), "Flower to forget the site")
        up.until(lambda: "400" in answer(up, path.parent / "keys"), "the proxy to refuse the certificate")
        seconds = time.monotonic() - begun
        up.until(lambda: "Exit Code" in said(), "its SuperNode to be told")
    book.note(
        "a site is revoked while it is connected",
        f"shut out of Flower and at the proxy within {seconds:.0f} s; its SuperNode ends",
        "nothing",
    )


def test_a_plan_that_was_changed_after_approval(up: Consortium, book: Book) -> None:
    published = PublishedPlan.from_json(up.poc.plan_path.read_text())
    for config in up.poc.site_yamls.values():
        shown = site_command("plan", "show", str(up.poc.plan_path), config=config)
        assert shown.returncode == 0, shown.stdout
        approved = site_command("plan", "approve", published.sha256[:12], config=config)
        assert approved.returncode == 0, approved.stdout
    changed = dataclasses.replace(published.plan, seed=published.plan.seed + 1)
    (up.poc.folder / "changed.json").write_text(changed.to_json())
    path, _ = publish(up.poc.folder / "changed.json", up.poc.folder / "plans")
    with running(up, path, up.poc.folder / "changed") as folder:
        up.until(lambda: (read_status(folder) or {}).get("state") == "failed", "the run to end")
    reason = (read_status(folder) or {})["reason"]
    assert reason.count("refused: plan_not_accepted") == 2, reason
    for config in up.poc.site_yamls.values():
        text = site_command("journal", "show", config=config).stdout
        assert changed.sha256[:12] not in text
        assert "Opened" not in text
    book.note(
        "the plan is changed after the sites approved it",
        "every site answers `plan_not_accepted` and reads no scan",
        "nothing",
    )


def test_another_account_of_the_machine(up: Consortium, book: Book) -> None:
    """The plan that was approved runs; while a hospital is at work, another account tries what it can."""
    site, config = next(iter(up.poc.site_yamls)), up.poc.config
    up.script(site, {1: {"do": "hold", "at_step": 1}})
    with running(up, up.poc.plan_path, up.poc.run_folder) as folder:
        up.until(lambda: up.held(site) is not None, "a hospital at work")
        before = Control(config).runs()
        held = up.held(site)
        assert held is not None
        asked = Path(f"/proc/{held[1]}/fd")
        (token,) = [one.read_text() for one in asked.iterdir() if "memfd:token" in str(one.readlink())]
        centre = attack("control", f"127.0.0.1:{config.port}", str(config.state_dir / "superlink.sock"))
        state = up.config(site).state_dir / "processes"
        hospital = attack("runtime", f"127.0.0.1:{config.port}", str(state / "supernode.sock"), token)
        assert {words for way, words in centre.items() if "port" in way} == {"status 403"}
        assert all("Permission denied" in words for way, words in centre.items() if "socket" in way)
        assert token not in hospital["tokens seen"].split()
        assert "Permission denied" in hospital["question by socket"]
        assert Control(config).runs() == before
        supervisor = read_state(state)
        assert supervisor is not None and listening(family(supervisor["pid"])) == set()
        up.let_go(site)
        up.until(lambda: (read_status(folder) or {}).get("state") == "complete", "the end")
    book.note(
        "another account of the machine submits, lists and stops runs, and takes a hospital's question with "
        "its token",
        "the centre's port answers 403, sockets are refused by the kernel, no token is in the process list, "
        "a hospital listens on no port; the run goes on",
        "nothing",
    )


@contextmanager
def running(up: Consortium, plan: Path, folder: Path) -> Iterator[Path]:
    """`meduet-server run` as one more process; the run's folder."""
    arguments = ["run", str(plan), "--folder", str(folder), "--config", str(up.poc.server_yaml)]
    process = subprocess.Popen(
        [sys.executable, "-m", "server.cli", *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        preexec_fn=die_with_parent(),
    )
    try:
        yield folder
    finally:
        process.terminate()
        process.wait(30)
