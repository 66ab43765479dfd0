"""What a central diffusion model costs the rounds: wall time of a run with it and without, in turn.

Simulated hospitals in this process, one thread each; the centre trains in a thread of its own. On a machine
with a core to spare for it the rounds should hardly notice; what collecting latents takes, and what they wait
for at the end of a round, is printed apart. A centre with a GPU of its own is not measured here.

    python bench/diffusion_overlap.py          about 3 minutes on 2 cores

Not importable; not shipped.
"""

import argparse
import statistics
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from meduet_models.threads import fixed_threads
from server.app import RunObserver
from server.config import compose_config, plain
from simulations.hospitals.make import make_hospitals
from simulations.progress import Live
from simulations.run import Made, prepare, simulate
from simulations.settings import settings_from


def seconds_of(made: Made, folder: Path, overrides: list[str]) -> tuple[list[float], list[float]]:
    """Seconds of each round, and those for collecting latents and for the centre's last steps."""
    config = plain(compose_config([*overrides, f"folder={folder}"]))
    with Live() as live, fixed_threads(1):
        simulation = prepare(config, live, made)
        for name in simulation.plan.participants:
            simulation.consortium.site(name).scans(simulation.plan)
        rounds = simulate(simulation, live, RunObserver()).metrics["rounds"]
    reports = [entry.get("diffusion", {"released": {}}) for entry in rounds]
    waited = [t.get("waited_s", 0.0) + t["released"].get("seconds", 0.0) for t in reports]
    return [entry["seconds"] for entry in rounds], waited


def main() -> None:
    """Print seconds per round of both, their ratio, and what was waited for."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--steps", type=int, default=8, help="steps of a site in a round")
    parser.add_argument("--diffusion-steps", type=int, default=20, help="steps of the centre in a round")
    parser.add_argument("--repeats", type=int, default=2)
    asked = parser.parse_args()
    common = [
        "hospitals.patients=20", "hospitals.paired=0", f"training.rounds={asked.rounds}",
        f"training.steps_per_round={asked.steps}",
    ]  # fmt: skip
    central = [
        "diffusion=raw", "generation=none", "diffusion.begin_round=1", "diffusion.final_steps=0",
        f"diffusion.steps_per_round={asked.diffusion_steps}",
    ]  # fmt: skip
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        settings, hospitals_plan = settings_from(plain(compose_config([*common, f"folder={folder}/made"])))
        del settings
        made = Made(make_hospitals(hospitals_plan, folder / "hospitals"), folder / "cache")
        alone, beside, waited = list[float](), list[float](), list[float]()
        for repeat in range(asked.repeats):
            alone += seconds_of(made, folder / f"alone-{repeat}", common)[0]
            rounds, waits = seconds_of(made, folder / f"beside-{repeat}", [*common, *central])
            beside, waited = beside + rounds, waited + waits
    first, second = statistics.median(alone), statistics.median(beside)
    print(f"a round without the diffusion model   {first:7.2f} s (median of {len(alone)})")
    print(f"a round with it, {asked.diffusion_steps:3d} steps            {second:7.2f} s")
    print(f"collecting, and waiting for the centre {statistics.median(waited):6.2f} s, on top")
    whole = (second + statistics.median(waited)) / first
    print(f"ratio of rounds {second / first:.3f}; with what is on top {whole:.3f}")


if __name__ == "__main__":
    main()
