"""What latents with noise are worth: how far they lie from held-out patients, beside what must lose.

    python bench/noised_latents.py root=DATA/msd_hippocampus            # three sites of about 60
    python bench/noised_latents.py arrays=DATA/adrenalmnist3d_64.npz     # two sites, 500 trained on each

Sites as in `meduet-simulate experiment=hippocampus privacy=sums` (other settings as overrides). Of each site:
what a bank would hold under `aggregate` and `synthetic`, with the noise of the plan's epsilon and with none;
beside it public phantoms in the protected style, their mean, noise about it, and the site's own latents (no
protection). Squared Fréchet distance to its test patients, in principal axes of random features of decoded
volumes that were fitted on validation patients, and the same in those of latents in the common style (anatomy
alone); mean over sites. CPU seconds are those of making the latents of a site.
"""

import dataclasses
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig
from torch import Tensor
from torch.nn import functional as F

from client.exchanges.latent_moments import patient_latents
from client.exchanges.style_code import patient_styles
from client.latents.batches import TrainingScans
from client.training.private_diffusion import HomeScans, train_at_home
from federation.exchanges.latent_moments import MOMENTS, MomentsReply, moments_promise, public_moments
from federation.exchanges.style_code import code_promise, style_code
from federation.exchanges.survey import survey_layout
from federation.exchanges.synthetic_latents import (
    home_transformer,
    synthetic_of,
    synthetic_promise,
    worth_at_home,
)
from federation.plan.diffusion_plan import DiffusionPlan
from federation.plan.plan import RunPlan
from forms.form import build
from forms.yaml_text import read_yaml
from meduet_models.diffusion.conditioner import Conditioner
from meduet_models.diffusion.conditions import Conditions
from meduet_models.diffusion.sampling import SamplingSettings, sample
from meduet_models.meduet import FactorNetwork
from meduet_models.random_features import random_features
from meduet_models.sample_quality import frechet_distance, principal_axes
from meduet_models.style.bank import StyleBank
from meduet_models.style.code import entry_of
from meduet_models.style.common_style import CommonStyle
from meduet_models.tokenizer.tokenizer import Tokenizer, load_tokenizer_file, shipped_tokenizer
from meduet_models.weights import load_weights
from privacy.randomness import SecretSource
from privacy.step_secrets import StepSecrets
from server.config import compose_config, plain, plan_from
from server.exchanges.latent_moments import DrawnLatents
from server.home_start import home_start
from server.public_scans import PUBLIC_SCANS, drawn_public_scans
from simulations.progress import Live
from simulations.run import prepare

AXES, SAMPLES = 8, 64
_TRAINED = 500
HIPPOCAMPUS = ["experiment=hippocampus", "hospitals.by=random", "hospitals.styles_on_top=true"]
_HOME = "synthetic."
"""Before a setting of the models at home, as `synthetic.steps=200`."""
EPSILONS = (3.0, 8.0)
DIMENSIONS = (4, 8, 16)


class Bench:
    """Sites' scans, public scans, and a protected bank of styles at one epsilon."""

    def __init__(self, plan: RunPlan, public: Tensor, scans: dict[str, TrainingScans]) -> None:
        self.plan, self.public, self.scans = plan, public, scans

    def styles(self, plan: RunPlan) -> CommonStyle:
        """A bank of protected styles, as the plan's style code tells them."""
        code, deviation, layout = (
            style_code(plan, self.public),
            code_promise(plan).deviation,
            survey_layout(plan),
        )
        draws = torch.Generator().manual_seed(1)
        entries = {}
        for site, scans in self.scans.items():
            total = code.total(list(patient_styles(scans, plan)))
            total = total + deviation * torch.randn(total.shape, generator=draws, dtype=torch.float64)
            entries[site] = (max(1.0, code.count(total)), entry_of(code.read(total), layout))
        return CommonStyle.of(StyleBank.of_entries(plan.sites, entries, layout))

    def aggregate(self, plan: RunPlan, common: CommonStyle, noise: float) -> dict[str, Tensor]:
        """Draws of each site from moments with this share of the plan's noise."""
        axes, told = public_moments(plan, common, self.public), {}
        drawn = DrawnLatents(plan, self.public, common.style_bank)
        draws = torch.Generator().manual_seed(2)
        for site, scans in self.scans.items():
            total = axes.total(list(patient_latents(scans, common, site)))
            deviation = noise * moments_promise(plan).deviation
            total = total + deviation * torch.randn(total.shape, generator=draws, dtype=torch.float64)
            reply = MomentsReply(plan_sha256=plan.sha256, site=site, moments={MOMENTS: total.float()})
            told[site] = drawn.of_site(reply).examples.latents
        return told

    def synthetic(self, plan: RunPlan, common: CommonStyle, noise: float | None) -> dict[str, Tensor]:
        """Samples of each site's model at home, with this share of the plan's noise; None: of the start."""
        conditioner = Conditioner(FactorNetwork(plan.network, seed=0).eval(), maps=plan.volumes.registered)
        start, synthetic = home_start(plan, self.public, common, conditioner).state_dict(), synthetic_of(plan)
        told = {}
        for number, (site, scans) in enumerate(self.scans.items()):
            network = home_transformer(plan)
            network.load_state_dict(start)
            if noise is not None:
                home = HomeScans(scans, lambda latents, site=site: common.into(latents, site))
                deviation = noise * synthetic_promise(plan).deviation
                secrets = StepSecrets(SecretSource(bytes([number]) * 32), ("bench",), deviation)
                train_at_home(network, home, synthetic, secrets)
            network.eval()
            settings = SamplingSettings(steps=synthetic.sampling_steps)
            drawn = sample(network, Conditions(), synthetic.samples, settings, seed=plan.seed)
            told[site] = common.back(drawn, site)
        return told


def of_policy(plan: RunPlan, policy: str, epsilon: float, **changes: object) -> RunPlan:
    """The plan with a diffusion model of this policy."""
    settings = plain(compose_config([f"diffusion={policy}", "privacy=sums"]))["diffusion"]
    settings[policy] |= {"epsilon_style": epsilon / 2, "samples": SAMPLES, **changes}
    privacy = plan.privacy
    assert privacy is not None
    return dataclasses.replace(
        plan,
        diffusion=build(DiffusionPlan, settings | {"final_steps": 1}, "diffusion"),
        privacy=dataclasses.replace(privacy, epsilon=epsilon),
    )


def main() -> None:
    """Print the table."""
    torch.set_num_threads(1)
    given = [one.partition("=") for one in sys.argv[1:]]
    own = ["=".join((n, v)) for n, _, v in given if not n.startswith(_HOME) and n != "arrays"]
    changed = {n.removeprefix(_HOME): v for n, _, v in given if n.startswith(_HOME)}
    arrays = [Path(value) for name, _, value in given if name == "arrays"]
    others = bool(arrays) or any(one.startswith("hospitals=") for one in own)
    overrides = ["privacy=sums", "engine.workers=1", "site.split_fractions=[0.6,0.2,0.2]", *own]
    config = compose_config([*([] if others else HIPPOCAMPUS), *overrides])
    with tempfile.TemporaryDirectory() as folder:
        bench = of_arrays(arrays[0], plain(config), Path(folder)) if arrays else of_hospitals(config, folder)
        table(bench, changed)


def of_hospitals(config: DictConfig, folder: str) -> Bench:
    """Sites of a simulation."""
    with Live() as live:
        simulation = prepare(plain(config) | {"folder": folder}, live)
        plan = simulation.plan
        scans = {site: simulation.consortium.site(site).scans(plan) for site in plan.sites}
    return Bench(plan, load_weights(Path(folder) / PUBLIC_SCANS)[0]["latents"], scans)


class Dealt:
    """Encoded volumes of one site: the first `_TRAINED` are trained on, half of the others validate."""

    def __init__(self, latents: Tensor, site: int) -> None:
        self._latents, self.patients = latents, [f"{site}-{n}" for n in range(len(latents))]
        self.covariates: list[dict[str, str | float]] = [{} for _ in self.patients]
        self.site_index = torch.full((len(latents),), site)

    def indices(self, split: str) -> list[int]:
        """Rows of a split."""
        rows = list(range(len(self._latents)))
        half = (_TRAINED + len(rows)) // 2
        return {"train": rows[:_TRAINED], "validation": rows[_TRAINED:half], "test": rows[half:]}[split]

    def latents(self, indices: Sequence[int], view: int = 0) -> Tensor:
        """These rows."""
        return self._latents[list(indices)].clone()


def of_arrays(path: Path, config: dict[str, Any], folder: Path) -> Bench:
    """Volumes of 64 cubed in an `.npz` (all of its images), halved in size and dealt to two sites."""
    with np.load(path) as file:
        found = np.concatenate([file[name] for name in sorted(file) if name.endswith("_images")])
    order = torch.randperm(len(found), generator=torch.Generator().manual_seed(0))
    volumes = torch.from_numpy(found)[order][:, None].float()
    volumes = F.avg_pool3d(volumes / volumes.max(), 2)
    config["volumes"]["shape"] = list(volumes.shape[2:])
    tokenizer = load_tokenizer_file(shipped_tokenizer(4))

    def made(public_sha256: str) -> RunPlan:
        return plan_from(
            config, sites=("first", "second"), tokenizer_sha256=tokenizer.sha256, latent_channels=4,
            stride=tokenizer.stride, public_sha256=public_sha256,
        )  # fmt: skip

    plan = made(drawn_public_scans(made("0" * 64), tokenizer, folder / PUBLIC_SCANS))
    latents = torch.cat([tokenizer.encode(chunk) for chunk in torch.split(volumes, 16)])
    parts = zip(plan.sites, latents.chunk(2), strict=True)
    scans: dict[str, Any] = {site: Dealt(part, number) for number, (site, part) in enumerate(parts)}
    return Bench(plan, load_weights(folder / PUBLIC_SCANS)[0]["latents"], scans)


def table(bench: Bench, changed: dict[str, str]) -> None:
    """Print it; `changed` are settings of the models at home."""
    plan = bench.plan
    held = {
        which: {site: one.latents(list(one.indices(which))) for site, one in bench.scans.items()}
        for which in ("train", "validation", "test")
    }
    tokenizer = load_tokenizer_file(shipped_tokenizer(plan.network.latent_channels))
    sizes = {which: [len(one) for one in sites.values()] for which, sites in held.items()}
    print(f"scans: {sizes}, latents {tuple(bench.public.shape[1:])}", flush=True)
    print("| released | epsilon | seen (random features) | anatomy (latents) | CPU s a site |")
    print("|---|---|---|---|---|")
    reference = bench.styles(of_policy(plan, "aggregate", 8.0))
    for name, epsilon, make in released(bench, held["train"], changed):
        began = time.process_time()
        made = make()
        spent = (time.process_time() - began) / len(made)
        seen, anatomy = distances(made, held, reference, tokenizer)
        print(f"| {name} | {epsilon} | {seen:.2f} | {anatomy:.2f} | {spent:.1f} |", flush=True)


Row = tuple[str, str, Callable[[], dict[str, Tensor]]]


def released(bench: Bench, train: dict[str, Tensor], changed: dict[str, str]) -> Iterator[Row]:
    """What is compared, under its name, with its epsilon."""
    plan, settings = bench.plan, {name: read_yaml(value, name) for name, value in changed.items()}
    yield "the site's own latents (raw)", "infinite", lambda: train
    for epsilon in EPSILONS:
        moments = of_policy(plan, "aggregate", epsilon)
        common = bench.styles(moments)
        dressed = common.dressed(bench.public, survey_layout(plan))
        text = f"{epsilon:g}"

        def worn(latents: Tensor, common: CommonStyle = common) -> dict[str, Tensor]:
            return {site: common.back(latents, site) for site in bench.scans}

        noise = torch.randn(SAMPLES, *dressed.shape[1:], generator=torch.Generator().manual_seed(3))
        mean = dressed.mean(0) + 0.01 * noise
        white = dressed.mean(0) + dressed.std(0) * noise
        yield "mean public phantom", text, lambda worn=worn, mean=mean: worn(mean)
        yield "white noise about it", text, lambda worn=worn, white=white: worn(white)
        yield "public phantoms in protected styles", text, lambda worn=worn, dressed=dressed: worn(dressed)
        for dimensions in DIMENSIONS:
            asked = of_policy(plan, "aggregate", epsilon, dimensions=dimensions)
            for share, how in ((1.0, ""), (0.0, ", no noise in the moments")):
                yield (
                    f"aggregate, {dimensions} axes{how}",
                    text,
                    lambda asked=asked, common=common, share=share: bench.aggregate(asked, common, share),
                )
        home = of_policy(
            plan,
            "synthetic",
            epsilon,
            although_noise_wins=True,
            **settings,
        )
        sizes = [len({scans.patients[i] for i in scans.indices("train")}) for scans in bench.scans.values()]
        worth = worth_at_home(home, sum(sizes) / len(sizes))
        for share, how in (
            (None, ", the public start"),
            (1.0, f", worth {worth:.2f}"),
            (0.0, ", no noise in the steps"),
        ):
            yield (
                f"synthetic{how}",
                text,
                lambda home=home, common=common, share=share: bench.synthetic(home, common, share),
            )


def distances(
    made: dict[str, Tensor], held: dict[str, dict[str, Tensor]], common: CommonStyle, tokenizer: Tokenizer
) -> tuple[float, float]:
    """Fréchet distance to test patients, mean over sites: seen, and in the common style."""
    seen, anatomy = [], []
    for site, latents in made.items():
        features = {
            which: random_features(tokenizer.decode(one).clamp(0, 1))
            for which, one in {
                "made": latents[:SAMPLES],
                **{w: held[w][site] for w in ("validation", "test")},
            }.items()
        }
        axes = principal_axes(features["validation"], AXES)
        seen.append(frechet_distance(axes(features["test"]), axes(features["made"])))
        flat = {
            which: common.into(one, site).flatten(1)
            for which, one in {"made": latents, **{w: held[w][site] for w in ("validation", "test")}}.items()
        }
        axes = principal_axes(flat["validation"], AXES)
        anatomy.append(frechet_distance(axes(flat["test"]), axes(flat["made"])))
    return sum(seen) / len(seen), sum(anatomy) / len(anatomy)


if __name__ == "__main__":
    main()
