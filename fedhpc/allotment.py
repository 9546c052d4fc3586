"""What Slurm or the machine gives this process: its slots, as the config wants them."""

import logging
import os
from pathlib import Path

from fedhpc.config import Isolation
from fedhpc.environment import Environment
from fedhpc.isolation import Nvml, Slot, allotted_gpus, cpu_slots, gpu_slots, locks

logger = logging.getLogger(__name__)


def lock_folder(isolation: Isolation) -> Path:
    """Return the folder of the slot locks."""
    if isolation.lock_dir is None:
        return locks.default_folder()
    return Path(os.path.expandvars(isolation.lock_dir)).expanduser()


def prepare_lock_folder(isolation: Isolation, environment: Environment) -> Path:
    """Return the folder of the slot locks, made and checked.

    Raises
    ------
    PlatformError
        If locks in it would not hold, or others could touch them.
    """
    folder = lock_folder(isolation)
    locks.prepare_folder(folder)
    if environment.on_slurm and (root := locks.private_to_job(folder, environment.job_id)):
        logger.warning(
            "isolation.lock_dir: %s is this job's alone (it is %s of its disk): other jobs on this"
            " node that use the same GPU do not see its slots; name a folder of the node that your"
            " jobs share, e.g. /var/tmp/fedhpc-$USER",
            folder, root,
        )  # fmt: skip
    return folder


def slots(
    isolation: Isolation,
    environment: Environment,
    nvml: Nvml | None,
    *,
    folder: Path | None = None,
    array_tasks_here: int = 1,
) -> list[Slot]:
    """Return the slots of this process.

    Parameters
    ----------
    isolation : Isolation
        Of the config.
    environment : Environment
        Of this process.
    nvml : Nvml, optional
        Where GPUs are known by their UUIDs.
    folder : Path, optional
        Of the slot locks; None: no locks are taken.
    array_tasks_here : int
        Array tasks of the run that share the cores of this process.

    Raises
    ------
    PlatformError
        If there is no GPU where one is wanted, or was allotted.
    """
    threads = isolation.threads_per_fit
    cpus = max(1, environment.cpus // array_tasks_here)
    job_id = environment.job_id if environment.on_slurm else None
    gpus = [] if isolation.device == "cpu" else allotted_gpus(environment.gpus, nvml)
    if gpus or isolation.device == "cuda":
        return gpu_slots(
            gpus,
            isolation.slots_per_gpu,
            cpus=cpus,
            threads_per_fit=threads,
            lock_folder=folder,
            job_id=job_id,
        )
    return cpu_slots(
        isolation.slots,
        cpus=cpus,
        threads_per_fit=threads,
        lock_folder=folder,
        shared_by=array_tasks_here,
        job_id=job_id,
    )
