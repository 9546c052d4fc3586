"""Slurm's commands, each with a deadline, repeated while the controller is busy or restarts."""

import contextlib
import os
import re
import shutil
import subprocess
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from fedhpc import environment
from fedhpc.errors import PlatformError, SubmissionError

_CALL_TIMEOUT_S = 30.0
_RETRY_S = 60.0
_FIRST_PAUSE_S = 0.5
_MAX_PAUSE_S = 8.0
_TRANSIENT = re.compile(
    "unable to contact|socket timed out|timed out|zero bytes|connection re(fused|set)|"
    "temporarily|try again|message (send|receive) failure|not responding|unexpected message|"
    "transport endpoint|resource busy|backup controller|in standby",
    re.IGNORECASE,
)
_PENDING = {"PENDING", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "SPECIAL_EXIT", "RESV_DEL_HOLD"}
_RUNNING = {"RUNNING", "CONFIGURING", "COMPLETING", "SIGNALING", "STAGE_OUT", "STOPPED",
            "SUSPENDED", "RESIZING"}  # fmt: skip
# While a job pends for one of these it will not start, whatever gets free.
_HOPELESS = {"BadConstraints", "DependencyNeverSatisfied", "InvalidAccount", "InvalidQOS",
             "JobHeldAdmin", "JobHeldUser", "PartitionNodeLimit", "PartitionTimeLimit",
             "AccountNotAllowed", "QOSNotAllowed", "launch_failed_requeued_held"}  # fmt: skip
_FORMAT = "%i|%T|%r|%S|%N"


@dataclass(frozen=True)
class Job:
    """What Slurm says of a job or of an element of a job array.

    Attributes
    ----------
    job_id : str
        ``<job>`` or ``<array job>_<index>``.
    state : str
        Slurm's word: PENDING, RUNNING, COMPLETED, TIMEOUT, OUT_OF_MEMORY, ...
    reason : str
        Why it pends, or why it ended; "" if Slurm says none.
    start : str
        When it started, or is expected to; "" if Slurm does not know.
    node : str
        Where it runs or ran.
    """

    job_id: str
    state: str
    reason: str = ""
    start: str = ""
    node: str = ""

    @property
    def pending(self) -> bool:
        """Whether it waits in the queue, also for being requeued."""
        return self.state in _PENDING

    @property
    def running(self) -> bool:
        """Whether it holds a node."""
        return self.state in _RUNNING

    @property
    def ended(self) -> bool:
        """Whether it is over for good."""
        return not self.pending and not self.running

    @property
    def hopeless(self) -> bool:
        """Whether it pends and can never start as it was asked for."""
        return self.pending and self.reason in _HOPELESS

    def describe(self) -> str:
        """Return state and reason for a person."""
        return f"{self.state} ({self.reason})" if self.reason else self.state


def available() -> bool:
    """Return whether Slurm's commands are on the PATH."""
    return shutil.which("squeue") is not None


def jobs(job_ids: Iterable[str], retry_s: float = _RETRY_S) -> dict[str, Job]:
    """Ask for all jobs of a run in one call.

    Jobs that ended some minutes ago are asked of the accounting, where there is one.

    Parameters
    ----------
    job_ids : iterable of str
        Jobs, or elements of job arrays.
    retry_s : float
        How long to try while the controller does not answer.

    Returns
    -------
    dict
        By job id; jobs that Slurm no longer knows are missing.

    Raises
    ------
    PlatformError
        If Slurm did not answer.
    """
    wanted = sorted(set(job_ids))
    if not wanted:
        return {}
    whole = sorted({job_id.split("_")[0] for job_id in wanted})
    command = ["squeue", "--noheader", "--array", "--states=all", f"--format={_FORMAT}",
               f"--jobs={','.join(whole)}"]  # fmt: skip
    done = _run(command, retry_s, tolerate="Invalid job id")
    found = _parse(done.stdout)
    if missing := [job_id for job_id in wanted if job_id not in found]:
        found |= _accounting(sorted({job_id.split("_")[0] for job_id in missing}))
    return {job_id: found[job_id] for job_id in wanted if job_id in found}


def _parse(text: str) -> dict[str, Job]:
    found = {}
    for line in text.splitlines():
        fields = [_plain(field) for field in line.split("|")]
        if len(fields) >= 5:
            job_id, state, reason, start, node = fields[:5]
            # sacct says who: "CANCELLED by 1000"
            found[job_id] = Job(job_id, state.partition(" ")[0], reason, start, node)
    return found


def _plain(field: str) -> str:
    text = field.strip()
    return "" if text in ("None", "N/A", "Unknown", "(null)", "None assigned") else text


def _accounting(job_ids: Sequence[str]) -> dict[str, Job]:
    """Ask sacct; nothing if the site has no accounting."""
    if shutil.which("sacct") is None:
        return {}
    command = ["sacct", "--allocations", "--noheader", "--parsable2",
               "--format=JobID,State,Reason,Start,NodeList",
               f"--jobs={','.join(job_ids)}"]  # fmt: skip
    with contextlib.suppress(PlatformError):
        return _parse(_run(command, 0.0).stdout)
    return {}


def submit(script: Path, name: str) -> str:
    """Submit a script and return its job id.

    Parameters
    ----------
    script : Path
        With its ``#SBATCH`` lines.
    name : str
        Its job name, unique: after a call whose answer was lost the job is looked up by it, so
        that it is not submitted twice.

    Raises
    ------
    SubmissionError
        If Slurm refuses it or does not answer.
    """
    env = environment.for_sbatch(re.findall(r"^#SBATCH --([a-z-]+)", script.read_text(), re.M))
    deadline_s = time.monotonic() + _RETRY_S
    pause_s = _FIRST_PAUSE_S
    while True:
        try:
            done = _run_once(["sbatch", "--parsable", str(script)], env=env)
            return done.stdout.strip().split(";")[0]
        except SlurmDoesNotAnswer as error:
            if time.monotonic() > deadline_s:
                raise SubmissionError(error.message, error.hint) from error
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, _MAX_PAUSE_S)
            if job_id := _find(name):
                return job_id
        except PlatformError as error:
            raise SubmissionError(
                f"Slurm refused the job: {error.message}",
                f"the script is {script}; see the sbatch options in section cluster",
            ) from error


def _find(name: str) -> str | None:
    with contextlib.suppress(PlatformError):
        done = _run(["squeue", "--noheader", "--format=%F", f"--name={name}",
                     f"--user={os.getuid()}"], _RETRY_S)  # fmt: skip
        return next(iter(done.stdout.split()), None)
    return None


def cancel(job_ids: Iterable[str], *, pending_only: bool = False) -> None:
    """Cancel jobs, whole arrays by the id of the array; jobs that are gone do not matter.

    Raises
    ------
    PlatformError
        If Slurm did not answer.
    """
    wanted = list(dict.fromkeys(job_ids))
    if wanted:
        state = ["--state=PENDING"] if pending_only else []
        _run(["scancel", *state, *wanted], _RETRY_S, tolerate="Invalid job id")


def cancel_by_name(names: Iterable[str]) -> None:
    """Cancel jobs whose ids were never learned.

    Raises
    ------
    PlatformError
        If Slurm did not answer.
    """
    for name in names:
        _run(["scancel", f"--user={os.getuid()}", f"--name={name}"], _RETRY_S)


def details(job_id: str, timeout_s: float) -> dict[str, str]:
    """Return what the controller knows of a job that it has not forgotten, asking once.

    Parameters
    ----------
    job_id : str
        Of a job, or of an element of a job array.
    timeout_s : float
        How long to wait for the answer.

    Returns
    -------
    dict
        The words of ``scontrol show job``: JobState, Restarts, PreemptTime, ...

    Raises
    ------
    PlatformError
        If Slurm did not answer.
    """
    command = ["scontrol", "show", "job", "--oneliner", job_id]
    done = _run_once(command, timeout_s=timeout_s)
    return dict(re.findall(r"(\w+)=(\S+)", done.stdout))


def control(*arguments: str) -> None:
    """Run ``scontrol``.

    Raises
    ------
    PlatformError
        If it fails.
    """
    _run(["scontrol", *arguments], _RETRY_S)


class SlurmDoesNotAnswer(PlatformError):
    """The controller is busy, restarts, or is out of reach."""


def _run(
    command: Sequence[str], retry_s: float, tolerate: str | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a command, again while the failure is transient and ``retry_s`` has not passed."""
    deadline_s = time.monotonic() + retry_s
    pause_s = _FIRST_PAUSE_S
    while True:
        try:
            return _run_once(command, tolerate)
        except SlurmDoesNotAnswer:
            if time.monotonic() + pause_s > deadline_s:
                raise
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, _MAX_PAUSE_S)


def _run_once(
    command: Sequence[str],
    tolerate: str | None = None,
    env: dict[str, str] | None = None,
    timeout_s: float | None = None,
) -> subprocess.CompletedProcess[str]:
    line = " ".join(command)
    timeout_s = timeout_s or _CALL_TIMEOUT_S
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
            env=env or environment.for_new_jobs(),
            start_new_session=True,  # a Ctrl-C in the terminal is ours to handle
        )
    except FileNotFoundError:
        raise PlatformError(
            f"wanted to run '{line}', found no {command[0]} on the PATH of"
            f" {environment.current().host}",
            "load the site's Slurm module, or put its commands on the PATH with cluster.setup",
        ) from None
    except OSError as error:
        raise PlatformError(f"'{line}' could not be run: {error.strerror}") from error
    except subprocess.TimeoutExpired:
        raise SlurmDoesNotAnswer(
            f"'{line}' gave no answer within {timeout_s:.0f} s", "is slurmctld up?"
        ) from None
    if done.returncode == 0 or (tolerate and tolerate in done.stderr):
        return done
    said = " ".join(done.stderr.split()) or "nothing on standard error"
    message = f"'{line}' ended with exit code {done.returncode}: {said}"
    if _TRANSIENT.search(done.stderr):
        raise SlurmDoesNotAnswer(message, "Slurm's controller does not answer; try again later")
    raise PlatformError(message)
