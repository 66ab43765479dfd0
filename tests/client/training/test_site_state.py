from pathlib import Path

import pytest
import torch

from client.training.site_state import SiteState, StateDamaged, StateFolder, StateMissing

PLAN = "9f3c" * 16


def state(round: int, began_from: int | None = None) -> SiteState:
    return SiteState(
        round=round,
        began_from=round - 1 if began_from is None else began_from,
        home={"style.weight": torch.full((2, 3), float(round))},
        teacher={"style.weight": torch.full((2, 3), round + 0.5)},
        optimiser={
            "exp_avg/style.weight": torch.zeros(2, 3),
            "step/style.weight": torch.tensor(float(round)),
        },
    )


@pytest.fixture
def folder(tmp_path: Path) -> StateFolder:
    folder = StateFolder(tmp_path / "state", PLAN)
    folder.begin({"style.weight": torch.zeros(2, 3)})
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
    for round in (1, 2, 3, 4):
        folder.save(state(round), "aa")
    assert folder.rounds() == [0, 2, 3, 4]
    assert torch.equal(folder.start().home["style.weight"], torch.zeros(2, 3))


def test_a_round_delivered_twice_starts_from_the_same_state(folder: StateFolder) -> None:
    for round in (1, 2, 3):
        folder.save(state(round), "aa")
    first = folder.before(3)
    folder.save(state(3), "aa")
    assert first.round == folder.before(3).round == 2


def test_a_centre_that_goes_back_finds_the_state_and_later_ones_go(folder: StateFolder) -> None:
    for round in (1, 2, 3, 4):  # the centre never counted round 4, and has lost what it knew of round 3
        folder.save(state(round), "aa")
    assert folder.before(3).round == 2
    folder.save(state(3), "bb")
    assert folder.rounds() == [0, 2, 3]
    assert folder.before(4).round == 3


def test_a_centre_that_goes_back_too_far_is_refused_and_not_given_the_common_start(
    folder: StateFolder,
) -> None:
    for round in (1, 2, 3, 4, 5):
        folder.save(state(round), "aa")
    with pytest.raises(StateMissing, match=r"after round 2; this site keeps 0, 3, 4, 5"):
        folder.before(3)


def test_a_site_that_sat_out_a_round_goes_on_from_its_last_state(folder: StateFolder) -> None:
    for round in (1, 2):
        folder.save(state(round), "aa")
    assert folder.before(4).round == 2
    folder.save(state(4, began_from=2), "aa")
    assert folder.rounds() == [0, 1, 2, 4]
    assert folder.before(4).round == 2  # delivered twice
    assert folder.before(5).round == 4


def test_beginning_again_forgets_the_earlier_attempt(folder: StateFolder) -> None:
    for round in (1, 2):
        folder.save(state(round), "aa")
    folder.begin({"style.weight": torch.ones(2, 3)})
    assert folder.rounds() == [0]
    assert torch.equal(folder.before(1).home["style.weight"], torch.ones(2, 3))


def test_a_site_that_never_received_the_common_start_has_no_state(tmp_path: Path) -> None:
    folder = StateFolder(tmp_path / "state", PLAN)
    for question in (folder.start, lambda: folder.before(2)):
        with pytest.raises(StateMissing, match="never received it"):
            question()


def test_two_plans_do_not_see_each_other(folder: StateFolder, tmp_path: Path) -> None:
    assert StateFolder(tmp_path / "state", "0" * 64).rounds() == []


def test_a_state_cut_short_flipped_or_renamed_is_refused_by_name(folder: StateFolder, tmp_path: Path) -> None:
    folder.save(state(1), "aa")
    (path,) = (tmp_path / "state").rglob("round-0001.safetensors")
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[-3] ^= 64
    for damaged in (whole[:-10], bytes(flipped), b"", (path.parent / "round-0000.safetensors").read_bytes()):
        path.write_bytes(damaged)
        with pytest.raises(StateDamaged, match="round-0001"):
            folder.before(2)
    path.write_bytes(whole)
    assert folder.before(2).round == 1


def test_a_damaged_state_is_made_again_when_its_round_is_asked_again(
    folder: StateFolder, tmp_path: Path
) -> None:
    folder.save(state(1), "aa")
    folder.save(state(2), "aa")
    (path,) = (tmp_path / "state").rglob("round-0002.safetensors")
    path.write_bytes(b"torn")
    assert folder.before(2).round == 1
    folder.save(state(2), "aa")
    assert folder.before(3).round == 2


def test_a_state_of_another_plan_in_this_plans_folder_is_refused(folder: StateFolder, tmp_path: Path) -> None:
    other = StateFolder(tmp_path / "other", PLAN[:12] + "0" * 52)
    other.begin({"style.weight": torch.zeros(2, 3)})
    (theirs,) = (tmp_path / "other").rglob("round-0000.safetensors")
    (ours,) = (tmp_path / "state").rglob("round-0000.safetensors")
    ours.write_bytes(theirs.read_bytes())
    with pytest.raises(StateDamaged, match="plan_sha256"):
        folder.start()
