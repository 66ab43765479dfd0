"""The ServerApp of a deployment: reads the plan, holds the run's folder, keeps its status, runs.

Run configuration: `plan` is the path of a plan, `folder` where the run goes, `consortium` the folder of its
keys, by which nodes are told apart, all on this machine; `device` (cpu if not given) and `bank_key` as in
`server.app.run`, for a central diffusion model. Where the file publishes a fine-tuning, that is what runs,
from the weights in `pretrained`: the folder of the pretraining, or its model.safetensors.
What ends it is written to `status.json`, so that whoever submits it (`server/deployment/submission.py`) knows
whether to submit it again.

Does not do: a round; `server/app.py` does, for every engine.
"""

from pathlib import Path

import torch
from cryptography.x509 import Certificate
from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from federation.exchanges.finetuning import FinetunePlan
from federation.plan.plan import RunPlan
from server.app import run
from server.consortium.plans import finetuning_to_run, plan_to_run
from server.consortium.registrations import Registrations
from server.deployment.status import kept_status
from server.model import MeduetModel
from strategies.quorum import SiteOf

app = ServerApp()
_CPU = torch.device("cpu")


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the plan that the run configuration names, or go on with it."""
    plan_path, folder, consortium, device, key, pretrained, anatomy, tokenizer = (
        str(context.run_config.get(name, ""))
        for name in (
            "plan",
            "folder",
            "consortium",
            "device",
            "bank_key",
            "pretrained",
            "anatomy",
            "tokenizer",
        )
    )
    if not plan_path or not folder or not consortium:
        raise ValueError(
            "Expected the run configuration to name plan=<path of plan.json>, folder=<folder of the run> and "
            "consortium=<folder of the consortium>, all on the centre's machine."
        )
    plan, finetuning = plan_to_run(Path(plan_path)), finetuning_to_run(Path(plan_path))
    registered = Registrations(Path(consortium))
    start = Path(anatomy) if anatomy else None
    if finetuning is not None:
        finetune_in_folder(grid, plan, finetuning, Path(pretrained), Path(folder), registered, start)
        return
    bank_key = Path(key) if key else None
    path = Path(tokenizer) if tokenizer else None
    run_in_folder(
        grid,
        plan,
        Path(folder),
        torch.device(device or "cpu"),
        bank_key,
        registered,
        path,
        start,
        registered.authority,
    )


def run_in_folder(
    grid: Grid,
    plan: RunPlan,
    folder: Path,
    device: torch.device = _CPU,
    bank_key: Path | None = None,
    site_of: SiteOf | None = None,
    tokenizer: Path | None = None,
    anatomy: Path | None = None,
    authority: Certificate | None = None,
) -> None:
    """Run `plan` in `folder`, which nobody else may write meanwhile, and leave in `status.json` how it ended.
    `site_of`, `authority`: as in `server.app.run`; `tokenizer`: the file of the plan's tokenizer (none: the
    package's); `anatomy`: that of its start from public anatomy (none: the shipped one).

    Raises what `run` raises, and `FolderBusy`.
    """
    with kept_status(plan, folder) as status:
        model = MeduetModel(plan, tokenizer, anatomy)
        run(
            grid,
            plan,
            folder,
            model=model,
            observer=status,
            device=device,
            bank_key=bank_key,
            site_of=site_of,
            authority=authority,
        )


def finetune_in_folder(
    grid: Grid,
    plan: RunPlan,
    finetuning: FinetunePlan,
    pretrained: Path,
    folder: Path,
    site_of: SiteOf | None = None,
    anatomy: Path | None = None,
) -> None:
    """The same for a fine-tuning, from the weights of its pretraining and, where the plan names one, the
    start from public anatomy in the file `anatomy`.

    Raises what `run_finetuning` raises, `ValueError` for a file that is no run's weights, and `FolderBusy`.
    """
    from server.exchanges.finetuning import pretrained_of, run_finetuning  # MONAI takes seconds to import

    with kept_status(plan, folder, finetuning) as status:
        network = pretrained_of(pretrained).network
        run_finetuning(
            grid, plan, finetuning, network, folder, observer=status, site_of=site_of, anatomy=anatomy
        )
