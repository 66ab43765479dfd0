"""The centre's half of the journal: one line per valid reply, saying what crossed, how large, its hash and
norm.

The hash is that of the tensors as the gate of the site hashed them: the line of the centre and the line of
the site name the same release. A draft is made when a reply is read and entered once it was found valid, as
folding may take the tensors away. Does not do: judge a reply, or keep its values.
"""

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor

from federation.exchanges.latents import to_tensors
from federation.journal import Journal
from federation.wire.wire import num_bytes
from meduet_models.diffusion.conditions import Examples
from meduet_models.weights import sha256_of_tensors


class ReplyBook:
    """Writes drafts of replies into a journal, which is opened once the folder of the run is claimed."""

    def __init__(self, journal: Journal | None = None) -> None:
        self.journal = journal

    def draft(self, kind: str, reply: Any) -> dict[str, Any]:
        """What is to be noted of `reply` (a message's dataclass), which answers a question of `kind`."""
        values = {f.name: getattr(reply, f.name) for f in dataclasses.fields(reply)}
        tensors: dict[str, Tensor] = {}
        for value in values.values():
            if isinstance(value, dict) and all(isinstance(v, Tensor) for v in value.values()):
                tensors |= value
            if isinstance(value, Examples):
                tensors |= to_tensors(value)
        numbers = {n: v for n, v in values.items() if isinstance(v, int) and not isinstance(v, bool)}
        measured = [
            tensor for tensor in tensors.values() if tensor.is_floating_point()
        ]  # a mask has no length
        norm = math.hypot(*(float(torch.linalg.vector_norm(tensor)) for tensor in measured))
        return {
            "kind": "reply",
            "to": kind,
            "plan": values["plan_sha256"],
            "site": values["site"],
            **numbers,
            "tensors": len(tensors),
            "bytes": num_bytes(tensors, values.get("wire_dtype", "float32")),
            "sha256": sha256_of_tensors(tensors),
            "norm": norm if math.isfinite(norm) else str(norm),
        }

    def enter(self, draft: dict[str, Any]) -> None:
        """Write a draft down; on the disk when this returns."""
        assert self.journal is not None, "the journal is opened before anybody is asked"
        self.journal.append(draft)
