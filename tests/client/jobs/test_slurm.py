"""Debian's slurm-wlm on one node: jobs of a real scheduler, one of which it kills.

Skipped where Slurm is not installed (apt-get install slurm-wlm munge), or not as root: its daemon takes
accounts on.
"""

import json
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from client.jobs import asking
from federation.plan.plan import RunPlan
from federation.programs.processes import die_with_parent
from simulations.poc import reserve_ports
from tests.client.jobs.hospital import World, bits
from tests.client.jobs.test_jobs import same_hospital

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "scancel", "sinfo")
missing = [name for name in PROGRAMS if shutil.which(name, path="/usr/sbin:/usr/bin") is None]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        bool(missing) or os.geteuid() != 0, reason=f"no Slurm here: {', '.join(missing) or 'not root'}"
    ),
]
CONF = """\
ClusterName=one
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller}
SlurmdPort={node}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} State=UNKNOWN
PartitionName=all Nodes={host} Default=YES MaxTime=INFINITE State=UP
"""


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """A cluster of this machine; the variables with which its commands find it."""
    folder = tmp_path_factory.mktemp("slurm")
    for name in ("state", "spool", "munge"):
        (folder / name).mkdir(mode=0o700)
    controller, node = reserve_ports(2)
    host = socket.gethostname().partition(".")[0]
    values = {"folder": folder, "controller": controller, "node": node, "host": host, "cpus": os.cpu_count()}
    conf = folder / "slurm.conf"
    conf.write_text(CONF.format(**values))
    key = folder / "munge" / "key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o400)
    variables = {**os.environ, "SLURM_CONF": str(conf)}
    files = [f"--{name}-file={folder}/munge/{name}" for name in ("key", "log", "pid", "seed")]
    daemons: list[tuple[str, ...]] = [
        ("/usr/sbin/munged", "--foreground", "--force", f"--socket={folder}/munge.socket", *files),
        ("/usr/sbin/slurmctld", "-D", "-f", str(conf)),
        ("/usr/sbin/slurmd", "-D", "-f", str(conf)),
    ]
    running = []
    try:
        for command in daemons:
            with (folder / f"{Path(command[0]).name}.out").open("wb") as log:
                running.append(
                    subprocess.Popen(
                        command, env=variables, stdout=log, stderr=log, preexec_fn=die_with_parent()
                    )
                )
            time.sleep(1.0)
        until(lambda: b"idle" in said(("sinfo", "-h", "-o", "%T"), variables), "an idle node")
        yield {"SLURM_CONF": str(conf)}
    finally:
        for process in reversed(running):
            process.terminate()
            process.wait(30)


def said(command: tuple[str, ...], variables: dict[str, str]) -> bytes:
    return subprocess.run(command, env=variables, capture_output=True, check=False).stdout


def until(happened: Callable[[], Any], what: str) -> None:
    end = time.monotonic() + 60
    while not happened():
        assert time.monotonic() < end, f"{what}: not within a minute"
        time.sleep(0.1)


def test_a_round_by_sbatch_is_the_local_one_to_the_bit(
    world: World, slurm: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_CONF", slurm["SLURM_CONF"])
    here = world.hospital("slurm-here")
    by_job = world.hospital("slurm-job", "sbatch", "--wait", "--output=/dev/null")
    assert bits(here.answer(world.round())) == bits(by_job.answer(world.round()))
    same_hospital(here, by_job)
    assert "Submitted batch job" in by_job.log()


def test_a_job_that_was_cancelled_goes_on_in_the_next(
    world: World, slurm: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_CONF", slurm["SLURM_CONF"])
    monkeypatch.setattr(asking, "PAUSE_S", 0.1)
    slow = world.plan.to_json().replace('"steps_per_round":4', '"steps_per_round":200')
    longer = World(world.folder, RunPlan.from_json(slow), world.bank)
    here = longer.hospital("whole", progress_every_s=0.0)
    by_job = longer.hospital(
        "cancelled", "sbatch", "--wait", "--output=/dev/null", "--job-name=meduet", progress_every_s=0.0
    )

    def cancel() -> None:
        partial = by_job.state_dir / "state"
        until(lambda: list(partial.rglob("*.partial.safetensors")), "a step")
        said(("scancel", "--signal=KILL", "--batch", "--name=meduet"), {**os.environ, **slurm})

    killer = Thread(target=cancel)
    killer.start()
    reply = by_job.answer(longer.round())
    killer.join()
    assert bits(reply) == bits(here.answer(longer.round()))
    same_hospital(here, by_job)
    assert "left no answer, 1 of 3" in by_job.log() and "goes on from there" in by_job.log()
    assert json.dumps(by_job.journal()[-1])  # one line, whatever it took
    assert [line["kind"] for line in by_job.journal()] == ["round"]
