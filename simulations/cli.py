"""`meduet-simulate`: which configuration was asked for, and the exit status; one line per error.

Libraries that take seconds to import are loaded when it is known which are needed, and aloud.
"""

import logging
import os
import sys
from pathlib import Path

from storage.files import keep_to_owner

os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")  # read when Flower is imported
os.environ.setdefault("FLWR_DISABLE_UPDATE_CHECK", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # read with PyTorch: a thread that waits leaves its core

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig
from rich.console import Console

from federation.loopback import spare_loopback
from federation.terminal import ended, failing, say, terminal
from simulations.pulse import Pulse

_CONF = (
    Path(__file__).resolve().parent.parent / "conf"
)  # as in server/config.py, which takes seconds to import


@hydra.main(version_base="1.3", config_path=str(_CONF), config_name="config")  # type: ignore[untyped-decorator]
def _main(config: DictConfig) -> None:
    console = terminal(stderr=True)
    logging.getLogger("flwr").setLevel(logging.WARNING)
    if HydraConfig.get().mode == RunMode.MULTIRUN:
        config.folder = HydraConfig.get().runtime.output_dir  # one folder per job
    status = ended(
        lambda: _page(config, console),
        console,
        interrupted="Interrupted. Nothing is lost: give the same command again to go on.",
        advice="Nothing that was done is lost. Put this right and give the same command again.",
    )
    if status:
        sys.exit(status)


def _page(config: DictConfig, console: Console) -> None:
    """Make what the chosen configuration is for, and say where its page is."""
    say(console, "loading PyTorch and Flower")
    loading = Pulse(lambda: say(console, "still loading: a few seconds on an idle machine"))
    with loading:
        from strategies.quorum import RoundFailed
    try:
        match HydraConfig.get().job.config_name:
            case "config":
                with loading:
                    from simulations.run import run
                page = run(config)
            case "benchmark":
                with loading:
                    from simulations.benchmark.run import CellsFailed, run_benchmark
                with failing(CellsFailed):
                    page = run_benchmark(config, console)
            case "downstream":
                with loading:
                    from simulations.downstream.run import run_downstream
                page = run_downstream(config)
            case "generation":
                with loading:
                    from simulations.diffusion_study.run import run_generation
                page = run_generation(config)
            case unknown:
                raise ValueError(
                    f"Expected --config-name config, benchmark, downstream or generation; got {unknown!r}."
                )
    except RoundFailed as error:
        raise ValueError(str(error)) from None
    say(terminal(), f"Done. The page: {page.resolve()}")


def main() -> None:
    """Entry point of `meduet-simulate`."""
    spare_loopback()
    keep_to_owner()
    _main()


if __name__ == "__main__":
    main()
