"""Who must not take part does not: no registered key, another authority, an expired or revoked certificate, a
clock that is off, a plan that was changed after the hospital had agreed, code that no hospital installed, a
hospital that answers as another, another account of the machine."""

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
from federation.journal import read_journal
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
from federation.programs.processes import die_with_parent, read_state
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
        of_it = [line for line in text.splitlines() if changed.sha256[:12] in line]
        assert of_it and all("reason=plan_not_accepted" in line for line in of_it)  # a refusal is a release
        assert "Opened" not in text
    book.note(
        "the plan is changed after the sites approved it",
        "every site answers `plan_not_accepted` and reads no scan",
        "nothing",
    )


FOREIGN_SETTINGS = """\
[project]
name = "fedmeduet"
version = "0.1.0"
description = "one of two files"
license = "Apache-2.0"
dependencies = []
[tool.flwr.app]
publisher = "fedmeduet"
[tool.flwr.app.components]
serverapp = "evil:server"
clientapp = "evil:client"
[tool.flwr.app.config]
loot = ""
"""
FOREIGN_CODE = """\
import json, pathlib, time
import yaml
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp

client = ClientApp()
server = ServerApp()

@client.query("survey")
def steal(message, context):
    path = pathlib.Path(context.node_config["site-config"])
    site = yaml.safe_load(path.read_text())
    key = (path.parent / site["keys_dir"] / "site.key").read_bytes()
    root = pathlib.Path(site["data_root"])
    root = root if root.is_dir() else root.parent
    scan = next(one for one in sorted(root.rglob("*.nii.gz"))).read_bytes()
    loot = ConfigRecord({"kind": "loot", "key": key, "scan": scan[:100]})
    pathlib.Path(context.run_config["loot"], site["name"]).write_bytes(key)
    return Message(RecordDict({"head": loot}), reply_to=message)

@server.main()
def main(grid, context):
    while len(nodes := list(grid.get_node_ids())) < 2:
        time.sleep(1)
    asked = [Message(RecordDict(), node, "query.survey", ttl=150.0) for node in nodes]
    answers = []
    for reply in grid.send_and_receive(asked, timeout=150.0):
        head = None if reply.has_error() else reply.content["head"]
        answers.append(["error"] if head is None else [head["kind"], str(head.get("reason", ""))])
    pathlib.Path(context.run_config["loot"], "answers.json").write_text(json.dumps(answers))
"""


def test_code_that_no_hospital_installed(up: Consortium, tmp_path: Path, book: Book) -> None:
    app, loot = tmp_path / "foreign", tmp_path / "loot"
    app.mkdir()
    loot.mkdir()
    (app / "pyproject.toml").write_text(FOREIGN_SETTINGS)
    (app / "evil.py").write_text(FOREIGN_CODE)
    books = {path: path.read_bytes() for path in state_files(up, "ledger.jsonl")}
    run = Control(up.poc.config).start(app, {"loot": str(loot)})
    up.until((loot / "answers.json").is_file, "the foreign application's end")
    answers = json.loads((loot / "answers.json").read_text())
    assert answers == [["refusal", "bundle_not_approved"]] * 2
    assert [path.name for path in loot.iterdir()] == ["answers.json"]
    for site, path in up.poc.site_yamls.items():
        lines = [entry.record for entry in read_journal(up.config(site).state_dir / "journal.jsonl")]
        refused = [line for line in lines if line["kind"] == "refusal" and line.get("run") == run]
        assert [line["reason"] for line in refused] == ["bundle_not_approved"]
        shown = site_command("journal", "show", config=path).stdout
        assert "bundle_not_approved" in shown
        assert not list((up.config(site).state_dir / "processes").rglob("evil.py"))
    assert {path: path.read_bytes() for path in state_files(up, "ledger.jsonl")} == books
    book.note(
        "an application of two files that opens the site's key and a scan is submitted to SuperLink",
        "refused where it arrives, in installed code: `bundle_not_approved`, a line in each site's journal; "
        "nothing is unpacked",
        "nothing",
    )


def state_files(up: Consortium, name: str) -> list[Path]:
    """This file of each hospital's state, where it is there."""
    found = [up.config(site).state_dir / name for site in up.poc.site_yamls]
    return [path for path in found if path.is_file()]


def test_a_hospital_that_answers_as_another(up: Consortium, book: Book) -> None:
    """It is registered, its certificate is valid, and it is in the plan; the other one is not there."""
    published = PublishedPlan.from_json(up.poc.plan_path.read_text()).plan
    paths = {name: member(up, name) for name in ("absent", "liar")}
    settings = dataclasses.replace(published.aggregation, quorum=0.5, deadline_s=90.0)
    plan = dataclasses.replace(published, sites=tuple(paths), aggregation=settings)
    (up.poc.folder / "two.json").write_text(plan.to_json())
    path, _ = publish(up.poc.folder / "two.json", up.poc.folder / "plans")
    config = paths["liar"]
    config.write_text(yaml.safe_dump(yaml.safe_load(config.read_text()) | {"plan_approval": "implied"}))
    sabotage = up.poc.folder / "sabotage" / "liar"
    sabotage.mkdir(parents=True)
    (sabotage / "name").write_text("absent")
    spoilt = {"PYTHONPATH": os.pathsep.join([str(SABOTEUR), str(ROOT)]), "MEDUET_SABOTAGE": str(sabotage)}
    folder = up.poc.folder / "named"
    with beside(config, spoilt), running(up, path, folder):
        up.until(lambda: online(up, "liar"), "the site to be let in")
        up.until(
            lambda: (read_status(folder) or {}).get("state") in ("failed", "refused", "complete"),
            "the run to end",
        )
        status = read_status(folder) or {}
    assert status["state"] == "failed", status
    assert "Expected a reply of 'liar', as this node is registered; it says 'absent'" in status["reason"]
    assert not [entry for entry in read_journal(folder / "journal.jsonl") if "site" in entry.record]
    book.note(
        "a hospital answers as another one",
        "put aside: its node is registered with its key, and that is who it is",
        "that site's share",
    )


def test_another_account_of_the_machine(up: Consortium, book: Book) -> None:
    """The plan that was approved runs; while a hospital is at work, another account tries what it can."""
    site, config = next(iter(up.poc.site_yamls)), up.poc.config
    up.script(site, {"1": {"do": "hold", "at_step": 1}})
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
