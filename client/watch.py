"""What the page of a site shows: what left it and under which promise, what was charged, what runs here.

From the site's own books, read and never written; they stay here, and so does the page. Does not do: serve
(`federation/watching.py`), or connect to anybody.
"""

import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from client.books.books import APPROVALS, JOURNAL, LEDGER
from client.books.refusals import is_stopped, stopped_plans
from client.connection.keys import SiteKeys
from client.settings import SiteConfig, ceiling_of, processes_of
from federation.journal import read_journal
from federation.keys.certificates import utc_now
from federation.programs.processes import read_state
from federation.published_plan import plan_of
from federation.watching import Section, Series, Watched
from privacy.chain import Entry, read_chain
from privacy.ledger import Ceiling, Spent, open_of, spent_of

_SHOWN = 15


def watched(config: SiteConfig) -> Watched:
    """The site of `config` now. Raises `BrokenChain` for books that do not hold."""
    folder = config.state_dir
    journal = read_journal(folder / JOURNAL) if (folder / JOURNAL).is_file() else []
    ledger = read_chain(folder / LEDGER, "ledger") if (folder / LEDGER).is_file() else []
    agreed = read_chain(folder / APPROVALS, "approvals") if (folder / APPROVALS).is_file() else []
    left = [entry for entry in journal if "promise" in entry.record]
    refused = [entry for entry in journal if entry.record.get("kind") == "refusal"]
    state = read_state(processes_of(config))
    runs = {} if state is None else state["processes"]
    days = _certificate_days(config)
    ceiling = ceiling_of(config)
    spent = spent_of(ledger, ceiling.delta) if ledger else None
    running = any(one["state"] == "running" for one in runs.values())
    now = "connected processes run" if running else "nothing runs here now"
    last = f"; something last left {_when(left[-1])} UTC" if left else "; nothing has left"
    sections = [
        Section(
            "Plans",
            ("plan", "hash", "people here said", "questions", "last round", "releases", "last left"),
            _plans(config, journal),
            "Each has states and answers of its own; they share ledger, journal and machine.",
        ),
        Section(
            "What left this site",
            ("when (UTC)", "what", "plan", "round", "bytes", "promise"),
            [
                (_when(entry), entry.record.get("kind", ""), str(entry.record.get("plan", ""))[:12],
                 entry.record.get("round", ""), entry.record.get("bytes", ""), entry.record["promise"])
                for entry in reversed(left[-_SHOWN:])
            ],
        ),
        Section(
            "Refused",
            ("when (UTC)", "what", "plan", "round", "what left instead"),
            [
                (_when(entry), entry.record.get("of", ""), str(entry.record.get("plan", ""))[:12],
                 entry.record.get("round", ""), entry.record.get("told", ""))
                for entry in reversed(refused[-_SHOWN:])
            ],
        ),
        Section(
            "Ledger",
            ("with noise", "without", "epsilon of a patient", "ceiling", "reserved, not released"),
            [] if spent is None else
            [(spent.num_noised, spent.num_plain, spent.total, f"{ceiling.epsilon:g}", len(open_of(ledger)))],
            f"All together, add or remove one patient, at delta {ceiling.delta:g}; what is reserved counts.",
        ),
        Section(
            "Processes", ("process", "state", "restarts"),
            [(name, one["state"], one["restarts"]) for name, one in runs.items()],
        ),
        Section("Certificate", ("days left",), [] if days is None else [(f"{days:.0f}",)]),
    ]  # fmt: skip
    return Watched(
        f"Site {config.name}",
        now + last,
        sections,
        [
            *_of_releases(journal, left, refused),
            *_of_ledger(ledger, ceiling, spent),
            *_of_machine(config, state, runs, days),
            Series.by("kind", "meduet_approval_lines", "Approvals of plans and withdrawals",
                      _counted(agreed, "kind"), "counter"),
        ],
    )  # fmt: skip


def _of_releases(journal: Sequence[Entry], left: Sequence[Entry], refused: Sequence[Entry]) -> list[Series]:
    sizes, seconds = Counter[str](), dict[str, float]()
    for record in (entry.record for entry in left):
        kind = str(record.get("kind", ""))
        sizes[kind] += int(record.get("bytes", 0))
        seconds[kind] = seconds.get(kind, 0.0) + record.get("metrics", {}).get("seconds", 0.0)
    clipped = sum(bool(entry.record.get("clipped")) for entry in left)
    made = [
        Series.by("kind", "meduet_released", "Releases that left this site", _counted(left, "kind"),
                  "counter"),
        Series.by("kind", "meduet_released_bytes", "Bytes that left this site", sizes, "counter"),
        Series.by("kind", "meduet_released_seconds", "Of work, as the releases say", seconds, "counter"),
        Series.by("plan", "meduet_plan_released", "Releases under a plan, by its hash",
                  Counter(str(entry.record.get("plan", ""))[:12] for entry in left), "counter"),
        Series.of("meduet_released_clipped", "Releases that the gate scaled down", clipped, "counter"),
        Series.by("reason", "meduet_refusals", "Questions refused, by the word that left",
                  _counted(refused, "told"), "counter"),
        Series.of("meduet_stopped_plans", "Plans under which nothing is answered until somebody here looks",
                  len(stopped_plans(journal))),
        Series.of("meduet_journal_lines", "Lines of the journal", len(journal), "counter"),
    ]  # fmt: skip
    if left:
        made += [
            Series.of("meduet_last_release_age_seconds", "Since something left", _age(left[-1])),
            Series.of(
                "meduet_last_release_round", "Round of what left last", left[-1].record.get("round", 0)
            ),
        ]
    return made


def _of_ledger(ledger: Sequence[Entry], ceiling: Ceiling, spent: Spent | None) -> list[Series]:
    waiting = open_of(ledger)
    return [
        Series.by("event", "meduet_ledger_lines", "Lines of the ledger", _counted(ledger, "event"),
                  "counter"),
        Series.of("meduet_epsilon", "Of a patient, everything together", spent.total.upper if spent else 0.0),
        Series.of("meduet_epsilon_with_noise", "Of a patient, releases with noise alone",
                  spent.noised.upper if spent else 0.0),
        Series.of("meduet_epsilon_ceiling", "Of site.yaml", ceiling.epsilon),
        Series.of("meduet_delta", "At which epsilon is told", ceiling.delta),
        Series.by("noise", "meduet_charged", "Places in the ledger that count",
                  {"with": spent.num_noised, "without": spent.num_plain} if spent else {}),
        Series.of("meduet_reserved", "Places held whose answer has not left", len(waiting)),
        Series.of("meduet_reserved_age_seconds", "Of the oldest of them",
                  _age(waiting[0]) if waiting else 0.0),
    ]  # fmt: skip


def _plans(config: SiteConfig, journal: Sequence[Entry]) -> list[tuple[object, ...]]:
    """A row for each plan that was looked at here, or asked anything."""
    path, names, said = config.state_dir / APPROVALS, {}, dict[str, str]()
    for file in sorted((config.state_dir / "plans").glob("*.plan.json")):
        names[file.name.removesuffix(".plan.json")] = plan_of(file.read_text(encoding="utf-8")).name
    for entry in read_chain(path, "approvals") if path.is_file() else []:
        said[str(entry.record["plan"])] = str(entry.record["kind"])
    asked = [str(entry.record["plan"]) for entry in journal if entry.record.get("plan")]
    rows: list[tuple[object, ...]] = []
    for sha256 in dict.fromkeys([*names, *said, *asked]):
        left = [e for e in journal if "promise" in e.record and e.record.get("plan") == sha256]
        last = (left[-1].record.get("round", ""), len(left), left[-1].utc) if left else ("", 0, "")
        state = "stopped: meduet-site plan resume" if is_stopped(journal, sha256) else "answered"
        rows.append((names.get(sha256, ""), sha256[:12], said.get(sha256, "nothing"), state, *last))
    return rows


def _of_machine(
    config: SiteConfig,
    state: Mapping[str, Any] | None,
    runs: Mapping[str, Mapping[str, Any]],
    days: float | None,
) -> list[Series]:
    disk = shutil.disk_usage(config.state_dir)
    up = state is not None and state["pid"] is not None
    made = [
        Series.of("meduet_disk_free_bytes", "Of the site's state", disk.free),
        Series.of("meduet_disk_size_bytes", "Of the site's state", disk.total),
        Series.of("meduet_supervisor_up", "1 while `meduet-site start` runs", float(up)),
        Series.by("process", "meduet_process_up", "1 while it runs",
                  {name: float(one["state"] == "running") for name, one in runs.items()}),
        Series.by("process", "meduet_process_restarts", "Times that it was started again",
                  {name: one["restarts"] for name, one in runs.items()}, "counter"),
    ]  # fmt: skip
    if days is not None:
        made.append(Series.of("meduet_certificate_days", "Days until this site's certificate ends", days))
    return made


def _counted(entries: Sequence[Entry], name: str) -> Counter[str]:
    """How often each value of a field stands in these lines; lines without it are left out."""
    return Counter(str(entry.record[name]) for entry in entries if name in entry.record)


def _when(entry: Entry) -> str:
    return entry.utc[:19].replace("T", " ")


def _age(entry: Entry) -> float:
    """Seconds since a line was written."""
    return max(0.0, (datetime.now(UTC) - datetime.fromisoformat(entry.utc)).total_seconds())


def _certificate_days(config: SiteConfig) -> float | None:
    """None where the site has no keys, or keys that `check` has something to say about."""
    if config.keys_dir is None:
        return None
    now = utc_now()
    try:
        return (SiteKeys.open(config.keys_dir).check(now) - now).total_seconds() / 86400
    except ValueError:
        return None
