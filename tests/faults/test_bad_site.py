"""A hospital whose replies are wrong in every way we could think of, one way per round: each is put aside
with its reason, the round goes on, and the final weights are those of a run in which it kept silent."""

import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import client.app
from client.exchanges import pretraining
from client.exchanges.exchange import AskRefused
from federation.wire.wire import RefusalKind
from tests.faults.consortium import Consortium, Weights, consortium, same_bits, undisturbed
from tests.faults.page import Book

pytestmark = pytest.mark.faults

WAYS: dict[str, tuple[dict[str, Any], str, str]] = {
    # first: it computes nothing while the other consortia of `make faults` begin
    "a site hangs": (
        {"do": "hang", "at_step": 1},
        "refused: not_answered",
        "its watchdog gives it up at nine tenths of it, says so, and ends the process",
    ),
    "NaN in an update": ({"reply": "nan"}, "Expected finite values", "put aside"),
    "infinite value": ({"reply": "infinite"}, "Expected finite values", "put aside"),
    "wrong shape": ({"reply": "shape"}, "of shape", "put aside; nothing is broadcast"),
    "extra keys": ({"reply": "extra"}, "Expected no tensor 'stray'", "put aside"),
    "missing keys": ({"reply": "missing"}, "it is missing", "put aside"),
    "negative weight": ({"reply": "negative"}, "examples; got -5", "put aside"),
    "weight zero": ({"reply": "zero"}, "examples; got 0", "put aside"),
    "enormous weight": ({"reply": "heavy"}, "examples; got 1000000000", "put aside"),
    "enormous norm": ({"reply": "huge"}, "L2 norm at most 20 per", "put aside: over the plan's bound"),
    "norm within the bound, unlike the others'": (
        {"reply": "long"},
        "times the round's median",
        "taken out of the sum again, exactly",
    ),
    "truncated message": ({"reply": "truncated"}, "bytes", "put aside"),
    "oversized array (one chunk named 3,000 times)": (
        {"reply": "oversized"},
        "bytes in arrays",
        "left at SuperLink: its size is checked before it is put together",
    ),
    "replayed message": (
        {"reply": "replayed"},
        "round 15; got one to round 14",
        "put aside: another round's",
    ),
    "a site raises (with a patient's name in the text)": (
        {"do": "raise", "at_step": 1},
        "refused: not_answered",
        "one word crosses: `not_answered`; the text stays in the site's log",
    ),
    "a site runs out of memory": (
        {"do": "memory", "at_step": 1},
        "refused: not_answered",
        "its log says so; one word crosses: `not_answered`",
    ),
}
BAD = "north"
FIRST = 2
"""In round 1 it is honest."""
ROUNDS = FIRST + len(WAYS)
DEADLINE_S = 150
"""A tenth of it is for starting the process and for saying so, on cores that others use, too."""
PLAN = (
    "hospitals.num_hospitals=3",
    f"training.rounds={ROUNDS}",
    f"aggregation.deadline_s={DEADLINE_S}",
    "aggregation.quorum=0.6",
)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Consortium, Weights]]:
    folder = tmp_path_factory.mktemp("bad")
    steps = {FIRST + number: way[0] for number, way in enumerate(WAYS.values())}
    honest = pretraining.ANSWER

    def silent(site: Any, ask: Any, *rest: Any) -> Any:
        """It trains where the bad one does, and says nothing of it."""
        step = steps.get(ask.round) if site.name == BAD else None
        if step is None or "reply" in step:
            answered = honest.work(site, ask, *rest)
        if step is not None:
            # as often as the bad one cannot answer: after three such questions a site stops
            kind = RefusalKind.BUDGET if "reply" in step else RefusalKind.INTERNAL
            raise AskRefused("silent", kind)
        return answered

    with pytest.MonkeyPatch.context() as patch:
        rows = [row for row in client.app.exchanges() if row is not honest]
        patch.setattr(client.app, "exchanges", lambda: (*rows, dataclasses.replace(honest, work=silent)))
        made, expected = undisturbed(folder / "undisturbed", PLAN)
    assert made.hospitals[0].name == BAD
    script = {str(round_number): step for round_number, step in steps.items()}
    whole = consortium(folder, PLAN, made, {BAD: script})
    with whole.supervisor:
        whole.until(lambda: whole.status().get("state") == "complete", "the end", 1800.0)
        yield whole, expected


@pytest.mark.parametrize("fault", WAYS)
def test_it_is_put_aside_with_its_reason_and_the_round_goes_on(run: Any, book: Book, fault: str) -> None:
    whole, _ = run
    round_number = FIRST + list(WAYS).index(fault)
    (line,) = [line for line in whole.journal("round") if line["round"] == round_number]
    _, reason, happens = WAYS[fault]
    assert list(line["refused"]) == [BAD]
    assert reason in line["refused"][BAD]
    assert len(line["sites"]) == 2
    seconds = float(DEADLINE_S) if "hangs" in fault else None
    lost = "that site's share of the round; otherwise same bits"
    book.note(fault, happens, lost, seconds)
    assert any(one["round"] == round_number and one["site"] == BAD for one in whole.status()["quarantined"])


def test_everybody_counts_until_the_first_fault_and_the_site_then_stops(
    run: Any,
) -> None:
    whole, _ = run
    assert [line["round"] for line in whole.journal("round") if not line["refused"]] == [1]
    assert len(whole.journal("resume")) == 0


def test_the_final_weights_are_those_of_a_run_in_which_it_kept_silent(run: Any) -> None:
    whole, expected = run
    assert same_bits(whole.weights(), expected)


def test_what_the_site_said_in_its_exception_stays_at_the_site(run: Any) -> None:
    whole, _ = run
    secret = re.compile(rb"Anna|/data/secret")
    centre = [*whole.poc.config.state_dir.rglob("*"), *whole.poc.run_folder.rglob("*")]
    spilled = [path for path in centre if path.is_file() and secret.search(path.read_bytes())]
    assert spilled == []
    assert "Anna Smith" in whole.site_log(BAD)
    supernode = whole.config(BAD).state_dir / "processes"
    assert Path(supernode / "supernode.log").is_file()
