"""The kinds of faults that need Slurm: written for tests/devcluster."""

import contextlib
import os
import random
import shlex
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from disturbed_run import LIVENESS_S, DisturbedRun
from fault_kinds import Inject, Kind
from slurm_support import Cluster, SlurmSubmitter, jobs_of

from fedhpc import rendezvous

DEVCLUSTER = [
    sys.executable,
    str(Path(__file__).resolve().parents[1] / "devcluster" / "devcluster.py"),
]
# A node each, so that a node is lost with one process; a partition that may be preempted.
ON_SLURM = ["cluster.slurm_partition=preempt", "cluster.server={nodelist: n4}",
            "cluster.clients={exclude: n4, cpus_per_task: 6}"]  # fmt: skip
_TIME_LIMIT_MIN = 10


def use_cluster() -> str:
    """Take over the environment of the devcluster; return why that cannot be, or ""."""
    if subprocess.run([*DEVCLUSTER, "status"], capture_output=True, check=False).returncode:
        return "no devcluster is up: tests/devcluster/devcluster.py up"
    lines = subprocess.run([*DEVCLUSTER, "env"], capture_output=True, text=True, check=True).stdout
    for line in lines.splitlines():
        name, _, value = line.removeprefix("export ").partition("=")
        os.environ[name] = shlex.split(value)[0]
    return ""


def submitter(folder: Path, data_root: Path) -> SlurmSubmitter:
    """Return what starts runs on the devcluster."""
    made = SlurmSubmitter(folder, data_root)
    made._common += ON_SLURM
    return made


def _command(*words: str) -> None:
    subprocess.run(words, check=True, timeout=60, capture_output=True)


def _running(run: DisturbedRun, role: str) -> str | None:
    """Return the id of a role's job while it runs."""
    job = jobs_of(run.paths).get(role)
    return job.job_id if job and job.running else None


def _some_array_task(run: DisturbedRun, draws: random.Random) -> tuple[int, str] | None:
    index = draws.randrange(2)
    job_id = _running(run, f"client-{index}")
    return (index, job_id) if job_id else None


def _to_array_task(*words: str) -> Inject:
    def inject(run: DisturbedRun, draws: random.Random) -> str | None:
        if (found := _some_array_task(run, draws)) is None:
            return None
        index, job_id = found
        _command(*words, job_id)
        return f"array task {index} is gone"

    return inject


def _to_server(*words: str, shows: str = "queued") -> Inject:
    def inject(run: DisturbedRun, _draws: random.Random) -> str | None:
        if (job_id := _running(run, "server")) is None:
            return None
        _command(*words, job_id)
        return shows

    return inject


def _preempt(role: str) -> Inject:
    """Let a job of the partition that may preempt take a role's node."""

    def inject(run: DisturbedRun, draws: random.Random) -> str | None:
        chosen = role if role == "server" else f"client-{draws.randrange(2)}"
        job = jobs_of(run.paths).get(chosen)
        if job is None or not job.running:
            return None
        _command("sbatch", "--partition=gpu", "--exclusive", f"--nodelist={job.node}",
                 "--output=/dev/null", "--wrap", "sleep 3")  # fmt: skip
        return "queued" if role == "server" else f"array task {chosen[-1]} is gone"

    return inject


def _node_of_array_task(run: DisturbedRun, draws: random.Random) -> tuple[int, str] | None:
    index = draws.randrange(2)
    job = jobs_of(run.paths).get(f"client-{index}")
    return (index, job.node) if job and job.running else None


def _node_down(*, tell: bool) -> Inject:
    def inject(run: DisturbedRun, draws: random.Random) -> str | None:
        if (found := _node_of_array_task(run, draws)) is None:
            return None
        index, node = found
        Cluster(DEVCLUSTER).do("node-down", node, *(["--tell"] if tell else []))
        run.later(20, lambda: Cluster(DEVCLUSTER).do("node-up", node))
        return f"array task {index} is gone"

    return inject


def _link_down(run: DisturbedRun, draws: random.Random) -> str | None:
    if (found := _node_of_array_task(run, draws)) is None:
        return None
    index, node = found
    Cluster(DEVCLUSTER).do("cable", node, "down")
    run.later(2 * LIVENESS_S, lambda: Cluster(DEVCLUSTER).do("cable", node, "up"))
    return f"array task {index} is gone"


def _time_limit(run: DisturbedRun, _draws: random.Random) -> str | None:
    if (job_id := _running(run, "server")) is None:
        return None
    _command("scontrol", "update", f"JobId={job_id}", "TimeLimit=1")

    def more_time() -> None:  # for the next attempt, which has the same limit
        job = jobs_of(run.paths).get("server")
        if job is not None and not job.ended and rendezvous.read(run.paths):
            with contextlib.suppress(subprocess.CalledProcessError):
                minutes = f"TimeLimit={_TIME_LIMIT_MIN}"
                _command("scontrol", "update", f"JobId={job_id}", minutes)

    run.later(70, more_time)
    return "time limit"


_KILL, _USR2 = (f"--signal={number.name[3:]}" for number in (signal.SIGKILL, signal.SIGUSR2))
_CANCELLED: Sequence[str] = ("scancel",)
KINDS = {
    kind.name: kind
    for kind in (
        Kind("element-cancelled", "scancel of an array task", _to_array_task(*_CANCELLED),
             "perhaps", ("failed", 75)),
        Kind("element-signalled", "scancel --signal=KILL of an array task",
             _to_array_task("scancel", _KILL), "perhaps", ("failed", 75)),
        Kind("element-requeued", "scontrol requeue of an array task",
             _to_array_task("scontrol", "requeue")),
        Kind("server-requeued", "scontrol requeue of the server job",
             _to_server("scontrol", "requeue")),
        Kind("server-signalled", "scancel --signal=USR2 of the server job",
             _to_server("scancel", "--full", _USR2, shows="time limit"), "perhaps",
             ("failed", 75)),
        Kind("server-cancelled", "scancel of the server job; resumed", _to_server(*_CANCELLED),
             "always", ("cancelled", 143)),
        Kind("element-preempted", "a job of a higher partition takes an array task's node",
             _preempt("client")),
        Kind("server-preempted", "a job of a higher partition takes the server's node",
             _preempt("server")),
        Kind("node-down", "an array task's node loses its power, and Slurm is told",
             _node_down(tell=True)),
        Kind("node-silent", "an array task's node loses its power, and Slurm finds out",
             _node_down(tell=False)),
        Kind("link-down", f"an array task's node loses its network for {2 * LIVENESS_S:g} s",
             _link_down),
        Kind("server-time-limit", "the server job reaches its time limit", _time_limit, "perhaps",
             ("failed", 75)),
    )
}  # fmt: skip
