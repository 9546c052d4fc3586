"""What the machine and Slurm tell this process: the only reader of ``SLURM_*``."""

import contextlib
import os
import socket
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path


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
    gpus : tuple of str
        Indices of the GPUs that Slurm allotted to the job, as far as it tells.
    on_slurm : bool
        Whether Slurm started it.
    restarts : int
        How often Slurm had queued the job again before it started this time.
    """

    host: str
    job_id: str
    array_task: int
    cpus: int
    gpus: tuple[str, ...]
    on_slurm: bool
    restarts: int


# What a job's own environment says of itself; a job that is submitted from inside it must not see
# it.
_OF_THE_JOB = ("SLURM_", "SLURMD_", "SRUN_", "SUBMITIT_", "PMI_", "PMIX_", "FEDHPC_ARRAY_TASK")
_ITS_GPUS = ("CUDA_VISIBLE_DEVICES", "GPU_DEVICE_ORDINAL", "ROCR_VISIBLE_DEVICES")
# A user's defaults for commands typed by hand: they would hide jobs from us.
_OF_THE_USER = ("SQUEUE_", "SACCT_", "SCANCEL_")
# The variables of sbatch are called after its options, but for these.
_SBATCH_NAMES = {"time": "TIMELIMIT", "array": "ARRAY_INX", "mem": "MEM_PER_NODE"}
_SBATCH_NEVER = ("SBATCH_ARRAY_INX", "SBATCH_WAIT", "SBATCH_WAIT_ALL_NODES")
_OF_THE_SITE = ("SLURM_CONF", "SLURM_CLUSTERS", "SLURM_JWT")


def for_new_jobs() -> dict[str, str]:
    """Return the environment for Slurm's commands: nothing of an outer job leaks into a new one."""
    drop: tuple[str, ...] = _OF_THE_JOB + _OF_THE_USER
    if "SLURM_JOB_ID" in os.environ:
        drop += _ITS_GPUS
    return {
        name: value
        for name, value in os.environ.items()
        if name in _OF_THE_SITE or not name.startswith(drop)
    }


def for_sbatch(options: Iterable[str]) -> dict[str, str]:
    """Return the environment for sbatch, with the user's defaults where a script is silent.

    Parameters
    ----------
    options : iterable of str
        Long names of the options in the script; sbatch itself would let the variables win.
    """
    given = {_SBATCH_NAMES.get(name, name.upper().replace("-", "_")) for name in options}
    drop = {f"SBATCH_{name}" for name in given}.union(_SBATCH_NEVER)
    return {name: value for name, value in for_new_jobs().items() if name not in drop}


def current() -> Environment:
    """Read the environment of this process."""
    env = os.environ
    array_job, array_index = env.get("SLURM_ARRAY_JOB_ID"), env.get("SLURM_ARRAY_TASK_ID")
    on_slurm = "SLURM_JOB_ID" in env
    job_id = env.get("SLURM_JOB_ID", f"local-{os.getpid()}")
    if array_job and array_index:
        job_id = f"{array_job}_{array_index}"
    # The affinity mask already follows cpusets; Slurm's number matters where tasks are not bound.
    cpus = min(len(os.sched_getaffinity(0)), _quota())
    if on_slurm and env.get("SLURM_CPUS_PER_TASK", "").isdigit():
        cpus = min(cpus, int(env["SLURM_CPUS_PER_TASK"]))
    return Environment(
        host=socket.gethostname(),
        job_id=job_id,
        array_task=int(array_index or env.get("FEDHPC_ARRAY_TASK", "0")),
        cpus=cpus,
        gpus=_indices(env.get("SLURM_STEP_GPUS") or env.get("SLURM_JOB_GPUS") or ""),
        on_slurm=on_slurm,
        restarts=int(env.get("SLURM_RESTART_COUNT", "0")),
    )


def _indices(text: str) -> tuple[str, ...]:
    """Return the indices in a list such as 0,2-3; other names stay as they are."""
    found: list[str] = []
    for part in filter(None, (part.strip() for part in text.split(","))):
        first, dash, last = part.partition("-")
        if dash and first.isdigit() and last.isdigit():
            found += map(str, range(int(first), int(last) + 1))
        else:
            found.append(part)
    return tuple(found)


def _quota() -> int:
    """Return how many cores the control group of this process may keep busy, one at least.

    Containers limit time on the cores rather than which cores.
    """
    quotas = [sys.maxsize]
    with contextlib.suppress(OSError, ValueError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _, controllers, group = line.split(":", 2)
            if not controllers:
                quotas += _quotas(Path("/sys/fs/cgroup"), group, "cpu.max")
            elif "cpu" in controllers.split(","):
                base = Path("/sys/fs/cgroup/cpu")
                quotas += _quotas(base, group, "cpu.cfs_quota_us", "cpu.cfs_period_us")
    return max(1, min(quotas))


def _quotas(base: Path, group: str, *names: str) -> Iterator[int]:
    """Yield the limits of a control group and of those that it is in."""
    folder = base / group.lstrip("/")
    while folder.is_relative_to(base):
        with contextlib.suppress(OSError, ValueError):
            quota, period = " ".join((folder / name).read_text() for name in names).split()
            if quota.isdigit():  # neither "max" nor -1: no limit
                yield int(quota) // int(period)
        folder = folder.parent
