"""Which device a fit uses."""

import os
from typing import TYPE_CHECKING

from fedhpc.errors import PlatformError

if TYPE_CHECKING:
    import torch


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
    if not torch.cuda.is_available():
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
