"""The doctor's two jobs, seen from the login node: submitted, waited for, and ended."""

import contextlib
import re
import shutil
import signal
import socket
import time
from collections.abc import Callable
from math import ceil
from pathlib import Path
from typing import Any

from fedhpc import cluster, config, files, inspection
from fedhpc.cluster.slurm import Job
from fedhpc.config import Config, JobOptions
from fedhpc.doctor import checks, node
from fedhpc.doctor.checks import Check
from fedhpc.doctor.node import Role
from fedhpc.errors import PlatformError, SubmissionError
from fedhpc.paths import RunPaths, create_run_folder

_PAUSE_S = 0.1
_LAST_WORD_S = 5.0  # for what a node wrote last to be seen on a shared disk
_TIME_MIN = 10
_LOG_LINES = 12
_LASTING = ("requeue", "time")  # options of sbatch
# Part of what Slurm says of a job that it refuses or lets pend; what to do.
_REMEDIES = {
    "time ?limit|MaxWall": "lower cluster.time_min; `sinfo --format=%P,%l` lists the limits",
    "account|qos": "see cluster.account and qos; `sacctmgr show associations user=$USER`",
    "partition": "set cluster.slurm_partition; `sinfo --format=%P,%a` lists the partitions",
    "generic resource|gres|gpu": "see cluster.clients: gpus_per_task, gres; `sinfo --format=%G`",
    "Resources|Priority": "the cluster is busy: try later, or wait longer with --timeout-min",
}


def examine(
    resolved: Config, timeout_s: float, *, keep: bool, tell: Callable[[str], None]
) -> list[Check]:
    """Run the pair of jobs and return what they found.

    Parameters
    ----------
    resolved : Config
        As `submit.resolve` returns it.
    timeout_s : float
        How long the jobs may take to start and end.
    keep : bool
        Whether to leave their folder.
    tell : callable
        Told what is being waited for, whenever that changes.

    Raises
    ------
    PlatformError
        If there is no folder for the pair, or a job is refused.
    """
    short = shorten(resolved, timeout_s)
    paths = create_run_folder(Path(short.cluster.runs_dir), "doctor")
    try:
        files.write_atomic(paths.config, config.dump(short))
        node.answer_in_background(paths, "login")
        try:
            jobs = cluster.submit(
                short, paths, f"{node.__name__}:server", f"{node.__name__}:client"
            )
        except SubmissionError as error:
            raise SubmissionError(error.message, _remedy(error.message, error.hint)) from error
        ids = dict(jobs.roles())
        tell(f"submitted: {', '.join(f'{role} {job_id}' for role, job_id in ids.items())}")
        silent = _wait(paths, ids, timeout_s, tell)
        return [*_collect(paths), *silent]
    finally:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)  # a second Ctrl-C must not leave half of it
        _end(paths, keep=keep, tell=tell)


def shorten(resolved: Config, timeout_s: float) -> Config:
    """Return the config of the pair: one array task, never requeued, and minutes of time."""
    old = resolved.cluster
    longest_min = max(_TIME_MIN, ceil(timeout_s / 60))  # one job waits for the other to start

    def limits(options: JobOptions) -> dict[str, Any]:
        time_min = min(options.time_min or old.time_min or longest_min, longest_min)
        once = {key: value for key, value in options.extra.items() if key not in _LASTING}
        return {"time_min": time_min, "extra": once}

    short = old.model_copy(
        update={
            **limits(old),
            "server": old.server.model_copy(update=limits(old.server)),
            "clients": old.clients.model_copy(update=limits(old.clients)),
            "executor": "slurm" if old.executor == "slurm" else "local",
            "array_tasks": 1,
            "max_parallel": 1,
            "min_array_tasks": 1,
        }
    )
    short.extra["no-requeue"] = True
    return resolved.model_copy(update={"cluster": short, "snapshot": False})


def _wait(
    paths: RunPaths, ids: dict[str, str], timeout_s: float, tell: Callable[[str], None]
) -> list[Check]:
    """Wait until both jobs are done; return a failed check for each that will not be."""
    deadline_s = time.monotonic() + timeout_s
    watch = inspection.Watch(paths)
    told = ""
    while silent := _silent(paths):
        standing = watch.look()
        jobs = {role: standing.jobs.get(role) for role in silent}
        late = time.monotonic() > deadline_s
        hopeless = [role for role, job in jobs.items() if job and job.hopeless]
        ended = [role for role, job in jobs.items() if job is None or job.ended]
        if late or hopeless or (ended and not standing.problem):
            patience_s = 0 if late or hopeless or not standing.on_slurm else _LAST_WORD_S
            files.wait_until(lambda: not _silent(paths), patience_s)
            lost = [role for role in _silent(paths) if late or role in (*hopeless, *ended)]
            return [_why(paths, role, ids[role], jobs[role], standing.problem) for role in lost]
        words = standing.problem or "; ".join(map(_in_words, jobs, jobs.values()))
        if words != told:
            tell(words)
            told = words
        time.sleep(_PAUSE_S)
    return []


def _silent(paths: RunPaths) -> list[Role]:
    return [role for role in node.JOBS if not node.report(paths, role).get("done")]


def _in_words(role: Role, job: Job | None) -> str:
    """Say of a job why it waits, or that it works."""
    if job is None or not job.pending:
        return f"{node.TITLES[role]}: checking"
    expected = f", expected to start at {job.start}" if job.start else ""
    return f"{node.TITLES[role]}: {job.describe()}{expected}"


def _why(paths: RunPaths, role: Role, job_id: str, job: Job | None, problem: str) -> Check:
    """Say why a job is not done, or the ``problem`` of knowing it, and how its log ends."""
    where = f"{node.TITLES[role]} ({job.node})" if job and job.node else node.TITLES[role]
    if job and job.pending:
        found = f"job {job_id} did not start: {_in_words(role, job)}"
        remedy = _remedy(job.reason, f"`scontrol show job {job_id}` says more")
        return Check("job ran", where, "fail", found, remedy)
    remedy = "is cluster.python a Python with fedhpc there, and cluster.runs_dir seen by it?"
    if problem or (job and job.running):
        found = f"job {job_id} was not done in time; {problem or 'it still runs'}"
        remedy = "wait longer with --timeout-min"
    elif job and job.state == "ENDED":  # a process of this machine
        found = f"process {job_id} ended before it was done"
    else:
        found = inspection.why_ended(job_id, role, job)
    for log in reversed(cluster.log_paths(paths, job_id)):
        with contextlib.suppress(OSError):
            if lines := log.read_text(errors="replace").splitlines()[-_LOG_LINES:]:
                return Check("job ran", where, "fail", "\n".join([found, *lines]), remedy)
    return Check("job ran", where, "fail", f"{found}, and left no log", remedy)


def _remedy(said: str, otherwise: str | None) -> str:
    """Return what to do about what Slurm said of a job."""
    found = (remedy for part, remedy in _REMEDIES.items() if re.search(part, said, re.IGNORECASE))
    return next(found, otherwise or "")


def _collect(paths: RunPaths) -> list[Check]:
    """Return what the jobs reported, and the comparison of their versions with this node's."""
    reports = [report for role in node.JOBS if (report := node.report(paths, role))]
    versions = {f"login node ({socket.gethostname()})": checks.versions()}
    versions |= {report["where"]: report["versions"] for report in reports}
    compared = checks.check("versions", "everywhere", checks.versions_agree, versions)
    return [*(Check(**found) for report in reports for found in report["checks"]), compared]


def _end(paths: RunPaths, *, keep: bool, tell: Callable[[str], None]) -> None:
    """End what is left of the jobs and remove the folder."""
    try:
        if left := cluster.cancel(paths):
            tell(f"still there after they were cancelled: {', '.join(left)}")
    except PlatformError as error:
        tell(f"the jobs could not be cancelled, see `squeue --me`: {error.message}")
    if keep:
        tell(f"folder: {paths.root}")
        return

    def removed() -> bool:  # a node may write a last line meanwhile
        shutil.rmtree(paths.root, ignore_errors=True)
        return not paths.root.exists()

    files.wait_until(removed, _LAST_WORD_S)
