"""Which GPUs an array task was allotted, and which device a fit uses."""

import itertools
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from fedhpc.errors import PlatformError
from fedhpc.isolation.nvml import Gpu, Nvml, device_nodes

if TYPE_CHECKING:
    import torch


def allotted_gpus(slurm_gpus: Sequence[str], nvml: Nvml | None) -> list[Gpu]:
    """Return the GPUs (or MIG devices) that this process may use.

    What CUDA_VISIBLE_DEVICES names; without it what Slurm allotted; without both every GPU of the
    machine. Indices count as nvidia-smi counts. A card in MIG mode stands for all its MIG devices,
    of which CUDA lets a process use one.

    Parameters
    ----------
    slurm_gpus : sequence of str
        Indices that Slurm allotted; empty where it allotted none or does not tell.
    nvml : Nvml, optional
        Where GPUs have UUIDs and memory; without it they are known by what names them.

    Raises
    ------
    PlatformError
        If what is named or allotted is not there.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    cards = nvml.cards() if nvml else [[Gpu(str(index))] for index in range(device_nodes())]
    if visible is not None:
        names = _names(visible)
        if slurm_gpus and not names:
            raise PlatformError(
                f"Slurm allotted {_count(len(slurm_gpus))} ({', '.join(slurm_gpus)}), but"
                f" CUDA_VISIBLE_DEVICES is {visible!r}",
                "unset it, or set isolation.device: cpu",
            )
        if nvml is None:
            return [Gpu(name) for name in names]
        source = f"CUDA_VISIBLE_DEVICES={visible}"
        found = [gpu for name in names for gpu in _find(name, cards, source)]
        return list(dict.fromkeys(found))
    if not slurm_gpus or len(cards) == len(slurm_gpus):  # in Slurm's cgroup indices begin at 0
        if slurm_gpus and not cards:
            raise _not_there(slurm_gpus, cards)
        return [gpu for card in cards for gpu in card]
    if not all(index.isdigit() and int(index) < len(cards) for index in slurm_gpus):
        raise _not_there(slurm_gpus, cards)
    return [gpu for index in slurm_gpus for gpu in cards[int(index)]]


def _names(visible: str) -> list[str]:
    """Return what CUDA_VISIBLE_DEVICES names; CUDA stops at the first that is no device."""
    names = (name.strip() for name in visible.split(","))
    return list(
        itertools.takewhile(
            lambda name: name and name != "NoDevFiles" and not name.startswith("-"), names
        )
    )


def _find(name: str, cards: list[list[Gpu]], source: str) -> list[Gpu]:
    if name.isdigit() and int(name) < len(cards):
        return cards[int(name)]
    # CUDA takes the beginning of a UUID too, if only one GPU has it. The UUID of a card in MIG mode
    # is not among these: there CUDA wants the MIG device.
    matches = [gpu for card in cards for gpu in card if name and gpu.id.startswith(name)]
    if len(matches) == 1 and not name.isdigit():
        return matches
    found = ", ".join(gpu.id for card in cards for gpu in card) or "none"
    raise PlatformError(
        f"{source}: expected GPUs of this machine, found {name!r}; there are {len(cards)}: {found}",
        "compare with nvidia-smi -L, or set isolation.device: cpu",
    )


def _not_there(slurm_gpus: Sequence[str], cards: list[list[Gpu]]) -> PlatformError:
    return PlatformError(
        f"Slurm allotted {_count(len(slurm_gpus))} ({', '.join(slurm_gpus)}), but the driver"
        f" ({driver_version()}) shows {len(cards)}",
        "does the node's driver work (nvidia-smi)? isolation.device: cpu does without",
    )


def _count(number: int) -> str:
    return "1 GPU" if number == 1 else f"{number} GPUs"


def device_of_this_child() -> "torch.device":
    """Return the device that this child's slot gives it. Only children may call it.

    Raises
    ------
    PlatformError
        If a GPU was allotted that torch cannot use; training on the CPU in silence would be worse.
    """
    import torch

    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    if not visible:
        return torch.device("cpu")
    # NVML also shows GPUs whose driver is too old for this torch. CUDA, which knows, may be asked
    # now that there is a slot.
    by_nvml = os.environ.pop("PYTORCH_NVML_BASED_CUDA_CHECK", None)
    try:
        usable = torch.cuda.is_available()
    finally:
        if by_nvml is not None:
            os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = by_nvml
    if not usable:
        raise PlatformError(
            f"isolation.device: GPU {visible} was allotted, but torch {torch.__version__} (built"
            f" for CUDA {torch.version.cuda}) cannot use it with driver {driver_version()}",
            "install a torch build for this driver, or set isolation.device: cpu",
        )
    return torch.device("cuda")


def driver_version() -> str:
    """Return what the NVIDIA driver says of itself; "none" where there is none."""
    try:
        with open("/proc/driver/nvidia/version", encoding="utf-8") as file:  # noqa: PTH123
            return file.readline().strip()
    except OSError:
        return "none"
