"""The latent bank: what sites released, encrypted at the centre, until it is withdrawn. PATIENT DATA, but for
latents with noise, which are labelled so (`synthetic`, `aggregate`), with their epsilon.

Takes items once, however often they come; keeps one of those with the same latents; keeps no more of a site
than the plan says. A site or an item that is withdrawn is overwritten, never taken again, and counted at
every model that learned from it. A record that does not open is put aside and training goes on without it.
What this file does not do: ask sites (`server/exchanges/latents.py`), encrypt (`records.py`), lay out the
file (`tables.py`), decide what a site releases (`client/exchanges/latents.py`).

In the folder: `bank.sqlite` and a file that says what this is. The key lies beside the folder.
"""

import dataclasses
import hashlib
import itertools
import json
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from federation.exchanges.latents import LatentsReply, ToldLatents, banked, is_item, opened
from federation.exchanges.private_rounds import run_epsilon
from federation.plan.plan import RunPlan
from federation.wire.sealing import recipient_key, recipient_of
from meduet_models.published.expiry import EXPIRES, check_unexpired
from server.latent_bank.records import Codes, DamagedRecord, RecordLayout, Seal, key_beside, read_key
from server.latent_bank.source import LatentSource
from server.latent_bank.tables import STATES, Item, Origin, Tables
from storage.files import private_folder

BANK, MARKER = "bank.sqlite", "PATIENT-DATA.txt"
_EARLIER = "index.sqlite"
"""What a bank of an earlier form has in its folder."""
_MARKER_TEXT = """This folder holds latents that sites released: of patients' scans, from which these can be
reconstructed, or, under a plan with privacy, synthetic ones. Unless `meduet-server bank list` says that there
are no raw latents, it is patient data, encrypted under a key that lies beside the folder. Do not copy, share
or publish it. `meduet-server bank forget` takes a site or an item out.
"""
_AT_ONCE = 64
_TERMS = "terms of"

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Added:
    """What became of the items of one answer."""

    kept: int = 0
    """New in the bank."""
    known: int = 0
    """There before."""
    duplicate: int = 0
    """With the latents of another item; noted, not stored."""
    withdrawn: int = 0
    """Withdrawn before, or of a site that withdrew."""
    over_quota: int = 0
    """More than the plan lets the centre keep of a site."""


@dataclass(frozen=True, kw_only=True)
class TrainedModel:
    """A model that learned from the bank."""

    path: str
    sha256: str
    last_round: int
    """It learned from what was released up to this round."""
    items: int
    """Items there were then."""
    withdrawn: int
    """How many of them were withdrawn since; above 0, the model should be trained again without them."""


@dataclass(frozen=True, kw_only=True)
class Withdrawal:
    """What a withdrawal did."""

    items: int
    """Items that were taken out."""
    models: tuple[str, ...]
    """Files of the models that had learned from one of them."""


class LatentBank:
    """A bank in `folder`; its key in the file `key` (default: `<folder>.key`), which is made with the bank.

    Raises `ValueError` when there is no bank and `create` is false, when the key is absent, readable by
    others or another bank's. Several threads may read while one adds.
    """

    def __init__(self, folder: Path, key: Path | None = None, *, create: bool = True) -> None:
        self.folder = folder
        self._key_path = key or key_beside(folder)
        if folder.resolve() in self._key_path.resolve().parents:
            raise ValueError(f"Expected the key outside the bank {folder}; got {self._key_path}.")
        if (folder / _EARLIER).is_file():
            raise ValueError(
                f"Expected a latent bank in one file at {folder}; it is of an earlier form ({_EARLIER} and "
                "shards), which this version does not read. Begin a bank in another folder: the sites send "
                "again what they still release. Ask them first to take out at home whom they had withdrawn: "
                "the new bank does not know. Then delete the old folder and its key."
            )
        new = not (folder / BANK).is_file()
        if new and not create:
            raise ValueError(f"Expected a latent bank at {folder}; there is none.")
        key_bytes = read_key(self._key_path, create=new)
        private_folder(folder)
        folder.chmod(0o700)
        (folder / MARKER).write_text(_MARKER_TEXT, encoding="utf-8")
        self.tables = Tables(folder / BANK)
        """What is in it (`tables.py`)."""
        self._seal = Seal(key_bytes)
        self._recipient = recipient_key(key_bytes)
        try:
            self._check_key(key_bytes)
        except ValueError:
            self.close()
            raise

    def close(self) -> None:
        """Let go of the file."""
        self.tables.close()

    def __len__(self) -> int:
        """Items that training can read."""
        return self.tables.count("kept")

    @property
    def patient_data(self) -> bool:
        """Whether scans can be reconstructed from what is in it."""
        return self.tables.meta("patient_data") == "true"

    @property
    def recipient(self) -> str:
        """The public key that sites seal latents to, as a plan names it (`diffusion.recipient`)."""
        return recipient_of(self._recipient)

    def opened(self, reply: LatentsReply) -> ToldLatents:
        """What a reply that was sealed to this bank holds. Raises `SealBroken` and `MessageError`."""
        return opened(reply, self._recipient)

    def dealt_with(self, plan: RunPlan, site: str, round_number: int) -> tuple[int, int] | None:
        """How many of a site's items of a round were dealt with, and how many there are; None before it said.

        A site that withdrew has none.
        """
        if site in self.tables.withdrawn_sites():
            return 0, 0
        origin = self.tables.origin_of(plan.sha256, site, round_number)
        return None if origin is None else (origin.next, origin.total)

    def add(self, reply: ToldLatents, plan: RunPlan, codes: Codes | None = None) -> Added:
        """Take the items of an answer that was checked (`server/exchanges/latents.py`): all of them or none.

        Raises `ValueError` when the bank is of other sites, volumes or tokenizer than the plan, when codes
        come for some items only, and when an item was released by another site.
        """
        diffusion = banked(plan)
        layout = RecordLayout.of(plan, codes)
        records = layout.pack(reply.examples, codes)
        hashes = [hashlib.sha256(record["latents"].tobytes()).hexdigest() for record in records]
        counts: Counter[str] = Counter()
        with self.tables.writing():
            self._claim(plan, layout)
            origin = self._origin(reply, plan, "" if codes is None else codes.encoder_sha256)
            gone = reply.site in self.tables.withdrawn_sites()
            room = diffusion.items_per_site - self.tables.count("kept", reply.site)
            for place, (name, sha256) in enumerate(zip(reply.items, hashes, strict=True)):
                new = Item(
                    number=0,
                    origin=origin.origin,
                    name=name,
                    position=reply.first + place,
                    sha256=sha256,
                    state="duplicate",
                )
                if gone or self.tables.is_buried(name):
                    counts["withdrawn"] += 1
                elif self._is_known(name, reply.site):
                    counts["known"] += 1
                elif self.tables.of_content(sha256, "kept"):
                    self.tables.insert(new)
                    counts["duplicate"] += 1
                elif diffusion.items_per_site and counts["kept"] >= room:
                    counts["over_quota"] += 1
                else:
                    new = dataclasses.replace(new, state="kept")
                    self.tables.insert(new, self._seal.close(records[place].tobytes(), new.header(origin)))
                    counts["kept"] += 1
            self.tables.dealt_with(origin, reply.first + len(reply.items))
        return Added(**counts)

    def terms_of(self, plan_sha256: str) -> dict[str, Any]:
        """Under which terms a plan's items came: epsilon of a patient (None: infinite), delta, the last day
        of their use; empty before the first."""
        text = self.tables.meta(f"{_TERMS} {plan_sha256}")
        return {} if text is None else dict(json.loads(text))

    def source(self, plan: RunPlan, last_round: int) -> LatentSource:
        """What was released up to a round, for training; always in the same order.

        Raises `ValueError` when there is nothing, or what there is may not be used under the plan, or not any
        more.
        """
        origins = [origin for origin in self.tables.origins().values() if origin.round <= last_round]
        for origin in origins:
            terms = self.terms_of(origin.plan)
            check_unexpired(terms.get(EXPIRES, ""), f"items of the bank {self.folder}")
        allowed = None if plan.diffusion is None else plan.diffusion.policy
        if odd := sorted({origin.policy for origin in origins if origin.total} - {allowed}):
            raise ValueError(
                f"Expected the bank {self.folder} to hold what the plan's policy ({allowed or 'none'}) "
                f"allows; it holds {odd[0]} latents. Use another bank, or take them out."
            )
        numbers = [self.tables.numbers(origin.origin, "kept") for origin in origins]
        found = np.concatenate([np.empty(0, np.int64), *numbers])
        if not len(found):
            raise ValueError(
                f"Expected latents up to round {last_round} in the bank {self.folder}; it has none. The "
                "run's journal says what each site answered (raw latents need its sentence, latent_release)."
            )
        mine, plain = self.layout, RecordLayout.of(plan, None)
        self._check(plan, dataclasses.replace(plain, content=mine.content, style=mine.style))
        return LatentSource(self, found)

    def records(self, numbers: Sequence[int]) -> "tuple[np.ndarray[Any, Any], list[bool]]":
        """Records of these items, and which of them could be read; damaged ones are put aside."""
        layout = self.layout
        found = self.tables.numbered(list(set(numbers)))
        items = {number: item for number, item in found.items() if item.state == "kept"}
        # Each origin once: a question for each item took a fifth of the time.
        one_of_each = {item.origin: item for item in items.values()}
        origins = {origin: self.tables.origin(item) for origin, item in one_of_each.items()}
        sealed = self.tables.sealed(list(items.values()))
        read = np.zeros(len(numbers), layout.record)
        for place, number in enumerate(numbers):
            if number not in items:
                continue
            item, row = items[number], read[place : place + 1].view(np.uint8).data
            try:
                self._seal.open(sealed.get(number, b""), item.header(origins[item.origin]), row)
            except DamagedRecord as error:
                _log.warning("Item %s of the latent bank is put aside: %s", item.name, error)
                with self.tables.writing():
                    self.tables.set_state(items.pop(number), "quarantined")
        return read, [number in items for number in numbers]

    def verify(self, on_item: Callable[[int, int], None] = lambda done, total: None) -> tuple[int, int]:
        """Open every kept record; how many opened, and how many were put aside now. Reports items done."""
        total, sound, damaged = len(self), 0, 0
        for origin in self.tables.origins():
            numbers = self.tables.numbers(origin, "kept")
            for first in range(0, len(numbers), _AT_ONCE):
                _, opened = self.records(numbers[first : first + _AT_ONCE].tolist())
                sound += sum(opened)
                damaged += len(opened) - sum(opened)
                on_item(sound + damaged, total)
        return sound, damaged

    def forget(self, *, site: str | None = None, item: str | None = None) -> Withdrawal:
        """Take out all items of a site, or one item: overwritten, never taken again, counted at models.

        An item's duplicates go with it, as they are the same latents. Of a site that is taken out nothing
        comes in again. Raises `ValueError` when there is no such site or item.
        """
        if (site is None) == (item is None):
            raise ValueError("Expected a site or an item to forget; got both or neither.")
        before = self.tables.num_buried()
        models: set[str] = set()
        with self.tables.deleting():
            if item is not None:
                found = self.tables.item(item) if is_item(item) else None
                if found is None:
                    raise ValueError(f"Expected an item of the bank {self.folder}; it has no {item[:40]!r}.")
                models |= self._bury([found])
            elif site is not None:
                mine = [origin for origin in self.tables.origins().values() if origin.site == site]
                if not mine:
                    raise ValueError(
                        f"Expected a site of the bank {self.folder}; it has nothing of {site!r}."
                    )
                self.tables.withdraw_site(site)
                for origin, state in itertools.product(mine, STATES):
                    numbers = self.tables.numbers(origin.origin, state).tolist()
                    for first in range(0, len(numbers), _AT_ONCE):
                        models |= self._bury(self.tables.numbered(numbers[first : first + _AT_ONCE]).values())
        return Withdrawal(items=self.tables.num_buried() - before, models=tuple(sorted(models)))

    def learned(self, path: Path, sha256: str, last_round: int) -> None:
        """Note that a model learned from what was released up to a round, each time its file is written."""
        origins = [origin.origin for origin in self.tables.origins().values() if origin.round <= last_round]
        items = sum(len(self.tables.numbers(origin, "kept")) for origin in origins)
        with self.tables.writing():
            self.tables.learned(str(path.resolve()), sha256, last_round, items)

    def models(self) -> list[TrainedModel]:
        """The models that learned from the bank."""
        return [
            TrainedModel(path=path, sha256=sha256, last_round=last, items=items, withdrawn=withdrawn)
            for path, sha256, last, items, withdrawn in self.tables.models()
        ]

    @property
    def layout(self) -> RecordLayout:
        """What a record holds. Raises `ValueError` before the first item."""
        if (text := self.tables.meta("layout")) is None:
            raise ValueError(f"Expected latents in the bank {self.folder}; it is empty.")
        return RecordLayout.from_json(text)

    def _bury(self, items: Iterable[Item]) -> set[str]:
        """Overwrite items and their duplicates, then leave tombstones; the models that learned from them."""
        gone = {item.number: item for item in items}
        for item in [item for item in gone.values() if item.state == "kept"]:
            twins = self.tables.of_content(item.sha256, "duplicate")
            gone |= {twin.number: twin for twin in twins}
        models: set[str] = set()
        for item in gone.values():
            origin = self.tables.origin(item)
            models |= set(self.tables.mark_models(item, origin.round))
            self.tables.bury(item, origin.site)
        return models

    def _is_known(self, name: str, site: str) -> bool:
        """Whether this site's item is there; a quarantined one is removed, to be taken anew."""
        there = self.tables.item(name)
        if there is None:
            return False
        if (other := self.tables.origin(there).site) != site:
            raise ValueError(f"Expected items of {site!r}; {name} was released by {other!r}.")
        if there.state == "quarantined":
            self.tables.remove(there)
            return False
        return True

    def _origin(self, reply: ToldLatents, plan: RunPlan, encoder: str) -> Origin:
        there = self.tables.origin_of(plan.sha256, reply.site, reply.round)
        if there is not None:
            return there
        self.tables.set_meta(f"{_TERMS} {plan.sha256}", json.dumps(_promised(plan), sort_keys=True))
        return self.tables.begin(
            Origin(
                origin=0,
                plan=plan.sha256,
                policy=banked(plan).policy,
                site=reply.site,
                participant=plan.participants.index(reply.site),
                round=reply.round,
                encoder=encoder,
                total=reply.total,
                next=0,
            )
        )

    def _claim(self, plan: RunPlan, layout: RecordLayout) -> None:
        """Make the bank this plan's when it is new; otherwise check that what it holds means the same."""
        if self.tables.meta("layout") is None:
            for name, value in {"layout": layout.to_json(), **_terms(plan)}.items():
                self.tables.set_meta(name, value)
            self.tables.set_meta("patient_data", json.dumps(banked(plan).release.is_patient_data))
        self._check(plan, layout)

    def _check(self, plan: RunPlan, layout: RecordLayout) -> None:
        for name, value in {"layout": layout.to_json(), **_terms(plan)}.items():
            if (there := self.tables.meta(name)) != value:
                raise ValueError(
                    f"Expected the bank {self.folder} to be of this {name}: {value}; it is of {there}. Use "
                    "another bank for this plan."
                )

    def _check_key(self, key_bytes: bytes) -> None:
        fingerprint = hashlib.sha256(b"fedmeduet latent bank" + key_bytes).hexdigest()
        known = self.tables.meta("key")
        if known is None:
            with self.tables.writing():
                self.tables.set_meta("key", fingerprint)
        elif known != fingerprint:
            raise ValueError(
                f"Expected the key of the bank {self.folder} in {self._key_path}; it is another's."
            )


def _promised(plan: RunPlan) -> dict[str, Any]:
    """What is promised of a plan's items to a patient of theirs."""
    until = {EXPIRES: plan.release.expires}
    if plan.privacy is None:
        return {"epsilon": None, "delta": None, **until}
    return {"epsilon": run_epsilon(plan).upper, "delta": plan.privacy.delta, **until}


def _terms(plan: RunPlan) -> dict[str, str]:
    """What the numbers in a record mean, by name, as text."""
    terms = {
        "tokenizer": plan.tokenizer_sha256,
        "sites": list(plan.sites),
        "body parts": list(plan.style.body_parts),
        "classes": [banked(plan).category, *banked(plan).categories],
        "volumes": dataclasses.asdict(plan.volumes),
    }
    return {name: json.dumps(value, sort_keys=True) for name, value in terms.items()}
