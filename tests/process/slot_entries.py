"""What the children of the tests of slots call, and the stages that a fit in a slot goes through.

Only the standard library and fedhpc.isolation: children import this module. It is also the owner of
a pool that is killed: python slot_entries.py STAGE LOCK_FOLDER MARKER.
"""

import json
import sys
import time
from collections.abc import Generator
from pathlib import Path
from typing import Any

import entries

from fedhpc.isolation import ChildPool, Gpu, Need, PoolOptions, Reply, Slot, channel
from fedhpc.isolation.nvml import Reading

GB = 1_000_000_000
KEY = "GPU-test"
GPU = Gpu(KEY, "simulated", 80 * GB)
STAGES = [
    "waiting in the queue",
    "waiting as the first",
    "waiting for memory",
    "importing",
    "training",
    "training with descendants",
    "replying",
]
WAITING = STAGES[:3]


class Card:
    """A GPU whose memory is what the test says."""

    def __init__(self, free_bytes: int = 80 * GB) -> None:
        self.free_bytes = free_bytes

    def memory(self, _: Gpu) -> Reading:
        return Reading(80 * GB, self.free_bytes, {})


def slot_in(folder: Path) -> Slot:
    return Slot(0, (GPU,), folder, KEY, limit=1)


def pool_for(stage: str, marker: Path) -> ChildPool:
    importing = stage == "importing"
    options = PoolOptions(
        preload=["json"],
        standby=False,
        prepare="entries:prepare_slowly" if importing else None,
        prepare_arg=str(marker),
    )
    return ChildPool(options, Card(1 * GB if "memory" in stage else 80 * GB))  # type: ignore[arg-type]


def run(
    pool: ChildPool, name: str, *args: Any, slot: Slot, timeout_s: float = 60, tag: str = ""
) -> Reply:
    fd = channel.write_memory([json.dumps(args).encode()])
    try:
        need = Need(40 * GB)
        return pool.run(  # a cap is torch's, which takes seconds to import
            name, [fd], slot=slot, timeout_s=timeout_s, tag=tag, need=need, capped=False
        )
    finally:
        channel.close_all([fd])


def begin(pool: ChildPool, stage: str, folder: Path, marker: Path) -> Reply:
    """Make the call that gets as far as the stage, and no further."""
    slot = slot_in(folder)
    if stage == "training with descendants":
        kinds = ["same group", "new session", "daemon", "fork"]
        return run(pool, "entries:hang_with_descendants", str(marker), kinds, slot=slot, tag="it")
    name = "slot_entries:large_reply" if stage == "replying" else "entries:hang"
    return run(pool, name, str(marker), slot=slot, tag="it")


def reached(pool: ChildPool, stage: str, marker: Path) -> bool:
    words = {"queue": "in the queue", "first": "held by", "memory": "can be had"}
    wanted = words.get(stage.split()[-1])
    return any(wanted in text for text in pool.waiting()) if wanted else marker.exists()


def large_reply(view: memoryview) -> list[Generator[bytes, None, None]]:
    """Stop after 300 MB of a reply."""
    (path,) = json.loads(bytes(view))

    def parts() -> Generator[bytes, None, None]:
        for _ in range(300):
            yield bytes(1_000_000)
        Path(path).touch()
        time.sleep(600)

    return [parts()]


def own_a_pool(stage: str, folder: str, marker: str) -> None:
    at = Path(marker)
    with pool_for(stage, at) as pool:
        call = entries.Background(begin, pool, stage, Path(folder), at)
        while call.running():
            if reached(pool, stage, at):
                print("reached", flush=True)
                break
            time.sleep(0.01)
        call.result(600)


if __name__ == "__main__":
    own_a_pool(*sys.argv[1:])
