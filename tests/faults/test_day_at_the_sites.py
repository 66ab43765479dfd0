"""A day on which a site's processes die, its network is cut, and another process uses its key: no completed
round is lost, and the final weights are those of a day on which nothing happened.
"""

import shutil
import time
from collections.abc import Iterator

import pytest
import yaml

from privacy.chain import read_chain
from tests.faults.consortium import beside, kill, site_command
from tests.faults.day import Day
from tests.faults.day import day as one_day
from tests.faults.page import Book
from tests.local_account import family

pytestmark = pytest.mark.faults


@pytest.fixture(scope="module")
def day(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Day]:
    with one_day(tmp_path_factory.mktemp("sites"), rounds=7) as one:
        yield one


def test_nothing_happens(day: Day, book: Book) -> None:
    day.nothing_happens(book)


def test_the_process_that_answers_for_a_site_is_killed(day: Day, book: Book) -> None:
    held = day.run.held(day.site)
    assert held is not None
    resumed = day.run.status()["resumed"]
    kill(held[1])  # as the kernel does when memory is short
    seconds = day.next_round()
    assert day.run.status()["resumed"] == resumed  # within the round
    book.note(
        "the process at work for a site, `kill -9` (or the kernel's, out of memory)",
        "Flower notices after up to 60 s; the site is asked again in the same round and continues after its "
        "last step",
        "nothing; same bits",
        seconds - day.round_s,
    )


def test_a_site_is_killed_in_the_middle_of_its_round(day: Day, book: Book) -> None:
    pid = day.run.supervisor.pid(day.site)
    assert pid is not None
    resumed = day.run.status()["resumed"]
    kill(*family(pid))
    seconds = day.next_round()
    assert day.run.status()["resumed"] == resumed
    assert "goes on from there" in day.run.site_log(day.site)
    book.note(
        "all of a site, `kill -9` in the middle of its round",
        "its supervisor starts again; the centre lets it in when Flower's heartbeat has run out; it is "
        "asked again in the same round and continues after its last step",
        "nothing; same bits",
        seconds - day.round_s,
    )


def test_the_network_of_a_site_is_cut_for_30_seconds(day: Day, book: Book) -> None:
    seconds = network_cut(day, 30.0)
    book.note(
        "network of a site cut for 30 s (packets dropped)",
        "the site tries on and hands in its answer",
        "nothing; same bits",
        seconds - day.round_s,
    )


def test_the_network_of_a_site_is_cut_for_120_seconds(day: Day, book: Book) -> None:
    seconds = network_cut(day, 120.0)
    book.note(
        "network of a site cut for 120 s",
        "Flower takes the site for lost; it is asked again in the same round when it is back",
        "nothing; same bits",
        seconds - day.round_s,
    )


def network_cut(day: Day, seconds: float) -> float:
    """Cut the wire of the held hospital, which works on; seconds until the round was on disk."""
    resumed = day.run.status()["resumed"]
    begun = time.monotonic()
    day.run.wires[day.site].cut()
    day.run.let_go(day.site)
    day.run.until(lambda: time.monotonic() - begun >= seconds, "the cut", seconds + 60)
    assert len(day.run.rounds_done()) == day.round - 1
    day.run.wires[day.site].mend()
    waited = time.monotonic() - begun
    waited += day.next_round()
    assert day.run.status()["resumed"] == resumed
    return waited


def test_a_second_process_with_a_sites_key_is_refused(day: Day, book: Book) -> None:
    config = day.run.poc.site_yamls[day.other]
    twin = config.parent / "twin"
    twin.mkdir()
    settings = yaml.safe_load(config.read_text()) | {
        "state_dir": str(twin / "state"),
    }
    (twin / "site.yaml").write_text(yaml.safe_dump(settings))
    with beside(twin / "site.yaml") as said:
        day.run.until(lambda: "Exit Code: 305" in said(), "a refusal of the twin")
    resumed = day.run.status()["resumed"]
    day.next_round()
    assert day.run.status()["resumed"] == resumed
    book.note(
        "a second process with a site's key", "refused (305), tried on; the first is not disturbed", "nothing"
    )


def test_the_day_ends_in_the_bits_of_a_day_on_which_nothing_happened(day: Day) -> None:
    day.ends_as_if_nothing_had_happened()


def test_a_site_that_lost_its_state_is_in_the_same_round(
    tmp_path_factory: pytest.TempPathFactory, book: Book
) -> None:
    with one_day(tmp_path_factory.mktemp("lost"), rounds=4) as day:
        day.next_round()
        pid = day.run.supervisor.pid(day.site)
        assert pid is not None
        kill(*family(pid))
        shutil.rmtree(day.run.config(day.site).state_dir / "state")
        resumed = day.run.status()["resumed"]
        seconds = day.next_round()
        assert day.run.status()["resumed"] == resumed  # within the round
        again = the_other_loses_what_it_answered(day)
        for config in day.run.poc.site_yamls.values():
            verified = site_command("journal", "verify", config=config)
            assert verified.returncode == 0, verified.stdout
        book.note(
            "a site's `state/` removed while it was down, in a run that waits for all",
            "the site says so; the centre asks again in the same round, with the start",
            "the style branch and AdamW's moments of that site: it begins them anew",
            seconds,
        )
        book.note(
            "a site's `state/` and `answers/` removed after it had answered, and the server application, "
            "`kill -9`",
            "the site is asked that round again, with the start, and answers the same question anew, once",
            "the same, and the answer that had left",
            again,
        )


def the_other_loses_what_it_answered(day: Day) -> float:
    """The hospital that is not held has answered the round; the centre forgets that, and the hospital loses
    everything but its books. Seconds until the round was on disk."""
    state = day.run.config(day.other).state_dir
    answer = f"answers/*/round-{day.round:04d}.safetensors"
    day.run.until(lambda: any(state.glob(answer)), "an answer of the other hospital")
    kill(day.run.status()["pid"])
    shutil.rmtree(state / "state")
    shutil.rmtree(state / "answers")
    seconds = day.next_round()
    ledger = [entry.record["event"] for entry in read_chain(state / "ledger.jsonl", "ledger")]
    assert ledger.count("anew") == 1 and any(state.glob(answer))
    return seconds
