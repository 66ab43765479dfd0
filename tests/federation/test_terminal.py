"""Text from elsewhere cannot act on a terminal, and a command ends in one line and one status."""

import io
import logging
import sys
import unicodedata
from collections.abc import Callable

import pytest
from rich.console import Console
from rich.table import Table

from federation.terminal import (
    CommandFailed,
    Terminal,
    VisibleFormatter,
    cell,
    ended,
    failing,
    say,
    terminal,
    visible,
)

ATTACKS = [
    "\x1b[2J\x1b[H", "\x1b]0;title\x07", "\r", "\x08" * 9, "\x9b31m", "\u202egnp", "\u200b", "\u2066",
    "\ufeff", "\U000e0041", "\u2028", "\ud800", "\u115f", "\ufe0f",
]  # fmt: skip


def acts(text: str) -> bool:
    """Whether anything but printable characters and newlines is in `text`."""
    return any(unicodedata.category(c)[0] == "C" and c != "\n" for c in text)


@pytest.mark.parametrize("attack", ATTACKS, ids=ascii)
def test_what_acts_on_a_terminal_is_shown_as_its_code(attack: str) -> None:
    screen = io.StringIO()
    console = Terminal(file=screen, force_terminal=False, width=200)
    say(console, f"before{attack}after")
    table = Table("name")
    table.add_row(cell(f"row{attack}"))
    table.add_row(f"plain{attack}")
    console.print(table)
    said = screen.getvalue()
    assert not acts(said) and "before" in said and "after" in said and "\\" in said
    assert attack not in said


@pytest.mark.parametrize("attack", ["\x1b[2J", "\u202egnp"], ids=ascii)
def test_without_this_a_console_passes_it_on(attack: str) -> None:
    screen = io.StringIO()
    Console(file=screen, width=200).print(f"before{attack}after", markup=False)
    assert attack in screen.getvalue()


def test_a_line_stays_one_line_and_markup_means_itself() -> None:
    screen = io.StringIO()
    say(Terminal(file=screen, width=200), "one\ntwo [bold]three[/] :smile: [link=x]y[/link]")
    assert screen.getvalue() == "one\\x0atwo [bold]three[/] :smile: [link=x]y[/link]\n"


def test_ordinary_text_is_left_alone() -> None:
    for text in ("München, 3 µm … “ok” ✓", "日本語", "north: 1.5 %"):
        assert visible(text) == text


def test_a_log_line_cannot_act_either() -> None:
    record = logging.LogRecord("x", logging.WARNING, "x", 1, "site \x1b[31m%s", ("\u202e",), None)
    assert VisibleFormatter("%(message)s").format(record) == "site \\x1b[31m\\u202e"


def _failed() -> None:
    with failing(KeyError, UnicodeError):
        raise KeyError("gone")


def _raises(error: BaseException) -> Callable[[], None]:
    def command() -> None:
        raise error

    return command


@pytest.mark.parametrize(
    ("command", "status", "line"),
    [
        (lambda: None, 0, ""),
        (lambda: 1, 1, ""),
        (_failed, 1, "'gone'"),
        (_raises(CommandFailed("given up")), 1, "given up"),
        (_raises(ValueError("wrong\nplan \x1b[2J")), 2, "wrong plan \\x1b[2J"),
        (_raises(OSError(28, "No space left", "/x")), 1, "No space left (/x). Make room."),
        (_raises(KeyboardInterrupt()), 130, "stopped"),
    ],
)
def test_a_command_ends_in_one_line_and_one_status(
    command: Callable[[], int | None], status: int, line: str
) -> None:
    screen = io.StringIO()
    assert (
        ended(command, Terminal(file=screen, width=200), interrupted="stopped", advice="Make room.") == status
    )
    assert screen.getvalue() == (f"{line}\n" if line else "")


def test_what_is_a_fault_of_ours_is_not_made_a_line_of() -> None:
    with pytest.raises(AssertionError):
        ended(_raises(AssertionError()), Terminal(file=io.StringIO()), interrupted="")


def test_a_terminal_that_knows_few_letters_shows_the_code(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="latin-1"))
    say(terminal(), "Ready … now")
    sys.stdout.flush()
    assert raw.getvalue() == b"Ready \\u2026 now\n"
