"""Start and stop the jobs of a run: the only user of submitit."""

import contextlib
import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from fedhpc import client, files, run_state, server
from fedhpc.config import Config, JobOptions
from fedhpc.errors import SubmissionError
from fedhpc.paths import RunPaths

_LOCAL_TIMEOUT_MIN = 60.0 * 24 * 30  # LocalExecutor would end every job after 2 minutes
_TERM_TIMEOUT_S = 8.0
_KILL_TIMEOUT_S = 5.0
_SLURM_TIMEOUT_S = 30.0
_JOB_ENV = {"PYTHONHASHSEED": "0"}  # the order of sets in strategies is the same in every run


@dataclass
class Submission:
    """The jobs of a run, as jobs/submission.json has them.

    Attributes
    ----------
    executor : str
        slurm or local.
    server : str
        Job id; with ``local`` the pid of submitit's controller process.
    clients : list of str
        Job ids of the array tasks.
    """

    executor: str
    server: str
    clients: list[str] = field(default_factory=list)

    def roles(self) -> Iterator[tuple[str, str]]:
        """Yield role and job id of each job."""
        if self.server:
            yield "server", self.server
        for index, job_id in enumerate(self.clients):
            yield f"client-{index}", job_id


def read_submission(paths: RunPaths) -> Submission | None:
    """Return the jobs of a run; None if it was not submitted."""
    value = files.read_json(paths.submission)
    return Submission(**value) if isinstance(value, dict) else None


def submit(config: Config, paths: RunPaths) -> Submission:
    """Submit the server job and the client array of a run folder.

    Raises
    ------
    SubmissionError
        If a job is refused; a server job that was accepted already is cancelled.
    """
    run_state.write(paths, "pending", "submitted")
    start = _submit_slurm if config.cluster.executor == "slurm" else _submit_local
    submission = Submission(config.cluster.executor, "")
    try:
        start(config, paths, submission)
    except BaseException as error:
        files.write_json(paths.submission, asdict(submission))
        cancel(paths)
        run_state.write(paths, "failed", f"not submitted: {error!r}", exit_code=75)
        raise
    files.write_json(paths.submission, asdict(submission))
    return submission


# --- local ---


def _submit_local(config: Config, paths: RunPaths, submission: Submission) -> None:
    import submitit

    cluster = config.cluster
    executor = submitit.LocalExecutor(folder=paths.jobs, python=cluster.python)
    executor.update_parameters(
        timeout_min=cluster.time_min or _LOCAL_TIMEOUT_MIN, setup=cluster.setup
    )
    gpus = os.environ.get("CUDA_VISIBLE_DEVICES")
    count = min(cluster.array_tasks, cluster.max_parallel or cluster.array_tasks)
    with _untouched_by_terminal():
        try:
            job = executor.submit(_with_gpus, gpus, server.run, str(paths.root))
            submission.server = job.job_id
            for index in range(count):
                job = executor.submit(_with_gpus, gpus, client.run, str(paths.root), index)
                submission.clients.append(job.job_id)
        except OSError as error:
            raise SubmissionError(f"a local process could not be started: {error}") from error


def _with_gpus(gpus: str | None, function: Callable[..., None], *args: Any) -> None:
    """Call a function with the GPUs that submit saw; LocalExecutor hides them all."""
    if gpus is None:
        os.environ.pop("CUDA_VISIBLE_DEVICES", None)
    else:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpus
    function(*args)


@contextlib.contextmanager
def _untouched_by_terminal() -> Iterator[None]:
    """Start processes that a Ctrl-C or the end of the terminal does not reach.

    An ignored signal stays ignored in a new program; submit itself decides what a Ctrl-C means.
    """
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGHUP)}
    env = {name: os.environ.get(name) for name in _JOB_ENV}
    os.environ.update(_JOB_ENV)
    for number in before:
        signal.signal(number, signal.SIG_IGN)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for name, value in env.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


# --- Slurm ---


def _submit_slurm(config: Config, paths: RunPaths, submission: Submission) -> None:
    import submitit

    cluster = config.cluster
    setup = [f"export {name}={value}" for name, value in _JOB_ENV.items()] + cluster.setup
    try:
        executor = submitit.SlurmExecutor(folder=paths.jobs, python=cluster.python)
        executor.update_parameters(
            **slurm_parameters(cluster, cluster.server, f"{config.name}-server"),
            setup=setup,
        )
        submission.server = executor.submit(server.run, str(paths.root)).job_id
        executor = submitit.SlurmExecutor(folder=paths.jobs, python=cluster.python)
        parameters = slurm_parameters(cluster, cluster.clients, f"{config.name}-clients")
        parameters["additional_parameters"]["dependency"] = f"after:{submission.server}"
        executor.update_parameters(
            **parameters,
            array_parallelism=cluster.max_parallel or cluster.array_tasks,
            setup=setup,
        )
        with executor.batch():
            jobs = [
                executor.submit(client.run, str(paths.root)) for _ in range(cluster.array_tasks)
            ]
        submission.clients = [job.job_id for job in jobs]
    except (submitit.core.utils.FailedJobError, RuntimeError, OSError) as error:
        raise SubmissionError(f"Slurm refused a job: {error}") from error


def slurm_parameters(common: JobOptions, special: JobOptions, name: str) -> dict[str, Any]:
    """Return submitit's parameters for a job: the common options with the job's own over them."""
    options = {
        **common.model_dump(include=set(JobOptions.model_fields)),
        **special.model_dump(exclude_none=True, exclude_defaults=True),
    }
    mem_gb = options["mem_gb"]
    return {
        "job_name": name,
        "partition": options["slurm_partition"],
        "account": options["account"],
        "qos": options["qos"],
        "constraint": options["constraint"],
        "ntasks_per_node": 1,  # Slurm refuses gpus_per_task without
        # submitit's 90 s before the limit would be most of a short job.
        "signal_delay_s": min(90, (options["time_min"] or 1e9) * 60 // 6),
        "time": options["time_min"],  # without: the partition's, where submitit would say 5
        "mem": mem_gb and f"{mem_gb * 1000:.0f}M",
        "cpus_per_task": options["cpus_per_task"],
        "gpus_per_task": options["gpus_per_task"] or None,
        "gres": options["gres"],
        "wckey": None,  # submitit sets one, which many sites refuse
        "additional_parameters": {**common.extra, **special.extra},
    }


def _is_queued(job_id: str) -> bool:
    """Return whether Slurm knows a job as pending or running; True if it does not answer."""
    command = ["squeue", "--noheader", "--format=%T", f"--jobs={job_id}"]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=_SLURM_TIMEOUT_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return True
    if done.returncode:
        return "Invalid job id" not in done.stderr  # else the controller is busy or restarts
    return bool(done.stdout.strip())


def _scancel(job_ids: list[str]) -> None:
    arrays = sorted({job_id.split("_")[0] for job_id in job_ids})
    if not arrays:
        return
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        subprocess.run(["scancel", *arrays], check=False, timeout=_SLURM_TIMEOUT_S)  # noqa: S607


# --- either ---


def alive(paths: RunPaths, submission: Submission) -> list[str]:
    """Return the roles that live: processes of this machine; with Slurm, the server if queued."""
    if submission.executor == "slurm":
        return ["server"] if _is_queued(submission.server) else []
    return [
        role
        for role, job_id in submission.roles()
        if run_state.live_pid(paths, role) is not None or _is_child(int(job_id))
    ]


def _is_child(pid: int) -> bool:
    """Return whether a controller that this process started still runs."""
    with contextlib.suppress(ChildProcessError):
        return os.waitpid(pid, os.WNOHANG) == (0, 0)
    return Path(f"/proc/{pid}/stat").exists() and "submitit" in _command_line(pid)


def _command_line(pid: int) -> str:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_text()
    return ""


def cancel(paths: RunPaths) -> None:
    """End every job of a run: politely, then with force. Returns when they are gone."""
    submission = read_submission(paths)
    if submission is None:
        return
    if submission.executor == "slurm":
        _scancel([job_id for job_id in (*submission.clients, submission.server) if job_id])
        return
    for number, timeout_s in ((signal.SIGTERM, _TERM_TIMEOUT_S), (signal.SIGKILL, _KILL_TIMEOUT_S)):
        for role, job_id in reversed(list(submission.roles())):
            pid = run_state.live_pid(paths, role)
            if pid is None and _is_child(int(job_id)):
                pid = int(job_id)  # it has not come as far as to register
            if pid is not None:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number)
        if files.wait_until(lambda: not alive(paths, submission), timeout_s):
            break


def wait_for_end(paths: RunPaths, submission: Submission, timeout_s: float) -> list[str]:
    """Wait until the local processes are gone; return the roles that are not."""
    files.wait_until(lambda: not alive(paths, submission), timeout_s)
    return alive(paths, submission)


def log_paths(paths: RunPaths, job_id: str) -> list[Path]:
    """Return the logs of a job, standard error last."""
    return [paths.jobs / f"{job_id}_0_log.{stream}" for stream in ("out", "err")]
