"""What children of the tests of host memory call; each takes memory and touches all of it.

It is also the owner of a pool in a control group: python memory_entries.py CGROUP.PROCS MB.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

from entries import SLOT, call, entry

from fedhpc.errors import FedHPCError
from fedhpc.isolation import ChildPool, PoolOptions, channel

MB = 1_000_000


@entry
def take(mb: int) -> int:
    return len(bytearray(b"x") * (mb * MB))


@entry
def take_with_torch(mb: int) -> int:
    import torch

    return torch.ones(mb * MB, dtype=torch.uint8).numel()


@entry
def take_with_numpy(mb: int) -> int:
    import numpy as np

    return np.ones(mb * MB, dtype=np.uint8).size


@entry
def take_and_hide_it(mb: int) -> int:
    try:
        return len(bytearray(b"x") * (mb * MB))
    except MemoryError as error:
        raise RuntimeError("the batch could not be loaded") from error


@entry
def take_in_subprocesses(mb: int, count: int) -> int:
    """Take memory in other processes, each of them below the limit, and wait there."""
    code = f"import time; data = bytearray(b'x') * {mb * MB}; time.sleep(600)"
    for _ in range(count):
        subprocess.Popen([sys.executable, "-c", code])
    time.sleep(600)
    return 0


def own_a_pool_in(procs: str, mb: str) -> None:
    Path(procs).write_text(str(os.getpid()))
    with ChildPool(PoolOptions(preload=["json"], standby=False)) as pool:
        try:
            call(pool, "add", 1, 2)
            call_take(pool, int(mb))
        except FedHPCError as error:
            print(type(error).__name__, getattr(error, "for_memory", None), error.message)
        print("then", call(pool, "add", 1, 2))


def call_take(pool: ChildPool, mb: int) -> None:
    fd = channel.write_memory([json.dumps([mb]).encode()])
    try:
        pool.run("memory_entries:take", [fd], slot=SLOT, timeout_s=60).close()
    finally:
        os.close(fd)


if __name__ == "__main__":
    own_a_pool_in(*sys.argv[1:])
