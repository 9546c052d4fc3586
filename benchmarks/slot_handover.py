"""How fast a slot changes hands: python benchmarks/slot_handover.py.

Milliseconds from the moment that a slot is free to the moment that the next fit's function is
entered, for each way to make children: alone (one pool, one call after the other) and contended
(the child of a second pool waits for the same slot). On the CPU a child gives its slot back just
before it sends its reply; a child that is kept and has no rival keeps it, and its slot counts as
free when its function returns. Fork servers preload what those of an array task of the built-in app
do; without one (spawn) each child imports the same. Last, what the slot locks cost a call.
"""

import argparse
import functools
import importlib
import json
import os
import platform
import statistics
import struct
import sys
import tempfile
import threading
import time
from dataclasses import replace
from pathlib import Path

from fedhpc.isolation import ChildPool, PoolOptions, Slot, channel
from fedhpc.isolation.calls import DEFAULT_PRELOAD
from fedhpc.isolation.locks import SlotLock

HERE = Path(__file__).parent
PRELOAD = (*DEFAULT_PRELOAD, "flwr.clientapp", "fedhpc.federation.fit")
PRELOAD = (*PRELOAD, "fedhpc.federation.client_app")
MODES = {
    "standby child": PoolOptions(standby=True),
    "cold fork": PoolOptions(standby=False),
    "fits_per_process 0": PoolOptions(standby=False, fits_per_process=0),
    "fits_per_process auto": PoolOptions(standby=False, fits_per_process="auto"),
    "spawn": PoolOptions(standby=False, start_method="spawn"),
}
STAMP = struct.Struct("d")


# --- in the children ---


def import_all(_: str) -> None:
    """Be ready for a fit: costs something only where nothing was preloaded."""
    for name in PRELOAD:
        importlib.import_module(name)


def train(request: memoryview) -> list[list[bytes]]:
    """Train for a while; tell when this began and ended, and have the slot's release told."""
    entered_s = time.monotonic()
    path, seconds = json.loads(bytes(request))
    stamp_release(path)
    time.sleep(seconds)
    return [[json.dumps([entered_s, time.monotonic()]).encode()]]


@functools.cache  # once in a process that is kept
def stamp_release(path: str) -> None:
    """Write down when this process has released its slot."""
    release = SlotLock.release
    file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)

    def release_and_tell(self: SlotLock) -> None:
        release(self)
        os.write(file, STAMP.pack(time.monotonic()))

    SlotLock.release = release_and_tell  # type: ignore[method-assign]


# --- the pools' side ---


class Calls:
    """Calls of `train`, and the moments that they and their slots tell."""

    def __init__(self, folder: Path, train_s: float) -> None:
        self.entered_s: list[float] = []
        self.returned_s: list[float] = []
        self.waited_s: list[float] = []
        self._stamps = folder / "released"
        self._stamps.touch()
        self._train_s = train_s

    def make(self, pool: ChildPool, slot: Slot, count: int) -> None:
        """Make calls one after the other."""
        for _ in range(count):
            fd = channel.write_memory([json.dumps([str(self._stamps), self._train_s]).encode()])
            reply = pool.run("slot_handover:train", [fd], slot=slot, timeout_s=120)
            entered_s, returned_s = json.loads(bytes(channel.view(reply.buffers[0])))
            channel.close_all([fd])
            reply.close()
            self.entered_s.append(entered_s)
            self.returned_s.append(returned_s)
            self.waited_s.append(reply.wait_s)

    def handovers_ms(self) -> list[float]:
        """Return the times from slot free to function entered, in the order of the fits."""
        released_s = sorted(STAMP.unpack(data)[0] for data in self._released())
        entered_s, returned_s = sorted(self.entered_s), sorted(self.returned_s)
        found = []
        for ended_s, next_s in zip(returned_s, entered_s[1:], strict=False):
            free_s = next((each for each in released_s if ended_s <= each <= next_s), ended_s)
            found.append(1000 * (next_s - free_s))
        return found

    def _released(self) -> list[bytes]:
        data = self._stamps.read_bytes()
        return [data[start : start + STAMP.size] for start in range(0, len(data), STAMP.size)]


def measure(
    options: PoolOptions, handovers: int, train_s: float, *, contended: bool
) -> list[float]:
    """Return the milliseconds of each handover."""
    with tempfile.TemporaryDirectory() as folder:
        locks = Path(folder) / "locks"
        locks.mkdir(mode=0o700)
        slot = Slot(0, lock_folder=locks, lock_key="cpu-benchmark", limit=1)
        calls = Calls(Path(folder), train_s)
        pools = [ChildPool(options) for _ in range(2 if contended else 1)]
        try:
            for pool in pools:
                warm_up = Calls(Path(folder), 0.0)
                warm_up.make(pool, slot, 2)
            (Path(folder) / "released").write_bytes(b"")
            each = -(-(handovers + 1) // len(pools))
            threads = [
                threading.Thread(target=calls.make, args=(pool, slot, each)) for pool in pools
            ]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        finally:
            for pool in pools:
                pool.close()
        return calls.handovers_ms()[:handovers]


def cost_of_locks(options: PoolOptions, calls: int) -> tuple[float, float, float]:
    """Return the medians of a call's milliseconds without and with locks, and to get a slot."""
    with tempfile.TemporaryDirectory() as folder:
        locks = Path(folder) / "locks"
        locks.mkdir(mode=0o700)
        bare = Slot(0)
        locked = Slot(0, lock_folder=locks, lock_key="cpu-benchmark", limit=1)
        seconds: dict[Slot, list[float]] = {bare: [], locked: []}
        waited_s = []
        with ChildPool(options) as without, ChildPool(options) as with_locks:
            for number in range(calls + 2):
                for pool, slot in ((without, bare), (with_locks, locked)):
                    empty = Calls(Path(folder), 0.0)
                    began_s = time.perf_counter()
                    empty.make(pool, slot, 1)
                    if number >= 2:
                        seconds[slot].append(time.perf_counter() - began_s)
                waited_s += empty.waited_s
        medians = [1000 * statistics.median(seconds[slot]) for slot in (bare, locked)]
        return medians[0], medians[1], 1000 * statistics.median(waited_s)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--handovers", type=int, default=100)
    parser.add_argument("--spawn-handovers", type=int, default=10, help="spawn is slow: fewer")
    parser.add_argument("--train-s", type=float, default=0.1, help="how long each fit sleeps")
    parser.add_argument("--modes", nargs="*", default=list(MODES), choices=list(MODES))
    options = parser.parse_args()
    paths = [str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])]
    os.environ["PYTHONPATH"] = os.pathsep.join(paths)
    preload = [*PRELOAD, "slot_handover"]
    modes = {
        mode: replace(MODES[mode], preload=preload, prepare="slot_handover:import_all")
        for mode in options.modes
    }
    print(f"{os.cpu_count()} cores, {_processor()}, Linux {platform.release()},", end=" ")
    print(f"Python {platform.python_version()}; from slot free to train() entered, ms:")
    medians: dict[tuple[str, bool], float] = {}
    for mode, pool_options in modes.items():
        for contended in (False, True):
            count = options.spawn_handovers if mode == "spawn" else options.handovers
            found = measure(pool_options, count, options.train_s, contended=contended)
            medians[mode, contended] = statistics.median(found)
            print(
                f"  {mode:<21} {'contended' if contended else 'alone':<10}"
                f" median {statistics.median(found):8.2f}  max {max(found):8.2f}"
                f"  of {len(found)}",
                flush=True,
            )
    if "spawn" in modes:
        print("spawn takes so many times as long, by the medians:")
        for (mode, contended), median_ms in medians.items():
            if mode != "spawn":
                ratio = medians["spawn", False] / median_ms
                print(f"  {mode:<21} {'contended' if contended else 'alone':<10} {ratio:8.0f}")
    print("a call of an empty function, without and with slot locks, medians in ms:")
    for mode, pool_options in modes.items():
        if mode != "spawn":
            bare_ms, locked_ms, wait_ms = cost_of_locks(pool_options, options.handovers)
            print(
                f"  {mode:<21} {bare_ms:6.2f} without, {locked_ms:6.2f} with, ratio"
                f" {locked_ms / bare_ms:5.2f}; of these to get the slot {wait_ms:5.3f}",
                flush=True,
            )


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


if __name__ == "__main__":
    sys.path.insert(0, str(HERE))
    main()
