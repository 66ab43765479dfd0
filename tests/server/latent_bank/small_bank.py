"""Two sites, examples that are known by their number, and a bank's file as another program sees it."""

import sqlite3
from contextlib import closing
from typing import Any

import torch

from federation.exchanges.latents import ToldLatents
from federation.plan.diffusion_plan import DiffusionPlan
from federation.plan.plan import ReleasePlan, RunPlan, StylePlan, TrainingPlan
from meduet_models.diffusion.conditions import Examples
from meduet_models.diffusion.settings import DiffusionTraining, TransformerShape
from scans.volume_plan import VolumePlan
from server.latent_bank.bank import BANK, LatentBank
from server.latent_bank.tables import Tables
from tests.worlds import small_network, small_plan

SITES = ("north", "south")


def a_plan(wire_dtype: Any = "float32", **diffusion: Any) -> RunPlan:
    settings: dict[str, Any] = {"policy": "raw", **diffusion}
    return small_plan(
        name="toy",
        seed=7,
        sites=SITES,
        volumes=VolumePlan(modality="mr", shape=(16, 24, 16)),
        network=small_network(width=16),
        training=TrainingPlan(rounds=4, steps_per_round=2, batch_size=4),
        style=StylePlan(minimum_cohort=3),
        release=ReleasePlan(wire_dtype=wire_dtype),
        diffusion=DiffusionPlan(
            transformer=TransformerShape(patch_size=2, width=12, depth=1, heads=2),
            training=DiffusionTraining(),
            **settings,
        ),
    )


def some(numbers: list[int], site: int = 0) -> Examples:
    """Examples that are told by their number, whoever they are of."""
    latents = [torch.randn(2, 4, 6, 4, generator=torch.Generator().manual_seed(n)) for n in numbers]
    spacing = torch.tensor([[0.5, 1.0, n + 1.0] for n in numbers])
    spacing[::2] = torch.nan
    return Examples(
        latents=torch.stack(latents),
        site=torch.full((len(numbers),), site),
        body_part=torch.full((len(numbers),), -1),
        spacing=spacing,
        category=torch.tensor(numbers),
    )


def name(number: int, site: str = "north") -> str:
    return f"{SITES.index(site):016x}{number:016x}"


def reply(
    plan: RunPlan,
    numbers: list[int],
    site: str = "north",
    round_number: int = 1,
    first: int = 0,
    total: int = 99,
) -> ToldLatents:
    return ToldLatents(
        plan_sha256=plan.sha256,
        site=site,
        round=round_number,
        first=first,
        total=total,
        items=tuple(name(n, site) for n in numbers),
        examples=some(numbers, SITES.index(site)),
        wire_dtype=plan.release.wire_dtype,
    )


def everything(source: Any) -> Examples:
    examples: Examples = source.read(torch.arange(len(source)))
    return examples


def ciphertexts(bank: LatentBank) -> dict[int, bytes]:
    """The sealed records by number, as another program reads them."""
    with closing(sqlite3.connect(bank.folder / BANK)) as database:
        return dict(database.execute("SELECT number, sealed FROM records ORDER BY number"))


def damage(bank: LatentBank, place: int, flipped: int = 40) -> None:
    """Flip a bit of the record at this place, where it lies in the file."""
    sealed = list(ciphertexts(bank).values())[place]
    path = bank.folder / BANK
    content = bytearray(path.read_bytes())
    content[content.index(sealed[:200]) + flipped] ^= 1
    path.write_bytes(content)
    read_anew(bank)


def read_anew(bank: LatentBank) -> None:
    """Let go of what is in memory."""
    bank.tables.close()
    bank.tables = Tables(bank.folder / BANK)
