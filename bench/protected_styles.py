"""What a style code with noise is worth: the style gap that restyling closes, by epsilon and dimensions.

    python bench/protected_styles.py root=DATA/msd_hippocampus

Sites as in `meduet-simulate experiment=hippocampus privacy=sums` (other settings as overrides). Held-out
scans of each site are moved from its entry to every other's; the gap is measured against that site's own.
Mean over draws of the noise. Prints, beside it, the exact sums (what leaves without privacy), and the
dimensions that close most at each epsilon.
"""

import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from client.exchanges.style_code import patient_styles
from client.latents.style_moments import own_moments
from federation.exchanges.style_code import style_code
from federation.exchanges.survey import survey_layout
from federation.plan.plan import RunPlan
from meduet_models.probes.swap_fidelity import style_gap_closed
from meduet_models.style.bank import StyleBank
from meduet_models.style.code import entry_of
from meduet_models.style.moments import StyleMoments, restyle
from meduet_models.weights import load_weights
from privacy.accounting import gaussian_multiplier
from privacy.style_code import SHARE_BOUND
from server.config import compose_config, plain
from server.public_scans import PUBLIC_SCANS
from simulations.progress import Live
from simulations.run import prepare

EPSILONS = (0.5, 1.0, 3.0, 8.0)
DIMENSIONS = (2, 4, 8, 16, 32)
DRAWS = 8


def gap_closed(plan: RunPlan, style_bank: StyleBank, held: Sequence[Tensor]) -> float:
    """Mean over pairs of sites."""
    layout = replace(survey_layout(plan), bound=1e9)

    def vector(latents: Tensor) -> Tensor:
        return StyleMoments.of(latents, [str(i) for i in range(len(latents))], layout).entry().to_vector()

    closed = []
    for a, source in enumerate(held):
        for b, truth in enumerate(held):
            if a != b:
                own, target = (style_bank.entry(torch.tensor([i]), torch.tensor([0])) for i in (a, b))
                moved = restyle(source, *(e.each(lambda t: t[0]) for e in (own, target)))
                closed.append(style_gap_closed(vector(moved), vector(source), vector(truth)))
    return sum(closed) / len(closed)


def main() -> None:
    """Print the table."""
    torch.set_num_threads(1)
    overrides = ["experiment=hippocampus", "privacy=sums", "engine.workers=1", *sys.argv[1:]]
    with tempfile.TemporaryDirectory() as folder, Live() as live:
        config = plain(compose_config([*overrides, f"folder={folder}"]))
        simulation = prepare(config, live)
        plan = simulation.plan
        public = load_weights(Path(folder) / PUBLIC_SCANS)[0]["latents"]
        scans = [simulation.consortium.site(site).scans(plan) for site in plan.sites]
        held = [s.latents([*s.indices("validation"), *s.indices("test")]) for s in scans]
        vectors = [list(patient_styles(s, plan)) for s in scans]
        sums = {site: own_moments(s, plan) for site, s in zip(plan.sites, scans, strict=True)}
    exact = StyleBank.of(plan.sites, sums)
    print(f"patients: {[len(v) for v in vectors]}, held out: {[len(x) for x in held]}")
    print(f"exact sums: {gap_closed(plan, exact, held):.2f}")
    print("| dimensions | no noise | " + " | ".join(f"eps {e:g}" for e in EPSILONS) + " |")
    layout = survey_layout(plan)
    best: dict[float, tuple[float, int]] = {}
    for dimensions in DIMENSIONS:
        assert plan.privacy is not None
        code = style_code(replace(plan, privacy=replace(plan.privacy, style_dimensions=dimensions)), public)
        totals = [code.total(own) for own in vectors]
        row = []
        for epsilon in (None, *EPSILONS):
            deviation = 0.0 if epsilon is None else SHARE_BOUND * gaussian_multiplier(epsilon, 1e-5)
            closed = []
            for draw in range(1 if epsilon is None else DRAWS):
                draws = torch.Generator().manual_seed(draw)
                noised = [t + deviation * torch.randn(t.shape, generator=draws) for t in totals]
                entries = {
                    site: (max(1.0, code.count(t)), entry_of(code.read(t), layout))
                    for site, t in zip(plan.sites, noised, strict=True)
                }
                closed.append(gap_closed(plan, StyleBank.of_entries(plan.sites, entries, layout), held))
            row.append(sum(closed) / len(closed))
            if epsilon is not None:
                best[epsilon] = max(best.get(epsilon, (-9.0, 0)), (row[-1], dimensions))
        print(f"| {dimensions} | " + " | ".join(f"{value:.2f}" for value in row) + " |", flush=True)
    for epsilon, (value, dimensions) in best.items():
        print(f"eps {epsilon:g}: {dimensions} dimensions close {value:.2f}")


if __name__ == "__main__":
    main()
