"""The gate: the only way out of a site.

Every tensor and every number that leaves passes `Gate.release`, in this order: a place in the ledger, exactly
the declared tensors, finite, bounded, noise as promised, wire dtype, still waited for
(`client/watchdog.py`), kept at the site (`client/books/answers.py`), charge in the ledger, line in the
journal. Whatever fails, nothing is returned; a site that is killed in between, and is asked again, does the
rest. Replies are built from `Released` values alone, and only the gate makes one: a new one once for each
place in the ledger, and that one again for the same question. What leaves for a secure sum is bounded in the
same way and masked after that; its counts and metrics leave in the masked vector or not at all.

Noise is the gate's own work: no exchange can forget it, and none sees its key. It is drawn from a secret of
this question's place in the ledger, so that a site that was killed goes on in the same bits; beside it
nothing leaves, and the books say nothing of how many patients are behind it. Noise of steps is drawn from
there while they are taken; the gate lets nothing out before every step had its own.

Does not do: decide what is shared (`meduet_models/sharing.py`) or bound one patient's share of a sum: that
happens where the sum is made; the gate checks that the sum is no longer than that allows.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Final, NoReturn, Protocol, final, runtime_checkable

import torch
from torch import Tensor

from client.books.answers import Answer, KeptAnswers
from client.declared import GateRefusal, check_declared, check_items, checked_counts, checked_metrics
from client.watchdog import may_leave
from federation.journal import Journal
from federation.plan.plan import WireDtype
from federation.wire.wire import GROWTH, RefusalKind, num_bytes, rounded
from meduet_models.weights import sha256_of_tensors
from privacy.clipping import clip, joint_norm
from privacy.ledger import Ledger, Reservation, Settled
from privacy.promise import Promise
from privacy.step_secrets import StepSecrets

TEXT: Final = "text"
"""Name of the tensor that holds the bytes of a text."""

OF_RANDOM_NUMBERS: Final = frozenset({"sum_keys", "sum_shares", "sum_unmask"})
"""Every kind of text that may leave: keys and shares of a secure sum (`privacy/secure_sum/party.py`)."""

_ROUNDING_OF_SUMS: Final = 2.0**-20
"""By what share the float32 copy of a float64 sum may pass its bound."""

_NO_NOISE: Final = "noise enters nowhere: the values leave as they were bounded"

_MAKERS_MARK: Final = object()


@runtime_checkable
class Masking(Protocol):
    """How a weighted update becomes a masked vector (`client/exchanges/secure_sum.py`)."""

    @property
    def rounding(self) -> float:
        """By how much rounding to the grid lengthens a weighted update in L2, at most."""

    def memory(self) -> dict[str, Tensor]:
        """Where the weighted update is written: the vector's own memory, so that it is held once."""

    def rounded(self, tensor: Tensor) -> Tensor:
        """A tensor of that memory with its values on the grid; the tensor itself."""

    def masked(self, weight: float, metrics: Mapping[str, float]) -> dict[str, Tensor]:
        """The masked vector of what lies in that memory, of its weight, and of metrics; the update is gone
        then."""


@final
class Released:
    """What passed the gate. Only the gate makes one."""

    __slots__ = ("counts", "metrics", "promise", "record", "tensors", "wire_dtype")

    def __init__(
        self,
        mark: object,
        *,
        promise: Promise,
        tensors: Mapping[str, Tensor],
        counts: Mapping[str, int],
        metrics: Mapping[str, float],
        wire_dtype: WireDtype,
        record: Mapping[str, Any],
    ) -> None:
        if mark is not _MAKERS_MARK:
            raise TypeError("Expected the gate to make a Released; pass tensors through Gate.release.")
        self.promise = promise
        self.tensors = MappingProxyType(dict(tensors))
        self.counts = MappingProxyType(dict(counts))
        self.metrics = MappingProxyType(dict(metrics))
        self.wire_dtype: WireDtype = wire_dtype
        self.record = MappingProxyType(dict(record))

    def __reduce__(self) -> NoReturn:
        """Refuse to be copied or pickled past the gate."""
        raise TypeError("A Released is neither copied nor pickled.")


class Gate:
    """The gate of one site for the answer to one question: a place in the ledger that was reserved for it,
    the ledger that is charged, the journal that is written, and the answers that are kept."""

    def __init__(
        self, reservation: Reservation, ledger: Ledger, journal: Journal, answers: KeptAnswers
    ) -> None:
        self._reservation = reservation
        self._ledger = ledger
        self._journal = journal
        self._answers = answers
        self._steps: StepSecrets | None = None

    @property
    def promise(self) -> Promise:
        """Under which promise the answer leaves."""
        return self._reservation.promise

    def step_secrets(self) -> StepSecrets:
        """The secret draws and the noise of the steps that the promise counts, the same after a kill."""
        held = self._reservation
        assert held.promise.in_steps, "the promise says where noise enters"
        self._steps = StepSecrets(self._answers.secret(held.place), (held.entry,), held.promise.deviation)
        return self._steps

    def again(self) -> Released | None:
        """The answer that left before, to the bit and for no second charge; None where none left, or it is
        not kept. The journal says that it left again."""
        settled = self._ledger.settled(self._reservation)
        if settled is None:
            return None
        answer = self._answers.read(self._reservation.place, settled.released)
        if answer is None:
            return None
        self._leaves_now()
        released = self._out(answer, settled.entry)
        self._answers.forget_secret(self._reservation.place)
        return released

    def release(
        self,
        tensors: Mapping[str, Tensor],
        declared: Mapping[str, tuple[int, ...]],
        *,
        weight: float = 1.0,
        counts: Mapping[str, object] | None = None,
        metrics: Mapping[str, object] | None = None,
        not_covered: frozenset[str] = frozenset(),
        items: Sequence[str] = (),
        wire_dtype: WireDtype = "float32",
        keep: Callable[[], None] = lambda: None,
        anew: bool = False,
        masking: Masking | None = None,
    ) -> Released:
        """Let `tensors`, `counts` and `metrics` out under the reservation's promise, or raise.

        `declared` maps each tensor that must be there to its shape; nothing else may be. With a promise that
        clips, `tensors` are a mean and `weight` is what it is multiplied by afterwards; with one that checks,
        they are sums over `weight` contributors; with one that bounds each, row i of every tensor is the
        share of the contributor whom `items[i]` names, an opaque name that leaves too, and `weight` is their
        number (0 for an empty answer). `not_covered` names tensors that the bound leaves out (how many
        contributors there were). `keep` is called once nothing but the books is left to do, and before them:
        for what must be on disk when an answer has left. `anew` says that the state after this answer is not
        kept: where an answer left before and is not kept either, this one may be another, once
        (`Ledger.settle`); never with `masking`, since two vectors under one mask tell their difference. With
        `masking`, what leaves is the masked vector of tensors, weight and metrics, and nothing beside it.

        Guarantee: the released vector's L2 norm is at most `weight * promise.bound` (of each row
        `promise.bound`, with one that bounds each), rounding to the wire's dtype included; a sum that was
        bounded where it was made may pass that by one part in a million, its own rounding. Not covered:
        `not_covered`, counts and metrics; the journal lists them. With a promise that has a mechanism, this
        holds before the noise: Gaussian, of the promise's deviation in each number; there is nothing else.
        With noise in steps it holds in each step, and the mean that leaves is as long as it is.
        Raises `GateRefusal` (kind `non_finite` for NaN and infinity), `AnsweredBefore` when another answer
        left under this reservation, `BrokenChain` or `OSError`.
        """
        reservation = self._reservation
        promise = reservation.promise
        each, noised = promise.enforcement == "each", promise.noise_in == "release"
        in_steps = promise.in_steps
        if not (math.isfinite(weight) and (weight > 0 or ((each or noised) and weight == 0))):
            raise GateRefusal(f"Expected a weight > 0; got {weight}.")
        if noised and (counts or metrics or not_covered):
            raise GateRefusal("Expected nothing beside a release with noise: it would be exact.")
        check_declared(tensors, declared)
        whole, real = checked_counts(counts or {}), checked_metrics(metrics or {})
        if in_steps:
            self._check_steps(whole, real)
        check_items(items, tensors, weight if each else 0.0)
        _finite_norm({name: tensor for name, tensor in tensors.items() if name in not_covered})
        maskable = promise.enforcement in ("clip", "steps") and not not_covered and not anew
        if masking is not None and not maskable:
            raise GateRefusal(
                "Expected an update to mask, clipped or of noisy steps, all covered, once only."
            )
        covered = {name: tensor for name, tensor in tensors.items() if name not in not_covered}
        before = _longest_row(covered) if each else _finite_norm(covered)
        room, into = (0.0, None) if masking is None else (masking.rounding / weight, masking.memory())
        bounded = _bound(covered, promise, weight, wire_dtype, room, into)
        on_wire = (lambda tensor: rounded(tensor, wire_dtype)) if masking is None else masking.rounded
        exact = {
            name: on_wire(bounded.pop(name) if name in bounded else tensor.detach().clone()).cpu()
            for name, tensor in tensors.items()
        }
        left = {name: exact[name] for name in covered}
        after = _longest_row(left) if each else _finite_norm(left)
        allowed = promise.bound * (1 if each else weight)
        limit = allowed * (1 + _ROUNDING_OF_SUMS if promise.enforcement == "check" else 1)
        if not in_steps and after > limit:
            raise GateRefusal(
                f"Expected '{promise.kind}' over {weight:g} contributors to be at most {limit:g} long; got "
                f"{after:g}. Contributors were not bounded where the sum was made."
            )
        leaving, noise = self._with_noise(tensors, wire_dtype) if noised else (exact, _NO_NOISE)
        if in_steps:
            allowed, noise = promise.bound, _said(promise)
        length = _finite_norm(leaving)
        if noised:  # nothing of the exact sum stands in the books
            weight, before, after, allowed = 1.0, length, length, promise.bound
        beside: dict[str, Any] = {"counts": whole, "metrics": real}
        if masking is not None:
            leaving = masking.masked(weight, real)
            beside = {"counts": {}, "metrics": {}, "masked": beside}
        sha256 = sha256_of_tensors(leaving)
        record: dict[str, Any] = {
            **reservation.place.record(),
            "question": reservation.question,
            "tensors": len(leaving),
            "bytes": num_bytes(leaving, wire_dtype),
            "sha256": sha256,
            "dtype": wire_dtype,
            "weight": weight,
            "not_covered": sorted(not_covered),
            "norm_before": before,
            "norm_after": after,
            "clipped": promise.enforcement != "check"
            and not in_steps
            and after < before * (1 if each else weight) * (1 - 2.0**-7),
            "bound": allowed,
            "promise": promise.sentence(),
            "noise": noise,
            **beside,
            **({"items": list(items)} if each else {}),
        }
        self._leaves_now()
        answer = Answer(leaving, record, promise)
        if (settled := self._ledger.settled(reservation)) is None:
            keep()
            if not each:
                self._answers.write(reservation.place, answer)
            released = self._out(answer, self._ledger.settle(reservation, weight, sha256))
            self._answers.forget_secret(reservation.place)
            return released
        # The same answer, or none; another one only where all was lost.
        charge = self._ledger.settle(reservation, weight, sha256, anew)
        keep()
        if charge != settled.entry:
            self._answers.write(reservation.place, answer)
            return self._out(answer, charge)
        # What is said beside the tensors is what was said with them.
        return self._out(dataclasses.replace(answer, record=self._line_of(settled) or record), charge)

    def release_text(
        self, text: str, keep: Callable[[], None] = lambda: None, said: Mapping[str, Any] | None = None
    ) -> Released:
        """Let out a text that was made of random numbers alone, of one of the few kinds that may leave.

        `keep`: as in `release`; it is not called where a text left before. `said`: what the journal says of
        it beside its hash. Raises `GateRefusal`, and `AnsweredBefore` when another text left under this
        reservation.
        """
        reservation = self._reservation
        if reservation.promise.enforcement != "none" or reservation.place.kind not in OF_RANDOM_NUMBERS:
            raise GateRefusal(f"Expected keys or shares of a secure sum; got a {reservation.place.kind!r}.")
        content = {TEXT: torch.frombuffer(bytearray(text.encode("ascii")), dtype=torch.uint8)}
        sha256 = sha256_of_tensors(content)
        record = {
            **reservation.place.record(),
            "question": reservation.question,
            "bytes": len(text),
            "sha256": sha256,
            "dtype": "float32",
            "norm_after": 0.0,
            "bound": 0.0,
            "clipped": False,
            "promise": reservation.promise.sentence(),
            "counts": {},
            "metrics": {},
            **(said or {}),
        }
        self._leaves_now()
        answer = Answer(content, record, reservation.promise)
        if self._ledger.settled(reservation) is None:
            keep()
            self._answers.write(reservation.place, answer)
        return self._out(answer, self._ledger.settle(reservation, 1.0, sha256))

    def _with_noise(
        self, tensors: Mapping[str, Tensor], wire_dtype: WireDtype
    ) -> tuple[dict[str, Tensor], str]:
        """The tensors with Gaussian noise, added in float64, and the sentence that says so."""
        reservation = self._reservation
        deviation = reservation.promise.deviation
        source = self._answers.secret(reservation.place)
        leaving = {}
        for name, tensor in tensors.items():
            noise = source.stream("noise", reservation.entry, name).normals(tuple(tensor.shape))
            leaving[name] = rounded((tensor.double().cpu() + deviation * noise).to(tensor.dtype), wire_dtype)
        return leaving, _said(reservation.promise)

    def _check_steps(self, counts: Mapping[str, int], metrics: Mapping[str, float]) -> None:
        """Raise unless every step had its noise, and nothing else is said beside what they made."""
        mechanism = self._reservation.promise.mechanism
        assert mechanism is not None, "noise enters steps"
        if self._steps is None or self._steps.last != mechanism.steps - 1:
            raise GateRefusal(f"Expected noise in each of {mechanism.steps} steps; some had none.")
        if self._reservation.promise.noise_in == "generation" and (counts or metrics):
            raise GateRefusal("Expected nothing beside samples; got more.")
        agreed = set(counts) <= {"examples"} and set(metrics) <= {"steps", "seconds"}
        if not agreed or not all(value.is_integer() for value in metrics.values()):
            raise GateRefusal("Expected examples, steps and whole seconds beside noisy steps; got more.")

    def _leaves_now(self) -> None:
        if not may_leave():
            raise GateRefusal(
                "Expected to be in time; the site has answered `deadline`. Nothing is released.",
                RefusalKind.DEADLINE,
            )

    def _line_of(self, settled: Settled) -> dict[str, Any] | None:
        """The line of the journal that names this charge; None when the site was killed before it."""
        for entry in self._journal.entries():
            if entry.record.get("ledger") == settled.entry:
                return {name: value for name, value in entry.record.items() if name != "ledger"}
        return None

    def _out(self, answer: Answer, charge: str) -> Released:
        """The line of the journal, and what may be sent."""
        record = {**answer.record, "ledger": charge}
        self._journal.append(record)
        return Released(
            _MAKERS_MARK,
            promise=answer.promise,
            tensors=answer.tensors,
            counts=record["counts"],
            metrics=record["metrics"],
            wire_dtype=record["dtype"],
            record=record,
        )


def _said(promise: Promise) -> str:
    """Where which noise enters, as the journal says it."""
    return f"noise enters {promise.noise_in}: Gaussian, deviation {promise.deviation:.4g}"


def _finite_norm(tensors: Mapping[str, Tensor]) -> float:
    norm = joint_norm(tensors)
    if not math.isfinite(norm):
        raise GateRefusal("Expected finite values to release; got NaN or infinity.", RefusalKind.NON_FINITE)
    return norm


def _longest_row(tensors: Mapping[str, Tensor]) -> float:
    """Largest joint norm of a row; 0 where there is none."""
    return max(
        (_finite_norm(dict(zip(tensors, row, strict=True))) for row in zip(*tensors.values(), strict=True)),
        default=0.0,
    )


def clipped_rows(tensors: Mapping[str, Tensor], bound: float) -> dict[str, Tensor]:
    """Row by row of all tensors together, clipped to a joint norm of `bound`; in memory of its own."""
    rows = [
        clip(dict(zip(tensors, row, strict=True)), bound).value for row in zip(*tensors.values(), strict=True)
    ]
    return {
        name: torch.stack([row[name] for row in rows]) if rows else t.detach().clone()
        for name, t in tensors.items()
    }


def _bound(
    tensors: Mapping[str, Tensor],
    promise: Promise,
    weight: float,
    wire_dtype: WireDtype,
    room: float,
    into: Mapping[str, Tensor] | None,
) -> dict[str, Tensor]:
    """The weighted sum, of a clipped mean (with head-room for rounding) or as it was; or clipped rows. In
    memory of its own, a mean in `into` if there is one. `room`: by how much more it is kept below the
    bound."""
    if promise.enforcement == "check":
        return {name: tensor.detach().clone() for name, tensor in tensors.items()}
    if promise.in_steps:
        made = {name: tensor.detach() * weight for name, tensor in tensors.items()}
        return made if into is None else {name: into[name].copy_(tensor) for name, tensor in made.items()}
    bound = promise.bound * (1 - GROWTH[wire_dtype])
    if promise.enforcement == "each":
        return clipped_rows(tensors, bound)
    if not bound > room:
        raise GateRefusal(f"Expected a grid finer than the bound {bound:g}; rounding alone takes {room:g}.")
    mean = clip(tensors, bound - room, into).value  # a copy
    return {name: tensor.mul_(weight) for name, tensor in mean.items()}
