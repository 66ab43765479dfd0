"""A generative model as one file: all that synthesis needs beside the tokenizer.

The moving average of the diffusion transformer, the content branch of the encoder that conditions it, the
styles of the sites, and where all of it comes from. Reading is strict: a damaged file, another kind of file,
another architecture, a tensor too few or too many each give one line. What this file does not do: decode
latents (the tokenizer is named by its hash), or sample.

A model trained on raw latents may reproduce them: `patient_data` says so, and such a file is handled as scans
are.

Axes: k = content channels.
"""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from forms.form import build
from forms.json_text import read_json
from forms.ranges import shown
from meduet_models.diffusion.conditioner import Conditioner
from meduet_models.diffusion.transformer import DiffusionConfig, DiffusionTransformer
from meduet_models.meduet import FactorNetwork, NetworkConfig
from meduet_models.published.expiry import EXPIRES, warn_if_expired
from meduet_models.published.withdrawals import warn_if_withdrawn
from meduet_models.sharing import encoder_keys
from meduet_models.style.bank import StyleBank
from meduet_models.weights import load_weights, save_weights, sha256_of_tensors

DIFFUSION_MODEL = "diffusion.safetensors"
"""What a run with a diffusion model leaves in its folder."""
KIND = "FedMeDUET generative model, version 1"


@dataclass(frozen=True)
class GenerativeModel:
    """A diffusion transformer with its conditioner and styles."""

    transformer: DiffusionTransformer
    """The moving average of its weights, for evaluation."""
    encoder: FactorNetwork
    """Content branch and constants; the style branch is as it starts."""
    bank: StyleBank | None
    """Styles of the sites; none where the plan exchanges no styles."""
    sites: tuple[str, ...]
    """The plan's sites."""
    directions: dict[str, Float[Tensor, "n k"]]
    """Covariate -> direction in content tokens along which it grows."""
    tokenizer_sha256: str
    """Hash of the tokenizer whose latents it makes."""
    volumes: dict[str, Any]
    """How scans became volumes: the plan's `volumes` as plain values."""
    body_parts: tuple[str, ...]
    """Names behind the condition `body_part`."""
    categories: tuple[str, ...]
    """Names behind the condition `category`."""
    policy: str
    """What the sites released for it: the plan's `diffusion.policy`."""
    patient_data: bool
    """Whether what they released is patient data: then the model is handled as scans are."""
    provenance: dict[str, str]
    """Plan, rounds, steps, hashes."""
    expires: str = ""
    """Last day on which it may be used; empty: no such day."""

    @property
    def conditioner(self) -> Conditioner:
        """What turns scans and styles into conditions of this model."""
        return Conditioner(self.encoder, maps=bool(self.volumes["registered"]))

    def to(self, device: torch.device) -> "GenerativeModel":
        """This model, its transformer and encoder moved to a device."""
        self.transformer.to(device)
        self.encoder.to(device)
        return self


def save_generative_model(path: str | Path, model: GenerativeModel) -> None:
    """Write the model, whole or not at all; readable by its owner only."""
    tensors = {f"transformer/{name}": t for name, t in model.transformer.state_dict().items()}
    tensors |= {f"encoder/{name}": t for name, t in _content_branch(model.encoder).items()}
    tensors |= {f"direction/{name}": t for name, t in model.directions.items()}
    if model.bank is not None:
        tensors |= {f"bank/{name}": t for name, t in model.bank.to_tensors().items()}
    header = {
        "kind": KIND,
        "transformer": model.transformer.config.to_json(),
        "network": json.dumps(dataclasses.asdict(model.encoder.config), sort_keys=True),
        "sites": json.dumps(model.sites),
        "bank_sites": json.dumps(None if model.bank is None else model.bank.sites),
        "tokenizer_sha256": model.tokenizer_sha256,
        "volumes": json.dumps(model.volumes, sort_keys=True),
        "body_parts": json.dumps(model.body_parts),
        "categories": json.dumps(model.categories),
        "policy": model.policy,
        "patient_data": json.dumps(model.patient_data),
        "provenance": json.dumps(model.provenance, sort_keys=True),
        EXPIRES: model.expires,
        "sha256": sha256_of_tensors(tensors),
    }
    save_weights(path, tensors, header)


def load_generative_model(path: str | Path) -> GenerativeModel:
    """Read a model, on the CPU and in evaluation mode.

    Raises `ValueError` in one line when the file is absent, damaged, or of another kind, version or
    architecture.
    """
    path = Path(path)
    tensors, header = load_weights(path)
    warn_if_withdrawn(path)
    warn_if_expired(path, header)
    if header.get("kind") != KIND:
        found = header.get("kind", "nothing of the kind")
        raise ValueError(f"Expected a {KIND} in {path.name}; its header says {found!r}.")
    if sha256_of_tensors(tensors) != header.get("sha256"):
        raise ValueError(f"Expected {path.name} as it was written; its tensors have changed. Copy it again.")
    try:
        encoder = FactorNetwork(build(NetworkConfig, _read(header, "network"), "network"))
        transformer = DiffusionTransformer(DiffusionConfig.from_json(header["transformer"]))
        bank_sites = None if header["bank_sites"] == "null" else _texts(header, "bank_sites")
        rest: dict[str, Any] = {
            "sites": _texts(header, "sites"),
            "tokenizer_sha256": header["tokenizer_sha256"],
            "volumes": _mapping(header, "volumes"),
            "body_parts": _texts(header, "body_parts"),
            "categories": _texts(header, "categories"),
            "policy": header["policy"],
            "patient_data": header.get("patient_data") != "false",  # of one that does not say, nobody knows
            "provenance": _mapping(header, "provenance"),
            "expires": header.get(EXPIRES, ""),
        }
    except (KeyError, TypeError) as error:
        raise ValueError(f"Expected the header of a {KIND} in {path.name}; got another ({error}).") from error
    parts: dict[str, dict[str, Tensor]] = {"transformer": {}, "encoder": {}, "direction": {}, "bank": {}}
    for name, tensor in tensors.items():
        part, _, inner = name.partition("/")
        if part not in parts:
            raise ValueError(f"Expected the parts of a {KIND} in {path.name}; got {name!r}.")
        parts[part][inner] = tensor
    _fit(parts["transformer"], transformer.state_dict(), f"the transformer in {path.name}")
    _fit(parts["encoder"], _content_branch(encoder), f"the encoder in {path.name}")
    transformer.load_state_dict(parts["transformer"])
    encoder.load_state_dict(encoder.state_dict() | parts["encoder"])
    for network_ in (transformer, encoder):
        network_.eval().requires_grad_(False)
    style_bank = None if bank_sites is None else StyleBank.from_tensors(parts["bank"], tuple(bank_sites))
    if style_bank is None and parts["bank"]:
        raise ValueError(f"Expected no style bank in {path.name}, as its header says; got one.")
    return GenerativeModel(
        transformer=transformer, encoder=encoder, bank=style_bank, directions=parts["direction"], **rest
    )


def _read(header: Mapping[str, str], name: str) -> Any:
    return read_json(header[name], f"{name} in the header of a {KIND}")


def _texts(header: Mapping[str, str], name: str) -> tuple[str, ...]:
    values = _read(header, name)
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise ValueError(f"Expected {name} in the header of a {KIND} to be names; got {shown(values)}.")
    return tuple(values)


def _mapping(header: Mapping[str, str], name: str) -> dict[str, Any]:
    values = _read(header, name)
    if not isinstance(values, dict):
        raise ValueError(f"Expected {name} in the header of a {KIND} to be a mapping; got {shown(values)}.")
    return values


def _content_branch(encoder: FactorNetwork) -> dict[str, Tensor]:
    weights = encoder.state_dict()
    return {name: weights[name] for name in encoder_keys(encoder)}


def _fit(came: Mapping[str, Tensor], expected: Mapping[str, Tensor], what: str) -> None:
    """Refuse tensors of another architecture, naming the first that is missing, unknown or misshapen."""
    for name in sorted({*came, *expected}):
        there = tuple(came[name].shape) if name in came else "none"
        wanted = tuple(expected[name].shape) if name in expected else "none"
        if there != wanted:
            raise ValueError(
                f"Expected {what} to have {name!r} of {wanted}, as its header says; got {there}. "
                "It is of another architecture."
            )
