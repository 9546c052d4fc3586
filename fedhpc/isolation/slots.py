"""Which slots an array task has: places where one fit at a time may run."""

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fedhpc.errors import PlatformError
from fedhpc.isolation.nvml import Gpu

_MAX_SLOTS_PER_GPU = 64


@dataclass(frozen=True)
class Slot:
    """A place for one fit at a time.

    Attributes
    ----------
    index : int
        0-based within the array task.
    gpus : tuple of Gpu
        What its children see: one GPU, or none on the CPU.
    lock_folder : Path, optional
        Where the locks of its GPU (or cores) are; None: nobody else is asked.
    lock_key : str
        What is locked there.
    limit : int
        Fits at a time that this run starts on its GPU (or cores), together with all others that
        keep to the same limit.
    """

    index: int
    gpus: tuple[Gpu, ...] = ()
    lock_folder: Path | None = None
    lock_key: str = ""
    limit: int = 1

    @property
    def env(self) -> dict[str, str]:
        """Environment of its children: which GPU they see, if any."""
        return {"CUDA_VISIBLE_DEVICES": ",".join(gpu.id for gpu in self.gpus)}


def cpu_slots(
    count: int | Literal["auto"],
    *,
    cpus: int,
    threads_per_fit: int,
    lock_folder: Path | None = None,
    shared_by: int = 1,
    job_id: str | None = None,
) -> list[Slot]:
    """Return slots on the cores of this process.

    Parameters
    ----------
    count : int or "auto"
        How many; auto: ``cpus // threads_per_fit``, at least one.
    cpus : int
        Cores that this array task may use.
    threads_per_fit : int
        Threads of one fit.
    lock_folder : Path, optional
        Of the slot locks.
    shared_by : int
        Array tasks of this run that have the same cores.
    job_id : str, optional
        The job that these cores belong to; None: whoever has the same cores shares them.
    """
    number = count if isinstance(count, int) else max(1, cpus // threads_per_fit)
    cores = job_id or ",".join(map(str, sorted(os.sched_getaffinity(0))))
    key = f"cpu-{hashlib.sha256(cores.encode()).hexdigest()[:16]}"
    return [Slot(index, (), lock_folder, key, limit=number * shared_by) for index in range(number)]


def gpu_slots(
    gpus: Sequence[Gpu],
    per_gpu: int | Literal["auto"],
    *,
    cpus: int,
    threads_per_fit: int,
    lock_folder: Path | None = None,
    job_id: str | None = None,
) -> list[Slot]:
    """Return slots on GPUs.

    Parameters
    ----------
    gpus : sequence of Gpu
        Those of this array task.
    per_gpu : int or "auto"
        Fits at a time on each; auto: as many as its memory admits and the cores can feed.
    cpus, threads_per_fit : int
        As for `cpu_slots`; for auto.
    lock_folder : Path, optional
        Of the slot locks.
    job_id : str, optional
        The job that numbers these GPUs, if they have no UUIDs.

    Raises
    ------
    PlatformError
        If there is no GPU, or one of them lets one process at a time use it and more are wanted.
    """
    if not gpus:
        raise PlatformError(
            "isolation.device: expected a GPU, found none visible"
            f" (CUDA_VISIBLE_DEVICES={os.environ.get('CUDA_VISIBLE_DEVICES')!r})",
            "ask Slurm for one with cluster.gpus_per_task, or set isolation.device: cpu",
        )
    count: int = 1
    limit: int = 1
    if isinstance(per_gpu, int):
        count, limit = per_gpu, per_gpu
    elif all(gpu.total_bytes and not gpu.exclusive for gpu in gpus):
        # Memory admits. Where it cannot be read, one fit at a time is all that is safe.
        count = min(max(1, cpus // threads_per_fit // len(gpus)), _MAX_SLOTS_PER_GPU)
        limit = _MAX_SLOTS_PER_GPU
    if count > 1 and (exclusive := [gpu.id for gpu in gpus if gpu.exclusive]):
        raise PlatformError(
            f"isolation.slots_per_gpu: expected 1, as {', '.join(exclusive)} lets one process at a"
            f" time use it (compute mode EXCLUSIVE_PROCESS), found {per_gpu}",
            "set it to 1, or ask the site for the compute mode DEFAULT",
        )
    # The first slots of all GPUs come first, so that few fits spread over all GPUs.
    return [
        Slot(rank * len(gpus) + index, (gpu,), lock_folder, _key(gpu, job_id), limit)
        for rank in range(count)
        for index, gpu in enumerate(gpus)
    ]


def _key(gpu: Gpu, job_id: str | None) -> str:
    if gpu.id.startswith(("GPU-", "MIG-")):
        return gpu.id.replace("/", "_")  # MIG devices of old drivers: MIG-GPU-<UUID>/1/0
    return f"gpu-{gpu.id}" if job_id is None else f"gpu-{gpu.id}-of-{job_id}"
