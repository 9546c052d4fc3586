"""How a run really stands: status.json, checked against its jobs and the server's heartbeat."""

import shutil
import socket
import time
from dataclasses import dataclass, field
from typing import Any

from fedhpc import files, rendezvous, run_state
from fedhpc.cluster import slurm, submission
from fedhpc.cluster.slurm import Job
from fedhpc.errors import PlatformError
from fedhpc.paths import RunPaths

_LAST_WORD_S = 3.0  # for a last status.json to be seen on a shared disk
_ENDS = {
    "TIMEOUT": "it reached its time limit (cluster.time_min)",
    "DEADLINE": "it reached its deadline",
    "OUT_OF_MEMORY": "it used more memory than it asked for (cluster.mem_gb)",
    "NODE_FAIL": "its node failed",
    "BOOT_FAIL": "its node did not start",
    "PREEMPTED": "it was preempted",
    "CANCELLED": "it was cancelled",
    "FAILED": "it failed",
    "COMPLETED": "it ended without a word",
}


@dataclass
class Standing:
    """How a run stands.

    Attributes
    ----------
    status : dict
        As in status.json, corrected where the jobs say otherwise.
    jobs : dict
        What is known of each job, by role (server, client-0, ...).
    problem : str
        Why the jobs are not known; "" if they are.
    """

    status: dict[str, Any]
    jobs: dict[str, Job] = field(default_factory=dict)
    problem: str = ""


def inspect(paths: RunPaths, retry_s: float = 10.0) -> Standing:
    """Find out how a run stands; where its server is gone for good, status.json is corrected.

    Parameters
    ----------
    paths : RunPaths
        Of the run.
    retry_s : float
        How long to try while Slurm does not answer.
    """
    standing = Standing(run_state.read(paths))
    jobs = submission.read(paths)
    if jobs is None:
        if not _is_ended(standing):
            standing.problem = "its jobs were not submitted"
        return standing
    try:
        standing.jobs = _ask(paths, jobs, retry_s)
    except PlatformError as error:
        standing.problem = error.message
    if _is_ended(standing):
        return standing
    if reason := _why_gone(paths, jobs, standing):
        settle(paths, reason, cancelled=_state_of(standing, "server") == "CANCELLED")
        standing.status = run_state.read(paths)
    return standing


def settle(paths: RunPaths, reason: str, *, cancelled: bool = False) -> None:
    """Write how a run ended whose server can no longer do it, unless the server did after all."""

    def said() -> bool:
        files.refresh_directory(paths.root)
        return run_state.read(paths)["state"] in run_state.ENDED

    if files.wait_until(said, _LAST_WORD_S):
        return
    shutil.rmtree(paths.secrets, ignore_errors=True)
    known = run_state.read(paths) | {"exit_code": 1}
    del known["state"], known["reason"]
    run_state.write(paths, "cancelled" if cancelled else "failed", reason, **known)


def why_ended(job_id: str, role: str, job: Job | None) -> str:
    """Say for a person how Slurm ended a job."""
    who = "server job" if role == "server" else f"array task {role.removeprefix('client-')}: job"
    if job is None:
        return f"Slurm no longer knows the {who} {job_id}"
    where = f" on {job.node}" if job.node else ""
    why = _ENDS.get(job.state, "it ended")
    return f"Slurm ended the {who} {job_id}{where}: {job.describe()}, {why}"


def _ask(paths: RunPaths, jobs: submission.Submission, retry_s: float) -> dict[str, Job]:
    if jobs.executor == "slurm":
        found = slurm.jobs((job_id for _, job_id in jobs.roles()), retry_s)
        return {role: found[job_id] for role, job_id in jobs.roles() if job_id in found}
    from fedhpc.cluster import local

    if jobs.host != socket.gethostname():
        raise PlatformError(f"its processes are on {jobs.host}, and only seen from there")
    alive = local.alive(paths, jobs)
    return {
        role: Job(job_id, "RUNNING" if role in alive else "ENDED", node=jobs.host)
        for role, job_id in jobs.roles()
    }


def _why_gone(paths: RunPaths, jobs: submission.Submission, standing: Standing) -> str | None:
    """Return why the server cannot come back; None if it lives, may live or may come back."""
    if jobs.executor == "slurm":
        if standing.problem or not jobs.server:
            return None
        server = standing.jobs.get("server")
        if server is not None and not server.ended:
            return None
        return why_ended(jobs.server, "server", server)
    if standing.problem:
        return None if _beats(paths) else f"the server was silent; {standing.problem}"
    if _state_of(standing, "server") == "RUNNING":
        return None
    return "the server process ended without a word"


def _beats(paths: RunPaths) -> bool:
    """Watch the heartbeat of a server that no process table and no Slurm can tell of."""
    first = rendezvous.read(paths)
    if first is None:
        return True  # it has not come so far yet
    deadline_s = time.monotonic() + 4 * rendezvous.BEAT_S
    while time.monotonic() < deadline_s:
        time.sleep(rendezvous.BEAT_S / 4)
        files.refresh_directory(paths.root)
        if rendezvous.read(paths) != first:
            return True
    return False


def _is_ended(standing: Standing) -> bool:
    return standing.status["state"] in run_state.ENDED


def _state_of(standing: Standing, role: str) -> str:
    job = standing.jobs.get(role)
    return job.state if job else ""
