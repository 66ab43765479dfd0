"""`meduet-simulate`: which configuration was asked for, and the exit status; one line per error."""

import logging
import os
import sys

os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")  # read when Flower is imported
os.environ.setdefault("FLWR_DISABLE_UPDATE_CHECK", "1")

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig
from rich.console import Console

from federation.loopback import spare_loopback
from federation.terminal import tolerate_any_terminal
from server.checkpoints import OtherPlan
from server.config import CONF
from simulations.benchmark.run import CellsFailed, run_benchmark
from simulations.diffusion_study.run import run_generation
from simulations.downstream.run import run_downstream
from simulations.run import run
from strategies.quorum import RoundFailed


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")  # type: ignore[untyped-decorator]
def _main(config: DictConfig) -> None:
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    logging.getLogger("flwr").setLevel(logging.WARNING)
    if HydraConfig.get().mode == RunMode.MULTIRUN:
        config.folder = HydraConfig.get().runtime.output_dir  # one folder per job
    try:
        match HydraConfig.get().job.config_name:
            case "config":
                page = run(config)
            case "benchmark":
                page = run_benchmark(config, console)
            case "downstream":
                page = run_downstream(config)
            case "generation":
                page = run_generation(config)
            case unknown:
                raise ValueError(
                    f"Expected --config-name config, benchmark, downstream or generation; got {unknown!r}."
                )
    except (ValueError, OtherPlan, RoundFailed) as error:
        console.print(f"[red]{type(error).__name__}[/]: {error}", markup=True)
        sys.exit(2)
    except CellsFailed as error:
        console.print(f"[red]{type(error).__name__}[/]: {error}", markup=True)
        sys.exit(1)
    except KeyboardInterrupt:
        console.print("Interrupted. Nothing is lost: give the same command again to go on.")
        sys.exit(130)
    Console(highlight=False, soft_wrap=True).print(f"Done. The page: {page.resolve()}")


def main() -> None:
    """Entry point of `meduet-simulate`."""
    tolerate_any_terminal()
    spare_loopback()
    _main()


if __name__ == "__main__":
    main()
