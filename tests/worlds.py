"""Toy worlds: a hospital in a folder that holds its latents in memory, and patients for it.

The client, the networks, the ledger and the journal are the real ones; only the scans are made up. A test
whose hospital does more (fails, counts, refuses) adds that in a class of its own.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch

from federation.journal import Journal
from federation.plan import RunPlan
from meduet_models.meduet import MeDUET
from privacy.ledger import Ledger
from server.model import MeduetModel


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
    """A site in a folder, with latents in memory; its books are read from the folder whenever asked for."""

    state_dir: Path
    held: Any
    name: str = "north"
    minimum_cohort: int = 0
    exact_sums: bool = True
    secret: bytes = b"1" * 32
    epsilon_ceiling: float | None = None
    compile: bool = False
    progress_every_s: ClassVar[float] = 30.0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def ledger(self) -> Ledger:
        return Ledger(self.state_dir / "ledger.jsonl", self.epsilon_ceiling)

    @property
    def journal(self) -> Journal:
        return Journal(self.state_dir / "journal.jsonl")

    def accept(self, plan: RunPlan, finetuning_sha256: str = "") -> None:
        """Every plan."""

    def scans(self, plan: RunPlan) -> Any:
        return self.held


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
