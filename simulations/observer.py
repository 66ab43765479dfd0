"""The witness of a simulated run: probes after rounds, pictures at the end.

Reads what sites keep at home, which nobody in a real federation could: a site's own style head is needed to
say what that site's model does. Writes nothing that trains.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from client.latents.latent_set import LatentSet
from client.latents.style_moments import own_moments
from client.scans.cohort import read_entry
from client.training.site_state import StateFolder
from federation.plan.plan import RunPlan
from meduet_models.meduet import MeDUET
from meduet_models.style.bank import StyleBank
from meduet_models.style.head_alignment import check_alignment, style_tokens
from scans.whole_volumes import volume_at
from server.app import RunObserver, RunResult
from simulations.consortium import Consortium
from simulations.evaluation import load_model, mean_style, measure, swap
from simulations.generation.judge import Bench
from simulations.hospitals.held_out import Held, join, own_scans, paired_scans, paired_set
from simulations.hospitals.labelled import labels_for_segmenters, num_classes
from simulations.hospitals.plans import Hospital
from simulations.progress import Live
from simulations.report.figures import SwapRow, draw_swaps
from simulations.settings import SimulationSettings
from simulations.yardsticks import label_rows, told_of_labels, yardsticks

TRAINING_SCANS = 24
"""Training scans of each hospital from which its style tokens are made."""


class Witness(RunObserver):
    """Observes a run of a simulated consortium."""

    def __init__(
        self,
        plan: RunPlan,
        consortium: Consortium,
        hospitals: Sequence[Hospital],
        settings: SimulationSettings,
        live: Live,
    ) -> None:
        self._plan, self._consortium, self._hospitals, self._live = plan, consortium, hospitals, live
        self._every, self._folder = settings.evaluation.every_rounds, Path(settings.folder)
        own = [consortium.site(hospital.name) for hospital in hospitals]
        self._scans = [site.scans(consortium.everyone) for site in own]
        self._training = [s.latents(s.indices("train")[:TRAINING_SCANS]) for s in self._scans]
        self._sites = own
        self._thorough = settings.evaluation.thorough
        self._paired = [
            paired_set(consortium.everyone, site, hospital)
            for site, hospital in zip(own, hospitals, strict=True)
        ]
        self._held = self._hold_out(len(plan.sites))

    def _hold_out(self, num_hospitals: int) -> Held | None:
        """Of the first hospitals, the paired patients where there are any, else those kept for validation and
        test; None: nobody.
        """
        everyone = self._consortium.everyone
        pairs = [
            paired_scans(everyone, self._sites[index], self._hospitals[index], index)
            for index in range(num_hospitals)
        ]
        if parts := [part for part in pairs if part is not None]:
            return join(parts)
        kept = ("validation", "test")
        own = [
            own_scans(everyone, scans, index, kept)
            for index, scans in enumerate(self._scans[:num_hospitals])
            if any(scans.indices(split) for split in kept)
        ]
        if not own:
            self._live.say("No patient is kept for validation or test: the model is not probed.")
            return None
        return join(own)

    def on_round_start(self, round_number: int, num_rounds: int) -> None:
        """Move the bar."""
        self._live.on_round(round_number, num_rounds)

    def on_round_end(
        self, round_number: int, shared: Mapping[str, Any], metrics: Mapping[str, Any]
    ) -> Mapping[str, Any]:
        """Probe every few rounds and after the last."""
        due = round_number % self._every == 0 or round_number == self._plan.num_rounds
        probes = self._measure(shared, self._held, round_number) if due else {}
        self._live.on_round_end(round_number, metrics, probes)
        return probes

    def on_diffusion(self, done: int, total: int, loss: float) -> None:
        """Move its bar."""
        self._live.on_diffusion(done, total, loss)

    def on_end(self, result: RunResult) -> Mapping[str, Any]:
        """Probe the final weights, site erasure included; test whether style heads understand each other.

        Hospitals held out are measured here and nowhere else: `with_held_out` has the probes on all.
        """
        measured: dict[str, Any] = {**self._measure(result.shared, self._held), **self._beside(result)}
        if self._consortium.held_out:
            measured["with_held_out"] = self._measure(result.shared, self._hold_out(len(self._hospitals)))
        return measured | self._alignment(result)

    def _beside(self, result: RunResult) -> dict[str, Any]:
        """What probes of the first site's model are to be read beside; Dice where there are label maps."""
        if self._held is None:
            return {}
        names, rounds = self._plan.sites, self._plan.num_rounds
        model = self._models(result.shared, rounds)[0]
        readings: dict[str, Any] = yardsticks(model, self._plan, self._held, self._training[: len(names)])
        own = list(zip(names, self._scans, strict=False))
        learn = [(name, scans, scans.indices("train")) for name, scans in own]
        kept = [(n, s, [*s.indices("validation"), *s.indices("test")]) for n, s in own]
        if (found := labels_for_segmenters(learn, kept)) is not None:
            rows = label_rows(model, self._plan, *found, num_classes(scans for _, scans in own))
            readings |= {} if rows is None else {"labels": told_of_labels(rows)}
        return readings

    def _alignment(self, result: RunResult) -> dict[str, float]:
        """The weakest outcome of the alignment self-test over pairs of sites, and whether all passed.

        Where style heads stay home: no style token may go from one site to another before this passes.
        """
        plan = self._plan
        if not result.bank or plan.style.exchange != "bank" or plan.style.head != "local":
            return {}
        style_bank = StyleBank.from_tensors(result.bank, plan.sites)
        if len(style_bank.present) < len(plan.sites) or len(plan.sites) < 2:
            return {}
        models = self._models(result.shared, plan.num_rounds)
        training = self._training[: len(plan.sites)]
        tokens = [
            style_tokens(m, x, style_bank, i) for i, (m, x) in enumerate(zip(models, training, strict=True))
        ]
        pairs = [(i, j) for i in range(len(models)) for j in range(len(models)) if i != j]
        outcomes = []
        with self._live.counting("comparing style heads", len(pairs)) as progress:
            for done, (i, j) in enumerate(pairs, start=1):
                outcomes.append(check_alignment(models[i], tokens[j], training[i], style_bank, i))
                progress(done, len(pairs))
        return {
            "alignment": min(outcome.value for outcome in outcomes),
            "alignment_passed": float(all(outcome.passed for outcome in outcomes)),
        }

    def _measure(
        self, shared: Mapping[str, Tensor], held: Held | None, round_number: int | None = None
    ) -> dict[str, float]:
        """Mean over the sites' models, what they share with what each keeps at home; after a round, or at the
        end, where more is measured.
        """
        if held is None:
            return {}
        final = round_number is None
        models = self._models(shared, self._plan.num_rounds if round_number is None else round_number)
        measured = []
        with self._live.counting("probing the models", len(models)) as progress:
            for done, model in enumerate(models, start=1):
                measured.append(
                    measure(
                        model,
                        self._plan,
                        held,
                        self._training[: max(held.site) + 1],
                        thorough=final and self._thorough,
                        tokenizer=self._sites[0].tokenizer if final else None,
                    )
                )
                progress(done, len(models))
        return {name: sum(m[name] for m in measured) / len(measured) for name in measured[0]}

    def _models(self, shared: Mapping[str, Tensor], round_number: int) -> list[MeDUET]:
        return site_models(self._plan, self._consortium, shared, round_number)

    def bench(self) -> Bench | None:
        """What a diffusion model is judged on; None where nobody is held out."""
        if self._held is None:
            return None
        own = self._scans[: len(self._plan.sites)]
        paired = [scans for scans in self._paired[: len(own)] if scans is not None]
        held: list[tuple[LatentSet, list[int]]] = [(scans, list(range(scans.num_scans))) for scans in paired]
        if not paired:
            held = [(scans, [*scans.indices("validation"), *scans.indices("test")]) for scans in own]
        return Bench(self._plan, self._sites[0].tokenizer, own, self._held, held)

    def draw(self, result: RunResult) -> None:
        """Draw a held-out patient of each hospital: as scanned, rebuilt, in every other hospital's style."""
        names = [hospital.name for hospital in self._hospitals]
        with self._live.counting("drawing patients", len(names)) as progress:
            models = self._models(result.shared, self._plan.num_rounds)
            for index in range(len(names)):
                self._draw(result, models, names, index)
                progress(index + 1, len(names))

    def _draw(self, result: RunResult, models: Sequence[MeDUET], names: Sequence[str], index: int) -> None:
        model = models[index if index < len(models) else 0]  # a hospital held out gets the first's
        styles = [mean_style(model, training) for training in self._training]
        scans, row = self._example(index)
        latents = scans.latents([row])
        others = [i for i in range(len(names)) if i != index]
        restyled = self._restyled(result, latents, index, others)
        drawn = {i: self._decode(swap(model, latents, styles[i])) for i in [index, *others]}
        draw_swaps(
            SwapRow(
                site=names[index],
                original=_volume(scans, row, self._plan),
                reconstruction=drawn[index],
                restyled={names[i]: self._decode(x) for i, x in restyled.items()},
                swaps={names[i]: drawn[i] for i in others},
                truths={names[i]: truth for i in others if (truth := self._truth(i, row)) is not None},
            ),
            self._folder / "figures" / f"swap-{names[index]}.png",
        )

    def _restyled(
        self, result: RunResult, latents: Tensor, index: int, others: Sequence[int]
    ) -> dict[int, Tensor]:
        """These latents moved to the other hospitals' entries; nothing where no bank goes round."""
        if not result.bank:
            return {}
        style_bank = StyleBank.from_tensors(result.bank, self._plan.sites)
        for site, scans in list(zip(self._consortium.everyone.sites, self._scans, strict=True))[
            len(style_bank.sites) :
        ]:
            style_bank = style_bank.joined_by(site, own_moments(scans, self._plan))
        known = [i for i in (index, *others) if float(style_bank.count[i].sum()) > 0]
        if index not in known:
            return {}
        own = torch.tensor([index])
        return {i: style_bank.restyle(latents, own, torch.tensor([i])) for i in known if i != index}

    def _example(self, index: int) -> tuple[LatentSet, int]:
        paired = self._paired[index]
        if paired is not None:
            return paired, 0
        scans = self._scans[index]
        return scans, (scans.indices("validation") + scans.indices("test") + scans.indices("train"))[0]

    def _truth(self, index: int, row: int) -> Any:
        paired = self._paired[index]
        return None if paired is None else _volume(paired, row, self._plan)

    def _decode(self, latents: Tensor) -> Any:
        volume = self._consortium.site(self._plan.sites[0]).tokenizer.decode(latents)
        return volume[0, 0].clamp(0, 1).numpy()


def site_models(
    plan: RunPlan, consortium: Consortium, shared: Mapping[str, Tensor], round_number: int
) -> list[MeDUET]:
    """Each participant's model after `round`: what all share, with what it keeps at home. With privacy theirs
    is taken for one (its site classifiers, which are not shared, are those of the start)."""
    if plan.privacy is not None:
        start = MeDUET(plan.network, len(plan.sites), seed=plan.seed).state_dict()
        return [load_model(plan, {**start, **shared})]
    models = []
    for name in plan.participants:
        states = StateFolder(consortium.site(name).state_dir / "state", plan.sha256)
        models.append(load_model(plan, {**states.before(round_number + 1).home, **shared}))
    return models


def _volume(scans: LatentSet, row: int, plan: RunPlan) -> Any:
    """The prepared scan behind a row, of a whole scan its central crop, [x y z]."""
    scan, _ = read_entry(scans.entries[row], plan.volumes)
    return volume_at(scan, plan.volumes, scans.geometry(row))[0].numpy()
