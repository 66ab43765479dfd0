"""Loaded by Python at start where a test puts this folder first on PYTHONPATH: makes a hospital's processes
do what its people would never let them.

`$MEDUET_SABOTAGE` is this hospital's folder. `script.json` there says, by round, what happens once: a reply
that is not what the site computed, or something in the middle of training; by round and route, where in a
stage of a secure sum it is held. `clock` holds seconds by which the
clock is off; `name` the name of another hospital, as which it answers.
"""

import dataclasses
import importlib.abc
import importlib.machinery
import importlib.util
import json
import os
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

FOLDER = Path(os.environ["MEDUET_SABOTAGE"])


def asked(place: object, kind: str) -> dict[str, Any] | None:
    """What the script wants in this round, or at this place of one, once."""
    path = FOLDER / "script.json"
    step = json.loads(path.read_text()).get(str(place)) if path.is_file() else None
    done = FOLDER / f"done-{place}"
    if step is None or kind not in step or done.exists():
        return None
    return dict(step)


def in_training(round_number: int, at: int) -> None:
    """Called after each step of training."""
    step = asked(round_number, "do")
    if step is None or step["at_step"] != at:
        return
    (FOLDER / f"done-{round_number}").touch()
    match step["do"]:
        case "hold":
            hold(round_number)
        case "hang":
            time.sleep(100_000)
        case "raise":
            raise RuntimeError("patient Anna Smith, /data/secret/anna.nii.gz")
        case "memory":
            import torch

            size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (size + (64 << 20), resource.RLIM_INFINITY))
            torch.zeros(1 << 30)


def hold(place: object) -> None:
    """Wait until a test lets this hospital go on."""
    held = FOLDER / "held"
    held.write_text(f"{place} {os.getpid()}")
    while held.exists():
        time.sleep(0.05)


def in_stage(place: str, when: str) -> None:
    """Called before, in the middle of the training of, and after the work of a stage of a secure sum."""
    step = asked(place, "when")
    if step is not None and step["when"] == when:
        (FOLDER / f"done-{place}").touch()
        hold(place)


def stages(module: ModuleType) -> None:
    """`client.exchanges.secure_sum`: places in each of the four stages."""
    for name in ("KEYS", "SHARES", "VECTOR", "OPENING"):
        row = getattr(module, name)
        setattr(module, name, dataclasses.replace(row, work=held_in(row)))


def held_in(row: Any) -> Callable[..., Any]:
    """The work of a row of the table, which may be held."""

    def work(site: Any, ask: Any, plan: Any, gate: Any, on_step: Callable[[int, float], None]) -> Any:
        place = f"{ask.round}.{row.exchange.route}"

        def stepped(step: int, loss: float) -> None:
            on_step(step, loss)
            in_stage(place, "training")

        in_stage(place, "before")
        released = row.work(site, ask, plan, gate, stepped)
        in_stage(place, "after")
        return released

    return work


def answers(module: ModuleType) -> None:
    """`client.exchanges.pretraining`: a place in the middle of training."""
    inner = module.answer_round

    def answer_round(site: Any, ask: Any, plan: Any, gate: Any, on_step: Callable[[int, float], None]) -> Any:
        def stepped(step: int, loss: float) -> None:
            on_step(step, loss)
            in_training(ask.round, step)

        return inner(site, ask, plan, gate, stepped)

    module.ANSWER = dataclasses.replace(module.ANSWER, work=answer_round)


def app(module: ModuleType) -> None:
    """`client.app`: what leaves is not what the gate let through."""
    inner = module._mail

    def mail(row: Any, released: Any, *rest: Any) -> Any:
        record = inner(row, released, *rest)
        if (FOLDER / "name").is_file():
            record["head"]["site"] = (FOLDER / "name").read_text()
        if released.promise.kind != "round":
            return record
        from flwr.common.serde import recorddict_from_proto, recorddict_to_proto
        from flwr.proto.recorddict_pb2 import RecordDict as Wire

        round_number = released.record["round"]
        kept = FOLDER / f"sent-{round_number}"
        kept.write_bytes(recorddict_to_proto(record).SerializeToString())
        step = asked(round_number, "reply")
        if step is None:
            return record
        (FOLDER / f"done-{round_number}").touch()
        if step["reply"] == "replayed":
            return recorddict_from_proto(Wire.FromString((FOLDER / f"sent-{round_number - 1}").read_bytes()))
        return tampered(row.exchange.reply.from_record(record), step["reply"])

    module._mail = mail


def tampered(reply: Any, how: str) -> Any:
    """The reply's record, spoilt."""
    import torch
    from flwr.app import Array

    def updated(**tensors: Any) -> Any:
        return dataclasses.replace(reply, update={**reply.update, **tensors})

    name = max(reply.update, key=lambda one: reply.update[one].numel())
    tensor = reply.update[name].clone()
    match how:
        case "nan" | "infinite":
            tensor.view(-1)[0] = torch.nan if how == "nan" else torch.inf
            return updated(**{name: tensor}).to_record()
        case "shape":
            return updated(**{name: tensor.view(-1)[:1].clone()}).to_record()
        case "extra":
            return updated(stray=torch.ones(3)).to_record()
        case "missing":
            rest = {one: value for one, value in reply.update.items() if one != name}
            return dataclasses.replace(reply, update=rest).to_record()
        case "negative" | "zero" | "heavy":
            examples = {"negative": -5, "zero": 0, "heavy": 10**9}[how]
            return dataclasses.replace(reply, examples=examples).to_record()
        case "huge":
            return updated(**{name: torch.full_like(tensor, 1e6)}).to_record()
        case "long":  # within the bound of the plan, and yet unlike the others
            norm = float(torch.linalg.vector_norm(torch.cat([v.flatten() for v in reply.update.values()])))
            factor = 15.0 * reply.examples / norm
            return updated(**{one: factor * value for one, value in reply.update.items()}).to_record()
        case "truncated":
            record = reply.to_record()
            arrays = record["update"]
            whole = arrays["float32"]
            arrays["float32"] = Array(whole.dtype, whole.shape, whole.stype, whole.data[:-7])
            return record
        case "oversized":
            record = reply.to_record()
            arrays = record["update"]
            arrays["float32"] = oversized(arrays["float32"])
            return record
    raise ValueError(how)


def oversized(array: Any) -> Any:
    """An array whose one chunk is named 3,000 times: as small as before on its way, and enormous where it is
    put together."""
    from flwr.app import Array

    class Named(Array):
        def deflate(self) -> bytes:
            head, body = super().deflate().split(b"\0", 1)
            fields = json.loads(body)
            body = json.dumps(fields | {"arraychunk_ids": fields["arraychunk_ids"] * 3000}).encode()
            kind, children, _ = head.decode().split(" ")
            return f"{kind} {children} {len(body)}".encode() + b"\0" + body

    Named.__qualname__ = "Array"  # what it says it is
    return Named(array.dtype, array.shape, array.stype, array.data)


def date(module: ModuleType) -> None:
    """`flwr.supercore.date`: a clock that is off."""
    import datetime

    off = datetime.timedelta(seconds=float((FOLDER / "clock").read_text()))
    inner = module.now
    module.now = lambda: inner() + off


PATCHES: dict[str, Callable[[ModuleType], None]] = {
    "client.exchanges.pretraining": answers,
    "client.exchanges.secure_sum": stages,
    "client.app": app,
}
if (FOLDER / "clock").is_file():
    PATCHES["flwr.supercore.date"] = date


class AfterImport(importlib.abc.MetaPathFinder):
    """Runs a patch when its module has been executed."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if name not in PATCHES:
            return None
        sys.meta_path.remove(self)
        try:
            spec = importlib.util.find_spec(name)
        finally:
            sys.meta_path.insert(0, self)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def executed(module: ModuleType) -> None:
            execute(module)
            PATCHES[name](module)

        spec.loader.exec_module = executed  # type: ignore[method-assign]
        return spec


sys.meta_path.insert(0, AfterImport())
