"""What a person reads in a terminal, and how a command ends: at a site, at the centre, in a simulation.

Text from elsewhere (plans, kits, certificates, journals, the names of files) is only ever text: what moves
the cursor, colours, hides, or turns a line's direction is shown as its code (\\x1b, \\u202e), a line stays
one line, and square brackets mean themselves. Every command ends through `ended`: one line, one exit status.

Does not do: log files, or what Flower prints.
"""

import logging
import sys
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import IO, Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.text import Text

from federation.extras import told

DONE, FAILED, NOT_POSSIBLE, INTERRUPTED = 0, 1, 2, 130
"""Exit statuses: as asked; tried and not done, a person has to look; refused, nothing was done; Ctrl-C."""

_UNSEEN = frozenset({"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"})  # Unicode's controls, formats, separators
_FILLERS = frozenset("\u034f\u115f\u1160\u17b4\u17b5\u180b\u180c\u180d\u180f\u2800\u3164\uffa0")
_SELECTORS = ((0xFE00, 0xFE0F), (0xE0100, 0xE01EF))  # of a glyph's variant: marks without a shape


class CommandFailed(Exception):
    """A command that was possible did not do what was asked; one line says why (exit status 1)."""


class Terminal(Console):
    """Rich's console, on which no text can act: whatever is printed, tables too, passes `visible`."""

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """Rich's own, with the text of each segment made visible."""
        return self._visible(super().render(renderable, options))

    @staticmethod
    def _visible(segments: Iterable[Segment]) -> Iterator[Segment]:
        for segment in segments:
            if segment.control:
                yield segment
            else:
                lines = segment.text.split("\n")
                yield Segment("\n".join(map(visible, lines)), segment.style)


def terminal(stderr: bool = False, file: IO[str] | None = None) -> Terminal:
    """The terminal of a command; a character that it cannot show is shown as its code."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    return Terminal(stderr=stderr, soft_wrap=True, file=file)


def visible(text: str) -> str:
    """`text` on one line, with everything that cannot be seen as its code."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(map(_visible, text))


def _visible(character: str) -> str:
    point = ord(character)
    hidden = (
        unicodedata.category(character) in _UNSEEN
        or character in _FILLERS
        or any(first <= point <= last for first, last in _SELECTORS)
    )
    if not hidden:
        return character
    return f"\\x{point:02x}" if point < 0x100 else f"\\u{point:04x}" if point < 0x10000 else f"\\U{point:08x}"


def say(console: Console, *lines: str) -> None:
    """Print lines as they are: no markup, no colour, each on a line of its own."""
    for line in lines:
        console.print(visible(line), markup=False, highlight=False, emoji=False, soft_wrap=True)


def typed(console: Console, question: str) -> str:
    """What a person types, unseen; raises `ValueError` where nobody sits at a terminal."""
    try:
        return console.input(question, password=True)
    except EOFError:
        raise ValueError("Expected a passphrase typed at a terminal; there is nobody to type it.") from None


def cell(text: object) -> Text:
    """`text` for a table: no markup."""
    return Text(visible(str(text)))


@contextmanager
def failing(*kinds: type[Exception], but: tuple[type[Exception], ...] = ()) -> Iterator[None]:
    """Errors of these kinds, but not of those, mean that the command failed (1), not that it was wrong."""
    try:
        yield
    except but:
        raise
    except kinds as error:
        raise CommandFailed(str(error)) from None


def ended(command: Callable[[], int | None], console: Console, *, interrupted: str, advice: str = "") -> int:
    """Run a command; returns its exit status, after one line for whatever it refuses.

    `CommandFailed` means 1, any other `ValueError` 2, as does a package of an extra that is not installed. A
    file that cannot be read or written means 1, followed by `advice`. `interrupted` is said after Ctrl-C.
    """
    try:
        return command() or DONE
    except CommandFailed as error:
        say(console, _line(error))
        return FAILED
    except ValueError as error:
        say(console, _line(error))
        return NOT_POSSIBLE
    except ModuleNotFoundError as error:
        if (line := told(error)) is None:
            raise
        say(console, line)
        return NOT_POSSIBLE
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        say(console, f"{error.strerror or _line(error)}{where}. {advice}".rstrip())
        return FAILED
    except KeyboardInterrupt:
        say(console, interrupted)
        return INTERRUPTED


class VisibleFormatter(logging.Formatter):
    """A log line without anything that acts on the terminal."""

    def format(self, record: logging.LogRecord) -> str:
        """The message, line by line visible: a traceback keeps its lines."""
        return "\n".join(map(visible, super().format(record).split("\n")))


def _line(error: Any) -> str:
    return " ".join(str(error).split()) or type(error).__name__
