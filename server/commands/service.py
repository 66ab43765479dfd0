"""`meduet-server start | run | stop | status | watch | proxy | poc`: the centre as something that runs.

Does not do: more than read arguments and call the module that does the work; heavy ones are imported then.
"""

import argparse
import os
import sys
from pathlib import Path
from typing import Any

from rich.console import Console

from federation.terminal import failing, say


def add_to(commands: Any) -> None:
    """Add these commands to `meduet-server`'s parser."""
    start = commands.add_parser(
        "start",
        help="run Flower's SuperLink and SuperExec and the proxy, until SIGTERM or Ctrl-C",
        description="Start and supervise everything the centre needs; what ends is started again. Sites "
        "named in server.yaml are registered, others shut out.",
    )
    _config(start)
    start.set_defaults(run=_start)

    run = commands.add_parser(
        "run",
        help="submit a plan and see it through: again after every failure, until it is complete",
        description="Submit a run to the centre that `start` keeps up, watch it, and submit it again when it "
        "fails, until its own checkpoints say it is complete. Given again, goes on with the same run.",
    )
    run.add_argument("plan", type=Path, metavar="PLAN", help="plan.json of the run, or a published plan")
    run.add_argument("--folder", type=Path, required=True, help="where the run goes")
    run.add_argument(
        "--pretrained",
        type=Path,
        metavar="RUN",
        help="of a fine-tuning: the folder of the pretraining, or its model.safetensors",
    )
    run.add_argument(
        "--anatomy",
        type=Path,
        metavar="FILE",
        help="of a plan that starts from public anatomy: the file of pretrain-public, in place of ours",
    )
    run.add_argument(
        "--bank-key",
        type=Path,
        metavar="FILE",
        help="of a plan under which latents leave: the key of the bank, as given to `plan` (default: "
        "FOLDER.key)",
    )
    _config(run)
    run.set_defaults(run=_run)

    stop = commands.add_parser(
        "stop",
        help="stop what runs at the centre; `run` goes on with it",
        description="Stop every run that is under way. Sites finish what they compute, and nobody reads it. "
        "`meduet-server run`, given again, goes on after the last round.",
    )
    _config(stop)
    stop.set_defaults(run=_stop)

    status = commands.add_parser(
        "status",
        help="a run's rounds, sites, traffic, losses and refused replies; live in a terminal",
        description="Show a run as it is now; in a terminal until it is over.",
    )
    status.add_argument("folder", type=Path, metavar="FOLDER", help="the run's folder")
    status.add_argument("--config", type=Path, metavar="FILE", help="server.yaml: also show its processes")
    status.add_argument("--json", action="store_true", help="print JSON once, for programs")
    status.add_argument("--once", action="store_true", help="print once, do not stay")
    status.set_defaults(run=_status)

    watch = commands.add_parser(
        "watch",
        help="a page to watch a run on this machine, and its numbers for Prometheus; read-only",
        description="Serve what `status` shows as a page on loopback, until Ctrl-C. It needs no JavaScript, "
        "asks nobody, and can change nothing. The address holds a word that only the folder's owner can "
        "read.",
    )
    watch.add_argument("folder", type=Path, metavar="FOLDER", help="the run's folder")
    watch.add_argument("--config", type=Path, metavar="FILE", help="server.yaml: processes and certificates")
    watch.add_argument("--port", type=int, default=8600, help="on loopback; 0: any (default 8600)")
    watch.set_defaults(run=_watch)

    proxy = commands.add_parser(
        "proxy",
        help="print the proxy's configuration, for a centre whose proxy is somebody else's",
        description="Print nginx.conf: mutual TLS, fleet routes only. `start` uses the same.",
    )
    _config(proxy)
    proxy.set_defaults(run=_proxy)

    poc = commands.add_parser(
        "poc",
        help="a whole consortium on this machine: real processes, TLS, simulated scans; two minutes",
        description="Make certificates, a centre and simulated hospitals, start all of them as real "
        "processes that talk over TLS on loopback, run a small plan, and stop: about two minutes on two idle "
        "cores, and 4 GB of memory. Nothing leaves this machine. nginx is needed for the whole of it "
        "(apt-get install nginx); without it, the sites reach SuperLink directly.",
    )
    poc.add_argument("--sites", type=int, default=3, help="number of hospitals, at least 2 (default 3)")
    poc.add_argument(
        "--folder", type=Path, default=Path("~/meduet-poc"), metavar="DIR",
        help="new folder for all of it (default: ~/meduet-poc); not in a git work tree, because it gets keys",
    )  # fmt: skip
    poc.set_defaults(run=_poc)


def _config(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", type=Path, required=True, metavar="FILE", help="the centre's server.yaml")


def _start(chosen: argparse.Namespace, console: Console) -> None:
    from server.deployment.config import load_server_config
    from server.deployment.service import Service

    Service(load_server_config(chosen.config), lambda line: say(console, line)).run()


def _run(chosen: argparse.Namespace, console: Console) -> None:
    from server.deployment.config import load_server_config
    from server.deployment.control import Control
    from server.deployment.submission import RunGivenUp, Submission

    control = Control(load_server_config(chosen.config))
    submission = Submission(
        control,
        chosen.plan,
        chosen.folder,
        lambda line: say(console, line),
        chosen.pretrained,
        chosen.anatomy,
        chosen.bank_key,
    )
    with failing(RunGivenUp):
        submission.see_through()


def _stop(chosen: argparse.Namespace, console: Console) -> None:
    from server.deployment.config import load_server_config
    from server.deployment.control import Control, ControlFailed

    control = Control(load_server_config(chosen.config))
    with failing(ControlFailed):
        under_way = [run for run in control.runs() if not run.finished]
        for run in under_way:
            control.stop(run.identity)
            say(console, f"stopped: Flower's run {run.identity}")
    if not under_way:
        say(console, "nothing is under way")


def _status(chosen: argparse.Namespace, console: Console) -> None:
    from server.deployment.config import load_server_config
    from server.deployment.status_screen import as_json, show

    state_dir = None if chosen.config is None else load_server_config(chosen.config).state_dir
    if chosen.json:
        console.out(as_json(chosen.folder, state_dir), highlight=False)
    else:
        show(console, chosen.folder, state_dir, live=not chosen.once)


def _watch(chosen: argparse.Namespace, console: Console) -> None:
    from federation.watching import watch
    from server.deployment.config import load_server_config
    from server.deployment.watch import watched

    config = None if chosen.config is None else load_server_config(chosen.config)
    watched(chosen.folder, config)  # whoever names another folder hears it now
    watch(lambda: watched(chosen.folder, config), chosen.folder, chosen.port, lambda line: say(console, line))


def _proxy(chosen: argparse.Namespace, console: Console) -> None:
    from server.deployment.config import load_server_config
    from server.deployment.proxy import proxy_configuration

    console.out(proxy_configuration(load_server_config(chosen.config)), end="", highlight=False)


def _poc(chosen: argparse.Namespace, console: Console) -> None:
    # Both sides meet in `simulations` only, which the centre's code never imports: it becomes that program.
    command = [sys.executable, "-m", "simulations.poc", str(chosen.sites), str(chosen.folder.expanduser())]
    os.execv(sys.executable, command)
