"""Only a bundle that is the installed code, byte for byte and alone, is what a site takes for code."""

import dataclasses
import hashlib
import io
import struct
import tracemalloc
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from flwr.cli.build import build_fab_from_disk
from flwr.supercore.fab import Fab
from flwr.supercore.run import Run
from hypothesis import given, settings
from hypothesis import strategies as st

from client.connection.arriving_bundle import (
    LARGEST,
    MANIFEST,
    SETTINGS,
    BundleRefused,
    InstalledCode,
    unpacked,
)
from federation.bundle import ROOT, running_bundle
from server.deployment.app_folder import write_app_folder

RUN = 7
Files = dict[str, bytes]


@pytest.fixture(scope="module")
def honest(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The application as Flower makes it of what the centre submits."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of what Flower's build uses
        return build_fab_from_disk(write_app_folder(tmp_path_factory.mktemp("app")))


@pytest.fixture(scope="module")
def installed() -> InstalledCode:
    return InstalledCode.read()


def packed(files: Files, how: int = zipfile.ZIP_DEFLATED) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as target:
        for name, content in files.items():
            target.writestr(zipfile.ZipInfo(name), content, how)
    return stream.getvalue()


def listed(files: Files) -> Files:
    """With a manifest that is right for the files, as an attacker would make it."""
    own = {name: content for name, content in files.items() if name != MANIFEST}
    lines = [f"{n},{hashlib.sha256(c).hexdigest()},{8 * len(c)}" for n, c in own.items()]
    return {**own, MANIFEST: "\n".join(lines).encode()}


def arrives(content: bytes, installed: InstalledCode, **run: Any) -> None:
    sha256 = hashlib.sha256(content).hexdigest()
    honest_run = {
        "fab_id": installed.name,
        "fab_version": installed.settings["project"]["version"],
        "fab_hash": sha256,
        "override_config": {"plan": "", "folder": ""},
    }
    asked = dataclasses.replace(Run.create_empty(RUN), **(honest_run | run))
    installed.check(asked, Fab(sha256, content, {}), RUN)


def test_the_application_that_the_centre_submits_is_the_installed_code(
    honest: bytes, installed: InstalledCode
) -> None:
    arrives(honest, installed)
    assert installed.bundle == running_bundle()


EVIL = b"import os\n"
BYTE = "client/app.py"
ATTACKS: dict[str, Callable[[Files], Files]] = {
    "a file beside the modules": lambda files: files | {"client/evil.py": EVIL},
    "a module that would shadow a library": lambda files: files | {"torch.py": EVIL},
    "a file that Python runs at start": lambda files: files | {"evil.pth": EVIL},
    "a file that pytest runs": lambda files: files | {"conftest.py": EVIL},
    "code compiled already": lambda files: files | {"client/__pycache__/app.cpython-311.pyc": EVIL},
    "one byte of a module": lambda files: files | {BYTE: files[BYTE][:-1] + b" "},
    "a module that is missing": lambda files: {n: c for n, c in files.items() if n != "privacy/ledger.py"},
    "a setting of conf": lambda files: files | {"conf/config.yaml": files["conf/config.yaml"] + b"\n"},
    "a path out of the folder": lambda files: files | {"../../evil.py": EVIL},
    "an absolute path": lambda files: files | {"/tmp/evil.py": EVIL},
    "a path that comes back": lambda files: files | {"client/../evil.py": EVIL},
    "the same file on another path": lambda files: files | {"client/./app.py": EVIL},
    "upper case": lambda files: files | {"Client/app.py": EVIL},
    "a backslash": lambda files: files | {"client\\app.py": EVIL},
    "a folder": lambda files: files | {"evil/": b""},
    "another entry point": lambda files: (
        files | {SETTINGS: files[SETTINGS].replace(b"client.app:app", b"client.site:open_site")}
    ),
    "another kind of component": lambda files: (
        files
        | {
            SETTINGS: files[SETTINGS].replace(
                b"[tool.flwr.app.components]", b'[tool.flwr.app.components]\nagentapp = "client.app:app"'
            )
        }
    ),
    "another setting of the application": lambda files: (
        files | {SETTINGS: files[SETTINGS].replace(b'plan = ""', b'plan = "x"')}
    ),
    "another name": lambda files: (
        files | {SETTINGS: files[SETTINGS].replace(b'name = "fedmeduet"', b'name = "x"')}
    ),
    "no settings": lambda files: {name: content for name, content in files.items() if name != SETTINGS},
    "settings that are no table": lambda files: files | {SETTINGS: b"tool = 1\n"},
    "settings without end": lambda files: files | {SETTINGS: b"a = " + b"[" * 60_000},
}


@pytest.mark.parametrize("what", ATTACKS)
def test_a_bundle_with_anything_else_in_it_is_refused(
    honest: bytes, installed: InstalledCode, what: str
) -> None:
    files = unpacked(honest)
    changed = ATTACKS[what](dict(files))
    assert changed != files
    with pytest.raises(BundleRefused):
        arrives(packed(listed(changed)), installed)
    arrives(packed(listed(files)), installed)  # the packing is not what was refused


def test_a_manifest_that_names_a_file_of_the_site_is_refused(honest: bytes, installed: InstalledCode) -> None:
    # Flower would compare a hash of the sender's choice with the file's, and say which it was
    files = unpacked(honest)
    files[MANIFEST] += b"\n../../../../etc/passwd," + b"0" * 64 + b",8"
    with pytest.raises(BundleRefused, match="to list the bundle's files"):
        arrives(packed(files), installed)


def test_a_name_that_is_there_twice_is_refused(honest: bytes) -> None:
    with pytest.warns(UserWarning, match="Duplicate name"):
        stream = io.BytesIO(honest)
        with zipfile.ZipFile(stream, "a") as target:
            target.writestr(zipfile.ZipInfo("client/app.py"), EVIL)
    with pytest.raises(BundleRefused, match="each file once"):
        unpacked(stream.getvalue())


def test_a_link_is_refused(honest: bytes) -> None:
    link = zipfile.ZipInfo("client/link.py")
    link.external_attr = 0o120777 << 16
    stream = io.BytesIO(honest)
    with zipfile.ZipFile(stream, "a") as target:
        target.writestr(link, b"/etc/passwd")
    with pytest.raises(BundleRefused, match="a link"):
        unpacked(stream.getvalue())


def test_a_name_that_is_cut_at_a_zero_byte_is_refused(honest: bytes) -> None:
    # Python cuts it, another program might not
    with pytest.raises(BundleRefused, match="written in two ways"):
        unpacked(honest.replace(b"client/app.py", b"client/ap\0.py"))


@pytest.mark.parametrize("said", [None, 1000], ids=["as it is", "said to be small"])
def test_a_bundle_that_would_fill_the_memory_is_refused_in_little(said: int | None) -> None:
    bomb = packed({"client/app.py": bytes(100_000_000)})
    assert len(bomb) < LARGEST
    if said is not None:
        for mark, at in ((b"PK\x01\x02", 24), (b"PK\x03\x04", 22)):  # both directories say so
            place = bomb.index(mark) + at
            bomb = bomb[:place] + struct.pack("<L", said) + bomb[place + 4 :]
    tracemalloc.start()
    try:
        with pytest.raises(BundleRefused):
            unpacked(bomb)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 20_000_000


def test_a_directory_of_very_many_files_is_refused_before_it_is_read() -> None:
    many = packed({f"{number:05d}": b"" for number in range(30_000)}, zipfile.ZIP_STORED)
    assert len(many) < LARGEST
    with pytest.raises(BundleRefused, match="files in a bundle"):
        unpacked(many)
    end = many.rindex(b"PK\x05\x06")
    few = many[: end + 8] + struct.pack("<2H", 3, 3) + many[end + 12 :]  # and lies about their number
    with pytest.raises(BundleRefused, match="files in a bundle"):
        unpacked(few)


def test_a_second_directory_that_python_would_prefer_is_refused(honest: bytes) -> None:
    end = honest.rindex(b"PK\x05\x06")
    locator = struct.pack("<4sLQL", b"PK\x06\x07", 0, 0, 1)
    with pytest.raises(BundleRefused, match="Zip64"):
        unpacked(honest[:end] + locator + honest[end:])


@pytest.mark.parametrize(
    "content", [b"", b"PK", b"PK\x05\x06", bytes(1000), bytes(LARGEST + 1)], ids=lambda c: f"{len(c)} bytes"
)
def test_what_is_no_bundle_is_refused_in_one_line(content: bytes) -> None:
    with pytest.raises(BundleRefused) as error:
        unpacked(content)
    assert "\n" not in str(error.value)


@given(st.data())
@settings(max_examples=300, deadline=None)
def test_a_damaged_bundle_is_refused_or_is_the_same_code(data: st.DataObject) -> None:
    small = packed({"client/app.py": b"x = 1\n" * 40, SETTINGS: b"a = 1\n", MANIFEST: b""})
    place = data.draw(st.integers(0, len(small) - 1))
    length = data.draw(st.integers(1, 8))
    changed = small[:place] + data.draw(st.binary(max_size=8)) + small[place + length :]
    try:
        files = unpacked(changed)
    except BundleRefused:
        return
    assert set(map(type, files.values())) <= {bytes}


OTHER_RUNS = {
    "number": {"run_id": RUN + 1},
    "application": {"fab_id": "fedmeduet/other"},
    "version that leads elsewhere": {"fab_version": "0.1.0.00000000/../../../../data/share"},
    "hash of another bundle": {"fab_hash": "0" * 64},
}


@pytest.mark.parametrize("what", OTHER_RUNS)
def test_a_bundle_serves_the_run_only_for_which_it_came(
    honest: bytes, installed: InstalledCode, what: str
) -> None:
    with pytest.raises(BundleRefused, match="Expected the run of this bundle"):
        arrives(honest, installed, **OTHER_RUNS[what])


@pytest.mark.parametrize("kind", ["flwr-agentapp", "flwr-clientapp", "flwr-model", "flwr-connector"])
def test_a_run_of_another_kind_of_application_is_refused(
    honest: bytes, installed: InstalledCode, kind: str
) -> None:
    with pytest.raises(BundleRefused, match="server application"):
        arrives(honest, installed, primary_task_type=kind)


def test_a_setting_that_the_application_does_not_have_is_refused(
    honest: bytes, installed: InstalledCode
) -> None:
    with pytest.raises(BundleRefused, match="Expected settings of"):
        arrives(honest, installed, override_config={"\x1b[2Jevil": "1"})


def test_the_hash_of_what_arrived_is_told_where_it_can_be_read(
    honest: bytes, installed: InstalledCode
) -> None:
    files = unpacked(honest) | {"client/evil\x1b[31m.py": EVIL}
    with pytest.raises(BundleRefused) as error:
        arrives(packed(listed(files)), installed)
    assert len(error.value.bundle) == 64 and error.value.bundle != installed.bundle
    assert "\x1b" not in str(error.value)


def test_a_local_change_of_the_installed_code_is_another_code(
    honest: bytes, installed: InstalledCode
) -> None:
    changed = dataclasses.replace(installed, files={**installed.files, BYTE: installed.files[BYTE] + b"#\n"})
    with pytest.raises(BundleRefused, match=f"Expected {BYTE} as it is installed"):
        arrives(honest, changed)


def test_a_site_that_is_not_installed_from_a_checkout_says_so(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="install from a checkout"):
        InstalledCode.read(tmp_path)
    assert (ROOT / SETTINGS).is_file()
