"""A page to watch, and the same for programs: tables in HTML, numbers as OpenMetrics, on loopback only.

Read-only: two addresses answer GET and nothing else does. No script, nothing from elsewhere, so it shows
whatever is off; the page asks for itself again every few seconds. Other accounts of the machine can reach
loopback, so both addresses lie behind a word that only the folder's owner can read (`watch.token`); a page of
another origin that had its name point here is refused by the Host header.

What this file does not do: know what is shown (`server/deployment/watch.py`, `client/watch.py`).
Source: OpenMetrics 1.0 (https://prometheus.io/docs/specs/om/open_metrics_spec/).
"""

import hmac
import html
import math
import secrets
import socket
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING, Any

from federation.terminal import visible
from storage.files import write_whole

if TYPE_CHECKING:
    import uvicorn

REFRESH_S = 5
TOKEN = "watch.token"
OPENMETRICS = "application/openmetrics-text; version=1.0.0; charset=utf-8"
_LONG = 40
"""Characters of a cell that may be broken into lines."""
_HTML = "text/html; charset=utf-8"
_HEADERS = {
    "content-security-policy": "default-src 'none'; style-src 'unsafe-inline'; frame-ancestors 'none'",
    "referrer-policy": "no-referrer",
    "cache-control": "no-store",
    "x-content-type-options": "nosniff",
}
_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 1.2rem auto; max-width: 70rem; padding: 0 .8rem }
h1 { font-size: 1.3rem } h2 { font-size: 1rem; margin: 1.4rem 0 .3rem }
div.wide { overflow-x: auto } table { border-collapse: collapse }
th, td { text-align: left; padding: .2rem .9rem .2rem 0; border-bottom: 1px solid #8884; vertical-align: top }
td { font-variant-numeric: tabular-nums; white-space: nowrap }
td.text { white-space: normal; min-width: 17rem }
p.note { color: #666; margin: .3rem 0 } p.bad { color: #b00020 }
@media (max-width: 30rem) { body { font-size: 13px; margin: .8rem auto } th, td { padding-right: .5rem } }
@media (prefers-color-scheme: dark) { body { background: #16181b; color: #ddd } p.note { color: #999 } }
"""
Receive = Callable[[], Awaitable[Mapping[str, Any]]]
Send = Callable[[Mapping[str, Any]], Awaitable[None]]


@dataclass(frozen=True)
class Section:
    """One table of the page."""

    title: str
    columns: tuple[str, ...]
    rows: Sequence[Sequence[object]]
    note: str = ""


@dataclass(frozen=True)
class Series:
    """One family of numbers."""

    name: str
    """Begins with `meduet_`; a unit is its last part, `_total` is added to a counter's samples."""
    kind: str
    """`gauge` or `counter`."""
    about: str
    samples: Mapping[tuple[tuple[str, str], ...], float]
    """Value by labels, which are (name, value) pairs."""

    @staticmethod
    def of(name: str, about: str, value: float, kind: str = "gauge") -> "Series":
        """A single number."""
        return Series(name, kind, about, {(): value})

    @staticmethod
    def by(label: str, name: str, about: str, values: Mapping[str, float], kind: str = "gauge") -> "Series":
        """A number for each value of one label."""
        return Series(name, kind, about, {((label, key),): value for key, value in values.items()})


@dataclass(frozen=True)
class Watched:
    """What is to be seen now."""

    title: str
    state: str
    """One line: what is going on, what is waited for."""
    sections: Sequence[Section]
    series: Sequence[Series]


def page(seen: Watched) -> str:
    """The page: HTML without scripts."""
    parts = [f"<h1>{_text(seen.title)}</h1>", f"<p>{_text(seen.state)}</p>"]
    for section in seen.sections:
        head = "".join(f"<th>{_text(name)}</th>" for name in section.columns)
        rows = "".join("<tr>" + "".join(_cell(str(cell)) for cell in row) + "</tr>" for row in section.rows)
        parts.append(f"<h2>{_text(section.title)}</h2>")
        if section.rows:
            parts.append(f'<div class="wide"><table><tr>{head}</tr>{rows}</table></div>')
        if section.note or not section.rows:
            parts.append(f'<p class="note">{_text(section.note or "none")}</p>')
    return _document(seen.title, "".join(parts))


def openmetrics(series: Sequence[Series]) -> str:
    """The numbers, as a scraper reads them."""
    lines = []
    for one in series:
        lines += [f"# TYPE {one.name} {one.kind}", f"# HELP {one.name} {_escaped(one.about)}"]
        suffix = "_total" if one.kind == "counter" else ""
        for labels, value in one.samples.items():
            shown = ",".join(f'{name}="{_escaped(visible(text))}"' for name, text in labels)
            lines.append(f"{one.name}{suffix}{'{' + shown + '}' if shown else ''} {_number(value)}")
    return "\n".join([*lines, "# EOF"]) + "\n"


def token_of(folder: Path) -> str:
    """The word in the address: kept in `folder`, for its owner alone, made when there is none."""
    path = folder / TOKEN
    if not path.is_file():
        write_whole(path, secrets.token_urlsafe(18) + "\n")
    return path.read_text(encoding="ascii").strip()


def application(look: Callable[[], Watched], token: str) -> Callable[..., Awaitable[None]]:
    """An ASGI application: `/TOKEN/` and `/TOKEN/metrics`, GET only, for loopback's names only."""

    def answer(scope: Mapping[str, Any]) -> tuple[int, str, str]:
        host = dict(scope["headers"]).get(b"host", b"").decode("latin-1").rpartition(":")[0]
        if host not in ("127.0.0.1", "localhost"):
            return 421, _HTML, _document("421", "<p>Expected this page's own address.</p>")
        word, _, rest = scope["path"].removeprefix("/").partition("/")
        if not hmac.compare_digest(word.encode(), token.encode()) or rest not in ("", "metrics"):
            return 404, _HTML, _document("404", "<p>Nothing is here. The command said the address.</p>")
        if scope["method"] not in ("GET", "HEAD"):
            return 405, _HTML, _document("405", "<p>This page is only read.</p>")
        try:
            seen = look()
        except ValueError as error:  # nothing to see yet, or a book that does not hold together
            return 503, _HTML, _document("Not now", f'<p class="bad">{_text(error)}</p>')
        if rest:
            return 200, OPENMETRICS, openmetrics(seen.series)
        return 200, _HTML, page(seen)

    async def serve_one(scope: Mapping[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        status, kind, text = answer(scope)
        body = text.encode("utf-8")
        headers = {**_HEADERS, "content-type": kind, "content-length": str(len(body))}
        pairs = [(name.encode(), value.encode()) for name, value in headers.items()]
        await send({"type": "http.response.start", "status": status, "headers": pairs})
        await send({"type": "http.response.body", "body": b"" if scope["method"] == "HEAD" else body})

    return serve_one


def watch(look: Callable[[], Watched], folder: Path, port: int, say: Callable[[str], None]) -> None:
    """Serve until Ctrl-C or SIGTERM; `port` 0 takes any. Raises `ValueError` when the port is taken."""
    token = token_of(folder)
    with _listening(port) as (listening, address):
        say(f"{address}/{token}/  (numbers for Prometheus: {address}/{token}/metrics); until Ctrl-C")
        _server(look, token).run(sockets=[listening])


@contextmanager
def serving(look: Callable[[], Watched], folder: Path) -> Iterator[str]:
    """Serve on any free port, in a thread, as long as the block runs; gives the page's address.

    Raises `ValueError` where nothing can listen on loopback.
    """
    token = token_of(folder)
    with _listening(0) as (listening, address):
        server = _server(look, token)
        thread = Thread(target=server.run, kwargs={"sockets": [listening]}, name="page", daemon=True)
        thread.start()
        try:
            yield f"{address}/{token}/"
        finally:
            server.should_exit = True
            thread.join()


@contextmanager
def _listening(port: int) -> Iterator[tuple[socket.socket, str]]:
    """A socket that listens before its address is said: whoever opens it at once waits, not refused."""
    with socket.socket() as listening:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listening.bind(("127.0.0.1", port))
        except OSError as error:
            raise ValueError(f"Expected port {port} to be free on loopback; {error.strerror}.") from None
        listening.listen()
        yield listening, f"http://127.0.0.1:{listening.getsockname()[1]}"


def _server(look: Callable[[], Watched], token: str) -> "uvicorn.Server":
    import uvicorn

    config = uvicorn.Config(
        application(look, token), log_config=None, access_log=False, lifespan="off", ws="none",
        server_header=False, date_header=False, timeout_graceful_shutdown=1,
    )  # fmt: skip
    return uvicorn.Server(config)


def _document(title: str, body: str) -> str:
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta http-equiv="refresh" content="{REFRESH_S}"><title>{_text(title)}</title>'
        f"<style>{_STYLE}</style></head><body>{body}</body></html>\n"
    )


def _cell(text: str) -> str:
    kind = ' class="text"' if len(text) > _LONG else ""
    return f"<td{kind}>{_text(text)}</td>"


def _text(value: object) -> str:
    return html.escape(visible(str(value)))


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


def _number(value: float) -> str:
    if math.isinf(value):
        return "+Inf" if value > 0 else "-Inf"
    return repr(float(value))
