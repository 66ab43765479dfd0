"""`meduet-server`: exit statuses are told, and are what happens."""

from pathlib import Path

import pytest

from server.cli import main
from server.deployment.submission import RunGivenUp


def test_help_says_what_the_exit_statuses_mean(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as done:
        main(["--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert done.value.code == 0
    assert "exit status: 0 done" in said and "1 a run was given up" in said and "130 interrupted" in said


def test_wrong_usage_and_a_folder_without_a_run_exit_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as done:
        main(["status"])
    assert done.value.code == 2
    capsys.readouterr()
    assert main(["status", str(tmp_path)]) == 2
    assert "Was it submitted yet?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("raised", "status"), [(RunGivenUp("gave up"), 1), (ValueError("wrong"), 2), (KeyboardInterrupt(), 130)]
)
def test_a_run_that_was_given_up_refused_or_interrupted_exits_so(
    raised: BaseException, status: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The statuses themselves; that a run is given up is tested in test_submission.py."""

    def see_through(self: object) -> None:
        raise raised

    monkeypatch.setattr("server.deployment.submission.Submission.__init__", lambda self, *settings: None)
    monkeypatch.setattr("server.deployment.submission.Submission.see_through", see_through)
    monkeypatch.setattr("server.deployment.control.Control.__init__", lambda self, config: None)
    monkeypatch.setattr("server.deployment.config.load_server_config", lambda path: None)
    assert main(["run", "plan.json", "--folder", "run", "--config", "server.yaml"]) == status
