import logging
from pathlib import Path

import pytest
import torch

from client.training.site_state import SiteState, StateFolder, StateMissing

PLAN = "9f3c" * 16


def state(round_number: int, began_from: int | None = None) -> SiteState:
    return SiteState(
        round=round_number,
        began_from=round_number - 1 if began_from is None else began_from,
        home={"style.weight": torch.full((2, 3), float(round_number))},
        teacher={"style.weight": torch.full((2, 3), round_number + 0.5)},
        optimiser={
            "exp_avg/style.weight": torch.zeros(2, 3),
            "step/style.weight": torch.tensor(float(round_number)),
        },
    )


def start(value: float = 0.0) -> dict[str, torch.Tensor]:
    return {"style.weight": torch.full((2, 3), value)}


@pytest.fixture
def folder(tmp_path: Path) -> StateFolder:
    folder = StateFolder(tmp_path / "state", PLAN)
    folder.enter(1, start)
    return folder


def test_a_state_comes_back_as_it_was_kept(folder: StateFolder) -> None:
    folder.save(state(1), "aa")
    again = folder.before(2)
    assert (again.round, again.began_from) == (1, 0)
    for part in ("home", "teacher", "optimiser"):
        kept, written = getattr(again, part), getattr(state(1), part)
        assert kept.keys() == written.keys()
        assert all(torch.equal(kept[name], written[name]) for name in written)


def test_the_last_three_rounds_and_the_common_start_are_kept(folder: StateFolder) -> None:
    for round_number in (1, 2, 3, 4):
        folder.save(state(round_number), "aa")
    assert folder.rounds() == [0, 2, 3, 4]
    assert torch.equal(folder.start().home["style.weight"], torch.zeros(2, 3))


def test_a_round_delivered_twice_starts_from_the_same_state(folder: StateFolder) -> None:
    for round_number in (1, 2, 3):
        folder.save(state(round_number), "aa")
    first = folder.before(3)
    folder.save(state(3), "aa")
    assert first.round == folder.before(3).round == 2


def test_a_centre_that_goes_back_finds_the_state_and_later_ones_go(folder: StateFolder) -> None:
    for round_number in (
        1,
        2,
        3,
        4,
    ):  # the centre never counted round 4, and has lost what it knew of round 3
        folder.save(state(round_number), "aa")
    assert folder.before(3).round == 2
    folder.save(state(3), "bb")
    assert folder.rounds() == [0, 2, 3]
    assert folder.before(4).round == 3


def test_a_centre_that_goes_back_too_far_is_refused_and_not_given_the_common_start(
    folder: StateFolder,
) -> None:
    for round_number in (1, 2, 3, 4, 5):
        folder.save(state(round_number), "aa")
    with pytest.raises(StateMissing, match=r"after round 2; this site keeps 0, 3, 4, 5"):
        folder.before(3)


def test_a_site_that_sat_out_a_round_goes_on_from_its_last_state(folder: StateFolder) -> None:
    for round_number in (1, 2):
        folder.save(state(round_number), "aa")
    assert folder.before(4).round == 2
    folder.save(state(4, began_from=2), "aa")
    assert folder.rounds() == [0, 1, 2, 4]
    assert folder.before(4).round == 2  # delivered twice
    assert folder.before(5).round == 4


def test_beginning_again_forgets_the_earlier_attempt(folder: StateFolder) -> None:
    for round_number in (1, 2):
        folder.save(state(round_number), "aa")
    place = folder.enter(1, lambda: start(1.0))
    assert folder.rounds() == [0]
    assert torch.equal(place.start.home["style.weight"], torch.ones(2, 3))
    assert torch.equal(folder.before(1).home["style.weight"], torch.ones(2, 3))


def test_a_site_that_never_received_the_common_start_has_no_place_in_a_round(tmp_path: Path) -> None:
    folder = StateFolder(tmp_path / "state", PLAN)
    for question in (
        folder.start,
        lambda: folder.before(2),
        lambda: folder.enter(2),
        lambda: folder.enter(1),
    ):
        with pytest.raises(StateMissing):
            question()
    assert not (tmp_path / "state").exists()


def test_two_plans_do_not_see_each_other(folder: StateFolder, tmp_path: Path) -> None:
    assert StateFolder(tmp_path / "state", "0" * 64).rounds() == []


def where(tmp_path: Path, round_number: int) -> Path:
    (path,) = (tmp_path / "state").rglob(f"round-{round_number:04d}.safetensors")
    return path


@pytest.mark.parametrize("round_number", [0, 1])
def test_no_flipped_bit_of_a_state_is_taken_for_the_state(
    folder: StateFolder, tmp_path: Path, round_number: int
) -> None:
    folder.save(state(1), "aa")
    path = where(tmp_path, round_number)
    whole = path.read_bytes()
    for bit in range(round_number, 8 * len(whole), 7):  # of each byte, one or two
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        read = folder._whole(round_number)
        assert read is None or (read.began_from == 0 and same(read, state(1) if round_number else None)), bit


def same(read: SiteState, written: SiteState | None) -> bool:
    """Whether it is what was written, or the start."""
    expected = SiteState(round=0, home=start()) if written is None else written
    mine, theirs = read.named(), expected.named()
    return mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


@pytest.mark.parametrize("how", ["cut", "flipped", "empty", "another's"])
def test_a_damaged_state_is_passed_over_for_the_one_before_and_the_log_says_so(
    folder: StateFolder, tmp_path: Path, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    for round_number in (1, 2):
        folder.save(state(round_number), "aa")
    path = where(tmp_path, 2)
    whole = path.read_bytes()
    damaged = {
        "cut": whole[:-10],
        "flipped": whole[:-3] + bytes([whole[-3] ^ 64]) + whole[-2:],
        "empty": b"",
        "another's": where(tmp_path, 0).read_bytes(),
    }
    path.write_bytes(damaged[how])
    with caplog.at_level(logging.WARNING, "client"):
        place = folder.enter(3)
    assert (place.kept.round, place.start.round) == (1, 0)
    assert "round-0002.safetensors is passed over" in caplog.text
    place.leaving(lambda: state(3, began_from=1), "aa")()
    assert folder.enter(4).kept.round == 3


def test_when_all_states_are_damaged_the_round_begins_from_the_start(
    folder: StateFolder, tmp_path: Path
) -> None:
    for round_number in (1, 2):
        folder.save(state(round_number), "aa")
        where(tmp_path, round_number).write_bytes(b"torn")
    assert folder.enter(3).kept.round == 0


def test_a_lost_or_damaged_start_is_taken_again_when_it_comes_and_later_states_stay(
    folder: StateFolder, tmp_path: Path
) -> None:
    folder.save(state(1), "aa")
    for lost in (lambda path: path.unlink(), lambda path: path.write_bytes(b"torn")):
        lost(where(tmp_path, 0))
        with pytest.raises(StateMissing, match="common start"):
            folder.enter(2)
        place = folder.enter(2, start)
        assert (place.kept.round, place.start.round) == (1, 0)


def test_a_site_that_lost_everything_goes_on_from_the_start_that_comes(tmp_path: Path) -> None:
    place = StateFolder(tmp_path / "state", PLAN).enter(7, start)
    assert place.kept.round == 0 and torch.equal(place.start.home["style.weight"], torch.zeros(2, 3))


def test_a_start_that_comes_later_does_not_replace_the_one_that_is_there(folder: StateFolder) -> None:
    folder.save(state(1), "aa")

    def another() -> dict[str, torch.Tensor]:
        raise AssertionError("it is not even made")

    assert folder.enter(2, another).kept.round == 1


def test_a_damaged_state_is_made_again_when_its_round_is_asked_again(
    folder: StateFolder, tmp_path: Path
) -> None:
    folder.save(state(1), "aa")
    folder.save(state(2), "aa")
    where(tmp_path, 2).write_bytes(b"torn")
    assert folder.before(2).round == 1
    folder.save(state(2), "aa")
    assert folder.before(3).round == 2


def test_a_state_of_another_plan_in_this_plans_folder_is_not_taken(
    folder: StateFolder, tmp_path: Path
) -> None:
    StateFolder(tmp_path / "other", PLAN[:12] + "0" * 52).enter(1, start)
    (theirs,) = (tmp_path / "other").rglob("round-0000.safetensors")
    where(tmp_path, 0).write_bytes(theirs.read_bytes())
    with pytest.raises(StateMissing):
        folder.start()
