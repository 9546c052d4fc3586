#!/usr/bin/env python3
"""A real Slurm cluster of four nodes on this one Linux machine; README.md says how to use it.

Every node has network, mounts and host name of its own. The daemons are children of one process,
the keeper, which starts what it is told to, reaps, and does nothing else. All daemons carry MARK
in their environment, and all on a node is in its network namespace: by these two `down` finds all.
"""

import argparse
import ctypes
import fcntl
import os
import re
import select
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
from pathlib import Path

NODES = {f"n{i}": f"10.77.0.{i}" for i in range(1, 5)}
BRIDGE, BRIDGE_ADDRESS = "fedhpc-br", "10.77.0.254"
HOST = socket.gethostname().split(".")[0]
SOCKETS = {"keeper": "run/keeper", "munged": "munge/socket", "mariadbd": "run/mariadb"}
MARK = "FEDHPC_DEVCLUSTER"
PROGRAMS = {"slurmctld": "slurm-wlm", "munged": "munge", "ip": "iproute2", "nsenter": "util-linux"}
ACCOUNTING_PROGRAMS = {"slurmdbd": "slurmdbd", "mariadbd": "mariadb-server"}
SLURM_CONF = f"""\
ClusterName=fedhpc
SlurmctldHost={HOST}({BRIDGE_ADDRESS})
SlurmctldPort=26817
AuthInfo=cred_expire=5,socket=ROOT/munge/socket
StateSaveLocation=ROOT/state
SlurmdSpoolDir=ROOT/spool/%n
SlurmctldPidFile=ROOT/run/slurmctld.own
SlurmdPidFile=ROOT/run/%n.own
SlurmdLogFile=ROOT/log/%n.steps
# Plain means, which work in any container, and nodes that have more than this machine has.
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/linux
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
GresTypes=gpu
MaxArraySize=2000
ReturnToService=2
# Tests need not wait long for a start, nor until a node's end is noticed.
SchedulerParameters=sched_interval=1,batch_sched_delay=0,bf_interval=1
SlurmdTimeout=10
MessageTimeout=5
# A job in gpu takes the place of one in preempt: SIGTERM, SIGKILL after KillWait (30 s), requeue.
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
NodeName=n[1-4] NodeAddr=10.77.0.[1-4] CPUs=8 RealMemory=20000 Gres=gpu:2
PartitionName=gpu Nodes=ALL Default=YES PriorityTier=10 PreemptMode=OFF
PartitionName=preempt Nodes=ALL PriorityTier=1 PreemptMode=REQUEUE
PartitionName=grace Nodes=ALL PriorityTier=1 PreemptMode=REQUEUE GraceTime=60
"""
ACCOUNTING_CONF = "AccountingStorageType=accounting_storage/slurmdbd\n"
ACCOUNTING_CONF += f"AccountingStorageHost={BRIDGE_ADDRESS}\n"
ACCOUNTING_CONF += "AccountingStoragePass=ROOT/munge/socket\n"
SLURMDBD_CONF = f"""\
DbdHost={HOST}
DbdAddr={BRIDGE_ADDRESS}
AuthInfo=socket=ROOT/munge/socket
PidFile=ROOT/run/slurmdbd.own
StorageType=accounting_storage/mysql
StorageUser=root
"""
HOSTS = {"localhost": "127.0.0.1", HOST: BRIDGE_ADDRESS} | NODES
COMMANDS = {
    "keeper": f"{sys.executable} {Path(__file__).resolve()} keeper --root ROOT",
    "munged": "munged --foreground --key-file=ROOT/munge/key --socket=ROOT/munge/socket"
    " --pid-file=ROOT/munge/pid --log-file=ROOT/munge/log --seed-file=ROOT/munge/seed",
    "mariadbd": "mariadbd --no-defaults --user=root --skip-networking --datadir=ROOT/db"
    " --socket=ROOT/run/mariadb --pid-file=ROOT/run/mariadbd.own",
    "slurmdbd": "slurmdbd -D",
    "slurmctld": "slurmctld -D",
} | {
    node: f"nsenter --net=/run/netns/fedhpc-{node} unshare --uts --mount sh -c"
    f" 'hostname {node} && mount --bind ROOT/hosts /etc/hosts"
    " && mount --bind ROOT/resolv.conf /etc/resolv.conf && exec slurmd -D'"
    for node in NODES
}


class Trouble(Exception):
    """What was wanted, what was found, and a hint."""


def run(command: str, check: bool = True) -> str:
    """Return the output of a command, which has to end in time."""
    done = subprocess.run(shlex.split(command), text=True, stdout=-1, stderr=-2, timeout=60)
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


def processes(matches: Callable[[Path], bool]) -> list[int]:
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has ended meanwhile
            if matches(folder):
                found.append(int(folder.name))
    return found


def processes_of(root: Path, name: str = "") -> list[int]:
    """Return the daemons (or the daemon of that name) and what has their environment."""
    mark = f"\0{MARK}={root}:{name}".encode() + (b"\0" if name else b"")
    return processes(lambda folder: mark in b"\0" + (folder / "environ").read_bytes())


def processes_on(node: str) -> list[int]:
    """Return everything that runs in the node's network namespace."""
    there = Path(f"/run/netns/fedhpc-{node}")
    return processes(lambda folder: there.samefile(folder / "ns/net"))


class Cluster:
    def __init__(self, root: Path) -> None:
        self.root = root
        os.environ["PATH"] += ":/usr/sbin:/sbin"
        os.environ["SLURM_CONF"] = str(root / "slurm.conf")

    def write(self, name: str, text: str, mode: int = 0o644) -> None:
        path = self.root / name
        path.touch(mode)
        path.write_text(text.replace("ROOT", str(self.root)))

    def keep(self) -> int:
        """Be the keeper, until the last child has ended."""
        ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER: orphans come here
        os.mkfifo(self.root / "run/keeper")
        fifo = os.open(self.root / "run/keeper", os.O_RDWR)
        begun = False
        while True:
            if select.select([fifo], [], [], 0.1)[0]:
                begun = True
                for name in os.read(fifo, 1000).decode().split():
                    self.spawn(name)
            try:
                while os.waitpid(-1, os.WNOHANG)[0]:
                    pass
            except ChildProcessError:
                if begun:
                    return 0

    def spawn(self, name: str) -> None:
        command = shlex.split(COMMANDS[name].replace("ROOT", str(self.root)))
        environ = {key: os.environ[key] for key in ("PATH", "SLURM_CONF")}
        environ["MYSQL_UNIX_PORT"] = f"{self.root}/run/mariadb"  # where slurmdbd looks
        environ[MARK] = f"{self.root}:{name}"
        with (self.root / "log" / name).open("ab") as log:
            std = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": log}
            daemon = subprocess.Popen(command, env=environ, cwd="/", start_new_session=True, **std)
        # Its environment, by which it is known, shows only some moments after it was started.
        while daemon.poll() is None and daemon.pid not in processes_of(self.root, name):
            time.sleep(0.01)
        (self.root / "run/new").write_text(f"{daemon.pid}\n")
        (self.root / "run/new").rename(self.root / "run" / f"{name}.pid")

    def pid(self, name: str) -> int:
        """Return the running daemon's process id, or 0."""
        with suppress(OSError, ValueError):
            pid = int((self.root / "run" / f"{name}.pid").read_text())
            if pid in processes_of(self.root, name):
                return pid
        return 0

    def start(self, *names: str) -> None:
        """Have the keeper start daemons, and wait until each does its work."""
        since = time.strftime("%Y-%m-%dT%H:%M:%S")
        for name in names:
            (self.root / "run" / f"{name}.pid").unlink(missing_ok=True)
            (self.root / "run/keeper").write_text(f"{name}\n")
        for name in names:
            self.wait_for(name, since)

    def wait_for(self, name: str, since: str = "") -> None:
        try:
            wait(f"{name} at work", lambda: self.missing(name, since), 20)
        except Trouble as trouble:
            log = (self.root / "log" / name).read_text(errors="replace").splitlines()
            raise Trouble("\n  ".join([f"{trouble}\n{name}'s log ends:", *log[-15:]])) from None

    def missing(self, name: str, since: str) -> str:
        """Say what a daemon, started at that time, does not do yet."""
        if not (self.root / "run" / f"{name}.pid").exists():
            return "not started"
        if not self.pid(name):
            # As one program takes another's place, its environment is empty for a moment.
            if Path("/proc", (self.root / "run" / f"{name}.pid").read_text().strip()).exists():
                return "not started"
            raise Trouble(f"wanted: {name} at work\nfound:  it has ended")
        if name in SOCKETS:
            return "" if (self.root / SOCKETS[name]).exists() else f"no {SOCKETS[name]}"
        if name == "slurmdbd":
            return run("sacctmgr --noheader show cluster", check=False)  # there is none yet
        if name == "slurmctld":
            answer = run("scontrol ping", check=False)
            return "" if " is UP" in answer else answer
        shown = run(f"scontrol --oneliner show node {name}", check=False)
        state = re.search(r" State=(\S+)", shown)
        started = re.search(r" SlurmdStartTime=([\dT:-]+)", shown)
        bad = not state or re.search(r"DOWN|UNKNOWN|NOT_RESP|\*", state[1])
        return shown if bad or not started or started[1] < since else ""

    def plug(self, node: str) -> None:
        """Make the node's network."""
        name = f"fedhpc-{node}"
        run(f"ip netns add {name}")
        run(f"ip link add {name} master {BRIDGE} up type veth peer name eth0 netns {name}")
        run(f"ip -n {name} addr add {NODES[node]}/24 dev eth0")
        run(f"ip -n {name} link set lo up")
        run(f"ip -n {name} link set eth0 up")
        run(f"ip -n {name} route add default via {BRIDGE_ADDRESS}")

    def unplug(self, node: str) -> None:
        """End the node as a power cut does: first the network, so that nobody gets a goodbye."""
        run(f"ip link del fedhpc-{node}", check=False)
        kill(f"all on {node}", lambda: processes_on(node))
        run(f"ip netns del fedhpc-{node}", check=False)

    def up(self, accounting: bool) -> None:
        programs = PROGRAMS | (ACCOUNTING_PROGRAMS if accounting else {})
        if lacking := {name: at for name, at in programs.items() if not shutil.which(name)}:
            hint = f"apt-get install {' '.join(lacking.values())}"
            raise Trouble(f"wanted: {' '.join(lacking)}\nfound:  none\nhint:   {hint}")
        self.root.mkdir(parents=True)
        self.write(".devcluster", "all here is removed by devcluster.py down\n")
        for name in ("log", "munge", "run", "spool", "state"):
            (self.root / name).mkdir()
        self.write("munge/key", os.urandom(64).hex(), 0o600)
        self.write("hosts", "".join(f"{HOSTS[name]} {name}\n" for name in HOSTS))
        self.write("resolv.conf", "nameserver 127.0.0.1\n")  # unknown names fail at once
        self.write("slurm.conf", SLURM_CONF + (ACCOUNTING_CONF if accounting else ""))
        self.write("gres.conf", "NodeName=n[1-4] Name=gpu File=ROOT/gpu[0-1]\n")
        for number in range(2):
            os.mknod(self.root / f"gpu{number}", 0o20666, os.makedev(1, 3))  # as /dev/null
        run(f"ip link add {BRIDGE} up type bridge")
        run(f"ip link set {BRIDGE} alias {self.root}")  # so that `down` finds the folder
        run(f"ip addr add {BRIDGE_ADDRESS}/24 dev {BRIDGE}")
        for node in NODES:
            self.plug(node)
        self.spawn("keeper")
        self.wait_for("keeper")
        self.start("munged")
        if accounting:
            self.write("slurmdbd.conf", SLURMDBD_CONF, 0o600)
            run(f"mariadb-install-db --no-defaults --user=root --datadir={self.root}/db")
            self.start("mariadbd")
            self.start("slurmdbd")
            run("sacctmgr --immediate add cluster fedhpc")
        self.start("slurmctld")
        self.start(*NODES)
        (self.root / "ready").touch()

    def is_up(self) -> bool:
        return (self.root / "ready").exists() and bool(self.pid("keeper"))

    def down(self) -> None:
        """Remove all there is of the cluster, however little or broken."""
        keeper = self.pid("keeper")
        kill("the daemons", lambda: [p for p in processes_of(self.root) if p != keeper])
        for node in NODES:
            self.unplug(node)
        with suppress(Trouble):  # it reaps its children and ends
            wait("the keeper's end", lambda: str(self.pid("keeper") or ""), 5)
        kill("the keeper", lambda: processes_of(self.root))
        run(f"ip link del {BRIDGE}", check=False)
        run("umount /run/netns", check=False)  # `ip` made it; fails if others have namespaces
        run("rmdir /run/netns", check=False)
        if (self.root / ".devcluster").exists():
            shutil.rmtree(self.root)

    def status(self) -> int:
        if not self.is_up():
            print(f"no devcluster is up at {self.root}")
            return 1
        more = ["mariadbd", "slurmdbd"] if (self.root / "slurmdbd.conf").exists() else []
        print(f"devcluster at {self.root}, {'with' if more else 'without'} accounting")
        for name in ["keeper", "munged", *more, "slurmctld", *NODES]:
            print(f"{name:10} {f'pid {self.pid(name)}' if self.pid(name) else 'not running'}")
        if not self.pid("slurmctld"):
            return 1
        print(run("sinfo --Node --format='%N %P %t %C %G %E'", check=False))
        return 0


def act(args: argparse.Namespace) -> int:
    os.umask(0o022)
    alias = Path(f"/sys/class/net/{BRIDGE}/ifalias")
    there = Path(alias.read_text().strip()) if alias.exists() else None
    root = (args.root or there or Path(tempfile.gettempdir(), "fedhpc-devcluster")).resolve()
    if there not in (None, Path(), root):
        raise Trouble(f"wanted: a devcluster at {root}\nfound:  there is one at {there}")
    if not re.fullmatch(r"[\w./+-]{2,70}", str(root)):
        raise Trouble(f"wanted: a short path without odd signs\nfound:  {root}")
    if os.geteuid():
        raise Trouble("wanted: root\nfound:  another user\nhint:   use sudo, or a container")
    cluster = Cluster(root)
    if args.command == "keeper":
        return cluster.keep()
    if args.command == "status":
        return cluster.status()
    with Path(__file__).open() as script:  # one at a time

        def locked() -> str:
            with suppress(BlockingIOError):
                fcntl.flock(script, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return ""
            return "another command runs"

        wait("its turn", locked, 120)
        if args.command == "down":
            cluster.down()
        elif args.command == "up":
            if cluster.is_up():
                print("already up")
            else:
                cluster.down()  # what an `up` that was cut off has left
                try:
                    cluster.up(args.accounting)
                except BaseException:
                    cluster.down()
                    raise
            cluster.status()
        elif not cluster.is_up():
            raise Trouble(f"wanted: a devcluster at {root}\nfound:  none\nhint:   devcluster.py up")
        elif args.command == "env":
            print(f"export SLURM_CONF={root}/slurm.conf")
        elif args.command == "node-down":
            cluster.unplug(args.node)
            if args.tell:
                run(f"scontrol update nodename={args.node} state=down reason=test")
        elif args.command == "node-up" and not cluster.pid(args.node):
            cluster.unplug(args.node)
            cluster.plug(args.node)
            cluster.start(args.node)
        elif args.command == "cable":
            run(f"ip link set fedhpc-{args.node} {args.state}")
        verb = args.command.removesuffix("-controller")
        if verb in ("stop", "restart"):
            kill("slurmctld", lambda: processes_of(root, "slurmctld"))
        if verb in ("start", "restart") and not cluster.pid("slurmctld"):
            cluster.start("slurmctld")
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    for name in (
        *("up", "down", "status", "env", "node-down", "node-up", "cable"),
        *("stop-controller", "start-controller", "restart-controller", "keeper"),
    ):
        command = commands.add_parser(name)
        command.add_argument("--root", type=Path, help="the cluster's folder")
        if name in ("node-down", "node-up", "cable"):
            command.add_argument("node", choices=NODES)
        if name == "cable":
            command.add_argument("state", choices=["up", "down"])
        for option in {"up": ["--accounting"], "node-down": ["--tell"]}.get(name, []):
            command.add_argument(option, action="store_true")
    args = parser.parse_args()
    try:
        return act(args)
    except (Trouble, OSError, subprocess.TimeoutExpired) as error:
        print(f"devcluster {args.command}: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
