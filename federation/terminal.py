"""Terminals that are not UTF-8: what they cannot show is replaced, and no output ends a command."""

import io
import sys


def tolerate_any_terminal() -> None:
    """Replace what standard output and error cannot encode, instead of failing on it."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
