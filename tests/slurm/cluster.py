"""A real Slurm cluster of one node, this machine, for as long as a test takes.

Debian's packages `slurm-wlm` and `munge` must be there, and we must be root. All state lies in a
folder of the test's, but for the configuration, which jobs look for in /etc/slurm; the daemons are
our children and end with it.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "squeue", "sinfo", "scancel", "srun")
ETC = Path("/etc/slurm/slurm.conf")
OURS = "# Written by a test of unfool's, and taken away at its end.\n"
CONF = """ClusterName=unfool
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/linux
JobAcctGatherFrequency=task=1
JobAcctGatherParams=OverMemoryKill
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
ReturnToService=2
MinJobAge=600
KillWait=2
SchedulerParameters=batch_sched_delay=0,sched_interval=2,bf_interval=2
SlurmctldPort={port}
SlurmdPort={next}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
NodeName={host} NodeAddr=127.0.0.1 CPUs=2 RealMemory={memory} State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=60 DefMemPerCPU=1000 State=UP
"""


def why_not() -> str:
    """Say why no cluster can be set up here; "" if it can."""
    if not hasattr(os, "geteuid") or os.geteuid() != 0:
        return "a Slurm cluster needs root: its daemons start jobs for others"
    missing = [name for name in PROGRAMS if shutil.which(name) is None]
    if missing:
        return f"no {', '.join(missing)}: apt-get install --no-install-recommends slurm-wlm munge"
    if ETC.exists() and not ETC.read_text().startswith(OURS):
        return f"{ETC} is there: this machine belongs to a cluster, which is left alone"
    if Path("/run/munge/munge.socket.2").exists() and munge_answers():
        return "munged runs already: this machine belongs to a cluster, which is left alone"
    return ""


def munge_answers() -> bool:
    done = subprocess.run(["munge", "-n"], capture_output=True, check=False)
    return done.returncode == 0


@contextmanager
def cluster(folder: Path) -> Iterator[None]:
    """Start the daemons, and end them afterwards with all their jobs."""
    for name in ("state", "spool"):
        (folder / name).mkdir(parents=True)
    host, port = socket.gethostname().split(".")[0], 46817
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2**20
    ETC.parent.mkdir(exist_ok=True)
    ETC.write_text(
        OURS
        + CONF.format(
            host=host, folder=folder, port=port, next=port + 1, memory=min(16000, memory - 500)
        )
    )
    Path("/run/munge").mkdir(exist_ok=True)
    shutil.chown("/run/munge", "munge", "munge")
    daemons: list[subprocess.Popen[bytes]] = []
    try:
        for command in (
            ["runuser", "-u", "munge", "--", "munged", "--foreground"],
            ["slurmctld", "-D", "-c"],
            ["slurmd", "-D", "-c", "-N", host],
        ):
            log = folder / f"{'munged' if 'munged' in command else command[0]}.log"
            with log.open("wb") as file:
                daemons.append(subprocess.Popen(command, stdout=file, stderr=file))
            _until(munge_answers if len(daemons) == 1 else lambda: True, folder)
        _until(lambda: "idle" in _said(["sinfo", "-h", "-o", "%T"]), folder)
        yield
    finally:
        _end(daemons)
        ETC.unlink()


def _end(daemons: list[subprocess.Popen[bytes]]) -> None:
    """End the jobs, then the daemons, the last started first; munged sits under runuser."""
    if len(daemons) > 1:
        _said(["scancel", "--user", "root"])
        time.sleep(3)
    for daemon in reversed(daemons):
        daemon.terminate()
    for daemon in reversed(daemons):
        try:
            daemon.wait(15)
        except subprocess.TimeoutExpired:
            daemon.kill()
            daemon.wait()


def _said(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout


def _until(holds: object, folder: Path, seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    assert callable(holds)
    while not holds():
        logs = "\n".join(f"{p.name}: {p.read_text()[-800:]}" for p in folder.glob("*.log"))
        assert time.monotonic() < end, f"the cluster does not come up\n{logs}"
        time.sleep(0.2)
