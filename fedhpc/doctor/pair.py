"""The doctor on the login node: submit the pair of jobs, wait for it, collect what it found."""

import contextlib
import shutil
import signal
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from math import ceil
from pathlib import Path
from typing import Any

from fedhpc import cluster, config, files, inspection, run_state
from fedhpc.cluster import submission
from fedhpc.cluster.slurm import Job
from fedhpc.config import Config, JobOptions
from fedhpc.doctor import login, probes, remedies, report
from fedhpc.doctor.folder import Folder, Role
from fedhpc.doctor.report import Check, Status
from fedhpc.errors import PlatformError, SubmissionError
from fedhpc.paths import RunPaths, create_run_folder

_PAUSE_S = 0.1
_ASK_SLURM_S = 5.0  # the controller serves many
_ASK_LOCAL_S = 0.5
_LAST_WORD_S = {"slurm": 15.0, "local": 2.0}  # for a last report to be seen on a shared disk
_LEAVE_TIMEOUT_S = 30.0
_CLIENT_TIME_MIN = 10
_LOG_LINES = 15
_ENTRIES = ("fedhpc.doctor.node:server", "fedhpc.doctor.node:client")
_INTERRUPTS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_ROLES: dict[str, Role] = {"server": "server", "client-0": "client"}


@dataclass
class Outcome:
    """What the doctor found.

    Attributes
    ----------
    checks : list of Check
        In the order of the table.
    logs : dict
        The end of the log of each job that ended without a word, by role.
    folder : Path or None
        Where the logs are; None if there is no such folder any more.
    died : bool
        Whether a job ended, or was ended, without a word.
    """

    checks: list[Check] = field(default_factory=list)
    logs: dict[str, str] = field(default_factory=dict)
    folder: Path | None = None
    died: bool = False

    @property
    def failed(self) -> bool:
        """Whether a check failed."""
        return any(check.status == "fail" for check in self.checks)


def examine(
    resolved: Config, timeout_s: float, *, keep: bool, show: Callable[[str], None]
) -> Outcome:
    """Run the checks.

    Parameters
    ----------
    resolved : Config
        With absolute paths, and an executor that is not auto.
    timeout_s : float
        How long the jobs may take to start and end.
    keep : bool
        Whether to leave the doctor's folder.
    show : callable
        Told what is being waited for, whenever that changes.

    Raises
    ------
    KeyboardInterrupt
        After a Ctrl-C, when the jobs are cancelled and the folder is removed.
    """
    short = shorten(resolved, timeout_s)
    where = f"login ({socket.gethostname()})"
    outcome = Outcome()
    can_submit = True
    if short.cluster.executor == "slurm":
        show("asking Slurm's controller")
        outcome.checks.append(login.check_commands(where))
        can_submit = not outcome.failed
    outcome.checks += login.check_source(short, where)
    try:
        paths = create_run_folder(Path(short.cluster.runs_dir), "doctor")
    except PlatformError as error:
        outcome.checks.append(
            Check("shared folder", where, "fail", error.message, error.hint or "")
        )
        return outcome
    pair = _Pair(short, paths, timeout_s, outcome, show)
    try:
        outcome.checks.append(login.check_space(paths, where))
        if can_submit:
            pair.run()
    finally:
        pair.end()
        if keep or outcome.died:
            outcome.folder = paths.root
        else:
            _remove(paths)
    return outcome


def shorten(resolved: Config, timeout_s: float) -> Config:
    """Return the config of the pair: one array task, and time limits of minutes.

    The server job may have to wait for the array task as long as the doctor does.
    """
    old = resolved.cluster
    timeout_min = ceil(timeout_s / 60)
    longest = {"server": max(_CLIENT_TIME_MIN, timeout_min), "clients": _CLIENT_TIME_MIN}
    jobs: dict[str, JobOptions] = {}
    limits: dict[str, int] = {}
    for role, minutes in longest.items():
        own: JobOptions = getattr(old, role)
        limits[role] = min(own.time_min or old.time_min or minutes, minutes)
        changes = {"time_min": limits[role], "extra": _once(own.extra)}
        jobs[role] = own.model_copy(update=changes)
    update: dict[str, Any] = {
        "executor": "slurm" if old.executor == "slurm" else "local",
        "array_tasks": 1,
        "max_parallel": 1,
        "min_array_tasks": 1,
        "time_min": max(limits.values()),  # the local executor's
        "extra": {**_once(old.extra), "no-requeue": True},
        **jobs,
    }
    short = old.model_copy(update=update)
    return resolved.model_copy(update={"cluster": short, "snapshot": False})


def _once(extra: dict[str, Any]) -> dict[str, Any]:
    """Return further sbatch options without those that would make it last."""
    return {name: value for name, value in extra.items() if name not in ("requeue", "time")}


class _Pair:
    """The two jobs, from submission to their end."""

    def __init__(
        self,
        short: Config,
        paths: RunPaths,
        timeout_s: float,
        outcome: Outcome,
        show: Callable[[str], None],
    ) -> None:
        self._config = short
        self._paths = paths
        self._folder = Folder(paths.root, "login")
        self._timeout_s = timeout_s
        self._outcome = outcome
        self._show = show
        self._shown = ""
        self._on_slurm = short.cluster.executor == "slurm"
        self._last_word_s = _LAST_WORD_S["slurm" if self._on_slurm else "local"]
        self._submitted = False
        self._jobs: dict[str, Job] = {}
        self._problem = ""
        self._ended_at_s: dict[str, float] = {}
        self._ask_s = 0.0
        self._reports: dict[str, dict[str, Any]] = {}

    def run(self) -> None:
        """Submit, wait, collect."""
        versions = {self._folder.where: probes.versions()}
        hello = {
            "host": socket.gethostname(),
            "timeout_s": self._timeout_s,
            "directory": str(Path.cwd()),
            "data_root": "there" if Path(self._config.data.root).is_dir() else "missing",
        }
        self._folder.open_mail()
        self._folder.answer_in_background()  # not from the loop below: Slurm may be slow to answer
        self._folder.say("hello", hello)
        files.write_atomic(self._paths.config, config.dump(self._config))
        if not self._submit():
            return
        self._wait()
        for job in _ROLES.values():
            found = self._reports.get(job, {})
            self._outcome.checks += report.read(found.get("checks"))
            if found:
                versions[str(found["where"])] = found["versions"]
        if len(versions) > 1:
            self._outcome.checks.append(report.compare_versions(versions))

    def _submit(self) -> bool:
        self._tell("submitting the server job and the array task")
        self._submitted = True
        try:
            with _interrupted_later():  # a job whose id is not noted yet could not be cancelled
                jobs = cluster.submit(self._config, self._paths, *_ENTRIES)
        except SubmissionError as error:
            self._submitted = False  # submit cancelled what there was
            remedy = remedies.for_slurm(error.message, error.hint or "see section cluster")
            accepted = submission.read(self._paths)
            which = "client array" if accepted and accepted.server else "server job"
            self._add("jobs accepted", "fail", f"{which}: {error.message}", remedy)
            return False
        ids = ", ".join(f"{role} {job_id}" for role, job_id in jobs.roles())
        self._add("jobs accepted", "pass", ids)
        return True

    def _wait(self) -> None:
        """Wait until both jobs have reported, or cannot any more."""
        deadline_s = time.monotonic() + self._timeout_s
        self._ask_s = time.monotonic() + (2.0 if self._on_slurm else _ASK_LOCAL_S)
        while True:
            self._read()
            silent = [job for job, role in _ROLES.items() if not self._is_done(role)]
            if not silent:
                return
            if time.monotonic() > self._ask_s:
                self._ask()
            gone = [job for job in silent if self._is_gone(job)]
            hopeless = [job for job in silent if job in self._jobs and self._jobs[job].hopeless]
            late = time.monotonic() > deadline_s
            if late or ((gone or hopeless) and not self._is_looking(silent)):
                for job in silent if late else [*gone, *hopeless]:
                    self._note_silent(job, late=late)
                return
            self._tell(self._waits_for(silent))
            time.sleep(_PAUSE_S)

    def _read(self) -> None:
        for role in _ROLES.values():
            found = self._folder.heard("report", role)
            if found is not None:
                self._reports[role] = found

    def _is_done(self, role: str) -> bool:
        return bool(self._reports.get(role, {}).get("final"))

    def _ask(self) -> None:
        standing = inspection.inspect(self._paths)
        self._ask_s = time.monotonic() + (_ASK_SLURM_S if self._on_slurm else _ASK_LOCAL_S)
        self._problem = standing.problem
        if standing.problem:
            return
        self._jobs = standing.jobs
        for job in _ROLES:
            if job not in self._jobs or self._jobs[job].ended:
                self._ended_at_s.setdefault(job, time.monotonic())

    def _is_gone(self, job: str) -> bool:
        since_s = self._ended_at_s.get(job)
        return since_s is not None and time.monotonic() - since_s > self._last_word_s

    def _is_looking(self, silent: list[str]) -> bool:
        """Return whether a job runs that has not reported yet what needs no other job."""
        return any(
            name in self._jobs and self._jobs[name].running and _ROLES[name] not in self._reports
            for name in silent
        )

    def _note_silent(self, name: str, *, late: bool) -> None:
        """Say of a job that did not report, or not to the end, what is known of it."""
        role = _ROLES[name]
        jobs = submission.read(self._paths)
        ids = dict(jobs.roles()) if jobs else {}
        job_id, job = ids.get(name, ""), self._jobs.get(name)
        where = f"{role} ({job.node})" if job and job.node else role
        minutes = f"{self._timeout_s / 60:g} min"
        if job and job.pending:
            found = f"job {job_id} did not start"
            found += f" within {minutes}" if late else " and never will"
            found += f": {job.describe()}"
            if job.start:
                found += f", expected to start at {job.start}"
            remedy = remedies.for_slurm(job.reason, f"`scontrol show job {job_id}` says more")
        elif job and job.running:
            found = f"job {job_id} runs, and did not report to the end within {minutes}"
            if self._problem:
                found += f" ({self._problem})"
            remedy = "see its log; --timeout-min waits longer"
            self._keep_log(role, job_id)
        else:
            found = inspection.why_ended(job_id, name, job)
            if not self._on_slurm:
                found = f"the {role} process {job_id} ended without a word"
            remedy = "see its log below"
            if not self._keep_log(role, job_id):
                remedy = self._why_no_log()
        self._outcome.checks.append(Check("job ran", where, "fail", found, remedy))

    def _why_no_log(self) -> str:
        """Return what may keep a job from leaving any log."""
        remedy = "it left no log"
        if self._on_slurm:
            remedy += (
                ": can its node write the runs folder? name a disk that all nodes see with --set"
                " cluster.runs_dir=DIR"
            )
        if python := self._config.cluster.python:
            remedy += f"; is cluster.python, {python}, a Python with fedhpc on its node?"
        return remedy

    def _keep_log(self, role: str, job_id: str) -> bool:
        """Keep the end of a job's log for the person; return whether there is any."""
        self._outcome.died = True
        for path in reversed(cluster.log_paths(self._paths, job_id)):
            with contextlib.suppress(OSError):
                lines = path.read_text(errors="replace").splitlines()[-_LOG_LINES:]
                if lines:
                    self._outcome.logs[role] = "\n".join(lines)
                    return True
        return False

    def _waits_for(self, silent: list[str]) -> str:
        """Return what is being waited for, in words."""
        if self._problem:
            return self._problem
        for name in silent:
            job = self._jobs.get(name)
            if job and job.pending:
                expected = f", expected at {job.start}" if job.start else ""
                return f"{_ROLES[name]} job {job.job_id}: {job.describe()}{expected}"
        return f"the checks run: waiting for the {' and the '.join(_ROLES[j] for j in silent)}"

    def _tell(self, words: str) -> None:
        if words != self._shown:
            self._shown = words
            self._show(words)

    def end(self) -> None:
        """Let both jobs end, or end them."""
        if not self._submitted:
            return
        done = all(map(self._is_done, _ROLES.values()))
        self._tell("the jobs end" if done else "cancelling the jobs")
        with contextlib.suppress(PlatformError):
            state: run_state.State = "finished" if done else "cancelled"
            run_state.write(self._paths, state, "by fedhpc doctor")
            self._folder.stop()
        if done and files.wait_until(self._left, _LEAVE_TIMEOUT_S, 0.1, _ASK_SLURM_S):
            return
        try:
            with _undisturbed():
                left = cluster.cancel(self._paths)
            found = f"still there after they were cancelled: {', '.join(left)}" if left else ""
        except PlatformError as error:
            found = f"could not be cancelled: {error.message}"
        if found:
            self._add("jobs ended", "warn", found, "`squeue --me`, `scancel JOB`")

    def _add(self, name: str, status: Status, found: str, remedy: str = "") -> None:
        self._outcome.checks.append(Check(name, self._folder.where, status, found, remedy))

    def _left(self) -> bool:
        standing = inspection.inspect(self._paths)
        return not standing.problem and all(job.ended for job in standing.jobs.values())


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """Ignore a second Ctrl-C: it would leave jobs behind."""
    before = {number: signal.signal(number, signal.SIG_IGN) for number in _INTERRUPTS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _interrupted_later() -> Iterator[None]:
    """Let a Ctrl-C come when this is done."""
    seen: list[int] = []
    before = {n: signal.signal(n, lambda number, _frame: seen.append(number)) for n in _INTERRUPTS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if seen:
            raise KeyboardInterrupt


def _remove(paths: RunPaths) -> None:
    """Remove the folder; a node may write a last line meanwhile."""

    def removed() -> bool:
        shutil.rmtree(paths.root, ignore_errors=True)
        return not paths.root.exists()

    files.wait_until(removed, 5.0, 0.2)
