"""Flower's side of a site: SuperNode and SuperExec as children of one supervisor.

SuperNode fetches questions from the centre and brings answers back; it only calls out. SuperExec starts a
process per question (`client/app.py`), and the two share a secret, so that no other user of the machine can
hand in an answer. A SuperNode that was killed is refused for up to 66 s (exit 305): the supervisor tries on.

Does not do: answer anything, or read a scan.
Source: flwr 1.41, `flower-supernode --help`.
"""

import json
import os
import stat
import sys
from pathlib import Path

from client import mutual_tls
from client.connection import SITE_CONFIG, CentreConnection
from client.site import SiteConfig
from federation.certificates import node_key, read_key
from federation.flower_programs import EXIT_MEANINGS, environment, program, secret_file
from federation.processes import ChildProcess

SUPERNODE, SUPEREXEC = "supernode", "superexec"
FOLDER = "processes"


def supernode_processes(config: SiteConfig, config_path: Path) -> tuple[ChildProcess, ...]:
    """SuperNode and SuperExec of the site that `config_path` describes, in the order of their start.

    Raises `ValueError` when site.yaml does not say where the centre is, a file is absent or readable by
    others, or the tokenizer would not be found by the application.
    """
    centre = _usable(config)
    folder = config.state_dir / FOLDER
    variables = environment(folder / "flower")
    secret = str(secret_file(folder / "superexec.secret"))
    runtime = f"127.0.0.1:{centre.port}"
    supernode = ChildProcess(
        name=SUPERNODE,
        # -P: this file's folder must not be searched for modules; it has names that others use
        command=(
            *(sys.executable, "-P", mutual_tls.__file__),
            *("--superlink", centre.address, "--root-certificates", str(centre.ca)),
            *("--auth-supernode-private-key", str(_node_key_file(centre, folder))),
            *("--node-config", f"{SITE_CONFIG}={json.dumps(str(config_path.resolve()))}"),
            *("--isolation", "process", "--superexec-auth-secret-file", secret),
            *("--host", "127.0.0.1", "--port", str(centre.port)),
        ),
        environment={
            **variables,
            mutual_tls.CERTIFICATE: str(centre.certificate),
            mutual_tls.KEY: str(centre.key),
        },
        meanings=EXIT_MEANINGS,
    )
    superexec = ChildProcess(
        name=SUPEREXEC,
        command=(
            program("flower-superexec"),
            *("--runtime-api-address", runtime, "--insecure"),  # loopback, and with the secret
            *("--superexec-auth-secret-file", secret),
        ),
        environment=variables,
        meanings=EXIT_MEANINGS,
    )
    return supernode, superexec


def _usable(config: SiteConfig) -> CentreConnection:
    centre = config.centre
    if centre is None:
        raise ValueError(
            "Expected a section `centre` in site.yaml (address, ca, certificate, key); there is none. "
            "The start-up kit has it."
        )
    for name, path in (("ca", centre.ca), ("certificate", centre.certificate), ("key", centre.key)):
        if not path.is_file():
            raise ValueError(f"Expected centre.{name} in site.yaml to name a file; nothing is at {path}.")
    if stat.S_IMODE(centre.key.stat().st_mode) & 0o077:
        raise ValueError(f"Expected {centre.key} to be its owner's alone; do: chmod 600 {centre.key}")
    if config.tokenizer.kind == "shipped":
        import meduet_models.tokenizer

        here = Path(meduet_models.tokenizer.__file__).with_name(
            f"tokenizer_{config.tokenizer.channels}ch.safetensors"
        )
        raise ValueError(
            "Expected a tokenizer file in site.yaml: the application that the centre sends is code only. "
            f"Write: tokenizer: {{kind: file, path: {here}, channels: {config.tokenizer.channels}}}"
        )
    return centre


def _node_key_file(centre: CentreConnection, folder: Path) -> Path:
    """The site's key in Flower's format, written anew at every start."""
    path = folder / "node.key"
    path.unlink(missing_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(node_key(read_key(centre.key.read_bytes())))
    return path
