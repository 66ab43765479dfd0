"""The latent bank: once, encrypted, in order, withdrawn on request, and never taken down by a bad record."""

import json
import sqlite3
import stat
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from federation.diffusion_plan import DiffusionPlan
from federation.exchanges.latents import LatentsReply
from federation.plan import ReleasePlan, RunPlan, StylePlan, TrainingPlan, VolumePlan
from meduet_models.diffusion.conditions import Examples
from meduet_models.diffusion.settings import DiffusionTraining, TransformerShape
from server.latent_bank.bank import BANK, MARKER, LatentBank
from server.latent_bank.listing import items, summary
from server.latent_bank.records import Codes, DamagedRecord, RecordLayout, Seal
from server.latent_bank.tables import Item, Tables
from tests.worlds import small_network, small_plan

SITES = ("north", "south")


def a_plan(wire_dtype: Any = "float32", **diffusion: Any) -> RunPlan:
    settings: dict[str, Any] = {"policy": "raw", **diffusion}
    return small_plan(
        name="toy",
        seed=7,
        sites=SITES,
        volumes=VolumePlan(modality="mr", shape=(16, 24, 16)),
        network=small_network(width=16),
        training=TrainingPlan(rounds=4, steps_per_round=2, batch_size=4),
        style=StylePlan(minimum_cohort=3),
        release=ReleasePlan(wire_dtype=wire_dtype),
        diffusion=DiffusionPlan(
            transformer=TransformerShape(patch_size=2, width=12, depth=1, heads=2),
            training=DiffusionTraining(),
            **settings,
        ),
    )


def some(numbers: list[int], site: int = 0) -> Examples:
    """Examples that are told by their number, whoever they are of."""
    latents = [torch.randn(2, 4, 6, 4, generator=torch.Generator().manual_seed(n)) for n in numbers]
    spacing = torch.tensor([[0.5, 1.0, n + 1.0] for n in numbers])
    spacing[::2] = torch.nan
    return Examples(
        latents=torch.stack(latents),
        site=torch.full((len(numbers),), site),
        body_part=torch.full((len(numbers),), -1),
        spacing=spacing,
        category=torch.tensor(numbers),
    )


def name(number: int, site: str = "north") -> str:
    return f"{SITES.index(site):016x}{number:016x}"


def reply(
    plan: RunPlan,
    numbers: list[int],
    site: str = "north",
    round_number: int = 1,
    first: int = 0,
    total: int = 99,
) -> LatentsReply:
    return LatentsReply(
        plan_sha256=plan.sha256,
        site=site,
        round=round_number,
        first=first,
        total=total,
        items=tuple(name(n, site) for n in numbers),
        examples=some(numbers, SITES.index(site)),
        wire_dtype=plan.release.wire_dtype,
    )


@pytest.fixture
def open_bank(tmp_path: Path) -> Iterator[Callable[..., LatentBank]]:
    opened: list[LatentBank] = []

    def bank(**more: Any) -> LatentBank:
        opened.append(LatentBank(tmp_path / "bank", **more))
        return opened[-1]

    yield bank
    for one in opened:
        one.close()


@pytest.fixture
def bank(open_bank: Callable[..., LatentBank]) -> LatentBank:
    return open_bank()


def everything(source: Any) -> Examples:
    examples: Examples = source.read(torch.arange(len(source)))
    return examples


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


def ciphertexts(bank: LatentBank) -> dict[int, bytes]:
    """The sealed records by number, as another program reads them."""
    with closing(sqlite3.connect(bank.folder / BANK)) as database:
        return dict(database.execute("SELECT number, sealed FROM records ORDER BY number"))


def damage(bank: LatentBank, place: int, flipped: int = 40) -> None:
    """Flip a bit of the record at this place, where it lies in the file."""
    sealed = list(ciphertexts(bank).values())[place]
    path = bank.folder / BANK
    content = bytearray(path.read_bytes())
    content[content.index(sealed[:200]) + flipped] ^= 1
    path.write_bytes(content)
    read_anew(bank)


def read_anew(bank: LatentBank) -> None:
    """Let go of what is in memory."""
    bank.tables.close()
    bank.tables = Tables(bank.folder / BANK)


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
