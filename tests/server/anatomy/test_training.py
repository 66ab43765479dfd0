"""A start from public anatomy: pieces and their answers, a run that can be stopped, and its command."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from meduet_models.anatomy_start import load_start
from server import cli
from server.anatomy.pieces import ANSWERS, UNIT_MM, draw_piece, draw_pieces, make_piece
from server.anatomy.training import AnatomyTraining, train_start

TINY = AnatomyTraining(steps=4, batch_size=2)
SHAPE = (16, 16, 16)


class StoppedError(Exception):
    """Stands for the power cut."""


def ignore(step: int, loss: float) -> None:
    """Watch a run without a word."""


def test_pieces_follow_from_their_words_alone() -> None:
    first, again = (
        draw_pieces("canonical", 2, 0, "a", shape=SHAPE),
        draw_pieces("canonical", 2, 0, "a", shape=SHAPE),
    )
    other = draw_pieces("canonical", 2, 0, "b", shape=SHAPE)
    assert torch.equal(first.volumes, again.volumes) and torch.equal(first.answers, again.answers)
    assert not torch.equal(first.volumes, other.volumes)


def test_every_piece_is_in_range_and_has_an_answer() -> None:
    pieces = draw_pieces("canonical", 12, 1, shape=SHAPE)
    assert pieces.volumes.isfinite().all() and pieces.answers.isfinite().all()
    assert 0.0 <= float(pieces.volumes.min()) and float(pieces.volumes.max()) <= 1.0
    assert pieces.known.flatten(1).any(dim=1).all()
    assert pieces.known[:, ANSWERS.index("border")].all()


def test_the_control_knows_nothing_of_the_template() -> None:
    pieces = draw_pieces("shapes", 12, 1, shape=SHAPE)
    assert not pieces.known[:, : ANSWERS.index("clean")].any()
    assert pieces.known[:, ANSWERS.index("clean") :].all()


def test_left_and_right_have_one_answer_and_front_and_back_have_not() -> None:
    recipe = draw_piece("canonical", torch.Generator().manual_seed(2))
    straight = dataclasses.replace(
        recipe,
        anatomy=True,
        warp_mm=0.0,
        spacing_mm=(2.0, 2.0, 2.0),
        rotation=((1.0, 0, 0), (0, 1.0, 0), (0, 0, 1.0)),
    )
    sides = [make_piece(dataclasses.replace(straight, centre=(x, 0.1, 0.2)), SHAPE)[1] for x in (-0.3, 0.3)]
    torch.testing.assert_close(sides[0][0], sides[1][0].flip(0), rtol=0, atol=2e-3)
    ends = [make_piece(dataclasses.replace(straight, centre=(0.2, y, 0.2)), SHAPE)[1] for y in (-0.3, 0.3)]
    middle = [float(answers[1].mean()) * UNIT_MM for answers in ends]
    assert middle[1] - middle[0] == pytest.approx(0.6 * 233 / 2, rel=0.02)  # the template has 233 mm that way


def test_a_run_that_was_stopped_and_resumed_ends_with_the_same_bytes(tmp_path: Path) -> None:
    def stop(step: int, loss: float) -> None:
        if step == 3:
            raise StoppedError

    train_start(TINY, tmp_path / "straight.safetensors", ignore)
    out = tmp_path / "resumed.safetensors"
    with pytest.raises(StoppedError):
        train_start(TINY, out, stop, checkpoint_every=1)
    assert not out.exists()
    steps: list[int] = []
    assert train_start(TINY, out, lambda step, loss: steps.append(step), stop_after=1) is None
    assert train_start(TINY, out, lambda step, loss: steps.append(step)) is not None
    assert steps == [3, 4]
    assert out.read_bytes() == (tmp_path / "straight.safetensors").read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["resumed.safetensors", "straight.safetensors"]


def test_a_checkpoint_of_other_settings_is_refused(tmp_path: Path) -> None:
    out = tmp_path / "start.safetensors"
    assert train_start(TINY, out, ignore, stop_after=1) is None
    with pytest.raises(ValueError, match="of a run with these settings"):
        train_start(dataclasses.replace(TINY, start="shapes"), out, ignore)


def test_training_lowers_the_loss_and_touches_no_global_random_numbers(tmp_path: Path) -> None:
    before = torch.random.get_rng_state()
    losses: list[float] = []
    settings = AnatomyTraining(start="shapes", steps=12, batch_size=2)
    train_start(settings, tmp_path / "start.safetensors", lambda step, loss: losses.append(loss))
    assert sum(losses[-4:]) < 0.7 * sum(losses[:4])
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("settings", [{"steps": 0}, {"batch_size": 0}])
def test_settings_that_cannot_train_are_refused(settings: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=next(iter(settings))):
        AnatomyTraining(**settings)


def test_the_command_writes_a_start_that_says_how_it_was_made(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "start.safetensors"
    threads = str(torch.get_num_threads())
    words = ["--start", "shapes", "--steps", "2", "--batch", "1", "--out", str(out), "--threads", threads]
    assert cli.main(["pretrain-public", *words]) == 0
    said = capsys.readouterr().out
    assert "borders" in said and "sha256" in said
    stored = load_start(out)
    assert stored.kind == "shapes" and "no scan of a patient" in stored.provenance["data"]
    assert json.loads(stored.provenance["settings"])["steps"] == 2
    assert json.loads(stored.provenance["quality"])["pieces"] == 32
