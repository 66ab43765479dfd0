import io
from pathlib import Path

import pytest
from rich.console import Console

from client.cli import main
from privacy.accounting import Mechanism
from privacy.ledger import Ledger, Place
from privacy.promise import Promise

NOISE = Mechanism(noise_multiplier=1.3907)
CODE = Promise(kind="style_code", bound=2.0, unit="patient", enforcement="check", mechanism=NOISE, delta=1e-5)


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "site.yaml"
    path.write_text("name: north\ndata_root: data\nstate_dir: state\nepsilon_ceiling: 5.0\n")
    ledger = Ledger(tmp_path / "state" / "ledger.jsonl")
    for plan, left in (("a", True), ("b", False)):
        reservation = ledger.reserve(
            Place(plan_sha256=plan * 64, kind="style_code", round=0), "c5" * 32, CODE
        )
        if left:
            ledger.settle(reservation, 1.0, "aa")
    return path


def said(*arguments: str) -> tuple[int, str]:
    stream = io.StringIO()
    status = main(["ledger", *arguments], Console(file=stream, width=300))
    return status, stream.getvalue()


def test_show_says_epsilon_as_an_interval_and_what_is_open_and_close_takes_it_out(config: Path) -> None:
    status, text = said("show", "--config", str(config))
    assert status == 0 and "from 2 releases with noise and 0 without; ceiling 5" in text
    assert "open 2: style_code of round 0 of plan bbbbbbbbbbbb" in text
    status, text = said("close", "2", "--reason", "nothing left", "--config", str(config))
    assert status == 0 and "epsilon 2.999 to 3.000 (delta 1e-05" in text and "open" not in text


def test_what_left_is_not_closed(config: Path) -> None:
    status, text = said("close", "0", "--reason", "we regret it", "--config", str(config))
    assert status == 2 and "that of 0 left" in text
