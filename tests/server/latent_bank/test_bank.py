"""The latent bank: once, encrypted, in order."""

import json
import stat
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from federation.plan.plan import ReleasePlan
from scans.volume_plan import VolumePlan
from server.latent_bank.bank import BANK, MARKER, LatentBank
from server.latent_bank.listing import items, summary
from server.latent_bank.records import Codes, DamagedRecord, RecordLayout, Seal
from tests.server.latent_bank.small_bank import (
    a_plan,
    ciphertexts,
    everything,
    name,
    reply,
    some,
)


def test_what_went_in_comes_out_in_the_order_of_rounds_sites_and_places(
    bank: LatentBank, open_bank: Callable[..., LatentBank]
) -> None:
    plan = a_plan()
    bank.add(reply(plan, [6], "north", round_number=2), plan)  # comes first, but is of a later round
    bank.add(reply(plan, [4, 5], "south"), plan)
    bank.add(reply(plan, [2, 3], "north", first=2), plan)
    bank.add(reply(plan, [0, 1], "north"), plan)
    assert len(bank) == 7
    for again in (bank, open_bank()):
        read = everything(again.source(plan, 2))
        assert read.category.tolist() == [0, 1, 2, 3, 4, 5, 6]
        assert torch.equal(read.latents, some(list(range(7))).latents)
        assert read.site.tolist() == [0, 0, 0, 0, 1, 1, 0]
        assert read.spacing[1].tolist() == [0.5, 1.0, 2.0] and read.spacing[0].isnan().all()
        assert len(again.source(plan, 1)) == 6
        assert again.source(plan, 1).read(torch.tensor([4, 0, 4])).category.tolist() == [4, 0, 4]


def test_an_item_is_taken_once_however_often_it_comes(bank: LatentBank) -> None:
    plan = a_plan()
    assert vars(bank.add(reply(plan, [0, 1]), plan))["kept"] == 2
    again = bank.add(reply(plan, [0, 1, 2]), plan)
    assert (again.kept, again.known) == (1, 2)
    later = bank.add(reply(plan, [1, 2], round_number=2), plan)
    assert (later.kept, later.known) == (0, 2)
    assert len(bank) == 3 and bank.dealt_with(plan, "north", 1) == (3, 99)


def test_the_same_latents_under_another_name_are_counted_and_not_stored(bank: LatentBank) -> None:
    plan = a_plan()
    bank.add(reply(plan, [0, 1]), plan)
    before = len(ciphertexts(bank))
    assert bank.add(reply(plan, [1], "south"), plan).duplicate == 1
    assert len(ciphertexts(bank)) == before
    twice = replace(reply(plan, [7, 7]), items=(name(7), name(8)))
    added = bank.add(twice, plan)
    assert (added.kept, added.duplicate) == (1, 1)


def test_the_centre_keeps_no_more_of_a_site_than_the_plan_says(bank: LatentBank) -> None:
    plan = a_plan(items_per_site=3)
    added = bank.add(reply(plan, [0, 1, 2, 3, 4], total=5), plan)
    assert (added.kept, added.over_quota) == (3, 2)
    assert bank.add(reply(plan, [5], "south"), plan).kept == 1
    assert bank.add(reply(plan, [6], round_number=2), plan).over_quota == 1


def test_nothing_on_the_disk_shows_a_latent_or_is_readable_by_others(
    bank: LatentBank, tmp_path: Path
) -> None:
    plan = a_plan()
    bank.add(reply(plan, [0]), plan)
    row = some([0]).latents.numpy().tobytes()
    files = [path for path in (tmp_path / "bank").rglob("*") if path.is_file()]
    assert {path.name for path in files} == {BANK, f"{BANK}-journal", MARKER}
    for path in files:
        assert row[:16] not in path.read_bytes()
        assert path.name == MARKER or stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE((tmp_path / "bank").stat().st_mode) == 0o700
    assert stat.S_IMODE((tmp_path / "bank.key").stat().st_mode) == 0o600
    assert "patient data" in (tmp_path / "bank" / MARKER).read_text()
    assert bank.patient_data is True


def test_a_key_that_is_anothers_absent_or_open_to_others_opens_nothing(
    bank: LatentBank, open_bank: Callable[..., LatentBank], tmp_path: Path
) -> None:
    plan = a_plan()
    bank.add(reply(plan, [0]), plan)
    key = tmp_path / "bank.key"
    whole = key.read_bytes()
    key.write_bytes(bytes(32))
    with pytest.raises(ValueError, match="it is another's"):
        open_bank()
    key.write_bytes(whole[:5])
    with pytest.raises(ValueError, match="32 bytes"):
        open_bank()
    key.write_bytes(whole)
    key.chmod(0o640)
    with pytest.raises(ValueError, match="mode is 640"):
        open_bank()
    key.unlink()
    with pytest.raises(ValueError, match="Restore it"):
        open_bank()
    assert not key.exists()  # another key is not made for a bank that has one
    with pytest.raises(ValueError, match="outside the bank"):
        open_bank(key=tmp_path / "bank" / "key")
    with pytest.raises(ValueError, match="there is none"):
        LatentBank(tmp_path / "elsewhere", create=False)


def test_an_empty_bank_and_one_whose_policy_the_plan_forbids_are_refused(bank: LatentBank) -> None:
    plan = a_plan()
    with pytest.raises(ValueError, match=r"up to round 1 .* it has none"):
        bank.source(plan, 1)
    bank.add(reply(plan, [0], round_number=2), plan)
    with pytest.raises(ValueError, match=r"up to round 1 .* it has none"):
        bank.source(plan, 1)
    for other in (a_plan(policy="federated", rounds=3), replace(plan, diffusion=None)):
        with pytest.raises(ValueError, match="it holds raw latents"):
            bank.source(other, 2)


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"tokenizer_sha256": "1" * 64}, "tokenizer"),
        ({"sites": ("south", "north")}, "sites"),
        ({"volumes": VolumePlan(modality="mr", shape=(16, 24, 16), spacing_mm=(2.0, 2.0, 2.0))}, "volumes"),
        ({"release": ReleasePlan(wire_dtype="bfloat16")}, "layout"),
    ],
)
def test_a_bank_of_something_else_is_not_mixed_with_this_plans(
    bank: LatentBank, change: dict[str, Any], what: str
) -> None:
    plan = a_plan()
    bank.add(reply(plan, [0]), plan)
    other = replace(plan, **change)
    with pytest.raises(ValueError, match=f"of this {what}"):
        bank.add(reply(other, [1]), other)
    with pytest.raises(ValueError, match=f"of this {what}"):
        bank.source(other, 1)
    assert len(bank) == 1
    more_rounds = replace(plan, name="another run of the same study")
    assert bank.add(reply(more_rounds, [0, 1]), more_rounds).known == 1


def test_an_item_of_another_site_is_refused(bank: LatentBank) -> None:
    plan = a_plan()
    bank.add(reply(plan, [0]), plan)
    stolen = replace(reply(plan, [1], "south"), items=(name(0),))
    with pytest.raises(ValueError, match="released by 'north'"):
        bank.add(stolen, plan)
    assert len(bank) == 1


def test_label_maps_bfloat16_and_codes_come_back(bank: LatentBank) -> None:
    plan = a_plan("bfloat16", conditions=("label_map",), labels=3)
    maps = torch.rand(2, 3, 4, 6, 4)
    maps[0] = torch.nan
    codes = Codes(content=torch.randn(2, 5), style=torch.randn(2, 4), encoder_sha256="e" * 64)
    coming = replace(reply(plan, [0, 1]), examples=replace(some([0, 1]), label_map=maps))
    bank.add(coming, plan, codes)
    source = bank.source(plan, 1)
    read = everything(source)
    assert torch.equal(read.latents, some([0, 1]).latents.bfloat16().float())
    torch.testing.assert_close(read.label_map, maps, rtol=0, atol=0, equal_nan=True)
    content, style = source.codes(torch.tensor([1]))
    assert torch.equal(content, codes.content[1:]) and torch.equal(style, codes.style[1:])
    assert {item["encoder"] for item in items(bank)} == {"e" * 64}
    with pytest.raises(ValueError, match="of this layout"):
        bank.add(coming, plan)


def test_a_layout_says_what_it_holds_in_words_that_come_back() -> None:
    layout = RecordLayout(latents=(2, 4, 6, 4), dtype="bfloat16", labels=3, content=5)
    assert RecordLayout.from_json(layout.to_json()) == layout
    assert layout.record.itemsize == 2 * 192 + 4 * (3 + 3 + 3 * 96 + 5)


def test_every_item_is_listed_with_where_it_comes_from(bank: LatentBank) -> None:
    plan = a_plan()
    bank.add(reply(plan, [0, 1]), plan)
    bank.add(reply(plan, [1], "south"), plan)
    listed = list(items(bank))
    assert [(one["item"], one["site"], one["state"]) for one in listed] == [
        (name(0), "north", "kept"),
        (name(1), "north", "kept"),
        (name(1, "south"), "south", "duplicate"),
    ]
    assert {(one["policy"], one["plan"], one["round"]) for one in listed} == {("raw", plan.sha256, 1)}
    json.dumps(summary(bank))


def test_a_sealed_record_opens_with_its_own_header_under_its_own_key_only() -> None:
    seal, into = Seal(bytes(32)), bytearray(8)
    sealed = seal.close(b"a record", b"header")
    assert b"a record" not in sealed and seal.close(b"a record", b"header") != sealed
    seal.open(sealed, b"header", memoryview(into))
    assert into == b"a record"
    for other, header, read in (
        (sealed, b"another", seal),
        (sealed, b"header", Seal(bytes(31) + b"1")),
        (sealed[:-1] + bytes([sealed[-1] ^ 1]), b"header", seal),
        (sealed[:-1], b"header", seal),
        (b"", b"header", seal),
    ):
        with pytest.raises(DamagedRecord):
            read.open(other, header, memoryview(bytearray(8)))
