"""What a site or a patient withdraws is overwritten, not taken again, and marked in what learned from it."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from server.latent_bank.bank import BANK, LatentBank
from server.latent_bank.listing import summary
from server.latent_bank.tables import Tables
from tests.server.latent_bank.small_bank import a_plan, ciphertexts, damage, everything, name, reply, some


def test_a_site_that_is_forgotten_is_overwritten_never_taken_again_and_marks_what_learned_from_it(
    bank: LatentBank, tmp_path: Path
) -> None:
    plan = a_plan()
    bank.add(reply(plan, [0, 1]), plan)
    bank.add(reply(plan, [2], "south"), plan)
    bank.learned(tmp_path / "early.safetensors", "a" * 64, 1)
    bank.add(reply(plan, [3], round_number=2), plan)
    bank.learned(tmp_path / "late.safetensors", "b" * 64, 2)
    source = bank.source(plan, 2)
    withdrawal = bank.forget(site="north")
    assert withdrawal.items == 3
    assert [Path(model).name for model in withdrawal.models] == ["early.safetensors", "late.safetensors"]
    assert {Path(m.path).name: (m.items, m.withdrawn) for m in bank.models()} == {
        "early.safetensors": (3, 2),
        "late.safetensors": (4, 3),
    }
    assert bank.verify() == (1, 0)
    assert everything(source).category.tolist() == [
        2,
        2,
        2,
        2,
    ]  # open, it reads no withdrawn item
    assert bank.dealt_with(plan, "north", 3) == (0, 0)  # is not asked again
    assert bank.add(reply(plan, [0, 1, 9]), plan).withdrawn == 3
    assert len(bank) == 1
    bank.learned(tmp_path / "early.safetensors", "c" * 64, 1)  # the file may be the same model, trained on
    assert {Path(m.path).name: m.withdrawn for m in bank.models()}["early.safetensors"] == 2
    sites = summary(bank)["sites"]
    assert (sites["north"]["withdrawn"], sites["north"]["site_withdrew"], sites["south"]["kept"]) == (
        3,
        True,
        1,
    )


def left_on_the_disk(folder: Path, sealed: bytes) -> list[str]:
    """Files of a bank that still hold a piece of this record."""
    pieces = [sealed[first : first + 32] for first in range(0, len(sealed) - 32, 32)]
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return [path.name for path in files if any(piece in path.read_bytes() for piece in pieces)]


def test_no_byte_of_a_forgotten_record_is_left_in_any_file(bank: LatentBank) -> None:
    plan = a_plan()
    bank.add(reply(plan, list(range(40))), plan)  # records of a size that share a page, and more than one
    bank.add(reply(plan, [50], "south"), plan)
    before = ciphertexts(bank)
    assert left_on_the_disk(bank.folder, before[1]) == [BANK]
    bank.forget(item=name(3))
    assert left_on_the_disk(bank.folder, before[4]) == []
    assert left_on_the_disk(bank.folder, before[5]) == [BANK]
    damage(bank, 6)
    assert bank.verify()[1] == 1
    damaged = ciphertexts(bank)
    bank.forget(site="north")  # a record that was put aside goes too
    assert [n for n, sealed in (before | damaged).items() if left_on_the_disk(bank.folder, sealed)] == [41]
    assert bank.verify() == (1, 0)


def test_a_forgetting_that_is_cut_off_is_finished_when_the_bank_is_opened_next(
    bank: LatentBank, open_bank: Callable[..., LatentBank], monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(self: Tables) -> None:
        raise KeyboardInterrupt

    plan = a_plan()
    bank.add(reply(plan, [0, 1]), plan)
    sealed = ciphertexts(bank)[1]
    with monkeypatch.context() as patched:
        patched.setattr(Tables, "wipe", killed)
        with pytest.raises(KeyboardInterrupt):
            bank.forget(item=name(0))
    bank.close()
    assert left_on_the_disk(bank.folder, sealed) == [f"{BANK}-journal"]
    again = open_bank()
    assert left_on_the_disk(bank.folder, sealed) == []
    assert again.verify() == (1, 0) and again.add(reply(plan, [0]), plan).withdrawn == 1


def test_several_threads_read_while_one_adds_and_forgets(bank: LatentBank) -> None:
    plan = a_plan()
    bank.add(reply(plan, list(range(20))), plan)
    source = bank.source(plan, 1)
    expected = some(list(range(20))).latents

    def reads(seed: int) -> bool:
        draws = torch.Generator().manual_seed(seed)
        chosen = [torch.randint(10, (4,), generator=draws) for _ in range(30)]
        return all(torch.equal(source.read(rows).latents, expected[rows]) for rows in chosen)

    with ThreadPoolExecutor(4) as pool:
        read = [pool.submit(reads, seed) for seed in range(4)]
        for number in range(10, 20):
            bank.add(reply(plan, [number + 90]), plan)
            bank.forget(item=name(number))
        assert all(one.result() for one in read)
    assert bank.verify() == (20, 0)


def test_an_item_is_forgotten_with_its_twins_and_models_of_earlier_rounds_are_left_alone(
    bank: LatentBank, tmp_path: Path
) -> None:
    plan = a_plan()
    bank.add(reply(plan, [0, 1]), plan)
    bank.learned(tmp_path / "m.safetensors", "a" * 64, 1)
    bank.add(reply(plan, [5], round_number=2), plan)
    bank.add(reply(plan, [5], "south", round_number=2), plan)
    assert bank.forget(item=name(5)).items == 2
    assert bank.models()[0].withdrawn == 0
    added = bank.add(reply(plan, [5], "south", round_number=2), plan)
    assert (added.withdrawn, added.kept) == (1, 0)
    assert bank.forget(item=name(0)).models == (str((tmp_path / "m.safetensors").resolve()),)
    assert everything(bank.source(plan, 2)).category.tolist() == [1]
    for wrong in (name(0), "0" * 31, "no such"):
        with pytest.raises(ValueError, match="it has no"):
            bank.forget(item=wrong)
    with pytest.raises(ValueError, match="nothing of 'west'"):
        bank.forget(site="west")
    with pytest.raises(ValueError, match="both or neither"):
        bank.forget()
