"""The sbatch scripts of a run, written by submitit."""

import shlex
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import submitit
from submitit.core import utils

from fedhpc.cluster import entries, slurm
from fedhpc.cluster.submission import Submission
from fedhpc.config import Config, JobOptions
from fedhpc.errors import SubmissionError
from fedhpc.paths import RunPaths

_WARNING_S = 90  # between USR2 and the time limit; less where the job is short


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
    submitit_folder = paths.jobs
    executors = {
        "server": _server(config, paths, submitit_folder),
        "clients": _clients(config, paths, submitit_folder, "<server job>"),
    }
    return {role: executor.text() for role, executor in executors.items()}


def submit(
    config: Config,
    paths: RunPaths,
    submission: Submission,
    server: str = entries.SERVER,
    client: str = entries.CLIENT,
) -> None:
    """Submit the server job and the client array; the ids go into ``submission`` as they come.

    Raises
    ------
    SubmissionError
        If Slurm refuses a job.
    """
    root = str(paths.root)
    try:
        executor = _server(config, paths, paths.jobs)
        submission.server = executor.submit(entries.call, server, root).job_id
        executor = _clients(config, paths, paths.jobs, submission.server)
        with executor.batch():
            jobs = [
                executor.submit(entries.call, client, root)
                for _ in range(config.cluster.array_tasks)
            ]
        submission.clients = [job.job_id for job in jobs]
    except OSError as error:
        raise SubmissionError(f"a job could not be prepared in {paths.jobs}: {error}") from error


def _server(config: Config, paths: RunPaths, folder: Path) -> _Executor:
    cluster = config.cluster
    # GPUs are for the clients: the server has some only where its own section asks for them.
    common = cluster.model_copy(update={"gpus_per_task": None, "gres": None})
    return _executor(config, paths, folder, common, cluster.server, "server")


def _clients(config: Config, paths: RunPaths, folder: Path, server_job: str) -> _Executor:
    cluster = config.cluster
    executor = _executor(config, paths, folder, cluster, cluster.clients, "clients")
    if cluster.dependency:
        executor.parameters["additional_parameters"].setdefault("dependency", f"after:{server_job}")
    executor.parameters["array_parallelism"] = cluster.max_parallel or cluster.array_tasks
    executor.parameters["map_count"] = cluster.array_tasks
    return executor


def _executor(
    config: Config,
    paths: RunPaths,
    folder: Path,
    common: JobOptions,
    special: JobOptions,
    role: str,
) -> _Executor:
    parameters = job_parameters(common, special)
    on_gpu = bool(parameters["gpus_per_task"] or "gpu" in (parameters["gres"] or ""))
    python, srun_args = _python(config, paths, on_gpu=on_gpu)
    executor = _Executor(folder=folder, python=python)
    executor.update_parameters(
        **parameters,
        job_name=f"{paths.run_id}-{role}",
        setup=_setup(config, parameters["additional_parameters"]),
        srun_args=srun_args,
    )
    return executor


def job_parameters(common: JobOptions, special: JobOptions) -> dict[str, Any]:
    """Return submitit's parameters for a job: the common options with the job's own over them."""
    options = {
        **common.model_dump(include=set(JobOptions.model_fields)),
        **special.model_dump(exclude_none=True, exclude_defaults=True),
    }
    mem_gb = options["mem_gb"]
    named = {
        "reservation": options["reservation"],
        "export": options["export"],
        # Sites differ in what they do by default; a run is made to survive it.
        "requeue": True,
    }
    extra = {**common.extra, **special.extra}
    if "no-requeue" in extra:
        del named["requeue"]
    return {
        "partition": options["slurm_partition"],
        "account": options["account"],
        "qos": options["qos"],
        "constraint": options["constraint"],
        "nodelist": options["nodelist"],
        "exclude": options["exclude"],
        "comment": options["comment"],
        "mail_user": options["mail_user"],
        "mail_type": options["mail_type"],
        "ntasks_per_node": 1,  # Slurm refuses gpus_per_task without
        # submitit's 90 s before the limit would be most of a short job.
        "signal_delay_s": min(_WARNING_S, (options["time_min"] or 1e9) * 60 // 6),
        "time": options["time_min"],  # without: the partition's, where submitit would say 5
        "mem": mem_gb and f"{mem_gb * 1000:.0f}M",
        "cpus_per_task": options["cpus_per_task"],
        "gpus_per_task": options["gpus_per_task"] or None,
        "gres": options["gres"],
        "wckey": None,  # submitit sets one, which many sites refuse
        "additional_parameters": {
            **{name: value for name, value in named.items() if value is not None},
            # False is an option that is not given.
            **{name: value for name, value in extra.items() if value is not False},
        },
    }


def _setup(config: Config, options: dict[str, Any]) -> list[str]:
    """Return the shell lines before Python starts."""
    lines = [f"export {name}={value}" for name, value in entries.JOB_ENV.items()]
    if "export" in options:
        lines.append("export SLURM_EXPORT_ENV=ALL")  # else srun would drop what these lines set
    lines += config.cluster.setup
    lines += [f"export {name}={shlex.quote(value)}" for name, value in config.cluster.env.items()]
    return lines


def _python(config: Config, paths: RunPaths, *, on_gpu: bool) -> tuple[str | None, list[str]]:
    """Return the shell words that start Python, and further arguments of srun."""
    container = config.cluster.container
    if container.image is None:
        return config.cluster.python, []
    python = config.cluster.python or "python3"
    folders = _seen_by_jobs(config, paths)
    if container.runtime == "pyxis":
        mounts = ",".join(f"{folder}:{folder}" for folder in folders)
        arguments = [f"--container-image={container.image}", f"--container-mounts={mounts}"]
        return python, [*arguments, *container.options]
    words = ["apptainer", "exec", *(["--nv"] if on_gpu else []), "--bind", ",".join(folders)]
    return f"{shlex.join([*words, *container.options, container.image])} {python}", []


def _seen_by_jobs(config: Config, paths: RunPaths) -> Sequence[str]:
    """Return the folders that a container must show."""
    wanted = [str(paths.root.parent), config.data.root, config.data.source, config.app.dir]
    return [path for path in dict.fromkeys(wanted) if path]
