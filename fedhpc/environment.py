"""What the machine and Slurm tell this process: the only reader of ``SLURM_*``."""

import os
import socket
from dataclasses import dataclass


@dataclass(frozen=True)
class Environment:
    """Where this process runs.

    Attributes
    ----------
    host : str
        Name of the machine.
    job_id : str
        Slurm's job id (``<array job>_<index>`` in an array), or ``local-<pid>``.
    array_task : int
        Index within the client array, 0 or more.
    cpus : int
        Cores this process may use.
    on_slurm : bool
        Whether Slurm started it.
    """

    host: str
    job_id: str
    array_task: int
    cpus: int
    on_slurm: bool


# What a job's own environment says of itself; a job that is submitted from inside it must not see
# it. SLURM_CONF and SBATCH_* are the user's and the site's.
_OF_THE_JOB = ("SLURM_", "SLURMD_", "SRUN_", "SUBMITIT_", "PMI_", "PMIX_", "FEDHPC_ARRAY_TASK")
_ITS_GPUS = ("CUDA_VISIBLE_DEVICES", "GPU_DEVICE_ORDINAL", "ROCR_VISIBLE_DEVICES")
_OF_THE_SITE = ("SLURM_CONF", "SLURM_CLUSTERS")


def for_new_jobs() -> dict[str, str]:
    """Return the environment for commands that submit a job: nothing of an outer job leaks."""
    drop: tuple[str, ...] = _OF_THE_JOB
    if "SLURM_JOB_ID" in os.environ:
        drop += _ITS_GPUS
    return {
        name: value
        for name, value in os.environ.items()
        if name in _OF_THE_SITE or not name.startswith(drop)
    }


def current() -> Environment:
    """Read the environment of this process."""
    env = os.environ
    array_job, array_index = env.get("SLURM_ARRAY_JOB_ID"), env.get("SLURM_ARRAY_TASK_ID")
    on_slurm = "SLURM_JOB_ID" in env
    job_id = env.get("SLURM_JOB_ID", f"local-{os.getpid()}")
    if array_job and array_index:
        job_id = f"{array_job}_{array_index}"
    # The affinity mask already follows cpusets; Slurm's number matters where tasks are not bound.
    cpus = len(os.sched_getaffinity(0))
    if on_slurm and env.get("SLURM_CPUS_PER_TASK", "").isdigit():
        cpus = min(cpus, int(env["SLURM_CPUS_PER_TASK"]))
    return Environment(
        host=socket.gethostname(),
        job_id=job_id,
        array_task=int(array_index or env.get("FEDHPC_ARRAY_TASK", "0")),
        cpus=cpus,
        on_slurm=on_slurm,
    )
