"""Run functions in child processes that share a node's cores and GPUs safely.

Usable alone: it needs neither flwr nor grpc nor submitit, and torch only inside the children.
"""

from fedhpc.isolation.processes import ChildPool, PoolOptions, Reply
from fedhpc.isolation.slots import Slot, find_slots

__all__ = ["ChildPool", "PoolOptions", "Reply", "Slot", "find_slots"]
