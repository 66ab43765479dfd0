"""An item of the latent bank as bytes, and back: all records of a bank have one layout and one size.

Does not do: encrypt (`latent_shards.py`) or know where a record lies (`latent_index.py`).

Axes: b = items, c d h w = latents, l = label values, k = content channels, s = numbers in a style code.
"""

import dataclasses
import json
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from federation.exchanges.latents import releasing
from federation.plan import LatentDtype, RunPlan
from forms.form import build
from meduet_models.diffusion.conditions import Examples


@dataclass(frozen=True, kw_only=True)
class Codes:
    """What an encoder at the centre makes of items."""

    content: Float[Tensor, "b k"]
    """Pooled content."""
    style: Float[Tensor, "b s"]
    """Style codes."""
    encoder_sha256: str
    """Hash of the encoder's weights."""


@dataclass(frozen=True, kw_only=True)
class RecordLayout:
    """What a record holds."""

    latents: tuple[int, int, int, int]
    """Channels and grid of the latents."""
    dtype: LatentDtype
    """As they travelled."""
    labels: int = 0
    """Label values of the label map; 0: none."""
    content: int = 0
    """Numbers of pooled content; 0: none."""
    style: int = 0
    """Numbers of the style code; 0: none."""

    @staticmethod
    def of(plan: RunPlan, codes: Codes | None) -> "RecordLayout":
        """The layout of what sites release under `plan`."""
        return RecordLayout(
            latents=(plan.network.latent_channels, *plan.network.latent_grid),
            dtype=plan.release.latent_dtype,
            labels=releasing(plan).labels,
            content=0 if codes is None else codes.content.shape[1],
            style=0 if codes is None else codes.style.shape[1],
        )

    def to_json(self) -> str:
        """For the bank's index."""
        return json.dumps(dataclasses.asdict(self), sort_keys=True)

    @staticmethod
    def from_json(text: str) -> "RecordLayout":
        """The inverse of `to_json`."""
        return build(RecordLayout, json.loads(text), "layout")

    @property
    def record(self) -> np.dtype[Any]:
        """A record as numpy sees it, without gaps."""
        values = "<f4" if self.dtype == "float32" else "<u2"  # numpy has no bfloat16: its bits
        fields: list[Any] = [
            ("latents", values, self.latents),
            ("site", "<i4"),
            ("body_part", "<i4"),
            ("category", "<i4"),
            ("spacing", "<f4", (3,)),
        ]
        if self.labels:
            fields.append(("label_map", "<f4", (self.labels, *self.latents[1:])))
        fields += [(name, "<f4", (size,)) for name in ("content", "style") if (size := getattr(self, name))]
        return np.dtype(fields)

    def pack(self, examples: Examples, codes: Codes | None = None) -> "np.ndarray[Any, Any]":
        """A record of each example. Latents that are not bfloat16 already lose digits in such a layout."""
        records = np.zeros(len(examples), self.record)
        records["latents"] = self._stored(examples.latents)
        for name in ("site", "body_part", "category", "spacing"):
            records[name] = getattr(examples, name).numpy()
        if examples.label_map is not None:
            records["label_map"] = examples.label_map.numpy()
        if codes is not None:
            records["content"], records["style"] = codes.content.numpy(), codes.style.numpy()
        return records

    def unpack(self, records: "np.ndarray[Any, Any]") -> Examples:
        """The examples of these records, copied."""
        latents = np.array(records["latents"], order="C")
        told = torch.from_numpy(latents)
        return Examples(
            latents=told if self.dtype == "float32" else told.view(torch.bfloat16).float(),
            site=torch.from_numpy(records["site"].astype(np.int64)),
            body_part=torch.from_numpy(records["body_part"].astype(np.int64)),
            spacing=torch.from_numpy(np.array(records["spacing"])),
            category=torch.from_numpy(records["category"].astype(np.int64)),
            label_map=torch.from_numpy(np.array(records["label_map"], order="C")) if self.labels else None,
        )

    def _stored(self, latents: Tensor) -> "np.ndarray[Any, Any]":
        latents = latents.detach().cpu().contiguous()
        if self.dtype == "float32":
            return latents.numpy()
        return latents.to(torch.bfloat16).view(torch.uint16).numpy()
