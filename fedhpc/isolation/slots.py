"""Which slots an array task has: places where one fit at a time may run."""

import itertools
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from fedhpc.errors import PlatformError


@dataclass(frozen=True)
class Slot:
    """A place for one fit at a time.

    Attributes
    ----------
    index : int
        0-based within the array task.
    env : dict
        Environment of the fit's child: which GPU it sees, if any.
    """

    index: int
    env: dict[str, str] = field(default_factory=dict, hash=False)


def find_slots(
    device: Literal["auto", "cpu", "cuda"],
    slots: int | Literal["auto"],
    *,
    cpus: int,
    threads_per_fit: int,
) -> list[Slot]:
    """Return the slots of this array task.

    On GPUs ``slots`` counts per GPU (auto: 1) and each slot sees one GPU. On the CPU auto gives
    ``cpus // threads_per_fit`` of them, at least one.

    Parameters
    ----------
    device : {"auto", "cpu", "cuda"}
        auto: the visible GPUs, or the CPU where there are none.
    slots : int or "auto"
        How many.
    cpus : int
        Cores that this array task may use.
    threads_per_fit : int
        Threads of one fit.

    Raises
    ------
    PlatformError
        If ``device`` is cuda and no GPU is visible.
    """
    gpus = [] if device == "cpu" else _visible_gpus()
    if device == "cuda" and not gpus:
        raise PlatformError(
            "isolation.device: expected a GPU, found none visible"
            f" (CUDA_VISIBLE_DEVICES={os.environ.get('CUDA_VISIBLE_DEVICES')!r})",
            "ask Slurm for one with cluster.gpus_per_task, or set isolation.device: cpu",
        )
    if not gpus:
        count = max(1, cpus // threads_per_fit) if slots == "auto" else slots
        return [Slot(index, {"CUDA_VISIBLE_DEVICES": ""}) for index in range(count)]
    per_gpu = 1 if slots == "auto" else slots
    # The first slots of all GPUs come first, so that few fits spread over all GPUs.
    return [
        Slot(rank * len(gpus) + index, {"CUDA_VISIBLE_DEVICES": gpu})
        for rank in range(per_gpu)
        for index, gpu in enumerate(gpus)
    ]


def _visible_gpus() -> list[str]:
    """Return the GPUs allotted to this process, by index or UUID as CUDA takes them."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        # CUDA itself stops at the first entry that is no device, such as -1.
        return list(
            itertools.takewhile(
                lambda gpu: gpu and gpu != "NoDevFiles" and not gpu.startswith("-"),
                (gpu.strip() for gpu in visible.split(",")),
            )
        )
    # The driver's device nodes, so that neither CUDA nor NVML is loaded here.
    return [str(index) for index, _ in enumerate(Path("/dev").glob("nvidia[0-9]*"))]
