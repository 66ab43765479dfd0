"""The judgement memo: what was read is not read again, and what may have changed is."""

import itertools
import json
import random
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

import client.scans.judgement_memo
from client.scans.judgement import Judgement, Source, Verdict, verdict_from_json, verdict_to_json
from client.scans.judgement_memo import JudgementMemo
from scans.scans import Note, Reason, UnusableScan


@pytest.fixture(autouse=True)
def settled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files just written count as settled."""
    monkeypatch.setattr(client.scans.judgement_memo, "SETTLED_S", -1.0)


@pytest.fixture
def sources(tmp_path: Path) -> list[Source]:
    """Four scans, two with a label."""
    made = []
    for number in range(4):
        path = tmp_path / "scans" / f"Mustermann{number}.nii.gz"
        path.parent.mkdir(exist_ok=True)
        path.write_text(str(number))
        label = path.with_name(f"label{number}.nii.gz")
        if number % 2:
            label.write_text(str(number))
        made.append(Source((path,), label if number % 2 else None))
    return made


class Readers:
    """Judges that tell what they were asked for."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def __call__(self, sources: Sequence[Source]) -> Iterator[tuple[int, Verdict]]:
        for number in random.Random(0).sample(range(len(sources)), len(sources)):
            text = sources[number].files[0].read_text()
            self.asked.append(text)
            yield number, Judgement(text, text, notes=(Note.UNIT,), label_reason=Reason.LABEL_MISMATCH)


def judged(memo: Path, sources: list[Source], settings: str = "a") -> tuple[dict[int, Verdict], list[str]]:
    readers = Readers()
    verdicts = dict(JudgementMemo(memo, {"plan": settings}).judges(readers)(sources))
    assert sorted(verdicts) == list(range(len(sources)))
    return verdicts, sorted(readers.asked)


def test_what_was_judged_is_not_read_again_and_the_same_comes_back(
    tmp_path: Path, sources: list[Source]
) -> None:
    memo = tmp_path / "judged"
    first, asked = judged(memo, sources)
    assert asked == ["0", "1", "2", "3"]
    assert judged(memo, sources) == (first, [])
    assert judged(memo, sources[::-1])[1] == [], "their order is no matter"
    assert judged(memo, sources, settings="b")[1] == ["0", "1", "2", "3"]


@pytest.mark.parametrize("change", ["voxels", "label", "another label", "claim"])
def test_a_scan_whose_files_changed_is_read_again_and_no_other(
    tmp_path: Path, sources: list[Source], change: str
) -> None:
    memo = tmp_path / "judged"
    judged(memo, sources)
    path, label = sources[1].files[0], sources[1].label
    assert label is not None
    if change == "voxels":
        path.write_text("new")
    elif change == "label":
        label.write_text("5")
    elif change == "another label":
        sources[1] = Source((path,), None)
    else:
        sources[1] = Source((path.rename(path.with_name("x.nii")),), label)
    assert judged(memo, sources)[1] == ["new" if change == "voxels" else "1"]


def test_a_run_that_was_killed_goes_on_behind_the_last_whole_line(
    tmp_path: Path, sources: list[Source]
) -> None:
    memo = tmp_path / "judged"
    started = JudgementMemo(memo, {"plan": "a"}).judges(Readers())(sources)
    done = [number for number, _ in itertools.islice(started, 3)]  # killed behind the third
    lines = memo.read_bytes()
    memo.write_bytes(lines + b"\n" + lines.splitlines()[-1][:80])  # in the middle of a line
    verdicts, asked = judged(memo, sources)
    assert asked == [str(number) for number in range(4) if number not in done]
    assert len(verdicts) == 4


def test_a_memo_that_is_damaged_is_forgotten(tmp_path: Path, sources: list[Source]) -> None:
    memo = tmp_path / "judged"
    judged(memo, sources)
    keys = [line.split()[0] for line in memo.read_text().splitlines()]
    for wrong in ("{}", "[]", "5", '{"reason": "none such", "detail": ""}', "{", ""):
        memo.write_text("".join(f"{key} {wrong}\n" for key in keys) + "\xff")
        assert judged(memo, sources)[1] == ["0", "1", "2", "3"]


def test_the_memo_names_nobody_and_only_its_owner_reads_it(tmp_path: Path, sources: list[Source]) -> None:
    memo = tmp_path / "state" / "judged"
    started = JudgementMemo(memo, {"plan": "a"}).judges(Readers())(sources)
    next(started)
    for _ in range(2):
        assert stat.S_IMODE(memo.stat().st_mode) == 0o600
        content = memo.read_text()
        assert "Mustermann" not in content and "label1" not in content and str(tmp_path) not in content
        list(started)


def test_a_file_that_could_not_be_read_is_tried_again(tmp_path: Path, sources: list[Source]) -> None:
    def away(sources: Sequence[Source]) -> Iterator[tuple[int, Verdict]]:
        for number in range(len(sources)):
            yield number, UnusableScan(Reason.UNREADABLE if number else Reason.CORRUPT, "errno 5")

    list(JudgementMemo(tmp_path / "judged", {"plan": "a"}).judges(away)(sources))
    assert judged(tmp_path / "judged", sources)[1] == ["1", "2", "3"]


def test_a_file_that_is_younger_than_the_clocks_grain_is_read_again(
    tmp_path: Path, sources: list[Source], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client.scans.judgement_memo, "SETTLED_S", 60.0)
    judged(tmp_path / "judged", sources)
    assert judged(tmp_path / "judged", sources)[1] == ["0", "1", "2", "3"]


def test_a_verdict_is_the_same_behind_json() -> None:
    whole = Judgement(
        "a", "b", True, 3, 2, 1 / 3, (Note.TILTED, Note.UNIT), True, Reason.LABEL_NOT_INTEGER, "e.g. 1/2"
    )
    for verdict in (whole, Judgement("a", "b")):
        assert verdict_from_json(json.loads(json.dumps(verdict_to_json(verdict)))) == verdict
    read = verdict_from_json(json.loads(json.dumps(verdict_to_json(UnusableScan(Reason.RGB, "detail")))))
    assert isinstance(read, UnusableScan) and (read.reason, read.detail) == (Reason.RGB, "detail")
