"""How a run really stands: status.json, checked against its jobs and the server's heartbeat."""

import logging
import shutil
import socket
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from fedhpc import files, rendezvous, run_state
from fedhpc.cluster import slurm, submission
from fedhpc.cluster.slurm import Job
from fedhpc.cluster.submission import Submission
from fedhpc.errors import PlatformError
from fedhpc.paths import RunPaths, latest_attempt

logger = logging.getLogger(__name__)

_ASK_LOCAL_S = 1.0
_ASK_SLURM_S = 5.0
_STRANGE_S = 4 * rendezvous.BEAT_S
_SILENT_S = files.PATIENCE_S + _STRANGE_S  # a server that has waited for its disk leaves by then
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
    submission : Submission or None
        Which jobs there are; None if none were submitted.
    """

    status: dict[str, Any]
    jobs: dict[str, Job] = field(default_factory=dict)
    problem: str = ""
    submission: Submission | None = None

    @property
    def ended(self) -> bool:
        """Whether the run has ended."""
        return self.status["state"] in run_state.ENDED

    @property
    def on_slurm(self) -> bool:
        """Whether its jobs are Slurm's."""
        return self.submission is not None and self.submission.executor == "slurm"


def inspect(paths: RunPaths, retry_s: float = 10.0) -> Standing:
    """Find out how a run stands; where its server is gone for good, status.json is corrected.

    Parameters
    ----------
    paths : RunPaths
        Of the run.
    retry_s : float
        How long to try while Slurm does not answer.
    """
    return inspect_all([paths], retry_s)[0]


def inspect_all(
    runs: Sequence[RunPaths], retry_s: float = 10.0, *, jobs_of_ended: bool = True
) -> list[Standing]:
    """Inspect many runs with one question to Slurm.

    Parameters
    ----------
    runs : sequence of RunPaths
        The runs.
    retry_s : float
        How long to try while Slurm does not answer.
    jobs_of_ended : bool
        Whether to look for the jobs of runs that have ended too.
    """
    standings = [Standing(run_state.read(paths)) for paths in runs]
    for paths, standing in zip(runs, standings, strict=True):
        if jobs_of_ended or not standing.ended:
            standing.submission = submission.read(paths)
    _ask_slurm([standing for standing in standings if standing.on_slurm], retry_s)
    with ThreadPoolExecutor(max_workers=16) as pool:  # each may wait for a last word
        list(pool.map(_check, runs, standings))
    return standings


class Watch:
    """A run that is looked at again and again.

    Parameters
    ----------
    paths : RunPaths
        Of the run.
    """

    def __init__(self, paths: RunPaths) -> None:
        self._paths = paths
        self._standing: Standing | None = None
        self._ask_s = 0.0
        self.is_fresh = False

    def look(self) -> Standing:
        """Return how the run stands: status.json as of now, the jobs as of some seconds ago.

        ``is_fresh`` says whether the jobs are as of now too.
        """
        self.is_fresh = self._standing is None or time.monotonic() >= self._ask_s
        if self._standing is None or self.is_fresh:
            self._standing = inspect(self._paths, retry_s=0.0)
            pause_s = _ASK_SLURM_S if self._standing.on_slurm else _ASK_LOCAL_S
            self._ask_s = time.monotonic() + pause_s
        else:
            files.refresh_directory(self._paths.root)
            self._standing.status = run_state.read(self._paths)
        return self._standing


def settle(
    paths: RunPaths, reason: str, *, cancelled: bool = False, finished: bool = False
) -> None:
    """Write how a run ended whose server can no longer do it, unless the server did after all."""

    def said() -> bool:
        files.refresh_directory(paths.root)
        return run_state.read(paths)["state"] in run_state.ENDED

    if not files.wait_until(said, _LAST_WORD_S):
        write_end(paths, reason, cancelled=cancelled, finished=finished)


def write_end(
    paths: RunPaths, reason: str, *, cancelled: bool = False, finished: bool = False
) -> None:
    """Write how a run ended, whatever its server said; for who has ended it.

    Raises
    ------
    PlatformError
        If the disk refuses it; it is not waited for, as others look again.
    """
    shutil.rmtree(paths.secrets, ignore_errors=True)
    known = run_state.read(paths) | {"exit_code": 0 if finished else 1}
    del known["state"], known["reason"]
    state = _how(cancelled=cancelled, finished=finished)
    run_state.write(paths, state, reason, patience_s=0.0, **known)


def write_cancelled(paths: RunPaths, reason: str) -> None:
    """Write that a run was cancelled, unless it finished before its jobs were gone.

    Raises
    ------
    PlatformError
        See `write_end`.
    """
    if run_state.read(paths)["state"] != "finished":
        write_end(paths, reason, cancelled=True)


def why_ended(job_id: str, role: str, job: Job | None) -> str:
    """Say for a person how Slurm ended a job."""
    who = "server job" if role == "server" else f"array task {role.removeprefix('client-')}: job"
    if job is None:
        return f"Slurm no longer knows the {who} {job_id}"
    where = f" on {job.node}" if job.node else ""
    return f"Slurm ended the {who} {job_id}{where}: {in_words(job)}"


def in_words(job: Job) -> str:
    """Say for a person what Slurm's state of a job that has ended means."""
    return f"{job.describe()}, {_ENDS.get(job.state, 'it ended')}"


def _ask_slurm(standings: Sequence[Standing], retry_s: float) -> None:
    wanted = [dict(standing.submission.roles()) for standing in standings if standing.submission]
    try:
        found = slurm.jobs((job_id for roles in wanted for job_id in roles.values()), retry_s)
    except PlatformError as error:
        for standing in standings:
            standing.problem = error.message
        return
    for standing, roles in zip(standings, wanted, strict=True):
        standing.jobs = {role: found[id_] for role, id_ in roles.items() if id_ in found}


def _check(paths: RunPaths, standing: Standing) -> None:
    """Look at processes of this machine; correct what status.json says, if it must be."""
    jobs = standing.submission
    if jobs is None:
        if not standing.ended:
            standing.problem = "its jobs were not submitted"
        return
    if jobs.executor != "slurm":
        _look_here(paths, jobs, standing)
    server = standing.jobs.get("server")
    if server is not None and server.pending and standing.status["state"] == "running":
        why = "the server ended without a word, and its job is in the queue again"
        more = {"state": "pending", "phase": "requeueing", "reason": why}
        standing.status = {**standing.status, **more}
    if not standing.ended and (reason := _why_gone(paths, jobs, standing)):
        cancelled = _state_of(standing, "server") == "CANCELLED"
        finished = False
        if (phase := _last_phase(paths)) in (
            "finished",
            "failed",
        ):  # status.json it could not write
            cancelled, finished = False, phase == "finished"
            reason = f"so says its rendezvous; {reason}"
        try:
            settle(paths, reason, cancelled=cancelled, finished=finished)
            standing.status = run_state.read(paths)
        except PlatformError as error:  # somebody else's run, or the disk is full
            state = _how(cancelled=cancelled, finished=finished)
            code = 0 if finished else error.exit_code
            standing.status |= {"state": state, "reason": reason, "exit_code": code}


def _look_here(paths: RunPaths, jobs: Submission, standing: Standing) -> None:
    from fedhpc.cluster import local

    if jobs.host != socket.gethostname():
        standing.problem = f"its processes are on {jobs.host}, and only seen from there"
        return
    alive = local.alive(paths, jobs)
    for role, job_id in jobs.roles():
        # That of submitit's process, which only waits for the one that does the work.
        pid = str(run_state.record(paths, role).get("pid", job_id))
        state = "RUNNING" if role in alive else "ENDED"
        standing.jobs[role] = Job(pid, state, node=jobs.host)


def _why_gone(paths: RunPaths, jobs: Submission, standing: Standing) -> str | None:
    """Return why the server cannot come back; None if it lives, may live or may come back."""
    if jobs.executor == "slurm":
        if standing.problem or not jobs.server:
            return None
        server = standing.jobs.get("server")
        if server is None and rendezvous.read(paths) and _beats(paths):
            return None  # Slurm has lost its memory, not the server its life
        if server is not None and not server.ended:
            return None
        return why_ended(jobs.server, "server", server)
    if standing.problem:
        return None if _beats(paths) else f"the server was silent; {standing.problem}"
    if _state_of(standing, "server") == "RUNNING":
        return None
    return "the server process ended without a word"


def _how(*, cancelled: bool, finished: bool) -> run_state.State:
    return "finished" if finished else "cancelled" if cancelled else "failed"


def _last_phase(paths: RunPaths) -> str:
    """Return what the server of the latest attempt has published last; "" if nothing."""
    found = rendezvous.read(paths)
    try:
        latest = latest_attempt(paths)
    except OSError:
        return ""
    return found.phase if found and found.attempt == latest else ""


def _beats(paths: RunPaths) -> bool:
    """Watch the heartbeat of a server that no process table and no Slurm can tell of.

    For long: it may wait for its disk, and who takes it for dead ends its run.
    """
    first = rendezvous.read(paths)
    if first is None:
        return True  # it has not come so far yet

    def moved() -> bool:
        files.refresh_directory(paths.root)
        return rendezvous.read(paths) != first

    if files.wait_until(moved, _STRANGE_S):
        return True
    logger.warning("%s: no heartbeat for %.0f s; watching on", paths.run_id, _STRANGE_S)
    return files.wait_until(moved, _SILENT_S - _STRANGE_S)


def _state_of(standing: Standing, role: str) -> str:
    job = standing.jobs.get(role)
    return job.state if job else ""
