"""A pretrained model from its file: what a run leaves in model.safetensors, as a network ready to use.

The federation's part is the content branch, so that is what the file holds; a style branch that stayed at the
sites is not in it, and is left as it started. What this file does not do: train, or fetch anything.
"""

import logging
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from forms.form import build
from forms.json_text import read_json
from meduet_models.meduet import FactorNetwork, NetworkConfig
from meduet_models.published.expiry import warn_if_expired
from meduet_models.published.withdrawals import warn_if_withdrawn
from meduet_models.weights import load_weights

MODEL = "model.safetensors"
"""What a pretraining leaves in its folder."""
CANARIES = "audit_canaries"
"""In the header of weights that were made with canaries, to audit their noise: which."""
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class CodeReader:
    """A linear reading of the content code, in the target's own unit; of two classes a logistic one."""

    weight: tuple[float, ...]
    bias: float
    classes: tuple[float, float] | None = None
    """The two values of a target that has no others; none: a number."""

    def __call__(self, codes: Float[Tensor, "b q"]) -> Float[Tensor, " b"]:
        """What is read of each scan; of two classes what is expected, between one and the other: with values
        0 and 1 the probability of 1."""
        told = codes @ torch.tensor(self.weight).to(codes) + self.bias
        if self.classes is None:
            return told
        low, high = self.classes
        return low + (high - low) * torch.sigmoid(told)


@dataclass(frozen=True)
class Pretrained:
    """A pretrained network and where it comes from."""

    network: FactorNetwork
    """In evaluation mode, on the CPU; `content_code` and `content_tokens` are what analysis reads."""
    has_style: bool
    """Whether the style branch is the trained one; without it `decode` and `pooled_style` mean nothing."""
    tokenizer_sha256: str
    """Hash of the tokenizer whose latents the network reads."""
    readers: dict[str, CodeReader]
    """Of the content code, by anatomical target: fitted from the sites' sums, where the plan had targets."""
    provenance: dict[str, str]
    """Header of the file: plan, rounds, erasure, hashes."""


def load_pretrained(path: Path) -> Pretrained:
    """Read the final weights of a run; a warning is logged where a site withdrew what they were made of,
    where their use was agreed until a day that is past, and where they were made with canaries.

    Raises `ValueError` when the file is damaged, is not a MeDUET of this version, or lacks a part of the
    content branch.
    """
    tensors, provenance = load_weights(path)
    warn_if_withdrawn(path)
    warn_if_expired(path, provenance)
    if CANARIES in provenance:
        _log.warning(
            "%s was made with canaries (%s), to audit its noise: made-up contributors are in these weights. "
            "Use those of a run without.",
            path.name, provenance[CANARIES],
        )  # fmt: skip
    try:
        text, tokenizer = provenance["network"], provenance["tokenizer_sha256"]
    except KeyError as error:
        raise ValueError(
            f"Expected the final weights of a MeDUET run in {path.name}; its header says none."
        ) from error
    config = build(NetworkConfig, read_json(text, f"a network in {path.name}"), "network")
    network = FactorNetwork(config)
    mine = network.state_dict()
    at_home = {name for name in mine if name.split(".", 1)[0] in network.STYLE_PARTS}
    if missing := sorted(set(mine) - set(tensors) - at_home):
        raise ValueError(f"Expected the whole content branch in {path.name}; {missing[0]!r} is missing.")
    if wrong := sorted(n for n, t in tensors.items() if n in mine and t.shape != mine[n].shape):
        raise ValueError(f"Expected {wrong[0]!r} of shape {tuple(mine[wrong[0]].shape)} in {path.name}.")
    network.load_state_dict(mine | {name: tensors[name] for name in mine if name in tensors})
    told = read_json(provenance.get("readers", "{}"), f"the readers in {path.name}")
    readers = {name: build(CodeReader, one, f"readers.{name}") for name, one in told.items()}
    return Pretrained(network.eval(), at_home <= set(tensors), tokenizer, readers, provenance)
