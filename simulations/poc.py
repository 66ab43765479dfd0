"""A consortium on one machine, for real: certificates, TLS, processes, a plan; `meduet-server poc`.

Everything a deployment has, on loopback: an authority and a certificate for everyone, the proxy with mutual
TLS, SuperLink, SuperExec, a SuperNode per hospital, the application as Flower ships it, a process per
question. Only the hospitals' scans are simulated. For people who want to see it before they trust it, and for
the tests that kill its parts. It takes about a minute, most of it Python loading libraries anew for each
question.

Does not do: anything that a deployment would not do in the same way; its files are examples of a real one's.
"""

import dataclasses
import os
import socket
import sys
import time
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from client.connection import CentreConnection
from client.site import SiteConfig
from federation.certificates import (
    Authority,
    certificate_pem,
    crl_pem,
    fingerprint,
    key_pem,
    new_key,
    node_public_key,
    utc_now,
)
from federation.plan import RunPlan
from federation.processes import ChildProcess, Say, Supervisor
from server.app_folder import ROOT
from server.config import compose_config, plain
from server.control import Control
from server.deployment import ServerConfig, load_server_config
from server.proxy import nginx
from server.run_folder import write_whole
from server.status import read_status
from server.submission import RunGivenUp, Submission
from simulations.progress import Live
from simulations.run import Made, Simulation, prepare

VALID = timedelta(days=30)
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
    fingerprint: str
    """Of the authority's certificate."""

    @property
    def plan(self) -> RunPlan:
        """What is going to run."""
        return self.simulation.plan

    @property
    def plan_path(self) -> Path:
        """The plan as the centre submits it."""
        return self.folder / "plan.json"

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
        return Supervisor(self.processes(), self.folder / "processes", say)


def provision(folder: Path, overrides: Sequence[str], live: Live, made: Made | None = None) -> Poc:
    """Make hospitals (unless they are `made`), certificates and settings in `folder`.

    Raises `ValueError` for settings that are wrong.
    """
    settings = compose_config([*SMALL, *overrides, f"folder={folder / 'simulated'}"])
    simulation = prepare(plain(settings), live, made)
    plan, configs = simulation.plan, simulation.consortium.configs
    proxy = _proxy_kind()
    ports = _free_ports(3 + len(configs))
    keys = folder / "certificates"
    keys.mkdir(parents=True, exist_ok=True, mode=0o700)
    now = utc_now()
    authority = Authority.create("poc", VALID.days, now)
    end = now + VALID
    server_key = new_key()
    _write(keys / "ca.crt", certificate_pem(authority.certificate))
    _write(keys / "server.key", key_pem(server_key))
    _write(keys / "server.crt", certificate_pem(authority.server(server_key.public_key(), [], end, now)))
    _write(keys / "revoked.crl", crl_pem(authority.revocation_list({}, now)))
    address = f"localhost:{ports[2] if proxy == 'nginx' else ports[0]}"
    site_yamls = {}
    for config, port in zip(configs, ports[3:], strict=True):
        key, name = new_key(), config.name
        _write(keys / f"{name}.key", key_pem(key))
        _write(keys / f"{name}.pub", node_public_key(key.public_key()))
        _write(keys / f"{name}.crt", certificate_pem(authority.site(name, key.public_key(), end, now)))
        centre = CentreConnection(
            address=address, ca=keys / "ca.crt", certificate=keys / f"{name}.crt", key=keys / f"{name}.key",
            port=port,
        )  # fmt: skip
        site_yamls[name] = folder / f"site-{name}.yaml"
        write_whole(site_yamls[name], _site_yaml(config, centre))
    server = {
        "state_dir": "centre",
        "ca": "certificates/ca.crt",
        "certificate": "certificates/server.crt",
        "key": "certificates/server.key",
        "revoked": "certificates/revoked.crl",
        "sites": {name: f"certificates/{name}.pub" for name in site_yamls},
        "port": ports[0],
        "health_port": ports[1],
        "proxy": proxy,
        "public_host": "127.0.0.1",
        "public_port": ports[2],
    }
    write_whole(folder / "server.yaml", yaml.safe_dump(server, sort_keys=False))
    write_whole(folder / "plan.json", plan.to_json())
    return Poc(folder, simulation, folder / "server.yaml", site_yamls, fingerprint(authority.certificate))


def run_poc(num_sites: int, folder: Path, say: Say) -> Path:
    """Provision, start, run, stop; the folder of the run. Raises `ValueError` and `RunGivenUp`."""
    if num_sites < 2:
        raise ValueError(f"Expected at least 2 sites; got {num_sites}.")
    folder = folder.resolve()
    if (folder / "server.yaml").is_file():
        raise ValueError(f"Expected {folder} to be new; it holds a consortium. Remove it, or name another.")
    begun = time.monotonic()
    with Live() as live:
        poc = provision(folder, [f"hospitals.num_hospitals={num_sites}"], live)
    say(f"authority, certificates, settings and {num_sites} simulated hospitals: {folder}")
    say(f"fingerprint of the authority: {poc.fingerprint}")
    if poc.config.proxy == "none":
        say("nginx is not installed: sites reach SuperLink directly over TLS, without the proxy's mutual TLS")
    with poc.running(say) as supervisor:
        say(f"starting the centre and {', '.join(poc.site_yamls)} as processes; logs in {folder}/processes")
        told = _Teller(poc, say)

        def tick() -> None:
            supervisor.poll()
            told.tell()

        Submission(Control(poc.config), poc.plan_path, poc.run_folder, say).see_through(tick)
        told.tell()
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


def _site_yaml(config: SiteConfig, centre: CentreConnection) -> str:
    """The site.yaml of a simulated hospital, as its people would write it: only what is not as it comes."""
    shipped = Path(ROOT / "meduet_models" / f"tokenizer_{config.tokenizer.channels}ch.safetensors")
    tokenizer = config.tokenizer
    if tokenizer.kind == "shipped":  # the application that travels carries code only
        tokenizer = dataclasses.replace(tokenizer, kind="file", path=str(shipped))
    full = dataclasses.replace(config, threads=1, tokenizer=tokenizer, centre=centre)
    values = {
        field.name: _plain(getattr(full, field.name))
        for field in dataclasses.fields(full)
        if getattr(full, field.name) != _default(field)
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


def _proxy_kind() -> str:
    try:
        nginx()
    except ValueError:
        return "none"
    return "nginx"


def _free_ports(count: int) -> list[int]:
    """Ports that are free now."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
    finally:
        for one in sockets:
            one.close()


def _write(path: Path, content: bytes) -> None:
    path.unlink(missing_ok=True)
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(content)


def main() -> int:
    """`python -m simulations.poc SITES FOLDER`; what `meduet-server poc` becomes."""
    console = Console(highlight=False, soft_wrap=True)
    try:
        folder = run_poc(int(sys.argv[1]), Path(sys.argv[2]), lambda line: console.print(line, markup=False))
    except (ValueError, RunGivenUp) as error:
        console.print(str(error), markup=False)
        return 2
    except KeyboardInterrupt:
        console.print("Interrupted; every process was stopped.")
        return 130
    console.print(f"Done. The run: {folder} (model.safetensors, metrics.json, journal.jsonl, status.json)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
