from pathlib import Path

import pytest
import torch

from server.checkpoints import KEPT, Checkpoint, Checkpoints, OtherPlan, early_rounds

PLAN = "a" * 64


def checkpoint(round_number: int, plan: str = PLAN) -> Checkpoint:
    return Checkpoint(
        plan_sha256=plan,
        round=round_number,
        shared={"weight": torch.full((3,), float(round_number)), "same": torch.ones(2)},
        optimiser={"first/weight": torch.full((3,), 0.5)},
        bank={"mean": torch.zeros(2, 2)},
        metrics={"rounds": [{"round": r} for r in range(1, round_number + 1)]},
    )


def test_the_latest_checkpoint_comes_back_as_it_was(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path / "checkpoints", PLAN)
    assert checkpoints.latest() is None
    for round_number in range(2):
        checkpoints.save(checkpoint(round_number))
    back, expected = checkpoints.latest(), checkpoint(1)
    assert back is not None and (back.round, back.metrics) == (1, expected.metrics)
    for group in ("shared", "optimiser", "bank"):
        assert set(getattr(back, group)) == set(getattr(expected, group))
        for name, tensor in getattr(expected, group).items():
            assert torch.equal(getattr(back, group)[name], tensor)


def test_only_the_last_few_are_kept_and_later_ones_of_a_run_that_went_back_go(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, PLAN)
    for round_number in range(KEPT + 3):
        checkpoints.save(checkpoint(round_number))
    assert checkpoints.rounds() == [3, 4, 5]
    checkpoints.save(checkpoint(4))
    assert checkpoints.rounds() == [3, 4]


def test_early_rounds_stay_to_be_compared_with_and_nobody_resumes_there(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, PLAN, early_rounds(7))
    for round_number in range(8):
        checkpoints.save(checkpoint(round_number))
    assert checkpoints.rounds() == [0, 3, 5, 6, 7]
    for last in (5, 6, 7):
        (tmp_path / f"round-{last:04d}.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match="all 3 are damaged"):
        checkpoints.latest()


@pytest.mark.parametrize("damage", ["cut", "flip", "empty"])
def test_a_damaged_checkpoint_is_passed_over_aloud(
    tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoints = Checkpoints(tmp_path, PLAN)
    for round_number in (1, 2):
        path = checkpoints.save(checkpoint(round_number))
    content = bytearray(path.read_bytes())
    content[-2] ^= 4
    path.write_bytes({"cut": content[: len(content) // 2], "flip": content, "empty": b""}[damage])
    back = checkpoints.latest()
    assert back is not None and back.round == 1
    assert "round 2 is damaged" in caplog.text


def test_when_all_are_damaged_nothing_is_guessed(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, PLAN)
    checkpoints.save(checkpoint(1)).write_bytes(b"")
    with pytest.raises(ValueError, match="all 1 are damaged"):
        checkpoints.latest()


def test_a_checkpoint_of_another_plan_is_refused(tmp_path: Path) -> None:
    Checkpoints(tmp_path, "b" * 64).save(checkpoint(1, "b" * 64))
    with pytest.raises(OtherPlan, match="aaaaaaaaaaaa"):
        Checkpoints(tmp_path, PLAN).latest()


def test_a_file_that_was_being_written_is_not_a_checkpoint(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, PLAN)
    checkpoints.save(checkpoint(1))
    (tmp_path / ".round-0002.safetensors.x7q").write_bytes(b"half")
    back = checkpoints.latest()
    assert back is not None and back.round == 1
