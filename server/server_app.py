"""The ServerApp of a deployment: reads the plan, holds the run's folder, keeps its status, runs.

Run configuration: `plan` is the path of a plan, `folder` where the run goes, `consortium` the folder of its
keys, by which nodes are told apart, all on this machine; `device` (cpu if not given) and `bank_key` as in
`server.app.run`, for a central diffusion model.
What ends it is written to `status.json`, so that whoever submits it (`server/deployment/submission.py`) knows
whether to submit it again.

Does not do: a round; `server/app.py` does, for every engine.
"""

from pathlib import Path

import torch
from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from federation.plan import RunPlan
from server.app import run
from server.consortium.plans import plan_to_run
from server.consortium.registrations import Registrations
from server.deployment.status import StatusFile
from server.run_folder import held
from strategies.quorum import SiteOf

app = ServerApp()
_CPU = torch.device("cpu")


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the plan that the run configuration names, or go on with it."""
    plan_path, folder, consortium, device, key = (
        str(context.run_config.get(name, ""))
        for name in ("plan", "folder", "consortium", "device", "bank_key")
    )
    if not plan_path or not folder or not consortium:
        raise ValueError(
            "Expected the run configuration to name plan=<path of plan.json>, folder=<folder of the run> and "
            "consortium=<folder of the consortium>, all on the centre's machine."
        )
    run_in_folder(
        grid,
        plan_to_run(Path(plan_path)),
        Path(folder),
        torch.device(device or "cpu"),
        Path(key) if key else None,
        Registrations(Path(consortium)),
    )


def run_in_folder(
    grid: Grid,
    plan: RunPlan,
    folder: Path,
    device: torch.device = _CPU,
    bank_key: Path | None = None,
    site_of: SiteOf | None = None,
) -> None:
    """Run `plan` in `folder`, which nobody else may write meanwhile, and leave in `status.json` how it ended.
    `site_of`: as in `server.app.run`.

    Raises what `run` raises, and `FolderBusy`.
    """
    with held(folder):
        status = StatusFile(plan, folder)
        try:
            run(grid, plan, folder, observer=status, device=device, bank_key=bank_key, site_of=site_of)
        except Exception as error:
            status.failed(" ".join(str(error).split()), final=isinstance(error, ValueError))
            raise
