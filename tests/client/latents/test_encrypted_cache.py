"""An encrypted cache: the same numbers to the bit, nothing in clear, a key that can be changed or lost."""

import dataclasses
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import client.latents.cache_keys
import storage.files
from client.latents import cache_keys as keys
from client.latents.batches import Batches
from client.latents.cache import LatentCache
from client.latents.cache_files import ClearFiles, DamagedEncoding, Place, SealedArrays, SealedFiles
from client.latents.cache_keys import Opener, cache_keys, rewrap, rotate, seal_all, sealed_files
from client.latents.latent_set import LatentSet
from client.latents.prepared_volumes import volume_path
from client.latents.workers import Job, Workers
from client.scans.cohort import open_cohort
from client.training.pretraining import train_round
from client.training.site_state import SiteState
from client.training.trainee import Trainee
from federation.plan.plan import RunPlan, StylePlan
from meduet_models.meduet import MeDUET
from meduet_models.sharing import home_keys, shared_keys
from meduet_models.tokenizer.tokenizer import Tokenizer, TokenizerSpec, load_tokenizer
from storage.sealed_files import CHUNK_BYTES, SealedFile, SealingKeys, open_sealed, sealed_under, write_sealed
from tests.client.conftest import make_plan
from tests.client.latents.test_cache import PATIENTS, PLAN, Blocks, Site

PASSPHRASE = Opener(None, "correct horse battery")
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def cheap_scrypt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client.latents.cache_keys, "_SCRYPT", {"n": 2**4, "r": 8, "p": 1})


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(tmp_path)


def blocks() -> Tokenizer:
    return Tokenizer(Blocks(), {"kind": "blocks", "channels": 1})


def cache_of(site: Site, opened_by: Opener | None) -> LatentCache:
    files = ClearFiles() if opened_by is None else sealed_files(site.folder, opened_by)
    return LatentCache(site.folder, blocks(), PLAN, files)


def encoded(site: Site, opened_by: Opener | None) -> LatentSet:
    return cache_of(site, opened_by).encode(site.cohort())


def everything(scans: LatentSet) -> list[torch.Tensor]:
    rows = range(len(scans))
    labels = [scans.labels([row]) for row in rows if scans.has_label[row]]
    assert all(label is not None for label in labels)
    return [scans.latents(rows), scans.volumes(rows, PLAN), *(label for label in labels if label is not None)]


def same(one: LatentSet, other: LatentSet) -> bool:
    return all(torch.equal(a, b) for a, b in zip(everything(one), everything(other), strict=True))


def files(site: Site) -> list[Path]:
    return [path for path in site.folder.rglob("*") if path.is_file() and path.name != keys.FILE]


def test_an_encrypted_cache_reads_to_the_bit_what_one_in_clear_does(site: Site, tmp_path: Path) -> None:
    clear = encoded(Site(tmp_path / "other"), None)
    sealed = encoded(site, PASSPHRASE)
    assert same(sealed, clear) and len(sealed) == len(PATIENTS)
    assert sealed.geometry(3).to_dict() == clear.geometry(3).to_dict()
    assert {path.name for path in sealed.files()} == {path.name for path in clear.files()}
    assert cache_of(site, PASSPHRASE).state(site.cohort()).missing == 0


def test_nothing_derived_from_a_patient_lies_in_the_folder_in_clear(site: Site, tmp_path: Path) -> None:
    other = Site(tmp_path / "other")
    for place, opened_by in ((site, PASSPHRASE), (other, None)):
        scans = encoded(place, opened_by)
        everything(scans)  # prepared volumes, too
        cache_of(place, opened_by).encode(place.cohort())
    known = encoded(other, None)
    looked_for = [
        known.latents([0])[0].numpy().tobytes(),
        known.volumes([0], PLAN)[0].numpy().tobytes(),
        b"latents",
    ]
    held = {place: b"".join(path.read_bytes() for path in files(place)) for place in (site, other)}
    assert all(one in held[other] for one in looked_for)
    assert not any(one in held[site] for one in looked_for)
    assert all(sealed_under(path) for path in files(site)) and len(files(site)) >= 2 * len(PATIENTS)


def test_what_lay_there_in_clear_is_sealed_before_anything_is_read(site: Site) -> None:
    before = encoded(site, None)
    expected = everything(before)
    cohort_memo = site.folder / "cohort-0123.json"
    cohort_memo.write_text("Mustermann")
    cut_off = next(iter(before.files())).with_name(".left.safetensors.x")
    cut_off.write_bytes(b"a scan")
    os.utime(cut_off, (time.time() - 7200, time.time() - 7200))
    calls = encoded(site, PASSPHRASE)
    assert all(torch.equal(a, b) for a, b in zip(everything(calls), expected, strict=True))
    assert all(sealed_under(path) for path in files(site))
    assert not cohort_memo.exists() and not cut_off.exists()


@pytest.mark.parametrize("place", [3, 70, -1])
def test_a_tampered_encoding_is_made_again_and_never_trained_on(site: Site, place: int) -> None:
    scans = encoded(site, PASSPHRASE)
    expected = everything(scans)
    path = scans.path(2)
    changed = bytearray(path.read_bytes())
    changed[place] ^= 1
    path.write_bytes(changed)
    if place == -1:  # the head still opens
        with pytest.raises(DamagedEncoding, match="prepare"):
            encoded(site, PASSPHRASE).latents([2])
    again = encoded(site, PASSPHRASE)
    assert all(torch.equal(a, b) for a, b in zip(everything(again), expected, strict=True))


def test_a_scan_put_in_the_place_of_another_is_never_trained_on(site: Site) -> None:
    scans = encoded(site, PASSPHRASE)
    expected = everything(scans)
    scans.path(2).write_bytes(scans.path(3).read_bytes())
    with pytest.raises(DamagedEncoding, match="prepare"):
        scans.latents([2])
    again = encoded(site, PASSPHRASE)
    assert all(torch.equal(a, b) for a, b in zip(everything(again), expected, strict=True))


def test_a_volume_of_another_scan_is_not_taken_for_this_ones(site: Site) -> None:
    scans = encoded(site, PASSPHRASE)
    expected = everything(scans)
    volume_path(scans.path(0)).write_bytes(volume_path(scans.path(1)).read_bytes())
    again = encoded(site, PASSPHRASE)
    assert all(torch.equal(a, b) for a, b in zip(everything(again), expected, strict=True))


def test_workers_seal_what_they_write(site: Site) -> None:
    tokenizer = load_tokenizer(TokenizerSpec())
    sealed = sealed_files(site.folder, PASSPHRASE)
    plan = dataclasses.replace(PLAN, shape=(16, 16, 16))
    for encodes in (True, False):
        cache = LatentCache(site.folder, tokenizer, plan, sealed)
        job = Job(site.folder, plan, TokenizerSpec(), tokenizer.sha256, encodes, sealed)
        with Workers(job, 1) as workers:
            judges = cache.judges(workers=workers)
            cohort = open_cohort(site.root, plan=plan, split_salt="salt", judges=judges)
            scans = cache.encode(cohort, judges=judges)
        assert judges.num_encoded == len(PATIENTS) and all(map(sealed_under, scans.files()))
        for path in scans.files():
            path.unlink()


def fresh(plan: RunPlan) -> tuple[dict[str, torch.Tensor], SiteState]:
    model = MeDUET(plan.network, len(plan.sites), seed=plan.seed)
    weights = model.state_dict()
    home = home_keys(model, plan.style.head, plan.aggregation.method)
    shared = shared_keys(model, plan.style.head, plan.aggregation.method)
    return {n: weights[n] for n in shared}, SiteState(round=0, home={n: weights[n] for n in home})


def test_a_round_trained_from_an_encrypted_cache_ends_in_the_same_bits(site: Site, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(TokenizerSpec())
    objective = make_plan().objective
    weights = dataclasses.replace(objective.weights, invariance=0.0, restyled_reconstruction=0.0)
    made = make_plan(
        style=StylePlan(exchange="none", minimum_cohort=3),
        objective=dataclasses.replace(objective, weights=weights),
    )
    plan = dataclasses.replace(
        made,
        volumes=dataclasses.replace(made.volumes, modality="t1"),
        network=dataclasses.replace(made.network, latent_channels=tokenizer.latent_channels),
    )
    updates = []
    for name in ("clear", "sealed"):
        folder = tmp_path / name
        kept = ClearFiles() if name == "clear" else sealed_files(folder, PASSPHRASE)
        cohort = open_cohort(site.root, plan=plan.volumes, split_salt="s", split_fractions=(1.0, 0.0, 0.0))
        scans = LatentCache(folder, tokenizer, plan.volumes, kept).encode(cohort)
        shared, state = fresh(plan)
        trainee = Trainee.of(plan, shared, state, CPU)
        batches = Batches(scans, plan, None)
        updates.append(train_round(trainee, batches, plan, 1, b"1" * 32, state.home, lambda step, loss: None))
    clear, sealed = updates
    assert clear.examples == sealed.examples == len(PATIENTS)
    assert any(bool(tensor.any()) for tensor in clear.update.values())
    assert all(torch.equal(clear.update[name], sealed.update[name]) for name in clear.update)


def test_a_crop_opens_the_chunks_it_lies_in_and_no_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    random = np.random.default_rng(0)
    before, array = random.bytes(777), random.random((5, 64, 60, 50), np.float32)
    sealing = SealingKeys(bytes(32))
    content = before + array.tobytes()
    write_sealed(tmp_path / "a", b"12345678{}", [content], len(content), sealing)
    stored = SealedArrays(open_sealed(tmp_path / "a", sealing))
    place = Place(len(before), np.dtype("<f4"), array.shape)
    opened: list[int] = []
    fill = SealedFile.fill

    def counted(self: SealedFile, buffer: memoryview, begin: int, chunks: Any = None) -> None:
        opened.extend(chunks if chunks is not None else range(-(-self.size // CHUNK_BYTES)))
        fill(self, buffer, begin, chunks)

    monkeypatch.setattr(SealedFile, "fill", counted)
    for number in range(30):
        starts = [int(random.integers(0, n)) for n in array.shape]
        inside = tuple(
            slice(a, int(random.integers(a, n + 1))) for a, n in zip(starts, array.shape, strict=True)
        )
        assert np.array_equal(stored.array(place, inside), array[inside]), number
    opened.clear()
    corner = (slice(0, 1), slice(0, 16), slice(0, 16), slice(0, 16))
    assert np.array_equal(stored.array(place, corner), array[corner]) and opened == [0]
    assert np.array_equal(stored.array(place), array)


def test_a_rotation_seals_all_anew_and_the_old_key_opens_nothing(site: Site) -> None:
    expected = everything(encoded(site, PASSPHRASE))
    old = cache_keys(site.folder, PASSPHRASE)
    assert rotate(site.folder, PASSPHRASE) == len(files(site))
    new = cache_keys(site.folder, PASSPHRASE)
    assert new.current != old.current and not new.earlier
    for path in files(site):
        with pytest.raises(ValueError, match="a key that is not here"):
            open_sealed(path, old)
    again = encoded(site, PASSPHRASE)
    assert all(torch.equal(a, b) for a, b in zip(everything(again), expected, strict=True))


class Killed(BaseException):
    """As a kill: nothing catches it."""


def test_a_rotation_killed_at_any_write_goes_on_and_loses_nothing(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = everything(encoded(site, PASSPHRASE))
    replace, left = Path.replace, 0

    def some(self: Path, target: Path) -> Path:
        nonlocal left
        if left == 0:
            raise Killed
        left -= 1
        return replace(self, target)

    kills, finished = 0, False
    while not finished:
        before = cache_keys(site.folder, PASSPHRASE)
        left = kills
        with monkeypatch.context() as patch:
            patch.setattr(storage.files.Path, "replace", some)
            try:
                rotate(site.folder, PASSPHRASE)
                finished = True
            except Killed:
                kills += 1
        for path in files(site):  # whatever was done: all that is there opens
            open_sealed(path, cache_keys(site.folder, PASSPHRASE)).values()
        if not finished:
            rotate(site.folder, PASSPHRASE)
            assert cache_keys(site.folder, PASSPHRASE).current != before.current
            assert not cache_keys(site.folder, PASSPHRASE).earlier
    assert kills == len(files(site)) + 2
    again = encoded(site, PASSPHRASE)
    assert all(torch.equal(a, b) for a, b in zip(everything(again), expected, strict=True))


def test_what_opens_the_cache_can_be_changed_without_sealing_anew(site: Site, tmp_path: Path) -> None:
    expected = everything(encoded(site, PASSPHRASE))
    before = {path: path.read_bytes() for path in files(site)}
    by_file = Opener(tmp_path / "keys" / "cache.bin")
    rewrap(site.folder, PASSPHRASE, by_file)
    assert {path: path.read_bytes() for path in files(site)} == before
    with pytest.raises(ValueError, match="Expected a key file, which opens"):
        cache_keys(site.folder, PASSPHRASE)
    again = encoded(site, by_file)
    assert all(torch.equal(a, b) for a, b in zip(everything(again), expected, strict=True))
    by_file.key_file.write_bytes(bytes(32))  # type: ignore[union-attr]
    with pytest.raises(ValueError, match="the key file that opens"):
        cache_keys(site.folder, by_file)
    by_file.key_file.unlink()  # type: ignore[union-attr]
    with pytest.raises(ValueError, match="Expected the cache's key file"):
        cache_keys(site.folder, by_file)


def one_line(raised: pytest.ExceptionInfo[ValueError]) -> str:
    text = str(raised.value)
    assert "\n" not in text and "horse" not in text
    return text


def test_a_wrong_short_or_missing_passphrase_is_one_line(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="at least 12 characters; got 5") as raised:
        cache_keys(site.folder, Opener(None, "short"))
    assert not (site.folder / keys.FILE).exists() and one_line(raised)
    encoded(site, PASSPHRASE)
    with pytest.raises(ValueError, match="Expected the passphrase that opens") as raised:
        cache_keys(site.folder, Opener(None, "another long passphrase"))
    assert one_line(raised)
    monkeypatch.delenv(keys.PASSPHRASE, raising=False)
    with pytest.raises(ValueError, match="MEDUET_CACHE_PASSPHRASE; it is not set"):
        keys.opener(None)


def test_a_lost_key_is_said_and_no_new_one_is_made_over_it(site: Site) -> None:
    encoded(site, PASSPHRASE)
    (site.folder / keys.FILE).unlink()
    with pytest.raises(ValueError, match="Restore it, or remove the cache's folder"):
        cache_keys(site.folder, PASSPHRASE)
    assert not (site.folder / keys.FILE).exists()


def test_no_change_of_the_key_file_goes_unnoticed(site: Site) -> None:
    cache_keys(site.folder, PASSPHRASE)
    path = site.folder / keys.FILE
    whole = path.read_text()
    said = json.loads(whole)
    for name in ("salt", "nonce", "sealed"):
        for place in range(len(said[name])):
            digit = "0" if said[name][place] != "0" else "1"
            changed = said[name][:place] + digit + said[name][place + 1 :]
            path.write_text(json.dumps({**said, name: changed}))
            with pytest.raises(ValueError, match="does not, or the file was changed"):
                cache_keys(site.folder, PASSPHRASE)
    random = np.random.default_rng(0)
    for _ in range(300):
        place = int(random.integers(len(whole)))
        path.write_text(whole[:place] + chr(int(random.integers(32, 127))) + whole[place + 1 :])
        if json_or_none(path) == said:
            continue
        with pytest.raises(ValueError, match=r"^Expected") as raised:
            cache_keys(site.folder, PASSPHRASE)
        assert one_line(raised)


def json_or_none(path: Path) -> object:
    try:
        return json.loads(path.read_text())
    except ValueError:
        return None


STRANGE: dict[str, Callable[[dict[str, Any]], object]] = {
    "a list": lambda said: [],
    "a field too few": lambda said: {n: v for n, v in said.items() if n != "salt"},
    "another form": lambda said: {**said, "form": 2},
    "no hex": lambda said: {**said, "nonce": "zz"},
    "a number": lambda said: {**said, "sealed": 12},
    "too long": lambda said: {**said, "sealed": "00" * 10_000},
    "another opener": lambda said: {**said, "opened_by": "anybody"},
}


@pytest.mark.parametrize("strange", STRANGE.values(), ids=STRANGE.keys())
def test_a_key_file_of_another_kind_is_refused(site: Site, strange: Callable[[Any], object]) -> None:
    cache_keys(site.folder, PASSPHRASE)
    path = site.folder / keys.FILE
    path.write_text(json.dumps(strange(json.loads(path.read_text()))))
    with pytest.raises(ValueError, match="Expected the key of an encrypted cache"):
        cache_keys(site.folder, PASSPHRASE)


def test_files_of_another_key_are_removed_and_made_again(site: Site) -> None:
    expected = everything(encoded(site, PASSPHRASE))
    path = sorted(site.folder.glob("??/*.safetensors"))[0]
    write_sealed(path, b"x", [b"y"], 1, SealingKeys(bytes(32)))
    assert seal_all(site.folder, cache_keys(site.folder, PASSPHRASE)) == 1 and not path.exists()
    again = cache_of(site, PASSPHRASE).encode(site.cohort())
    assert isinstance(sealed_files(site.folder, PASSPHRASE), SealedFiles)
    assert all(torch.equal(a, b) for a, b in zip(everything(again), expected, strict=True))
