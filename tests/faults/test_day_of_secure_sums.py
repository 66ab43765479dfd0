"""A day of secure sums over TLS on which a site dies in each of the four stages, the centre in each, and too
many sites lose their secrets: a sum is that of the survivors, or the journal says which round was burnt, and
the final weights are those of a run in which the lost sites kept silent.
"""

import dataclasses
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest

import client.app
from client.exchanges.exchange import AskRefused
from client.secrets.sum_secrets import FOLDER
from federation.exchanges.secure_sum import SUM_KEYS, SUM_MASKED, SUM_SHARES, SUM_UNMASK
from federation.wire.wire import RefusalKind
from tests.faults.consortium import (
    Consortium,
    Weights,
    command,
    consortium,
    kill,
    same_bits,
    site_command,
    undisturbed,
)
from tests.faults.page import Book

pytestmark = pytest.mark.faults

STAGES = {
    SUM_KEYS.route: ("sum_keys", "after"),
    SUM_SHARES.route: ("sum_shares", "after"),
    SUM_MASKED.route: ("round", "training"),
    SUM_UNMASK.route: ("sum_unmask", "after"),
}
"""By route: the kind of the answer, and where in it a site is held: it has answered, but said nothing yet, or
it is in the middle of its training."""
QUIET, KILLED, CENTRE, BURNT, LAST = 1, (2, 3, 4, 5), 6, 7, 8
"""What happens in which round."""
PLAN = (
    "hospitals.num_hospitals=4",
    f"training.rounds={LAST}",
    "aggregation.deadline_s=300",
    "aggregation.secure_sum=true",
    "aggregation.norm_tolerance=0",
    "aggregation.quorum=0.75",
)


@dataclass
class SumDay:
    """The run; its sites in the order of the plan, the last of which is the one that dies."""

    run: Consortium
    expected: Weights
    sites: tuple[str, ...]
    rest_s: dict[str, float] = field(default_factory=dict)
    """What is left of an undisturbed round from each stage."""

    def held(self, site: str, round_number: int, route: str) -> int:
        """Wait until a site is held there; its process."""
        place = f"{round_number}.{route}"
        self.run.until(lambda: (self.run.held(site) or ("", 0))[0] == place, f"{site} at {place}")
        held = self.run.held(site)
        assert held is not None
        return held[1]

    def others_answered(self, sites: tuple[str, ...], round_number: int, kind: str) -> None:
        """Wait until these sites have answered."""
        answer = f"answers/*/{kind}-{round_number:04d}*.safetensors"
        for site in sites:
            state = self.run.config(site).state_dir
            self.run.until(lambda state=state: any(state.glob(answer)), f"{site}'s answer {answer}")

    def resumed(self, times: int) -> None:
        """Wait until the run has been submitted again so often, and is at work."""
        self.run.until(lambda: self.run.status()["resumed"] == times, "the next application")

    def ended(self, round_number: int) -> dict[str, Any]:
        """Wait for the end of a round; its line in the journal."""
        done = list(range(1, round_number + 1))
        self.run.until(lambda: self.run.rounds_done() == done, f"the end of round {round_number}")
        return self.run.journal("round")[-1]


@pytest.fixture(scope="module")
def day(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SumDay]:
    folder = tmp_path_factory.mktemp("sums")
    silent = {(number, route): 1 for number, route in zip(KILLED[:3], STAGES, strict=False)}
    silent[BURNT, SUM_UNMASK.route] = 2

    def keeps_silent(row: Any) -> Any:
        def work(site: Any, ask: Any, plan: Any, *rest: Any) -> Any:
            if site.name in plan.sites[len(plan.sites) - silent.get((ask.round, row.exchange.route), 0) :]:
                raise AskRefused("silent", RefusalKind.BUDGET)
            return row.work(site, ask, plan, *rest)

        return dataclasses.replace(row, work=work) if row.exchange.route in STAGES else row

    with pytest.MonkeyPatch.context() as patch:
        rows = tuple(map(keeps_silent, client.app.exchanges()))
        patch.setattr(client.app, "exchanges", lambda: rows)
        made, expected = undisturbed(folder / "undisturbed", PLAN)
    sites = tuple(hospital.name for hospital in made.hospitals)
    first, _, third, last = sites
    scripts: dict[str, dict[str, dict[str, Any]]] = {site: {} for site in sites}
    for number, (route, (_, when)) in zip(KILLED, STAGES.items(), strict=True):
        scripts[last][f"{QUIET}.{route}"] = {"do": "hold", "when": when}
        scripts[last][f"{number}.{route}"] = {"do": "hold", "when": when}
        scripts[first][f"{CENTRE}.{route}"] = {"do": "hold", "when": when}
    for site in (third, last):
        scripts[site][f"{BURNT}.{SUM_UNMASK.route}"] = {"do": "hold", "when": "before"}
    run = consortium(folder, PLAN, made, scripts)
    with run.supervisor:
        yield SumDay(run, expected, sites)


def test_nothing_happens(day: SumDay, book: Book) -> None:
    let_go = {}
    for route in STAGES:
        day.held(day.sites[-1], QUIET, route)
        let_go[route] = time.monotonic()
        day.run.let_go(day.sites[-1])
    assert day.ended(QUIET)["sites"]
    day.rest_s = {route: time.monotonic() - begun for route, begun in let_go.items()}
    book.rounds_s.append(day.rest_s[SUM_KEYS.route])


@pytest.mark.parametrize(("round_number", "route"), list(zip(KILLED, STAGES, strict=True)))
def test_a_site_that_is_killed_in_a_stage_is_left_out_and_the_sum_is_the_survivors(
    day: SumDay, book: Book, round_number: int, route: str
) -> None:
    *others, lost = day.sites
    pid = day.held(lost, round_number, route)
    day.others_answered(tuple(others), round_number, STAGES[route][0])
    begun = time.monotonic()
    kill(pid)
    line = day.ended(round_number)
    vector_came = route == SUM_UNMASK.route
    assert sorted(line["sites"]) == sorted([*others, lost] if vector_came else others)
    assert line["refused"].keys() == {lost} and "burnt" not in line
    book.note(
        f"secure sum, 3 of 4 needed: a site's process, `kill -9` in `{route}`",
        "the others open the sum of all four: its vector was there"
        if vector_came
        else "Flower notices after up to 60 s; the sum is that of the other three; it is asked again in the "
        "next round",
        "nothing; same bits" if vector_came else "that site's share of the round; otherwise same bits",
        time.monotonic() - begun - day.rest_s[route],
    )


def test_the_server_application_is_killed_in_each_stage_of_one_round(day: SumDay, book: Book) -> None:
    site = day.sites[0]
    seconds = 0.0
    for number, route in enumerate(STAGES):
        day.held(site, CENTRE, route)
        begun = time.monotonic()
        assert day.run.status()["resumed"] == number
        kill(day.run.status()["pid"])
        day.resumed(number + 1)
        day.run.let_go(site)
        seconds += time.monotonic() - begun
    begun = time.monotonic()
    line = day.ended(CENTRE)
    seconds += time.monotonic() - begun - day.rest_s[SUM_UNMASK.route]
    assert sorted(line["sites"]) == sorted(day.sites) and "burnt" not in line
    book.note(
        "secure sum: the server application, `kill -9` in each of the four stages of one round",
        "submitted again each time, it goes on in the same attempt, with the same roster, texts and list; "
        "sites give the same answers again",
        "nothing; same bits",
        seconds,
    )


def test_a_sum_that_too_few_can_open_burns_the_round(day: SumDay, book: Book) -> None:
    lost = day.sites[2:]
    for site in lost:
        day.held(site, BURNT, SUM_UNMASK.route)
        shutil.rmtree(day.run.config(site).state_dir / FOLDER)
    for site in lost:
        day.run.let_go(site)
    line = day.ended(BURNT)
    assert "2" in line["burnt"] and line["refused"].keys() == set(lost)
    book.note(
        "secure sum: two of four sites lose their secrets when the list has been sent",
        "the round is burnt, and the journal says so: it counts, the weights stay, no other list is sent",
        "that round; otherwise same bits",
    )


def test_the_day_ends_in_the_bits_of_a_run_in_which_the_lost_kept_silent(day: SumDay) -> None:
    day.run.until(lambda: day.run.status().get("state") == "complete", "the end")
    lines = day.run.journal("round")
    assert [line["round"] for line in lines if "burnt" in line] == [BURNT]
    assert sorted(lines[-1]["sites"]) == sorted(day.sites)
    assert same_bits(day.run.weights(), day.expected)
    at_the_centre = command("server.cli", "journal", "verify", str(day.run.poc.run_folder))
    assert at_the_centre.returncode == 0, at_the_centre.stdout
    for config in day.run.poc.site_yamls.values():
        verified = site_command("journal", "verify", config=config)
        assert verified.returncode == 0, verified.stdout
