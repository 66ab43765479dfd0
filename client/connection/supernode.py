"""Flower's side of a site: SuperNode and SuperExec as children of one supervisor.

SuperNode fetches questions from the centre and brings answers back; it only calls out. SuperExec starts a
process per question (`client/app.py`). The two share a secret, and speak through a socket that no other user
of the machine can open, so that none can take a question or hand in an answer. A SuperNode that was killed is
refused for up to 66 s (exit 305): the supervisor tries on. SuperNode reads the site's certificate when it
starts only: when another lies there that checks out, it is started again between two questions.

Does not do: answer anything, or read a scan.
Source: flwr 1.41, `flower-supernode --help`.
"""

import json
import sys
from pathlib import Path

import meduet_models.tokenizer.tokenizer
from client.app import SITE_CONFIG
from client.connection import mutual_tls
from client.connection.arriving_bundle import InstalledCode
from client.connection.certificate_checks import certificate_check
from client.connection.keys import NODE_KEY, SiteKeys
from client.settings import SiteConfig, processes_of
from federation.bundle import ROOT
from federation.keys.certificates import utc_now
from federation.keys.kits import AUTHORITY, CERTIFICATE, KEY
from federation.programs.flower_programs import (
    EXIT_MEANINGS,
    EXIT_PATTERN,
    SUPEREXEC,
    environment,
    secret_file,
    superexec_process,
)
from federation.programs.processes import ChildProcess

SUPERNODE = "supernode"
SOCKET = "supernode.sock"
_PROGRAM = (
    "import sys; root = sys.argv.pop(1); root in sys.path or sys.path.insert(0, root); "  # this code's
    "from client.connection.{} import main; sys.exit(main())"
)


def supernode_processes(config: SiteConfig, config_path: Path) -> tuple[ChildProcess, ...]:
    """SuperNode and SuperExec of the site that `config_path` describes, in the order of their start.

    Raises `ValueError` when there are no keys, they do not belong together, are not valid now or can be read
    by others, when the application would not find the tokenizer, or when this code is not a checkout.
    """
    keys = _usable_keys(config)
    _check_tokenizer(config)
    InstalledCode.read()
    folder = processes_of(config)
    variables = environment(folder / "flower", folder / SOCKET)
    secret = str(secret_file(folder / "superexec.secret"))
    supernode = ChildProcess(
        name=SUPERNODE,
        command=(
            *(sys.executable, "-P", "-c", _PROGRAM.format("mutual_tls"), str(ROOT)),
            *("--superlink", keys.connection.server),
            *("--root-certificates", str(keys.folder / AUTHORITY)),
            *("--auth-supernode-private-key", str(keys.folder / NODE_KEY)),
            *("--node-config", f"{SITE_CONFIG}={json.dumps(str(config_path.resolve()))}"),
            *("--isolation", "process", "--superexec-auth-secret-file", secret),
        ),
        environment={
            **variables,
            mutual_tls.CERTIFICATE: str(keys.folder / CERTIFICATE),
            mutual_tls.KEY: str(keys.folder / KEY),
            mutual_tls.STATE: str(config.state_dir.resolve()),
        },
        meanings=EXIT_MEANINGS,
        exit_pattern=EXIT_PATTERN,
        reads_once=tuple(str(keys.folder / name) for name in (CERTIFICATE, KEY, NODE_KEY, AUTHORITY)),
        check=(
            *(sys.executable, "-P", "-c", _PROGRAM.format("certificate_checks"), str(ROOT)),
            *(str(keys.folder), config.name),
        ),
        not_while=SUPEREXEC,
    )
    superexec = superexec_process(secret, variables, ("localhost", "--insecure"))  # a name; the socket is it
    return supernode, superexec


def _usable_keys(config: SiteConfig) -> SiteKeys:
    if config.keys_dir is None:
        raise ValueError(
            "Expected keys_dir in site.yaml; there is none. `meduet-site install` makes it from the start-up "
            "kit."
        )
    verdict, found, advice = certificate_check(config.keys_dir, config.name, utc_now())
    if verdict == "failed":
        raise ValueError(f"{found}. {advice}")
    return SiteKeys.open(config.keys_dir)


def _check_tokenizer(config: SiteConfig) -> None:
    spec = config.tokenizer
    if spec.kind == "shipped":
        here = Path(meduet_models.tokenizer.tokenizer.__file__).with_name(
            f"tokenizer_{spec.channels}ch.safetensors"
        )
        raise ValueError(
            "Expected a tokenizer file in site.yaml: the application that the centre sends is code only. "
            f"Write: tokenizer: {{kind: file, path: {here}, channels: {spec.channels}}}"
        )
