#!/usr/bin/env python3
"""A real Slurm cluster of four nodes on this one Linux machine; README.md says how to use it.

Every node has network, mounts and host name of its own. The daemons are children of one process,
the keeper, which starts what it is told to start, reaps, and does nothing else. All daemons carry
MARK in their environment, and all that runs on a node is in its network namespace: by these two
`down` finds everything, also when the keeper is gone.
"""

from __future__ import annotations

import argparse
import ctypes
import fcntl
import os
import secrets
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import datetime
from pathlib import Path

NODES = {f"n{i}": f"10.77.0.{i}" for i in range(1, 5)}
BRIDGE, BRIDGE_ADDRESS = "fedhpc-br", "10.77.0.254"
HOST = socket.gethostname().split(".")[0]
MARK = "FEDHPC_DEVCLUSTER"
PACKAGES = {
    "slurm-wlm": ["slurmctld", "slurmd", "scontrol", "sinfo"],
    "munge": ["munged"],
    "iproute2": ["ip"],
    "util-linux": ["nsenter", "unshare"],
}
ACCOUNTING_PACKAGES = {
    "mariadb-server": ["mariadbd", "mariadb-install-db"],
    "slurmdbd": ["slurmdbd"],
    "slurm-wlm": ["sacctmgr"],
}
SLURM_CONF = f"""\
ClusterName=fedhpc
SlurmctldHost={HOST}({BRIDGE_ADDRESS})
SlurmctldPort=26817
SlurmdPort=26818
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=cred_expire=5,socket=ROOT/munge/socket
StateSaveLocation=ROOT/state
SlurmdSpoolDir=ROOT/spool/%n
SlurmctldPidFile=ROOT/run/slurmctld.own
SlurmdPidFile=ROOT/run/%n.own
SlurmdLogFile=ROOT/log/%n.steps
# Plain means, which work in any container: no cgroups, no binding to cores.
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/linux
MpiDefault=none
# The nodes say that they have more than this machine has.
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
GresTypes=gpu
# Tests need not wait long for a start, nor until a node's end is noticed.
SchedulerParameters=sched_interval=1,batch_sched_delay=0,bf_interval=1
SlurmctldTimeout=10
SlurmdTimeout=10
KillWait=30
MinJobAge=300
MaxArraySize=2000
JobRequeue=1
ReturnToService=2
# A job in gpu takes the place of one in preempt, which gets SIGTERM and is requeued 5 s later.
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
NodeName=n[1-4] NodeAddr=10.77.0.[1-4] CPUs=8 RealMemory=20000 Gres=gpu:2
PartitionName=DEFAULT Nodes=n[1-4] MaxTime=INFINITE State=UP
PartitionName=gpu Default=YES PriorityTier=10 PreemptMode=OFF
PartitionName=preempt PriorityTier=1 PreemptMode=REQUEUE GraceTime=5
"""
ACCOUNTING_CONF = f"""\
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost={BRIDGE_ADDRESS}
AccountingStoragePort=26819
"""
SLURMDBD_CONF = f"""\
DbdHost={HOST}
DbdAddr={BRIDGE_ADDRESS}
DbdPort=26819
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket=ROOT/munge/socket
PidFile=ROOT/run/slurmdbd.own
StorageType=accounting_storage/mysql
StorageUser=root
"""
GRES_CONF = "NodeName=n[1-4] Name=gpu File=ROOT/gpu[0-1]\n"
HOSTS = "\n".join(
    ["127.0.0.1 localhost", f"{BRIDGE_ADDRESS} {HOST}", *(f"{a} {n}" for n, a in NODES.items()), ""]
)
COMMANDS = {
    "munged": "munged --foreground --key-file=ROOT/munge/key --socket=ROOT/munge/socket"
    " --pid-file=ROOT/munge/pid --log-file=ROOT/munge/log --seed-file=ROOT/munge/seed",
    "mariadbd": "mariadbd --no-defaults --user=root --skip-networking --datadir=ROOT/db"
    " --socket=ROOT/run/mariadb --pid-file=ROOT/run/mariadbd.own",
    "slurmdbd": "slurmdbd -D",
    "slurmctld": "slurmctld -D",
} | {
    node: f"nsenter --net=/run/netns/fedhpc-{node} unshare --uts --mount sh -c"
    f" 'hostname {node} && mount --bind ROOT/hosts /etc/hosts && exec slurmd -D'"
    for node in NODES
}


class Trouble(Exception):
    """What was wanted, what was found, and a hint."""


def run(command: str, check: bool = True) -> str:
    """Return the output of a command, which has to end in time."""
    done = subprocess.run(
        shlex.split(command), text=True, stdout=-1, stderr=-2, check=False, timeout=60
    )
    if check and done.returncode:
        raise Trouble(f"wanted: {command}\nfound:  {done.stdout.strip()}")
    return done.stdout.strip()


def wait(wanted: str, missing: Callable[[], str], seconds: float) -> None:
    """Wait until nothing is missing: until the function, which says what is, returns ''."""
    end = time.monotonic() + seconds
    while found := missing():
        if time.monotonic() > end:
            raise Trouble(f"wanted: {wanted} within {seconds:g} s\nfound:  {found}")
        time.sleep(0.05)


def kill(what: str, find: Callable[[], list[int]]) -> None:
    """Kill what the function finds until it finds nothing."""

    def left() -> str:
        pids = find()
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return f"processes {pids}" if pids else ""

    wait(f"the end of {what}", left, 20)


def processes_of(root: Path, name: str = "") -> list[int]:
    """Return the daemons (or the daemon of that name) and what has their environment."""
    mark = f"{MARK}={root}:{name}" + ("\0" if name else "")
    found = []
    for environ in Path("/proc").glob("[0-9]*/environ"):
        with suppress(OSError):  # it has ended meanwhile
            if b"\0" + mark.encode() in b"\0" + environ.read_bytes():
                found.append(int(environ.parent.name))
    return sorted(found)


def processes_on(node: str) -> list[int]:
    """Return everything that runs in the node's network namespace."""
    found = []
    with suppress(FileNotFoundError):
        there = Path(f"/run/netns/fedhpc-{node}").stat()
        for net in Path("/proc").glob("[0-9]*/ns/net"):
            with suppress(OSError):
                if os.path.samestat(net.stat(), there):
                    found.append(int(net.parts[2]))
    return found


class Cluster:
    def __init__(self, root: Path) -> None:
        self.root = root
        os.environ["PATH"] += ":/usr/sbin:/sbin"
        os.environ["SLURM_CONF"] = str(root / "slurm.conf")

    @property
    def accounting(self) -> bool:
        return (self.root / "slurmdbd.conf").exists()

    def write(self, name: str, text: str, mode: int = 0o644) -> None:
        path = self.root / name
        path.touch(mode)
        path.write_text(text.replace("ROOT", str(self.root)))

    # Daemons

    def keep(self) -> None:
        """Be the keeper."""

        def reap(*_: object) -> None:
            with suppress(ChildProcessError):
                while os.waitpid(-1, os.WNOHANG)[0]:
                    pass

        ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER: orphans come here
        signal.signal(signal.SIGCHLD, reap)
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(f"{self.root}/run/keeper")
            server.listen()
            while True:
                client, _ = server.accept()
                with client, suppress(OSError):
                    client.settimeout(5)
                    name = client.recv(100).decode()
                    client.sendall(self.spawn(name, COMMANDS[name]).encode())

    def spawn(self, name: str, command: str) -> str:
        """Start a daemon; return what went wrong, or 'ok'."""
        keys = ("PATH", "SLURM_CONF")
        environ = {key: os.environ[key] for key in keys} | {MARK: f"{self.root}:{name}"}
        environ["MYSQL_UNIX_PORT"] = f"{self.root}/run/mariadb"  # for slurmdbd
        with (self.root / "log" / name).open("ab") as log:
            try:
                process = subprocess.Popen(
                    shlex.split(command.replace("ROOT", str(self.root))),
                    env=environ,
                    cwd="/",
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                )
            except OSError as error:
                return str(error)
        (self.root / "run" / f"{name}.pid").write_text(f"{process.pid}\n")
        return "ok"

    def pid(self, name: str) -> int:
        """Return the running daemon's process id, or 0."""
        with suppress(OSError, ValueError):
            pid = int((self.root / "run" / f"{name}.pid").read_text())
            if pid in processes_of(self.root, name):
                return pid
        return 0

    def start(self, name: str, missing: Callable[[], str], seconds: float = 20) -> None:
        """Have the keeper start a daemon, and wait until nothing is missing."""
        if not self.pid(name):
            with socket.socket(socket.AF_UNIX) as keeper:
                keeper.settimeout(10)
                keeper.connect(f"{self.root}/run/keeper")
                keeper.sendall(name.encode())
                if (answer := keeper.recv(1000).decode()) != "ok":
                    raise Trouble(f"wanted: to start {name}\nfound:  {answer}")
