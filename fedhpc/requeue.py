"""What becomes of a job that gets a signal: whether it starts again, and who sees to that.

Slurm sends USR2 (``--signal``) before a time limit, and, where the site has set
``SlurmctldParameters=preempt_send_user_signal``, in the ``GraceTime`` before a preemption: then the
job has to queue itself again. SIGTERM comes with a cancel, a requeue, or a preemption. The last two
Slurm queues again itself, but for one case: of the jobs that get SIGTERM as their ``GraceTime``
begins it does so only with those that still run at its end.
"""

import logging
import signal
from dataclasses import dataclass

from fedhpc.cluster import slurm
from fedhpc.environment import Environment
from fedhpc.errors import PlatformError

logger = logging.getLogger(__name__)

_ASK_TIMEOUT_S = 3.0  # what is left of the time until SIGKILL belongs to the state


@dataclass(frozen=True)
class Fate:
    """What becomes of a job.

    Attributes
    ----------
    returns : bool
        Whether it starts again.
    by_itself : bool
        Whether it has to put itself into the queue for that.
    reason : str
        Why it was stopped, and why it does not return.
    """

    returns: bool
    by_itself: bool
    reason: str


_WHY = {
    signal.SIGUSR2: "its time limit (cluster.time_min) is near, or it is preempted",
    signal.SIGTERM: "it was stopped by SIGTERM",
}


def stays_away(signum: int) -> Fate:
    """Return what becomes of a process that is no job of Slurm's."""
    return Fate(False, False, _WHY[signal.Signals(signum)])


def foresee(signum: int, here: Environment, max_requeues: int) -> Fate:
    """Return what becomes of this job after a signal.

    Parameters
    ----------
    signum : int
        SIGTERM or SIGUSR2.
    here : Environment
        Of this job.
    max_requeues : int
        How often a job may put itself into the queue.
    """
    if signum == signal.SIGUSR2:
        return _by_itself(_WHY[signal.SIGUSR2], here, max_requeues)
    try:
        said = slurm.details(here.job_id, _ASK_TIMEOUT_S)
    except PlatformError as error:
        # If it was cancelled after all, whoever asks Slurm later will see it.
        logger.warning("why this job is stopped is not known: %s", error.message)
        return Fate(True, False, "it was stopped, and Slurm did not say why")
    if int(said.get("Restarts", "0")) > here.restarts:
        return Fate(True, False, "Slurm has queued it again")
    if said.get("PreemptTime", "None") != "None" and said.get("JobState") == "RUNNING":
        return _by_itself("it is preempted", here, max_requeues)
    return stays_away(signum)


def _by_itself(why: str, here: Environment, max_requeues: int) -> Fate:
    if here.restarts < max_requeues:
        return Fate(True, True, why)
    times = "once" if here.restarts == 1 else f"{here.restarts} times"
    return Fate(
        False, False, f"{why}; it was queued again {times}, and cluster.max_requeues is"
        f" {max_requeues}",
    )  # fmt: skip


def queue_again(job_id: str) -> None:
    """Put this job back into the queue; Slurm ends everything in it.

    Raises
    ------
    PlatformError
        If Slurm refuses.
    """
    _stay_until_done()
    slurm.control("requeue", job_id)


def queue_behind(job_id: str, server_job: str) -> None:
    """Put this job back into the queue, where it waits until the server job has started.

    Raises
    ------
    PlatformError
        If Slurm refuses.
    """
    _stay_until_done()
    # An `after:` that was met once is not looked at again, so it is set anew.
    slurm.control("requeuehold", job_id)
    try:
        slurm.control("update", f"JobId={job_id}", f"Dependency=after:{server_job}")
    finally:  # without it the job starts at once, which is better than never
        slurm.control("release", job_id)


def _stay_until_done() -> None:
    """Ignore what Slurm sends as soon as the job is queued; the commands to come inherit this."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
