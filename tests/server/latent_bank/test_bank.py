"""The latent bank: once, encrypted, in order, withdrawn on request, and never taken down by a bad record."""

import json
import os
import stat
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from federation.diffusion_plan import DiffusionPlan
from federation.exchanges.latents import LatentsReply
from federation.plan import AggregationPlan, ReleasePlan, RunPlan, StylePlan, TrainingPlan, VolumePlan
from meduet_models.diffusion.conditions import Examples
from meduet_models.diffusion.settings import DiffusionTraining, TransformerShape
from meduet_models.meduet import NetworkConfig
from meduet_models.objective import ObjectiveConfig
from server.latent_bank.bank import MARKER, LatentBank
from server.latent_bank.records import Codes, RecordLayout
from server.latent_bank.shards import DamagedRecord, Shards
from server.latent_listing import items, summary

SITES = ("north", "south")


def a_plan(wire_dtype: Any = "float32", **diffusion: Any) -> RunPlan:
    settings: dict[str, Any] = {"policy": "raw", **diffusion}
    return RunPlan(
        name="toy",
        seed=7,
        sites=SITES,
        tokenizer_sha256="0" * 64,
        volumes=VolumePlan(modality="mr", shape=(16, 24, 16)),
        network=NetworkConfig(
            latent_channels=2, latent_grid=(4, 6, 4), patch_size=2, width=16, depth=1, heads=2,
            decoder_width=12, decoder_depth=1, decoder_heads=2,
        ),
        objective=ObjectiveConfig(),
        training=TrainingPlan(rounds=4, steps_per_round=2, batch_size=4),
        style=StylePlan(minimum_cohort=3),
        aggregation=AggregationPlan(),
        release=ReleasePlan(wire_dtype=wire_dtype),
        diffusion=DiffusionPlan(
            transformer=TransformerShape(patch_size=2, width=12, depth=1, heads=2),
            training=DiffusionTraining(),
            **settings,
        ),
    )  # fmt: skip


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
    plan: RunPlan, numbers: list[int], site: str = "north", round: int = 1, first: int = 0, total: int = 99
) -> LatentsReply:
    return LatentsReply(
        plan_sha256=plan.sha256,
        site=site,
        round=round,
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
    told: Examples = source.read(torch.arange(len(source)))
    return told


def test_what_went_in_comes_out_in_the_order_of_rounds_sites_and_places(
    bank: LatentBank, open_bank: Callable[..., LatentBank]
) -> None:
    plan = a_plan()
    bank.add(reply(plan, [6], "north", round=2), plan)  # comes first, but is of a later round
    bank.add(reply(plan, [4, 5], "south"), plan)
    bank.add(reply(plan, [2, 3], "north", first=2), plan)
    bank.add(reply(plan, [0, 1], "north"), plan)
    assert len(bank) == 7
    for again in (bank, open_bank()):
        told = everything(again.source(plan, 2))
        assert told.category.tolist() == [0, 1, 2, 3, 4, 5, 6]
        assert torch.equal(told.latents, some(list(range(7))).latents)
        assert told.site.tolist() == [0, 0, 0, 0, 1, 1, 0]
        assert told.spacing[1].tolist() == [0.5, 1.0, 2.0] and told.spacing[0].isnan().all()
        assert len(again.source(plan, 1)) == 6
        assert again.source(plan, 1).read(torch.tensor([4, 0, 4])).category.tolist() == [4, 0, 4]


def test_an_item_is_taken_once_however_often_it_comes(bank: LatentBank) -> None:
    plan = a_plan()
    assert vars(bank.add(reply(plan, [0, 1]), plan))["kept"] == 2
    again = bank.add(reply(plan, [0, 1, 2]), plan)
    assert (again.kept, again.known) == (1, 2)
    later = bank.add(reply(plan, [1, 2], round=2), plan)
    assert (later.kept, later.known) == (0, 2)
    assert len(bank) == 3 and bank.dealt_with(plan, "north", 1) == (3, 99)


def test_the_same_latents_under_another_name_are_counted_and_not_stored(
    bank: LatentBank, tmp_path: Path
) -> None:
    plan = a_plan()
    bank.add(reply(plan, [0, 1]), plan)
    size = sum(path.stat().st_size for path in (tmp_path / "bank" / "shards").iterdir())
    assert bank.add(reply(plan, [1], "south"), plan).duplicate == 1
    assert sum(path.stat().st_size for path in (tmp_path / "bank" / "shards").iterdir()) == size
    twice = replace(reply(plan, [7, 7]), items=(name(7), name(8)))
    added = bank.add(twice, plan)
    assert (added.kept, added.duplicate) == (1, 1)


def test_the_centre_keeps_no_more_of_a_site_than_the_plan_says(bank: LatentBank) -> None:
    plan = a_plan(items_per_site=3)
    added = bank.add(reply(plan, [0, 1, 2, 3, 4], total=5), plan)
    assert (added.kept, added.over_quota) == (3, 2)
    assert bank.add(reply(plan, [5], "south"), plan).kept == 1
    assert bank.add(reply(plan, [6], round=2), plan).over_quota == 1


def test_nothing_on_the_disk_shows_a_latent_or_is_readable_by_others(
    bank: LatentBank, tmp_path: Path
) -> None:
    plan = a_plan()
    bank.add(reply(plan, [0]), plan)
    row = some([0]).latents.numpy().tobytes()
    files = [path for path in (tmp_path / "bank").rglob("*") if path.is_file()]
    assert {path.name for path in files} == {"index.sqlite", MARKER, "00000.shard"}
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


def damage(bank: LatentBank, slot: int, flipped: int = 40) -> None:
    shard, record = bank.place(slot)
    path = bank.folder / "shards" / f"{shard:05d}.shard"
    size = path.stat().st_size // bank.index.last_number()
    with path.open("r+b") as file:
        file.seek(record * size + flipped)
        byte = file.read(1)
        file.seek(record * size + flipped)
        file.write(bytes([byte[0] ^ 1]))


def test_a_damaged_record_is_put_aside_and_training_goes_on_without_it(bank: LatentBank) -> None:
    plan = a_plan()
    bank.add(reply(plan, [0, 1, 2, 3]), plan)
    source = bank.source(plan, 1)
    damage(bank, 1)
    assert source.read(torch.tensor([0, 1, 2, 1])).category.tolist() == [0, 2, 2, 2]
    assert (len(bank), bank.index.count("quarantined")) == (3, 1)
    assert everything(bank.source(plan, 1)).category.tolist() == [0, 2, 3]
    damage(bank, 3)
    seen: list[tuple[int, int]] = []
    assert bank.verify(lambda done, total: seen.append((done, total))) == (2, 1)
    assert seen == [(3, 3)]
    assert bank.add(reply(plan, [1]), plan).kept == 1  # taken anew when it comes again
    assert everything(bank.source(plan, 1)).category.tolist() == [0, 1, 2]
    for slot in (0, 2, 4):
        damage(bank, slot)
    with pytest.raises(ValueError, match="none opens"):
        source.read(torch.tensor([0]))


def test_records_that_change_places_do_not_open(bank: LatentBank) -> None:
    plan = a_plan()
    bank.add(reply(plan, [0, 1, 2]), plan)
    path = bank.folder / "shards" / "00000.shard"
    content = path.read_bytes()
    size = len(content) // 3
    path.write_bytes(content[size : 2 * size] + content[:size] + content[2 * size :])
    assert bank.verify() == (1, 2)


def test_a_shard_that_was_cut_short_or_is_gone_costs_its_records_only(bank: LatentBank) -> None:
    plan = a_plan()
    bank.add(reply(plan, [0, 1, 2]), plan)
    path = bank.folder / "shards" / "00000.shard"
    os.truncate(path, path.stat().st_size - 1)
    assert bank.verify() == (2, 1)
    path.unlink()
    fresh = LatentBank(bank.folder)
    assert fresh.verify() == (0, 2)
    with pytest.raises(ValueError, match="it has none"):
        fresh.source(plan, 1)
    fresh.close()


def test_a_write_that_is_cut_off_leaves_the_bank_as_it_was(
    bank: LatentBank, open_bank: Callable[..., LatentBank], monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = a_plan()
    bank.add(reply(plan, [0]), plan)
    write = Shards.write

    def torn(self: Shards, first: int, records: Any) -> None:
        write(self, first, records[:1])
        raise OSError("no space left")

    with monkeypatch.context() as patched:
        patched.setattr(Shards, "write", torn)
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
    def fails(self: Shards, first: int, records: Any) -> None:
        raise OSError("no space left")

    with monkeypatch.context() as patched:
        patched.setattr(Shards, "write", fails)
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
    bank.add(reply(plan, [3], round=2), plan)
    bank.learned(tmp_path / "late.safetensors", "b" * 64, 2)
    source = bank.source(plan, 2)
    path = bank.folder / "shards" / "00000.shard"
    size = path.stat().st_size // 4
    withdrawal = bank.forget(site="north")
    assert withdrawal.items == 3
    assert [Path(model).name for model in withdrawal.models] == ["early.safetensors", "late.safetensors"]
    assert {Path(m.path).name: (m.items, m.withdrawn) for m in bank.models()} == {
        "early.safetensors": (3, 2),
        "late.safetensors": (4, 3),
    }
    content = path.read_bytes()
    assert content[: 2 * size] == bytes(2 * size) and content[3 * size :] == bytes(size)
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
    told = summary(bank)["sites"]
    assert (told["north"]["withdrawn"], told["north"]["site_withdrew"], told["south"]["kept"]) == (3, True, 1)


def test_an_item_is_forgotten_with_its_twins_and_models_of_earlier_rounds_are_left_alone(
    bank: LatentBank, tmp_path: Path
) -> None:
    plan = a_plan()
    bank.add(reply(plan, [0, 1]), plan)
    bank.learned(tmp_path / "m.safetensors", "a" * 64, 1)
    bank.add(reply(plan, [5], round=2), plan)
    bank.add(reply(plan, [5], "south", round=2), plan)
    assert bank.forget(item=name(5)).items == 2
    assert bank.models()[0].withdrawn == 0
    added = bank.add(reply(plan, [5], "south", round=2), plan)
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
    bank.add(reply(plan, [0], round=2), plan)
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
    told = everything(source)
    assert torch.equal(told.latents, some([0, 1]).latents.bfloat16().float())
    torch.testing.assert_close(told.label_map, maps, rtol=0, atol=0, equal_nan=True)
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
    told = list(items(bank))
    assert [(one["item"], one["site"], one["state"], one["record"]) for one in told] == [
        (name(0), "north", "kept", 0),
        (name(1), "north", "kept", 1),
        (name(1, "south"), "south", "duplicate", None),
    ]
    assert {(one["policy"], one["plan"], one["round"]) for one in told} == {("raw", plan.sha256, 1)}
    json.dumps(summary(bank))


def test_records_go_on_in_the_next_shard(tmp_path: Path) -> None:
    shards = Shards(tmp_path / "s", bytes(range(32)), 8, shard_bytes=3 * (8 + 28))
    written = [(f"h{n}".encode(), f"record {n}".encode()[:8]) for n in range(8)]
    shards.write(0, written[:2])
    shards.write(2, written[2:])
    assert sorted(path.name for path in (tmp_path / "s").iterdir()) == [f"0000{n}.shard" for n in range(3)]
    for slot, (header, plain) in enumerate(written):
        into = bytearray(8)
        shards.read(slot, header, memoryview(into))
        assert bytes(into) == plain
    with pytest.raises(DamagedRecord):
        shards.read(3, b"h4", memoryview(bytearray(8)))
    with pytest.raises(DamagedRecord):
        shards.read(8, b"h8", memoryview(bytearray(8)))
    with pytest.raises(DamagedRecord):
        shards.read(99, b"h", memoryview(bytearray(8)))
