"""A bad record, a bad file, a write that is cut off: each costs itself, and the bank goes on."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from server.latent_bank.bank import BANK, LatentBank
from server.latent_bank.tables import Item, Tables
from tests.server.latent_bank.small_bank import (
    a_plan,
    ciphertexts,
    damage,
    everything,
    read_anew,
    reply,
    some,
)


def test_a_damaged_record_is_put_aside_and_training_goes_on_without_it(bank: LatentBank) -> None:
    plan = a_plan()
    bank.add(reply(plan, [0, 1, 2, 3]), plan)
    source = bank.source(plan, 1)
    damage(bank, 1)
    assert source.read(torch.tensor([0, 1, 2, 1])).category.tolist() == [0, 2, 2, 2]
    assert (len(bank), bank.tables.count("quarantined")) == (3, 1)
    assert everything(bank.source(plan, 1)).category.tolist() == [0, 2, 3]
    damage(bank, 3)
    seen: list[tuple[int, int]] = []
    assert bank.verify(lambda done, total: seen.append((done, total))) == (2, 1)
    assert seen == [(3, 3)]
    assert bank.add(reply(plan, [1]), plan).kept == 1  # taken anew when it comes again
    assert everything(bank.source(plan, 1)).category.tolist() == [0, 1, 2]
    for place in range(3):
        damage(bank, place)
    with pytest.raises(ValueError, match="none opens"):
        source.read(torch.tensor([0]))


def test_a_page_of_a_record_that_is_damaged_costs_that_record_only(bank: LatentBank) -> None:
    plan = replace(a_plan(), network=replace(a_plan().network, latent_grid=(16, 24, 16)))
    coming = reply(plan, [0, 1, 2])
    wide = torch.randn(3, 2, 16, 24, 16)  # a record takes several pages, each of which names the next
    bank.add(replace(coming, examples=replace(coming.examples, latents=wide)), plan)
    path = bank.folder / BANK
    content = bytearray(path.read_bytes())
    page = content.index(ciphertexts(bank)[2][20_000:20_032]) // 16384 * 16384
    content[page : page + 4] = (2**31 - 2).to_bytes(4)
    path.write_bytes(content)
    read_anew(bank)
    assert bank.verify() == (2, 1)
    assert torch.equal(everything(bank.source(plan, 1)).latents, wide[[0, 2]])


def test_records_that_change_places_do_not_open(bank: LatentBank) -> None:
    plan = a_plan()
    bank.add(reply(plan, [0, 1, 2]), plan)
    with bank.tables.writing():
        for before, after in ((1, 9), (2, 1), (9, 2)):
            bank.tables._run("UPDATE records SET number = ? WHERE number = ?", after, before)
    assert bank.verify() == (1, 2)


def test_a_record_that_is_gone_or_no_record_costs_itself_only(bank: LatentBank) -> None:
    plan = a_plan()
    bank.add(reply(plan, [0, 1, 2, 3]), plan)
    with bank.tables.writing():
        bank.tables._run("DELETE FROM records WHERE number = 1")
        bank.tables._run("UPDATE records SET sealed = x'00' WHERE number = 2")
        bank.tables._run("UPDATE records SET sealed = 'words' WHERE number = 3")
    assert bank.verify() == (1, 3)
    assert everything(bank.source(plan, 1)).category.tolist() == [3]


def test_a_file_that_is_no_bank_or_was_cut_short_is_one_line(
    bank: LatentBank, open_bank: Callable[..., LatentBank]
) -> None:
    plan = a_plan()
    bank.add(reply(plan, [0, 1, 2]), plan)
    bank.close()
    path = bank.folder / BANK
    whole = path.read_bytes()
    for content in (whole[: len(whole) // 2], b"no bank at all" * 1000, whole[:1000]):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=BANK) as raised:
            open_bank().verify()
        assert "\n" not in str(raised.value)


def test_a_bank_of_an_earlier_form_is_refused_by_name_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "bank").mkdir()
    (tmp_path / "bank" / "index.sqlite").write_bytes(b"")
    for create in (True, False):
        with pytest.raises(ValueError, match=r"earlier form .* Begin a bank in another folder"):
            LatentBank(tmp_path / "bank", create=create)
    assert [path.name for path in tmp_path.rglob("*")] == ["bank", "index.sqlite"]


def test_a_write_that_is_cut_off_leaves_the_bank_as_it_was(
    bank: LatentBank, open_bank: Callable[..., LatentBank], monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = a_plan()
    bank.add(reply(plan, [0]), plan)
    insert, calls = Tables.insert, iter(range(9))

    def torn(self: Tables, item: Item, sealed: bytes | None = None) -> None:
        if next(calls):
            raise OSError("no space left")
        insert(self, item, sealed)

    with monkeypatch.context() as patched:
        patched.setattr(Tables, "insert", torn)
        with pytest.raises(OSError, match="no space"):
            bank.add(reply(plan, [1, 2], first=1), plan)
    assert len(bank) == 1 and bank.dealt_with(plan, "north", 1) == (1, 99)
    again = open_bank()
    assert again.add(reply(plan, [1, 2], first=1), plan).kept == 2
    assert everything(again.source(plan, 1)).category.tolist() == [0, 1, 2]
    assert again.verify() == (3, 0)


def test_a_first_write_that_is_cut_off_does_not_decide_what_the_bank_is_of(
    bank: LatentBank, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(self: Tables, item: Item, sealed: bytes | None = None) -> None:
        raise OSError("no space left")

    with monkeypatch.context() as patched:
        patched.setattr(Tables, "insert", fails)
        with pytest.raises(OSError, match="no space"):
            bank.add(reply(a_plan("bfloat16"), [0]), a_plan("bfloat16"))
    plan = a_plan()
    assert bank.add(reply(plan, [0]), plan).kept == 1
    assert torch.equal(everything(bank.source(plan, 1)).latents, some([0]).latents)
