"""A consortium on one machine, for real: certificates, TLS, processes, a plan; `meduet-server poc`.

Everything a deployment has, on loopback: an authority and a certificate for everyone, the proxy with mutual
TLS, SuperLink, SuperExec, a SuperNode per hospital, the application as Flower ships it, a process per
question. Only the hospitals' scans are simulated. For people who want to see it before they trust it, and for
the tests that kill its parts. It takes about two minutes, most of it Python loading libraries anew for each
question.

Does not do: anything that a deployment would not do in the same way; its files are examples of a real one's.
"""

import dataclasses
import socket
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from client.connection.keys import install
from client.secrets.site_secret import DRAWS
from client.settings import SiteConfig
from client.site_scans import confirm_patients
from federation.keys.certificates import utc_now
from federation.keys.key_files import refuse_work_tree
from federation.keys.kits import SETTINGS
from federation.plan.plan import RunPlan
from federation.programs.processes import GRACE_S, ChildProcess, Say, Supervisor
from federation.terminal import CommandFailed, ended, say, terminal
from meduet_models.tokenizer.tokenizer import shipped_tokenizer
from server.config import compose_config, plain
from server.consortium.plans import publish
from server.consortium.provisioning import ConsortiumSettings, SiteEntry
from server.consortium.provisioning import provision as make_consortium
from server.deployment.app_folder import ROOT
from server.deployment.config import ServerConfig, load_server_config
from server.deployment.control import Control
from server.deployment.proxy import nginx_is_there
from server.deployment.status import read_status
from server.deployment.submission import RunGivenUp, Submission
from server.latent_bank.records import key_beside
from simulations.consortium import simulated_secret
from simulations.progress import Live
from simulations.run import Made, Simulation, prepare
from storage.files import keep_to_owner, write_whole

SMALL = (
    "name=poc",
    "hospitals.patients=12",
    "hospitals.paired=0",
    "hospitals.resolution_mm=4",
    "style.minimum_cohort=5",
    "training.rounds=2",
    "training.steps_per_round=4",
    "training.batch_size=4",
    "aggregation.deadline_s=300",
    "device=cpu",
    "engine.cpus_per_site=1",
)
"""The plan: a small network, two short rounds."""


@dataclasses.dataclass(frozen=True)
class Poc:
    """The files of a consortium on this machine; nothing runs yet."""

    folder: Path
    simulation: Simulation
    server_yaml: Path
    site_yamls: dict[str, Path]
    plan_path: Path
    """The plan as the centre publishes it; these hospitals' people said in advance that they agree."""
    fingerprint: str
    """Of the authority's certificate."""

    @property
    def plan(self) -> RunPlan:
        """What is going to run."""
        return self.simulation.plan

    @property
    def run_folder(self) -> Path:
        """Where the run goes."""
        return self.folder / "run"

    @property
    def config(self) -> ServerConfig:
        """The centre's settings."""
        return load_server_config(self.server_yaml)

    def processes(self) -> tuple[ChildProcess, ...]:
        """The centre and the sites, each as its people would start it."""
        # many processes share the cores of one machine; sums of floats depend on the number of threads
        variables = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        commands = {"centre": ("server.cli", self.server_yaml)} | {
            site: ("client.cli", path) for site, path in self.site_yamls.items()
        }
        return tuple(
            ChildProcess(
                name=name,
                command=(sys.executable, "-m", module, "start", "--config", str(path)),
                environment=variables,
            )
            for name, (module, path) in commands.items()
        )

    def running(self, say: Say = lambda line: None) -> Supervisor:
        """A supervisor of all of them; its end is theirs."""
        return Supervisor(self.processes(), self.folder / "processes", say, grace_s=3 * GRACE_S)


def provision(folder: Path, overrides: Sequence[str], live: Live, made: Made | None = None) -> Poc:
    """Make hospitals (unless they are `made`), certificates and settings in `folder`.

    Raises `ValueError` for settings that are wrong.
    """
    settings = compose_config([*SMALL, *overrides, f"folder={folder / 'simulated'}"])
    simulation = prepare(plain(settings), live, made)
    plan, configs = simulation.plan, simulation.consortium.configs
    proxy = "nginx" if nginx_is_there() else "none"
    ports = reserve_ports(3)
    address = f"localhost:{ports[2] if proxy == 'nginx' else ports[0]}"
    sites = tuple(SiteEntry(name=config.name) for config in configs)
    consortium = ConsortiumSettings(name="poc", server=address, sites=sites, valid_days=90)
    done = make_consortium(consortium, folder / "consortium")
    site_yamls = {}
    for config, kit in zip(configs, done.kits, strict=True):
        home = folder / config.name
        keys = install(kit, home, utc_now())
        site_yamls[config.name] = home / SETTINGS
        own = dataclasses.replace(config, keys_dir=keys.folder, threads=1)
        write_whole(home / SETTINGS, _site_yaml(own))
        config.state_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
        write_whole(config.state_dir / DRAWS, simulated_secret(plan.seed, config.name))
        found = confirm_patients(own)
        live.say(f"{config.name}: {found.guess()}; {found.rule}")
    server = {
        "state_dir": "centre",
        "consortium": "consortium",
        "port": ports[0],
        "health_port": ports[1],
        "proxy": proxy,
        "public_host": "127.0.0.1",
        "public_port": ports[2],
    }
    write_whole(folder / "server.yaml", yaml.safe_dump(server, sort_keys=False))
    write_whole(folder / "plan.json", plan.to_json())
    published, _ = publish(folder / "plan.json", folder / "plans")
    return Poc(folder, simulation, folder / "server.yaml", site_yamls, published, done.office.fingerprint)


def run_poc(num_sites: int, folder: Path, say: Say) -> Path:
    """Provision, start, run, stop; the folder of the run. Raises `ValueError` and `RunGivenUp`."""
    refuse_work_tree(folder)
    if num_sites < 2:
        raise ValueError(f"Expected at least 2 sites; got {num_sites}.")
    folder = folder.resolve()
    if (folder / "server.yaml").is_file():
        raise ValueError(
            f"Expected {folder} to be new; it holds a consortium. Remove it, or name another (--folder)."
        )
    say(f"everything goes to {folder}; about two minutes on two idle cores")
    begun = time.monotonic()
    with Live() as live:
        poc = provision(folder, [f"hospitals.num_hospitals={num_sites}"], live)
    say(f"authority, certificates, settings and {num_sites} simulated hospitals: {folder}")
    say(f"fingerprint of the authority: {poc.fingerprint}")
    if poc.config.proxy == "none":
        say("nginx is not installed: sites reach SuperLink directly over TLS, without the proxy's mutual TLS")
        say("to see that, too: apt-get install nginx, and the same command with another --folder")
    with poc.running(say) as supervisor:
        say(f"starting the centre and {', '.join(poc.site_yamls)} as processes; logs in {folder}/processes")
        teller = _Teller(poc, say)

        def tick() -> None:
            supervisor.poll()
            teller.tell()

        Submission(
            Control(poc.config),
            poc.plan_path,
            poc.run_folder,
            say,
            bank_key=key_beside(poc.simulation.folder),
        ).see_through(tick)
        teller.tell()
    say(f"all processes stopped, {time.monotonic() - begun:.0f} s after the start")
    return poc.run_folder


class _Teller:
    """Says once what the run's status says."""

    def __init__(self, poc: Poc, say: Say) -> None:
        self._folder, self._say, self._last = poc.run_folder, say, ""

    def tell(self) -> None:
        status = read_status(self._folder)
        if status is None:
            return
        answered = [name for name, site in status["sites"].items() if site["state"] == "answered"]
        words = status["state"]
        if status["state"] == "round":
            words = f"round {status['round']} of {status['rounds']}"
            words += f": {', '.join(answered)} answered" if answered else ""
        if words != self._last:
            self._say(words)
            self._last = words


def _site_yaml(config: SiteConfig) -> str:
    """The site.yaml of a simulated hospital, as its people would write it: only what is not as it comes."""
    if config.tokenizer.kind == "shipped":  # the application that travels carries code only
        shipped = shipped_tokenizer(config.tokenizer.channels)
        as_file = dataclasses.replace(config.tokenizer, kind="file", path=str(shipped))
        config = dataclasses.replace(config, tokenizer=as_file)
    values = {
        field.name: _plain(getattr(config, field.name))
        for field in dataclasses.fields(config)
        if getattr(config, field.name) != _default(field)
    }
    return yaml.safe_dump(values, sort_keys=False)


def _default(field: "dataclasses.Field[Any]") -> Any:
    factory = field.default_factory
    return field.default if factory is dataclasses.MISSING else factory()


def _plain(value: Any) -> Any:
    match value:
        case Path():
            return str(value.resolve())
        case tuple() | list():
            return [_plain(item) for item in value]
        case dict():
            return {key: _plain(item) for key, item in value.items()}
        case _ if dataclasses.is_dataclass(value):
            return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
        case _:
            return value


def reserve_ports(count: int) -> list[int]:
    """Ports that are free now, and that no other consortium is given as long as this program lives.

    Each stays bound here without being listened on: servers that ask for an address that is in use
    (SO_REUSEADDR), as all of ours do, may have it; whoever asks for any free port gets another.
    """
    ports = []
    for _ in range(count):
        with socket.socket() as one:
            one.bind(("127.0.0.1", 0))
            one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            ports.append(one.getsockname()[1])
            one.detach()  # stays open until this program ends
    return ports


def main() -> int:
    """`python -m simulations.poc SITES FOLDER`; what `meduet-server poc` becomes."""
    keep_to_owner()
    console = terminal()
    return ended(
        lambda: _poc(int(sys.argv[1]), Path(sys.argv[2]), console),
        console,
        interrupted="Interrupted; every process was stopped.",
        advice="Every process was stopped.",
    )


def _poc(num_sites: int, folder: Path, console: Console) -> None:
    try:
        run = run_poc(num_sites, folder, lambda line: say(console, line))
    except RunGivenUp as error:
        raise CommandFailed(f"{error} Logs: {folder}/processes and {folder}/centre.") from None
    say(
        console,
        f"Done. The run: {run} (model.safetensors, metrics.json, journal.jsonl, status.json)",
        f"Look at it: meduet-server status {run}; meduet-server journal show {run}",
        f"Logs: {run.parent}/processes and {run.parent}/centre; remove {run.parent} when done.",
    )


if __name__ == "__main__":
    sys.exit(main())
