"""Start and stop the jobs of a run: the only user of submitit and of Slurm's commands."""

import contextlib
import shutil
from pathlib import Path

from fedhpc import files, run_state
from fedhpc.cluster import entries, slurm, submission
from fedhpc.cluster.submission import Submission
from fedhpc.config import Config
from fedhpc.errors import PlatformError
from fedhpc.paths import RunPaths

__all__ = ["Submission", "cancel", "log_paths", "submit"]

_GONE_TIMEOUT_S = 60.0


def submit(
    config: Config, paths: RunPaths, server: str = entries.SERVER, client: str = entries.CLIENT
) -> Submission:
    """Submit the server job and the client array of a run folder.

    Parameters
    ----------
    config : Config
        Of the run.
    paths : RunPaths
        Of the run.
    server, client : str
        "module:function" that the jobs call with the run folder (array tasks of the local executor
        with their index too).

    Raises
    ------
    SubmissionError
        If a job is refused; a server job that was accepted already is cancelled.
    """
    run_state.write(paths, "pending", "submitted")
    jobs = Submission(config.cluster.executor)
    try:
        if config.cluster.executor == "slurm":
            from fedhpc.cluster import scripts

            scripts.submit(config, paths, jobs, server, client)
        else:
            from fedhpc.cluster import local

            local.submit(config, paths, jobs, server, client)
    except BaseException as error:
        interrupted = isinstance(error, KeyboardInterrupt)
        why = "interrupted" if interrupted else getattr(error, "message", repr(error))
        with contextlib.suppress(PlatformError):  # it may be what has failed
            submission.write(paths, jobs)
            run_state.write(
                paths,
                "cancelled" if interrupted else "failed",
                f"not submitted: {why}",
                exit_code=130 if interrupted else 75,
            )
        _end(paths, jobs)
        shutil.rmtree(paths.secrets, ignore_errors=True)
        raise
    return jobs


def cancel(paths: RunPaths) -> list[str]:
    """End every job of a run, the client array first.

    Returns
    -------
    list of str
        Roles that were not gone at the deadline; processes of this machine are ended by force.

    Raises
    ------
    PlatformError
        If Slurm did not answer.
    """
    return _end(paths, submission.read(paths) or Submission("slurm" if slurm.available() else ""))


def _end(paths: RunPaths, jobs: Submission) -> list[str]:
    if jobs.executor == "slurm":
        slurm.cancel(jobs.whole_jobs())
        if not jobs.server or not jobs.clients:  # a submit that was killed may have had no time
            slurm.cancel_by_name(f"{paths.run_id}-{role}" for role in ("clients", "server"))
        return _wait_until_gone(jobs)
    from fedhpc.cluster import local

    local.cancel(paths, jobs)
    return local.alive(paths, jobs)


def _wait_until_gone(jobs: Submission) -> list[str]:
    roles = {job_id: role for role, job_id in jobs.roles()}
    left: list[str] = []

    def gone() -> bool:
        left[:] = [roles[id_] for id_, job in slurm.jobs(roles).items() if not job.ended]
        return not left

    files.wait_until(gone, _GONE_TIMEOUT_S, first_pause_s=0.5, max_pause_s=3.0)
    return left


def log_paths(paths: RunPaths, job_id: str) -> list[Path]:
    """Return the logs of a job, standard error last."""
    return [paths.jobs / f"{job_id}_0_log.{stream}" for stream in ("out", "err")]
