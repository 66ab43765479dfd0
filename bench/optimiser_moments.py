"""AdamW's moments of the shared weights, kept at a site between rounds or started anew: which learns faster?

Three simulated scanners over real hippocampus crops, plain weighted averaging, the whole objective. Same
weights, draws and schedule; the one difference is what a site remembers. Prints the error of held-out scans
(reconstruction at hidden positions) and its ratio. Found: between .985 and 1.018 over 12 rounds of 8 steps,
two seeds: no difference at this length.

    FEDMEDUET_DATA=... python bench/optimiser_moments.py            a minute or two on a CPU

Not importable; not shipped.
"""

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from client.latents.batches import Batches, step_generator
from client.training.pretraining import train_round
from client.training.site_state import SiteState
from client.training.trainee import Trainee
from federation.exchanges.survey import survey_layout
from federation.plan.plan import AggregationPlan, ReleasePlan, RunPlan, StylePlan, TrainingPlan
from meduet_models.meduet import MeDUET, NetworkConfig
from meduet_models.objective.objective import MeduetObjective
from meduet_models.objective.settings import LossWeights, ObjectiveConfig
from meduet_models.sharing import home_keys, shared_keys
from meduet_models.style.bank import StyleBank
from meduet_models.style.moments import StyleMoments
from meduet_models.tokenizer.tokenizer import TokenizerSpec, load_tokenizer
from scans.volume_plan import VolumePlan
from scans.volumes import prepare, read_scan

SITES, PATIENTS, HELD_OUT = ("one", "two", "three"), 30, 10
CPU = torch.device("cpu")
RECONSTRUCTION = ObjectiveConfig(
    weights=LossWeights(
        visible_reconstruction=0.0,
        site_adversary=0.0,
        site_from_style=0.0,
        mftd=0.0,
        siqc=0.0,
        invariance=0.0,
        restyled_reconstruction=0.0,
    )
)
Weights = dict[str, torch.Tensor]


@dataclass
class Latents:
    """Latents in memory, as a site's latent set."""

    values: torch.Tensor
    site: int
    rows: Sequence[int]

    def __post_init__(self) -> None:
        """One patient per scan."""
        self.patients = [str(row) for row in range(len(self.values))]
        self.covariates: list[Mapping[str, str | float]] = [{} for _ in self.patients]
        self.site_index = torch.full((len(self.values),), self.site)

    def indices(self, split: str) -> Sequence[int]:
        """Training rows."""
        return self.rows

    def latents(self, indices: Sequence[int], view: int = 0) -> torch.Tensor:
        """Latents of these rows."""
        return self.values[list(indices)]


def scan(volume: torch.Tensor, scanner: int) -> torch.Tensor:
    """A volume in [0, 1] as three scanners show it: as it is, another contrast, shading along an axis."""
    shading = torch.linspace(0.5, 1.2, volume.shape[-1])
    return (volume, volume**0.6, (volume * shading).clamp(max=1.0))[scanner]


def cohorts(volumes: VolumePlan) -> list[torch.Tensor]:
    """Latents of each site's patients, its held-out ones last."""
    root = Path(os.environ.get("FEDMEDUET_DATA") or Path(__file__).parents[2] / "shared" / "data")
    files = sorted((root / "msd_hippocampus" / "images").glob("*.nii.gz"))
    tokenizer, sites = load_tokenizer(TokenizerSpec()), []
    for index in range(len(SITES)):
        mine = files[index * (PATIENTS + HELD_OUT) :][: PATIENTS + HELD_OUT]
        crops = [scan(prepare(read_scan(file), volumes).volume, index) for file in mine]
        sites.append(torch.cat([tokenizer.encode(crop[None]) for crop in crops]))
    return sites


def held_out_error(model: Trainee, held_out: Batches, plan: RunPlan, site: int) -> float:
    """Squared error at hidden positions over held-out scans in their own style; the same draws each time."""
    errors = []
    with torch.no_grad():
        for step in range(4):
            draw = held_out.draw(step_generator(bytes([site]), 0, 0, step))
            batch = held_out.apply(draw, CPU)
            losses = MeduetObjective(RECONSTRUCTION)(model.student, model.teacher, batch, draw.step, 0.0)
            errors.append(float(losses.terms["reconstruction"]))
    return sum(errors) / len(errors)


def run(plan: RunPlan, latents: list[torch.Tensor], keep: bool) -> list[float]:
    """Held-out error after each round, averaged over the sites."""
    train = [Latents(values, site, range(PATIENTS)) for site, values in enumerate(latents)]
    held = [Latents(values[PATIENTS:], site, range(HELD_OUT)) for site, values in enumerate(latents)]
    moments = {
        SITES[t.site]: StyleMoments.of(t.values[:PATIENTS], t.patients[:PATIENTS], survey_layout(plan))
        for t in train
    }
    style_bank = StyleBank.of(SITES, moments)
    batches = [Batches(t, plan, style_bank) for t in train]
    unseen = [Batches(h, plan, None) for h in held]
    model = MeDUET(plan.network, len(SITES), seed=plan.seed)
    model.set_latent_scale(style_bank.centre, style_bank.scale)
    weights, scope, method = model.state_dict(), plan.style.head, plan.aggregation.method
    shared: Weights = {n: weights[n].clone() for n in shared_keys(model, scope, method)}
    start: Weights = {n: weights[n].clone() for n in home_keys(model, scope, method)}
    kept = [SiteState(round=0, home=start) for _ in SITES]
    errors = []
    for round_number in range(1, plan.training.rounds + 1):
        updates = []
        for site, state in enumerate(kept):
            trainee = Trainee.of(plan, shared, state if keep else replace(state, optimiser={}), CPU)
            updates.append(
                train_round(trainee, batches[site], plan, round_number, bytes([site]), start).update
            )
            kept[site] = trainee.state(plan, round_number, round_number - 1)
        shared = {n: t + torch.stack([u[n] for u in updates]).mean(0) for n, t in shared.items()}
        now = [Trainee.of(plan, shared, state, CPU) for state in kept]
        own = [held_out_error(trainee, unseen[site], plan, site) for site, trainee in enumerate(now)]
        errors.append(sum(own) / len(own))
    return errors


def main() -> None:
    """Two seeds, and the ratio early, halfway and at the end."""
    torch.set_num_threads(1)
    volumes = VolumePlan(modality="mr")
    latents = cohorts(volumes)
    for seed in (1, 2):
        plan = RunPlan(
            name="moments", seed=seed, sites=SITES, tokenizer_sha256="0" * 64, volumes=volumes,
            network=NetworkConfig(
                latent_channels=4, latent_grid=(8, 12, 8), patch_size=2, width=48, depth=2, heads=4,
                decoder_width=48, decoder_depth=1, decoder_heads=4,
            ),
            objective=ObjectiveConfig(), training=TrainingPlan(rounds=12, steps_per_round=8),
            style=StylePlan(), aggregation=AggregationPlan(), release=ReleasePlan(),
        )  # fmt: skip
        kept, anew = run(plan, latents, True), run(plan, latents, False)
        for round_number in (3, 6, 12):
            k, a = kept[round_number - 1], anew[round_number - 1]
            print(
                f"seed {seed}, round {round_number:2d}: kept {k:.3f}, anew {a:.3f}, kept / anew {k / a:.3f}"
            )


if __name__ == "__main__":
    main()
