"""`meduet-simulate`: which configuration was asked for, and the exit status; one line per error.

Libraries that take seconds to import are loaded when it is known which are needed, and aloud.
"""

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from storage.files import keep_to_owner, private_folder

os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")  # read when Flower is imported
os.environ.setdefault("FLWR_DISABLE_UPDATE_CHECK", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # read with PyTorch: a thread that waits leaves its core

from rich.console import Console

from federation.programs.loopback import spare_loopback
from federation.terminal import ended, failing, say, terminal
from federation.watching import serving
from simulations.pulse import Pulse
from simulations.watch import SimulationPage

if TYPE_CHECKING:
    from omegaconf import DictConfig

_CONF = (
    Path(__file__).resolve().parent.parent / "conf"
)  # as in server/config.py, which takes seconds to import
_CURE = {
    "interrupted": "Interrupted. Nothing is lost: give the same command again to go on.",
    "advice": "Nothing that was done is lost. Put this right and give the same command again.",
}


def _main(config: "DictConfig") -> None:
    """One job of Hydra's."""
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    console = terminal(stderr=True)
    logging.getLogger("flwr").setLevel(logging.WARNING)
    if HydraConfig.get().mode == RunMode.MULTIRUN:
        config.folder = HydraConfig.get().runtime.output_dir  # one folder per job
    if status := ended(lambda: _report(config, HydraConfig.get().job.config_name, console), console, **_CURE):
        sys.exit(status)


def _report(config: "DictConfig", kind: str | None, console: Console) -> None:
    """Make what the chosen configuration is for, and say where its report is."""
    with _watched(config, kind, console) as page:
        say(console, "loading PyTorch and Flower")
        loading = Pulse(lambda: say(console, "still loading: a few seconds on an idle machine"))
        with loading:
            from server.run_folder import FolderBusy
            from strategies.quorum import RoundFailed
        try:
            match kind:
                case "config":
                    with loading:
                        from simulations.run import run
                    report = run(config, page)
                case "benchmark":
                    with loading:
                        from simulations.benchmark.run import CellsFailed, run_benchmark
                    with failing(CellsFailed):
                        report = run_benchmark(config, console)
                case "downstream":
                    with loading:
                        from simulations.downstream.run import run_downstream
                    report = run_downstream(config)
                case "generation":
                    with loading:
                        from simulations.diffusion_study.run import run_generation
                    report = run_generation(config)
                case unknown:
                    kinds = "config, benchmark, downstream or generation"
                    raise ValueError(f"Expected --config-name {kinds}; got {unknown!r}.")
        except (RoundFailed, FolderBusy) as error:
            raise ValueError(str(error)) from None
    say(terminal(), f"Done. The page: {report.resolve()}")


@contextmanager
def _watched(config: "DictConfig", kind: str | None, console: Console) -> Iterator[SimulationPage | None]:
    """The page of a run while it runs, said before anything else; None of the other kinds, and where nothing
    can listen."""
    if kind != "config":
        yield None
        return
    page = SimulationPage(config.name)
    with ExitStack() as stack:
        try:
            address = stack.enter_context(serving(page.look, private_folder(Path(config.folder))))
            say(console, f"{address}  shows this run while it runs")
        except ValueError as error:
            say(console, f"No page while it runs: {error}")
        yield page


def main() -> None:
    """Entry point of `meduet-simulate`."""
    spare_loopback()
    keep_to_owner()
    sys.exit(ended(_hydra, terminal(stderr=True), **_CURE))


def _hydra() -> None:
    import hydra

    hydra.main(version_base="1.3", config_path=str(_CONF), config_name="config")(_main)()


if __name__ == "__main__":
    main()
