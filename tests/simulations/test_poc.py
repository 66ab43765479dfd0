"""`meduet-server poc` says in one line what it cannot do; tests/faults run the whole of it."""

import socket
import sys
from pathlib import Path

import pytest

from server.deployment.submission import RunGivenUp
from simulations import poc


def typed(monkeypatch: pytest.MonkeyPatch, sites: str, folder: Path) -> int:
    monkeypatch.setattr(sys, "argv", ["poc", sites, str(folder)])
    return poc.main()


def test_a_folder_in_use_a_work_tree_or_a_lone_site_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "server.yaml").write_text("")
    (tmp_path / "tree" / ".git").mkdir(parents=True)
    assert typed(monkeypatch, "3", tmp_path / "used") == 2
    assert "name another (--folder)" in capsys.readouterr().out
    assert typed(monkeypatch, "3", tmp_path / "tree" / "poc") == 2
    assert "git work tree" in capsys.readouterr().out
    assert typed(monkeypatch, "1", tmp_path / "new") == 2
    assert "at least 2 sites" in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tree", "used"]


def test_it_says_where_how_long_and_where_to_look(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop(*settings: object) -> None:
        raise RunGivenUp("The run ended.")

    monkeypatch.setattr(poc, "provision", stop)
    assert typed(monkeypatch, "2", tmp_path / "new") == 1
    said = capsys.readouterr().out
    assert f"everything goes to {tmp_path / 'new'}; about two minutes" in said
    assert f"The run ended. Logs: {tmp_path / 'new'}/processes" in said
    monkeypatch.setattr(poc, "run_poc", lambda num_sites, folder, say: folder / "run")
    assert typed(monkeypatch, "2", tmp_path / "new") == 0
    said = capsys.readouterr().out
    assert f"meduet-server status {tmp_path / 'new' / 'run'}" in said and "remove" in said


def test_a_reserved_port_is_nobody_elses_until_the_server_it_is_for_listens_on_it() -> None:
    ports = poc.reserve_ports(20)
    assert len({*ports, *poc.reserve_ports(20)}) == 40
    with socket.socket() as other, pytest.raises(OSError, match="in use"):
        other.bind(("127.0.0.1", ports[0]))
    for _ in range(2):  # and again, when it was restarted
        with (
            socket.create_server(("127.0.0.1", ports[0])) as server,
            socket.create_connection(("127.0.0.1", ports[0])),
        ):
            server.accept()[0].close()
