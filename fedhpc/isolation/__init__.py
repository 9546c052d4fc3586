"""Run functions in child processes that share a node's cores and GPUs safely.

Usable alone: it needs neither flwr nor grpc nor submitit, torch only inside the children, and
nvidia-ml-py only to share the memory of GPUs.
"""

from fedhpc.isolation.admission import Need
from fedhpc.isolation.calls import Ahead, PoolOptions, Reply
from fedhpc.isolation.devices import allotted_gpus
from fedhpc.isolation.nvml import Gpu, Nvml
from fedhpc.isolation.processes import ChildPool
from fedhpc.isolation.slots import Slot, cpu_slots, gpu_slots

__all__ = [
    "Ahead",
    "ChildPool",
    "Gpu",
    "Need",
    "Nvml",
    "PoolOptions",
    "Reply",
    "Slot",
    "allotted_gpus",
    "cpu_slots",
    "gpu_slots",
]
