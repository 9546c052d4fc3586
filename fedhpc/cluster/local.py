"""The jobs of a run as processes of this machine, started by submitit's LocalExecutor."""

import contextlib
import os
import shlex
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import submitit

from fedhpc import files, run_state
from fedhpc.cluster import entries, submission
from fedhpc.cluster.submission import Submission
from fedhpc.config import Config
from fedhpc.errors import SubmissionError
from fedhpc.paths import RunPaths

_TIMEOUT_MIN = 60.0 * 24 * 30  # LocalExecutor would end every job after 2 minutes
_TERM_TIMEOUT_S = 8.0
_KILL_TIMEOUT_S = 5.0


def submit(
    config: Config,
    paths: RunPaths,
    jobs: Submission,
    server: str = entries.SERVER,
    client: str = entries.CLIENT,
) -> None:
    """Start the server and the array tasks; their pids go into ``jobs`` as they come.

    Raises
    ------
    SubmissionError
        If a process could not be started.
    """
    cluster = config.cluster
    python = entries.python(config, shlex.quote(sys.executable))
    # With setup lines the environment is set after them; without, there need not be a shell.
    setup = cluster.setup and [*cluster.setup, *entries.export_lines(config, paths)]
    timeout_min = cluster.time_min or _TIMEOUT_MIN

    def start(entry: str, *more: int) -> str:
        # One for each job: between two jobs an executor waits for 0.2 s, to spare a scheduler.
        executor = submitit.LocalExecutor(folder=paths.jobs, python=python)
        executor.update_parameters(timeout_min=timeout_min, setup=setup)
        job_id: str = executor.submit(entries.call_with_gpus, gpus, entry, root, *more).job_id
        return job_id

    env = {**entries.JOB_ENV, **cluster.env}
    if config.snapshot:
        env |= entries.snapshot_env(paths, env.get("PYTHONPATH", os.environ.get("PYTHONPATH")))
    root = str(paths.root)
    gpus = os.environ.get("CUDA_VISIBLE_DEVICES")
    count = min(cluster.array_tasks, cluster.max_parallel or cluster.array_tasks)
    with _untouched_by_terminal(env, paths.jobs / "controllers.log"):
        try:
            jobs.server = start(server)
            for index in range(count):
                jobs.clients.append(start(client, index))
            submission.write(paths, jobs)
        except OSError as error:
            raise SubmissionError(f"a local process could not be started: {error}") from error


@contextlib.contextmanager
def _untouched_by_terminal(env: dict[str, str], log: Path) -> Iterator[None]:
    """Start processes that a Ctrl-C or the end of the terminal does not reach.

    An ignored signal stays ignored in a new program; submit itself decides what a Ctrl-C means.
    Nor do they hold submit's output open: who reads it through a pipe waits for its end.
    """
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGHUP)}
    saved = {name: os.environ.get(name) for name in env}
    os.environ.update(env)
    for number in before:
        signal.signal(number, signal.SIG_IGN)
    sys.stdout.flush()
    outputs = {fd: os.dup(fd) for fd in (1, 2)}
    with log.open("ab") as file:
        for fd in outputs:
            os.dup2(file.fileno(), fd)
    try:
        yield
    finally:
        for fd, output in outputs.items():
            os.dup2(output, fd)
            os.close(output)
        for number, handler in before.items():
            signal.signal(number, handler)
        for name, value in saved.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def alive(paths: RunPaths, jobs: Submission) -> list[str]:
    """Return the roles whose processes live on this machine."""
    return [
        role
        for role, job_id in jobs.roles()
        if run_state.live_pid(paths, role) is not None or _is_child(int(job_id))
    ]


def cancel(paths: RunPaths, jobs: Submission) -> None:
    """End the processes of a run, politely, then with force; the server last."""
    for number, timeout_s in ((signal.SIGTERM, _TERM_TIMEOUT_S), (signal.SIGKILL, _KILL_TIMEOUT_S)):
        for role, job_id in reversed(list(jobs.roles())):
            pid = run_state.live_pid(paths, role)
            if pid is None and _is_child(int(job_id)):
                pid = int(job_id)  # it has not come as far as to register
            if pid is not None:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number)
        if files.wait_until(lambda: not alive(paths, jobs), timeout_s):
            break


def _is_child(pid: int) -> bool:
    """Return whether a controller that this process started still runs."""
    with contextlib.suppress(ChildProcessError):
        return os.waitpid(pid, os.WNOHANG) == (0, 0)
    return Path(f"/proc/{pid}/stat").exists() and "submitit" in _command_line(pid)


def _command_line(pid: int) -> str:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_text()
    return ""
