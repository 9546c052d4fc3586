"""What Slurm says of the other side of a run, for those who wait for it.

Array tasks that have lost their server share what one of them has learned, and everybody asks more
and more rarely: a controller serves many.
"""

import contextlib
import logging
import random
import time
from dataclasses import asdict

from fedhpc import files, inspection, rendezvous
from fedhpc.cluster import slurm, submission
from fedhpc.cluster.slurm import Job
from fedhpc.config import Cluster
from fedhpc.errors import PlatformError
from fedhpc.paths import RunPaths

logger = logging.getLogger(__name__)

_FIRST_LOOK_S = 2.0
_LOOK_S = (6.0, 12.0)
_ALONE_S = 3.0
_ARRAY_GONE_S = 15.0
_ARRAY_UNKNOWN_S = 60.0  # a controller that restarts may know no job for a moment
_FIRST_ASK_S = 5.0
_MAX_ASK_S = 30.0


class ServerGone(PlatformError):
    """The server job is over, and nothing will start it again.

    Parameters
    ----------
    message : str
        How Slurm ended it.
    job : Job or None
        What Slurm says of it; None if it no longer knows it.
    """

    def __init__(self, message: str, job: Job | None) -> None:
        self.job = job
        super().__init__(message)


class ServerQueued(PlatformError):
    """The server job waits in the queue again, for longer than an array task keeps its node."""


class ServerJob:
    """The server job, watched by an array task that has no server.

    Parameters
    ----------
    paths : RunPaths
        Of the run.
    reattach_timeout_s : float
        How long a server that is queued is waited for.
    """

    def __init__(self, paths: RunPaths, reattach_timeout_s: float) -> None:
        self._paths = paths
        self._reattach_timeout_s = reattach_timeout_s
        self.expect_soon()

    @property
    def job_id(self) -> str:
        """Its id; "" while nobody has recorded it."""
        jobs = submission.read(self._paths)
        if jobs is not None and jobs.server:
            return jobs.server
        found = rendezvous.read(self._paths)
        return found.job_id if found else ""

    @property
    def queued(self) -> bool:
        """Whether it waited in the queue when it was looked at last."""
        return self._queued_since_s is not None

    def expect_soon(self) -> None:
        """Ask Slurm within the next seconds: a server was lost, or was never there."""
        self._sequence = self._shared()[0]  # what others have learned before is of its past
        self._queued_since_s: float | None = None
        self._look_s = time.monotonic() + random.uniform(0, _FIRST_LOOK_S)  # noqa: S311

    def check(self) -> None:
        """Ask Slurm when it is time to; to be called about every second.

        Raises
        ------
        ServerGone
            If it is over.
        ServerQueued
            If it has been queued for too long.
        """
        shared_sequence, known = self._shared()
        if shared_sequence != self._sequence:  # another array task has asked
            self._sequence = shared_sequence
            self._plan_next_look()
            self._judge(known)
        elif time.monotonic() >= self._look_s and self.job_id:
            self._plan_next_look()
            self._ask(self.job_id)

    def _plan_next_look(self) -> None:
        self._look_s = time.monotonic() + random.uniform(*_LOOK_S)  # noqa: S311

    def _ask(self, job_id: str) -> None:
        try:
            job = slurm.jobs([job_id], retry_s=0.0).get(job_id)
        except PlatformError as error:
            logger.warning("the state of server job %s is not known: %s", job_id, error.message)
            return
        self._sequence += 1
        value = {"sequence": self._sequence, "job": job and asdict(job)}
        with contextlib.suppress(PlatformError):  # then the others ask too
            files.write_json(self._paths.server_job, value, patience_s=0.0)
        self._judge(job)

    def _shared(self) -> tuple[int, Job | None]:
        value = files.read_json(self._paths.server_job)
        if not isinstance(value, dict):
            return 0, None
        job = value.get("job")
        return int(value.get("sequence", 0)), Job(**job) if job else None

    def _judge(self, job: Job | None) -> None:
        if job is None or job.ended:
            raise ServerGone(inspection.why_ended(self.job_id, "server", job), job)
        if not job.pending:
            self._queued_since_s = None
            return
        now_s = time.monotonic()
        self._queued_since_s = self._queued_since_s or now_s
        if now_s - self._queued_since_s >= self._reattach_timeout_s:
            raise ServerQueued(
                f"cluster.reattach_timeout_min: the server job {job.job_id} is queued again since"
                f" {(now_s - self._queued_since_s) / 60:.0f} min: {job.describe()}"
            )


class ClientArray:
    """The client array, watched by a server that no work can start on.

    Parameters
    ----------
    paths : RunPaths
        Of the run.
    cluster : Cluster
        Section of the config.
    """

    def __init__(self, paths: RunPaths, cluster: Cluster) -> None:
        self._paths = paths
        self._cluster = cluster
        self._jobs: dict[str, Job] = {}
        self._ask_s = 0.0
        self._pause_s = _FIRST_ASK_S
        self._gone_since_s: float | None = None
        self._gone_after_s = _ARRAY_GONE_S

    def exists(self) -> bool:
        """Return whether an array task runs or waits in the queue, or Slurm does not say so now."""
        return not self._ask() or any(not job.ended for job in self._jobs.values())

    def check(self, alone_s: float, connected: int) -> None:
        """Decide whether to go on waiting.

        Parameters
        ----------
        alone_s : float
            For how long no work could start.
        connected : int
            Array tasks that are connected.

        Raises
        ------
        PlatformError
            If there is no point in it, or the deadline is over.
        """
        if alone_s < _ALONE_S:
            self._ask_s, self._pause_s = 0.0, _FIRST_ASK_S
            return
        if self._cluster.executor == "slurm" and time.monotonic() >= self._ask_s:
            self._ask()
            self._ask_s = time.monotonic() + self._pause_s
            self._pause_s = min(1.5 * self._pause_s, _MAX_ASK_S)
        self._check_gone(connected)
        key, limit_s = self._deadline()
        if alone_s > limit_s:
            raise PlatformError(
                f"{key}: no work could start for {alone_s:.0f} s; array tasks connected:"
                f" {connected}, needed: {self._cluster.min_array_tasks}{self.said()}",
                "see the logs of the client array in the run folder's jobs/",
            )

    def end_pending(self) -> None:
        """Take array tasks that have not started out of the queue: there is nothing for them."""
        jobs = submission.read(self._paths)
        if jobs is not None and jobs.executor == "slurm" and jobs.clients:
            try:
                slurm.cancel({job_id.split("_")[0] for job_id in jobs.clients}, pending_only=True)
            except PlatformError as error:
                logger.warning("pending array tasks could not be cancelled: %s", error.message)

    def _ask(self) -> bool:
        """Ask Slurm; return whether it answered. Where it knows no job, the last word stands."""
        jobs = submission.read(self._paths)
        if jobs is None or not jobs.clients:
            return True
        try:
            found = slurm.jobs(jobs.clients, retry_s=0.0)
        except PlatformError as error:
            logger.warning("the state of the client array is not known: %s", error.message)
            return False
        self._jobs = found or self._jobs
        over = all(job.ended for job in found.values())
        self._gone_since_s = (self._gone_since_s or time.monotonic()) if over else None
        self._gone_after_s = _ARRAY_GONE_S if found else _ARRAY_UNKNOWN_S
        return True

    def _check_gone(self, connected: int) -> None:
        since_s = self._gone_since_s
        if since_s and not connected and time.monotonic() - since_s > self._gone_after_s:
            raise PlatformError(
                f"every array task has ended, and the run has not{self.said()}",
                "see the logs of the client array in the run folder's jobs/; with more time or"
                f" memory it goes on: fedhpc submit --resume {self._paths.root}",
            )

    def _deadline(self) -> tuple[str, float]:
        """Return what sets the deadline now, and how long it is in seconds."""
        active = [job for job in self._jobs.values() if not job.ended]
        if active and all(job.pending and not job.hopeless for job in active):
            return "cluster.pending_timeout_min", 60 * self._cluster.pending_timeout_min
        return "cluster.array_task_timeout_s", self._cluster.array_task_timeout_s

    def said(self) -> str:
        """Return what Slurm said last of the array tasks, as the end of a sentence."""
        counts: dict[str, int] = {}
        for job in self._jobs.values():
            where = f" on {job.node}" if job.node else ""
            text = f"{job.describe()}{where}"
            counts[text] = counts.get(text, 0) + 1
        said = ", ".join(f"{count} {text}" for text, count in sorted(counts.items()))
        return f"; Slurm says of the array tasks: {said}" if said else ""
