"""The sbatch scripts of a run, written by submitit."""

import contextlib
import math
import shlex
import signal
import sys
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import submitit
from submitit.core import utils

from fedhpc.cluster import entries, options, slurm, submission
from fedhpc.cluster.submission import Submission
from fedhpc.config import Config, JobOptions
from fedhpc.errors import SubmissionError
from fedhpc.paths import RunPaths

_WARNING_S = 90  # between USR2 and the time limit; less where the job is short
# srun says 137 for kill -9; Slurm queues no job again for that. In slurm/*.sbatch too.
_UNLESS_KILLED = (
    "trap 'code=$?; [ $code -ne 137 ] || [ ${{SLURM_RESTART_COUNT:-0}} -ge {max_requeues} ]"
    ' || [ "$(squeue -h -j $SLURM_JOB_ID -o %T)" != RUNNING ]'
    " || scontrol requeue $SLURM_JOB_ID; exit $code' EXIT"
)


class _Executor(submitit.SlurmExecutor):
    """Submitit's, without a Slurm at hand for a dry run, and with our own call of sbatch.

    Submitit calls sbatch once, without a deadline, and a call whose answer is lost is a failure.
    """

    @classmethod
    def affinity(cls) -> int:
        return 2

    def _internal_process_submissions(
        self, delayed_submissions: list[utils.DelayedSubmission]
    ) -> list[Any]:
        pickles = []
        for delayed in delayed_submissions:
            path = utils.JobPaths.get_first_id_independent_folder(self.folder)
            path /= f"{uuid.uuid4().hex}.pkl"
            delayed.set_timeout(self.parameters.get("time") or 5, self.max_num_timeout)
            delayed.dump(path)
            pickles.append(path)
        first = self._submit_command(self._submitit_command_str)
        ids = [first.job_id]
        if "map_count" in self.parameters:
            ids = [f"{first.job_id}_{index}" for index in range(len(pickles))]
        jobs = [self.job_class(folder=self.folder, job_id=job_id, tasks=[0]) for job_id in ids]
        for job, path in zip(jobs, pickles, strict=True):
            job.paths.move_temporary_file(path, "submitted_pickle")
        return jobs

    def _submit_command(self, command: str) -> Any:
        script = Path(self.folder) / f".submission_file_{uuid.uuid4().hex}.sh"
        script.write_text(self._make_submission_file_text(command, ""))
        job_id = slurm.submit(script, self.parameters["job_name"])
        job = self.job_class(folder=self.folder, job_id=job_id, tasks=[0])
        job.paths.move_temporary_file(script, "submission_file", keep_as_symlink=True)
        return job

    def text(self) -> str:
        """Return the script."""
        return str(self._make_submission_file_text(self._submitit_command_str, ""))


def texts(config: Config, paths: RunPaths) -> dict[str, str]:
    """Return both scripts as they would be submitted, without submitting anything."""
    executors = {
        "server job": _server(config, paths),
        "client array": _clients(config, paths, "SERVER_JOB"),
    }
    return {job: executor.text() for job, executor in executors.items()}


def submit(
    config: Config,
    paths: RunPaths,
    jobs: Submission,
    server: str = entries.SERVER,
    client: str = entries.CLIENT,
) -> None:
    """Submit the server job and the client array; the ids go into ``jobs`` as they come.

    Raises
    ------
    SubmissionError
        If Slurm refuses a job.
    """
    root = str(paths.root)
    try:
        with _signals_held():
            executor = _server(config, paths)
            jobs.server = executor.submit(entries.call, server, root).job_id
            submission.write(paths, jobs)
        with _signals_held():
            executor = _clients(config, paths, jobs.server)
            with executor.batch():
                array = [
                    executor.submit(entries.call, client, root)
                    for _ in range(config.cluster.array_tasks)
                ]
            jobs.clients = [job.job_id for job in array]
            submission.write(paths, jobs)
    except OSError as error:
        raise SubmissionError(f"a job could not be prepared in {paths.jobs}: {error}") from error


@contextlib.contextmanager
def _signals_held() -> Iterator[None]:
    """Hold back what would end submit until the job id that sbatch prints is written down.

    Raises
    ------
    KeyboardInterrupt
        Afterwards, if there was such a signal.
    """
    came: list[int] = []
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.signal(number, lambda n, _: came.append(n)) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if came:
        raise KeyboardInterrupt


def _server(config: Config, paths: RunPaths) -> _Executor:
    return _executor(config, paths, options.of_server(config.cluster), "server")


def _clients(config: Config, paths: RunPaths, server_job: str) -> _Executor:
    cluster = config.cluster
    executor = _executor(config, paths, options.of_clients(cluster), "clients")
    if cluster.dependency:
        more = executor.parameters["additional_parameters"]
        # "," means that all must hold, whatever the user waits for besides.
        more["dependency"] = ",".join(filter(None, [more.get("dependency"), f"after:{server_job}"]))
    executor.parameters["array_parallelism"] = cluster.max_parallel or cluster.array_tasks
    executor.parameters["map_count"] = cluster.array_tasks
    return executor


def _executor(config: Config, paths: RunPaths, job: JobOptions, role: str) -> _Executor:
    parameters = job_parameters(job)
    python, srun_args = _python(config, paths, on_gpu=options.gpus(job) > 0)
    if job.cpus_per_task:  # srun does not inherit it in Slurm 22.05 and 23.02
        srun_args = [f"--cpus-per-task={job.cpus_per_task}", *srun_args]
    executor = _Executor(folder=paths.jobs, python=python)
    executor.update_parameters(
        **parameters,
        job_name=f"{paths.run_id}-{role}",
        setup=_setup(config, paths, parameters["additional_parameters"]),
        srun_args=srun_args,
    )
    return executor


def job_parameters(job: JobOptions) -> dict[str, Any]:
    """Return submitit's parameters for a job with these options."""
    more = {
        "reservation": job.reservation,
        "export": job.export,
        # Sites differ in what they do by default; a run is made to survive it.
        "requeue": not job.extra.get("no-requeue"),
        **job.extra,
    }
    parameters = {
        "partition": job.slurm_partition,
        "account": job.account,
        "qos": job.qos,
        "constraint": job.constraint,
        "nodelist": job.nodelist,
        "exclude": job.exclude,
        "comment": job.comment,
        "mail_user": job.mail_user,
        "mail_type": job.mail_type,
        "ntasks_per_node": 1,  # Slurm refuses gpus_per_task without
        # submitit's 90 s before the limit would be most of a short job.
        "signal_delay_s": min(_WARNING_S, (job.time_min or 1e9) * 60 // 6),
        "time": job.time_min,  # without: the partition's, where submitit would say 5
        "mem": job.mem_gb and f"{math.ceil(job.mem_gb * 1000)}M",  # 0M would be all of the node's
        "cpus_per_task": job.cpus_per_task,
        "gpus_per_task": job.gpus_per_task or None,
        "gres": job.gres,
        "wckey": None,  # submitit sets one, which many sites refuse
    }
    for key in job.extra:  # it wins, and an option is given once
        if (name := key.replace("-", "_")) in parameters:
            parameters[name] = None
    # False is an option that is not given; 0 is given.
    given = {key: value for key, value in more.items() if value is not None and value is not False}
    return {**parameters, "additional_parameters": given}


def _setup(config: Config, paths: RunPaths, given: dict[str, Any]) -> list[str]:
    """Return the shell lines before Python starts."""
    lines = [f"export {name}={value}" for name, value in entries.JOB_ENV.items()]
    if "export" in given:
        lines.append("export SLURM_EXPORT_ENV=ALL")  # else srun would drop what these lines set
    if given.get("requeue"):
        lines.append("# Killed, e.g. for want of memory, and not cancelled: once more")
        lines.append(_UNLESS_KILLED.format(max_requeues=config.cluster.max_requeues))
    return [*lines, *config.cluster.setup, *entries.export_lines(config, paths)]


def _python(config: Config, paths: RunPaths, *, on_gpu: bool) -> tuple[str, list[str]]:
    """Return the shell words that start Python, and further arguments of srun."""
    container = config.cluster.container
    if container.image is None:
        return entries.python(config, shlex.quote(sys.executable)), []
    python = entries.python(config, "python3")
    folders = _seen_by_jobs(config, paths)
    here = str(Path.cwd())  # where a job starts, and an app's relative paths begin
    if container.runtime == "pyxis":
        mounts = ",".join(f"{folder}:{folder}" for folder in folders)
        arguments = [
            f"--container-image={container.image}",
            f"--container-mounts={mounts}",
            f"--container-workdir={here}",
        ]
        return python, [*arguments, *container.options]
    words = ["apptainer", "exec", *(["--nv"] if on_gpu else [])]
    words += ["--bind", ",".join(folders), "--pwd", here]
    return f"{shlex.join([*words, *container.options, container.image])} {python}", []


def _seen_by_jobs(config: Config, paths: RunPaths) -> Sequence[str]:
    """Return the folders that a container must show; one that is missing would be an error."""
    wanted = [str(paths.root.parent), str(Path.cwd()), config.app.dir]
    if config.app.is_builtin:
        wanted.append(config.data.root)
    return [path for path in dict.fromkeys(wanted) if path and path != "/"]
