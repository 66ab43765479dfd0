"""A simulated run: several hospitals on one machine pretrain together.

Makes the hospitals, opens them as sites, runs the plan through the messages of a real federation, and leaves
metrics, weights, figures and a page. What was interrupted goes on when the same command is given again.
"""

import importlib.metadata
import json
import os
import platform
import shutil
import sys
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from meduet_models.threads import fixed_threads
from storage.files import write_whole

os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")  # read when Flower is imported
os.environ.setdefault("FLWR_DISABLE_UPDATE_CHECK", "1")

import torch
from flwr.serverapp import Grid
from omegaconf import DictConfig, OmegaConf

from client.app import make_client_app
from client.settings import resolve_device
from federation.plan.plan import RunPlan
from meduet_models.diffusion.artefact import load_generative_model
from meduet_models.tokenizer.tokenizer import load_tokenizer
from server.app import RunObserver, RunResult
from server.app import run as run_plan
from server.config import plain, plan_from
from server.deployment.status import kept_status
from server.deployment.watch import watched
from server.export.crate import write_run_crate
from server.latent_bank.records import key_beside, public_key
from server.model import MeduetModel
from server.public_scans import PUBLIC_SCANS, drawn_public_scans
from server.volume_start import with_start
from simulations.consortium import Consortium, simulated_identity, site_configs
from simulations.engines.in_process import FixedThreads, InProcessGrid
from simulations.engines.side_by_side import SideBySide, SideBySideGrid, num_processes
from simulations.generation.judge import judge
from simulations.hospitals.make import make_hospitals
from simulations.hospitals.plans import (
    FolderHospitals,
    Hospital,
    HospitalsPlan,
    PhantomHospitals,
    SplitHospitals,
    hospital_names,
)
from simulations.observer import Witness, site_models
from simulations.page import write_page
from simulations.progress import Live
from simulations.settings import SimulationSettings, settings_from
from simulations.together import Together
from simulations.tracking import Tracking
from simulations.watch import SimulationPage

_LIBRARIES = ("torch", "flwr", "monai", "nibabel", "numpy", "scipy", "safetensors", "hydra-core", "nilearn")


@dataclass(frozen=True)
class Simulation:
    """A run that is ready to start."""

    plan: RunPlan
    settings: SimulationSettings
    consortium: Consortium
    hospitals: list[Hospital]
    """Those of the plan in its order, then those held out."""
    folder: Path
    real_scans: bool
    """Whether scans of patients are among them; phantoms are nobody's."""


@dataclass(frozen=True)
class Made:
    """Hospitals that are there already, for several runs."""

    hospitals: list[Hospital]
    """All of them, in the order in which they were made."""
    cache: Path
    """Folder of their encodings."""


def prepare(config: Mapping[str, Any], live: Live, made: Made | None = None) -> Simulation:
    """Make the hospitals, unless they are `made`, and the plan.

    Raises `ValueError` when settings are wrong, `OtherPlan` when the folder holds another run.
    """
    settings, hospitals_plan = settings_from(config)
    folder = Path(settings.folder)
    if settings.fresh and (folder / "plan.json").is_file():
        shutil.rmtree(folder)
    tokenizer = load_tokenizer(settings.tokenizer)

    def plan_for(sites: Sequence[str], public_sha256: str = "0" * 64, recipient: str = "") -> RunPlan:
        planned = plan_from(
            config,
            sites=sites,
            tokenizer_sha256=tokenizer.sha256,
            latent_channels=tokenizer.latent_channels,
            stride=tokenizer.stride,
            public_sha256=public_sha256,
            recipient=recipient,
        )
        return with_start(planned, settings.tokenizer, settings.anatomy_path)

    known = None if made is None else made.hospitals
    if known is None and isinstance(hospitals_plan, FolderHospitals):  # found there, not made
        known = make_hospitals(hospitals_plan, folder / "hospitals")
    # a mistake in the settings is said before anything is made
    asked = plan_for(_sites_of(hospitals_plan, known, settings.held_out))
    public_sha256 = "0" * 64
    if asked.privacy is not None:
        with live.counting("drawing public scans") as progress:
            path = folder / PUBLIC_SCANS
            public_sha256 = drawn_public_scans(asked, tokenizer, path, progress)
    if known is None:
        with live.counting("making hospitals") as progress:
            known = make_hospitals(hospitals_plan, folder / "hospitals", progress)
    taking_part, apart = held_apart(known, settings.held_out)
    recipient = public_key(key_beside(folder)) if asked.latent_policy.sealed else ""
    plan = plan_for([hospital.name for hospital in taking_part], public_sha256, recipient)
    state = folder / "sites"
    hospitals = [*taking_part, *apart]
    configs = site_configs(hospitals, plan, settings, state, None if made is None else made.cache)
    real = not isinstance(hospitals_plan, PhantomHospitals)
    return Simulation(plan, settings, Consortium(plan, configs, state), hospitals, folder, real)


def _sites_of(
    plan: HospitalsPlan, known: Sequence[Hospital] | None, held_out: Sequence[str]
) -> Sequence[str]:
    """As many names as sites will take part; their own where the hospitals are known."""
    if known is not None or isinstance(plan, FolderHospitals):
        return [hospital.name for hospital in held_apart(known or (), held_out)[0]]
    return hospital_names(plan.names, plan.num_hospitals)[: max(1, plan.num_hospitals - len(held_out))]


def held_apart(
    hospitals: Sequence[Hospital], held_out: Sequence[str]
) -> tuple[list[Hospital], list[Hospital]]:
    """Hospitals that take part, and those held out; `ValueError` for an unknown name, or when none remain."""
    names = [hospital.name for hospital in hospitals]
    if unknown := sorted(set(held_out) - set(names)):
        raise ValueError(f"Expected held_out to name hospitals ({', '.join(names)}); got {unknown[0]!r}.")
    if len(set(held_out)) < len(held_out):
        raise ValueError(f"Expected held_out to name each hospital once; got {', '.join(held_out)}.")
    apart = [hospital for name in held_out for hospital in hospitals if hospital.name == name]
    taking_part = [hospital for hospital in hospitals if hospital.name not in held_out]
    if not taking_part:
        raise ValueError(f"Expected a hospital that is not held out; held_out names all {len(names)}.")
    return taking_part, apart


def side_by_side(simulation: Simulation) -> AbstractContextManager[SideBySide | None]:
    """The processes in which the sites work; none where this one does it all, or Ray."""
    engine, num_sites = simulation.settings.engine, len(simulation.plan.participants)
    on_gpu = resolve_device(simulation.settings.device).type == "cuda"
    number = num_processes(engine.workers, num_sites, engine.cpus_per_site, on_gpu)
    if engine.kind == "ray" or number == 1:
        return nullcontext()
    logs = simulation.folder / "processes"
    return SideBySide(simulation.consortium, number, engine.cpus_per_site, logs)


def simulate(
    simulation: Simulation, live: Live, observer: RunObserver, processes: SideBySide | None = None
) -> RunResult:
    """Run the plan on the chosen engine, or go on with what is in the folder. `processes`: where the sites
    work already; none: in this process."""
    plan, engine = simulation.plan, simulation.settings.engine

    def on_turn(site: int, message_type: str, begins: bool) -> None:
        live.on_turn(plan.participants[site], message_type.partition(".")[2], begins)

    def serve(grid: Grid) -> RunResult:
        device = resolve_device(simulation.settings.device)
        keep_early = simulation.settings.checkpoints.keep_early
        return run_plan(
            grid,
            plan,
            simulation.folder,
            model=MeduetModel(plan, anatomy=simulation.settings.anatomy_path),
            observer=observer,
            device=device,
            authority=simulated_identity(plan.participants[0]).authority,
            keep_early=keep_early,
        )

    num_sites = len(plan.participants)
    match engine.kind:
        case "process" if processes is not None:
            return serve(SideBySideGrid(processes, num_sites, live.on_step, on_turn))
        case "process":
            client_app = make_client_app(simulation.consortium.open_by_context, live.on_step)
            client_app = FixedThreads(client_app, engine.cpus_per_site)
            return serve(InProcessGrid(client_app, num_sites, on_turn=on_turn))
        case "ray":
            from simulations.engines.ray_engine import run_on_ray  # Ray takes seconds to import

            gpus = (
                0.0 if simulation.settings.device == "cpu" else float(torch.cuda.is_available()) / num_sites
            )
            client_app = make_client_app(simulation.consortium.open_by_context)
            return run_on_ray(
                serve,
                client_app,
                num_sites,
                address=engine.address,
                real_scans=simulation.real_scans,
                cpus_per_site=engine.cpus_per_site,
                gpus_per_site=gpus,
            )


def run(config: DictConfig, page: SimulationPage | None = None) -> Path:
    """Everything from settings to report; returns the report's path. `page`: shows it meanwhile."""
    values, page = plain(config), page or SimulationPage(config.name)
    with fixed_threads(settings_from(values)[0].engine.cpus_per_site), Live() as live:
        page.show_work(live)
        simulation = prepare(values, live)
        plan, folder = simulation.plan, simulation.folder
        live.begin(plan)
        with side_by_side(simulation) as processes:
            _read(simulation, live, processes)
            with live.counting("opening the scans of held-out patients"):
                hospitals, settings = simulation.hospitals, simulation.settings
                witness = Witness(plan, simulation.consortium, hospitals, settings, live)
                tracking = Tracking(plan, folder, settings.tracking)
            write_whole(folder / "config.yaml", OmegaConf.to_yaml(config, resolve=True))
            with kept_status(plan, folder) as status:
                page.show_run(lambda: watched(folder))
                result = simulate(simulation, live, Together(witness, tracking, status), processes)
        witness.draw(result)
        _judge(simulation, result, witness, live)
        with live.counting("drawing the page"):
            write_whole(folder / "versions.json", json.dumps(versions(result), indent=1) + "\n")
            origin = _origin(settings_from(values)[1], simulation.hospitals)
            report = write_page(folder, origin, simulation.consortium.held_out)
        write_run_crate(folder)  # once more: figures and the report are part of it
        return report


def _read(simulation: Simulation, live: Live, processes: SideBySide | None) -> None:
    """Read and encode everybody's scans, as `meduet-site prepare` does at a hospital."""
    plan, consortium = simulation.plan, simulation.consortium
    if processes is not None:
        processes.read([*plan.sites, *consortium.held_out], live.reading)
    for name in plan.participants:
        with live.reading(name) as progress:
            consortium.site(name).scans(plan, progress)
    for name, found in consortium.patients.items():
        live.say(f"{name}: {found.guess()}; {found.rule}")
    for name in consortium.held_out:
        with live.reading(name) as progress:
            consortium.site(name).scans(consortium.everyone, progress)


def _judge(simulation: Simulation, result: RunResult, witness: Witness, live: Live) -> None:
    """Sample and measure the diffusion model, where there is one and there are scans to measure it on."""
    settings = simulation.settings.generation
    if result.diffusion is None or settings is None:
        return
    bench = witness.bench()
    if bench is None:
        live.say("No patient is kept for validation or test: the diffusion model is not judged.")
        return
    with live.reading("diffusion model") as progress:
        plan = simulation.plan
        swaps = site_models(plan, simulation.consortium, result.shared, plan.num_rounds)[0]
        model = load_generative_model(result.diffusion)
        judge(model, bench, simulation.folder, settings, progress, swaps)


def versions(result: RunResult) -> dict[str, Any]:
    """What produced the run: command, code, libraries, machine, hash of the final weights."""
    from meduet_models.weights import sha256_of_tensors

    return {
        "command": " ".join(["meduet-simulate", *sys.argv[1:]]),
        "fedmeduet": importlib.metadata.version("fedmeduet"),
        "python": platform.python_version(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores"
        + (f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""),
        "model_sha256": sha256_of_tensors(result.shared) if result.shared else "",
        "libraries": {name: importlib.metadata.version(name) for name in _LIBRARIES},
    }


def _origin(plan: HospitalsPlan, hospitals: list[Hospital]) -> str:
    match plan:
        case PhantomHospitals():
            return "Simulated patients (deformed ICBM 152 anatomy), a simulated scanner for each hospital."
        case SplitHospitals(by=by, styles_on_top=True):
            return f"Real scans of one folder, divided ({by}), a simulated scanner on top for each hospital."
        case SplitHospitals(by=by):
            return f"Real scans of one folder, divided among simulated hospitals ({by})."
        case _:
            return "Real scans of real hospitals."
