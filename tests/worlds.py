"""Toy worlds: a plan of seconds, a hospital in a folder that holds its latents in memory, patients for it.

The client, the networks, the ledger and the journal are the real ones; only the scans are made up. A test
whose hospital or patients do more (fail, count, refuse) adds that in a class of its own.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import torch

from federation.exchanges.private_rounds import with_noise
from federation.journal import Journal
from federation.keys.identity import SiteIdentity
from federation.plan.plan import AggregationPlan, ReleasePlan, RunPlan, StylePlan, TrainingPlan
from federation.plan.privacy_plan import PrivacyPlan
from federation.wire.sealing import recipient_key, recipient_of
from meduet_models.meduet import MeDUET, NetworkConfig
from meduet_models.objective.settings import ObjectiveConfig
from meduet_models.weights import sha256_of_tensors
from privacy.chain import read_chain
from privacy.ledger import Ceiling, Ledger
from scans.volume_plan import VolumePlan
from scans.volumes import Geometry
from server.model import MeduetModel
from simulations.consortium import simulated_identity
from storage.files import write_whole

BANK_KEY = bytes(range(32))
RECIPIENT = recipient_of(recipient_key(BANK_KEY))
"""The latent bank's public key, as plans of toy worlds name it."""


def bank_key_in(path: Path) -> Path:
    """The file of the bank's key."""
    write_whole(path, BANK_KEY)
    return path


SITES = ("oslo", "lyon", "turin")
GRID = (4, 6, 4)


def small_network(**changes: Any) -> NetworkConfig:
    """The smallest network that has every part; `changes` replace settings."""
    settings: dict[str, Any] = {
        "latent_channels": 2,
        "latent_grid": GRID,
        "patch_size": 2,
        "width": 12,
        "depth": 1,
        "heads": 2,
        "decoder_width": 12,
        "decoder_depth": 1,
        "decoder_heads": 2,
    }
    return NetworkConfig(**settings | changes)


def small_plan(**changes: Any) -> RunPlan:
    """A plan of seconds; `changes` replace whole parts."""
    parts: dict[str, Any] = {
        "name": "tiny",
        "seed": 1,
        "sites": SITES,
        "tokenizer_sha256": "0" * 64,
        "volumes": VolumePlan(modality="t1", shape=(16, 24, 16)),
        "network": small_network(),
        "objective": ObjectiveConfig(),
        "training": TrainingPlan(rounds=3, steps_per_round=1),
        "style": StylePlan(minimum_cohort=5),
        "aggregation": AggregationPlan(),
        "release": ReleasePlan(),
    }
    return RunPlan(**parts | changes)


def coded(plan: RunPlan, shared: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Shared weights with the public axes of their content code, as the centre sends them."""
    return MeduetModel(plan).with_code(shared, {})


def coded_network(plan: RunPlan) -> MeDUET:
    """The network of the plan's seed, with the public axes of its content code."""
    network = MeDUET(plan.network, len(plan.sites), seed=plan.seed)
    network.load_state_dict(coded(plan, network.state_dict()))
    return network.eval()


@dataclass
class Hospital:
    """A site in a folder, with latents in memory; its books are those in the folder, whatever it is now."""

    state_dir: Path
    held: Any
    name: str = "north"
    minimum_cohort: int = 0
    exact_sums: bool = True
    secret: bytes = b"1" * 32
    epsilon_ceiling: float | None = None
    compile: bool = False
    launcher: ClassVar[None] = None
    progress_every_s: ClassVar[float] = 30.0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    _ledgers: dict[Any, Ledger] = field(default_factory=dict, init=False, repr=False)
    _journals: dict[Path, Journal] = field(default_factory=dict, init=False, repr=False)

    @property
    def ledger(self) -> Ledger:
        key = self.state_dir, self.epsilon_ceiling
        if key not in self._ledgers:  # opening verifies the whole file, and each type check of a `Site` asks
            epsilon = math.inf if self.epsilon_ceiling is None else self.epsilon_ceiling
            self._ledgers[key] = Ledger(self.state_dir / "ledger.jsonl", Ceiling(epsilon=epsilon))
        return self._ledgers[key]

    @property
    def journal(self) -> Journal:
        if self.state_dir not in self._journals:
            self._journals[self.state_dir] = Journal(self.state_dir / "journal.jsonl")
        return self._journals[self.state_dir]

    def identity(self) -> SiteIdentity:
        return simulated_identity(self.name)

    def accept(self, plan: RunPlan, finetuning_sha256: str = "") -> None:
        """Every plan."""

    def scans(self, plan: RunPlan) -> Any:
        return self.held


def unanswered_places(ledger: Path) -> list[tuple[str, int]]:
    """Kind and round of each place in a ledger that was held for an answer which never left, in order."""
    entries = read_chain(ledger, "ledger")
    left = {entry.record.get("reservation") for entry in entries}
    held = [entry for entry in entries if entry.record["event"] == "reserve" and entry.sha256 not in left]
    return [(entry.record["kind"], entry.record["round"]) for entry in held]


class Latents:
    """`count` training patients of each site; latents (2 channels, 4 x 6 x 4) shifted by its number."""

    def __init__(self, sites: Sequence[int], count: int = 12) -> None:
        draws = torch.Generator().manual_seed(sum(sites))
        self.values = torch.cat(
            [torch.randn(count, 2, 4, 6, 4, generator=draws) * (1 + s) + s for s in sites]
        )
        self.patients = [f"{site}-{n}" for site in sites for n in range(count)]
        self.covariates: list[dict[str, str | float]] = [{} for _ in self.patients]
        self.site_index = torch.tensor([site for site in sites for _ in range(count)])

    def indices(self, split: str) -> list[int]:
        return list(range(len(self.patients))) if split == "train" else []

    def latents(self, indices: Sequence[int], view: int = 0) -> torch.Tensor:
        return self.values[list(indices)].clone()


class KnownScans(Latents):
    """Latents of one site with all that is known of a scan: where it lies, the label of the first `labelled`
    ones, its entry in the cohort. The last `held_out` patients are for testing."""

    def __init__(self, site: int, count: int = 12, held_out: int = 0, labelled: int = 0) -> None:
        super().__init__([site], count)
        self.held_out = held_out
        draws = torch.Generator().manual_seed(site + 1)
        self.label = (torch.rand(count, 1, 16, 24, 16, generator=draws) > 0.7).long()
        self.has_label = [n < labelled for n in range(count)]
        self.entries = [
            SimpleNamespace(scan_id=f"{site}{n:063d}", path=f"/pacs/{site}/{n}.nii") for n in range(count)
        ]

    def indices(self, split: str) -> list[int]:
        rows = super().indices("train")
        train = rows[: len(rows) - self.held_out]
        return train if split == "train" else rows[len(train) :] if split == "test" else []

    def labels(self, indices: Sequence[int], view: int = 0) -> torch.Tensor | None:
        return self.label[list(indices)].clone() if any(self.has_label) else None

    def geometry(self, row: int, view: int = 0) -> Geometry:
        return Geometry(np.eye(4), (16, 24, 16), np.eye(4), (16, 24, 16))


@dataclass
class ViewedScans:
    """Latents of named patients, in several views; remembers what was asked for."""

    patients: list[str]
    values: torch.Tensor  # n views c d h w
    site_index: torch.Tensor
    train: list[int]
    covariates: list[Mapping[str, str | float]]
    asked: list[tuple[int, int]] = field(default_factory=list)

    @staticmethod
    def of(patients: Sequence[str], site: int = 0, views: int = 1, seed: int = 0) -> "ViewedScans":
        generator = torch.Generator().manual_seed(seed)
        values = torch.randn(len(patients), views, 2, *GRID, generator=generator) * (1 + site) + site
        rows = list(range(len(patients)))
        return ViewedScans(list(patients), values, torch.full((len(rows),), site), rows, [{} for _ in rows])

    def indices(self, split: str) -> list[int]:
        return self.train if split == "train" else []

    def latents(self, indices: Sequence[int], view: int = 0) -> torch.Tensor:
        self.asked += [(int(i), view) for i in indices]
        return self.values[list(indices), view].clone()


def protected_plan(
    public: torch.Tensor, make: Callable[..., RunPlan] = small_plan, **changes: Any
) -> RunPlan:
    """A plan of seconds with privacy, whose public scans are `public`; `changes` replace settings of its
    privacy."""
    settings = {
        "epsilon": 3.0,
        "style_dimensions": 4,
        "public_scans": len(public),
        "public_sha256": sha256_of_tensors({"latents": public}),
    }
    return with_noise(
        make(
            privacy=PrivacyPlan(**settings | changes),
            style=StylePlan(minimum_cohort=3, head="shared", anchor=0.0),
        )
    )


def public_latents(count: int = 72, seed: int = 0) -> torch.Tensor:
    """Latents of nobody (2 channels, 4 x 6 x 4), of many means and deviations."""
    draws = torch.Generator().manual_seed(seed)
    place, spread = torch.randn(2, count, 2, 1, 1, 1, generator=draws)
    return torch.randn(count, 2, *GRID, generator=draws) * (0.3 * spread).exp() + place
