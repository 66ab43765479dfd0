"""SuperNode with the check around its fetch: what is refused is not kept, so nothing can run it."""

import hashlib
import io
import json
import warnings
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.cli.build import build_fab_from_disk
from flwr.common.config import get_project_dir
from flwr.supercore.fab import Fab
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree
from flwr.supercore.object_store import ObjectStoreFactory
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity
from flwr.supernode import start_client_internal
from flwr.supernode.nodestate import NodeState, NodeStateFactory

from client.connection.arriving_bundle import InstalledCode, unpacked
from client.connection.checked_fetch import checked
from federation.bundle import running_bundle
from federation.journal import Journal
from federation.wire.messages import Refusal, RefusalKind
from server.deployment.app_folder import write_app_folder

NODE = 11
flowers_own = start_client_internal._pull_and_store_message

FOREIGN = {
    "pyproject.toml": b"""
[project]
name = "fedmeduet"
version = "0.1.0"
[tool.flwr.app]
publisher = "fedmeduet"
[tool.flwr.app.components]
serverapp = "evil:server"
clientapp = "evil:client"
""",
    "evil.py": b"print('the key, and a scan')\n",
}


def fab_of(files: dict[str, bytes]) -> bytes:
    lines = [f"{n},{hashlib.sha256(c).hexdigest()},{8 * len(c)}" for n, c in files.items()]
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as target:
        for name, content in (files | {".info/CONTENT": "\n".join(lines).encode()}).items():
            target.writestr(zipfile.ZipInfo(name), content)
    return stream.getvalue()


@pytest.fixture(scope="module")
def honest(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of what Flower's build uses
        return build_fab_from_disk(write_app_folder(tmp_path_factory.mktemp("app")))


@dataclass
class Centre:
    """What a centre sends: a message for each run, the run, its code."""

    bundles: dict[int, bytes]
    claims: dict[int, dict[str, Any]] = field(default_factory=dict)
    waiting: list[int] = field(default_factory=list)
    contents: dict[str, bytes] = field(default_factory=dict)

    def receive(self) -> Any:
        if not self.waiting:
            return None
        message = question(self.waiting.pop(0))
        self.contents |= {name: one.deflate() for name, one in get_all_nested_objects(message).items()}
        return message, get_object_tree(message)

    def get_run(self, run_id: int) -> Run:
        own = {
            "fab_id": "fedmeduet/fedmeduet",
            "fab_version": "0.1.0",
            "fab_hash": hashlib.sha256(self.bundles[run_id]).hexdigest(),
        }
        return replace(Run.create_empty(run_id), **(own | self.claims.get(run_id, {})))

    def get_fab(self, fab_hash: str, run_id: int) -> Fab:
        content = self.bundles[run_id]
        return Fab(hashlib.sha256(content).hexdigest(), content, {})


def question(run_id: int) -> Message:
    with pytest.MonkeyPatch.context() as centre:  # only there: SuperNode's process is no task of Flower's
        for name, value in (("_run_id", run_id), ("_node_id", 1), ("_task_id", 1)):
            centre.setattr(TaskIdentity, name, value)
        message = Message(RecordDict({"head": ConfigRecord({"kind": "survey"})}), NODE, "query.survey")
    message.metadata.__dict__["_message_id"] = message.object_id
    return message


@dataclass
class SuperNode:
    """Flower's state of a SuperNode, which one turn of its loop fills."""

    centre: Centre
    pull: Callable[..., int | None]
    state: NodeState = field(init=False)

    def __post_init__(self) -> None:
        self._factory = NodeStateFactory(ObjectStoreFactory())
        self.state = self._factory.state()
        self.state.set_node_id(NODE)

    def turn(self, run_id: int) -> list[Message]:
        """One message of a run; the answers that SuperNode would send at once."""
        self.centre.waiting.append(run_id)
        pulled = self.pull(
            state=self.state,
            object_store=self._factory.objectstore_factory.store(),
            node_config={},
            receive=self.centre.receive,
            get_run=self.centre.get_run,
            get_fab=self.centre.get_fab,
            pull_object=lambda run, name: self.centre.contents[name],
            confirm_message_received=lambda run, message: None,
            trusted_entities=None,
        )
        assert pulled == run_id
        return list(self.state.get_messages_legacy(is_reply=True))

    def would_run(self) -> set[int]:
        """Runs for which a process would be started."""
        return {task.run_id for task in self.state.get_tasks()}


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FLWR_HOME", str(tmp_path / "flower"))
    return tmp_path


def journaled(home: Path) -> list[dict[str, Any]]:
    return [entry.record for entry in Journal(home / "journal.jsonl").entries()]


def test_a_foreign_application_is_kept_by_flower_and_refused_here(home: Path) -> None:
    foreign = fab_of(FOREIGN)
    unguarded = SuperNode(Centre({1: foreign}), flowers_own)
    assert unguarded.turn(1) == [] and unguarded.would_run() == {1}  # the attack, without the defence

    node = SuperNode(Centre({1: foreign}), checked(flowers_own, home))
    (reply,) = node.turn(1)
    assert Refusal.from_record(reply.content).kind is RefusalKind.BUNDLE_NOT_APPROVED
    assert (reply.metadata.dst_node_id, reply.metadata.run_id) == (1, 1)
    assert node.would_run() == set() and node.state.get_run(1) is None
    assert node.state.get_fab(hashlib.sha256(foreign).hexdigest()) is None
    (line,) = journaled(home)
    assert line["kind"] == "refusal" and line["reason"] == "bundle_not_approved" and line["run"] == "1"
    assert line["installed"] == running_bundle() != line["bundle"]
    assert [path.name for path in home.rglob("*") if path.is_file()] == ["journal.jsonl"]  # nothing charged


def test_after_a_refusal_honest_runs_go_on(home: Path, honest: bytes) -> None:
    node = SuperNode(Centre({1: fab_of(FOREIGN), 2: honest}), checked(flowers_own, home))
    node.turn(1)
    assert node.turn(2) == [] and node.would_run() == {2}
    assert len(node.turn(1)) == 1 and node.would_run() == {2}
    assert [line["run"] for line in journaled(home)] == ["1"]  # asked again, it says nothing new


def test_honest_code_of_one_run_lends_nothing_to_another(home: Path, honest: bytes) -> None:
    changed = unpacked(honest) | {"client/evil.py": b""}
    changed.pop(".info/CONTENT")
    centre = Centre({1: honest, 2: fab_of(changed), 3: honest})
    centre.claims[2] = {"fab_hash": hashlib.sha256(honest).hexdigest()}  # says it is the honest one
    centre.claims[3] = {"fab_version": "0.1.0.00000000/../../../../share"}  # leads to another folder
    node = SuperNode(centre, checked(flowers_own, home))
    assert node.turn(1) == []
    assert len(node.turn(2)) == len(node.turn(3)) == 1
    assert node.would_run() == {1}


def test_code_that_lies_where_a_bundle_is_unpacked_is_not_what_runs(home: Path, honest: bytes) -> None:
    sha256 = hashlib.sha256(honest).hexdigest()
    node = SuperNode(Centre({1: honest}), checked(flowers_own, home))
    unpacked_at = get_project_dir("fedmeduet/fedmeduet", "0.1.0", sha256)
    (unpacked_at / "client").mkdir(parents=True)
    (unpacked_at / "client" / "app.py").write_text("evil")
    node.turn(1)
    assert not unpacked_at.exists()  # a process unpacks only what is not there


def test_what_is_no_bundle_at_all_is_refused_and_the_site_stays_up(home: Path) -> None:
    node = SuperNode(Centre({1: b"PK no zip"}), checked(flowers_own, home))
    assert len(node.turn(1)) == 1
    assert journaled(home)[0]["bundle"] == "unreadable"


def test_a_setting_that_the_application_has_not_is_refused_and_ends_nothing(
    home: Path, honest: bytes
) -> None:
    centre = Centre({1: honest}, {1: {"override_config": {"other": "x"}}})
    assert len(SuperNode(centre, checked(flowers_own, home)).turn(1)) == 1
    with pytest.raises(ValueError, match="not present"):  # Flower's loop would end
        SuperNode(Centre({1: honest}, centre.claims), flowers_own).turn(1)


def test_the_installed_code_is_read_when_it_is_asked_for(home: Path, honest: bytes) -> None:
    assert json.dumps(InstalledCode.read().settings["tool"]["flwr"]["app"]["components"], sort_keys=True) == (
        '{"clientapp": "client.app:app", "serverapp": "server.server_app:app"}'
    )
