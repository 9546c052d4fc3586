"""What the children of these tests call, and the processes that own pools of their own.

Children and owners import this module: only the standard library, torch and fedhpc.isolation.
"""

import contextlib
import hashlib
import json
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

import gpu_device
from entries import entry
from gpu_device import GIB, MIB

from fedhpc.isolation import (
    ChildPool,
    Need,
    PoolOptions,
    Reply,
    Slot,
    allotted_gpus,
    channel,
    gpu_slots,
)
from fedhpc.isolation.nvml import Gpu, open_nvml

PRELOAD = ("numpy", "torch")  # what optimizers need takes longer to import
_kept: list[Any] = []  # what a child holds until it ends

# --- the side of an owner ---


def options(**more: Any) -> PoolOptions:
    return PoolOptions(**{"preload": PRELOAD, "standby": False, "huge_pages": False, **more})


def slots(gpu: Gpu, folder: Path | str, per_gpu: int = 1) -> list[Slot]:
    return gpu_slots([gpu], per_gpu, cpus=16, threads_per_fit=1, lock_folder=Path(folder))


def run(
    pool: ChildPool, slot: Slot, name: str, *args: Any, timeout_s: float = 60.0, **more: Any
) -> tuple[Any, Reply]:
    """Call one of the functions below in a child; arguments and result travel as JSON."""
    fd = channel.write_memory([json.dumps(args).encode()])
    try:
        reply = pool.run(f"gpu_entries:{name}", [fd], slot=slot, timeout_s=timeout_s, **more)
    finally:
        os.close(fd)
    try:
        return json.loads(bytes(channel.view(reply.buffers[0]))), reply
    finally:
        reply.close()


# --- what children call ---


def reach(marker: str) -> None:
    """Tell a test that this process is where it wants it."""
    beside = Path(f"{marker}.tmp")
    beside.write_text(str(os.getpid()))
    beside.replace(marker)


@entry
def use(mib: int, seconds: float = 0.0, marker: str = "") -> dict[str, Any]:
    block = gpu_device.allocate(mib * MIB)
    if marker:
        reach(marker)
    time.sleep(seconds)
    del block
    return {"pid": os.getpid(), "ended_s": time.monotonic()}


@entry
def keep(mib: int, marker: str) -> None:
    _kept.append(gpu_device.allocate(mib * MIB))
    reach(marker)
    time.sleep(600)


@entry
def keep_with_loader(mib: int, marker: str) -> None:
    """Keep memory while forks of this process, as DataLoader makes them, have its files open."""
    import torch
    from torch.utils.data import DataLoader, TensorDataset

    _kept.append(gpu_device.allocate(mib * MIB))
    data = TensorDataset(torch.arange(64.0))
    iterator = iter(DataLoader(data, batch_size=8, num_workers=2, persistent_workers=True))
    next(iterator)
    _kept.append(iterator)
    reach(marker)
    time.sleep(600)


@entry
def stamp(path: str, mib: int, seconds: float) -> None:
    """Note when this fit used its GPU."""
    entered_s = time.monotonic()
    block = gpu_device.allocate(mib * MIB)
    time.sleep(seconds)
    del block
    append(path, [os.getpid(), entered_s, time.monotonic()])


@entry
def greedy(path: str, step_mib: int) -> None:
    """Take memory without end; note how much there was each time."""
    taken = []
    while True:
        taken.append(gpu_device.allocate(step_mib * MIB))
        append(path, [os.getpid(), len(taken) * step_mib, time.monotonic()])


@entry
def see() -> dict[str, Any]:
    return gpu_device.seen()


@entry
def break_context() -> None:
    gpu_device.break_context()


@entry
def train(seed: int, steps: int) -> str:
    """Train a small CNN with deterministic algorithms; return a digest of its parameters."""
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    import torch

    device = gpu_device.device()
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
    torch.manual_seed(seed)
    images, labels = torch.randn(256, 3, 32, 32), torch.randint(10, (256,))
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 16, 3, padding=1),
        torch.nn.ReLU(),
        torch.nn.MaxPool2d(2),
        torch.nn.Conv2d(16, 32, 3, padding=1),
        torch.nn.ReLU(),
        torch.nn.MaxPool2d(2),
        torch.nn.Flatten(),
        torch.nn.Dropout(0.2),
        torch.nn.Linear(32 * 8 * 8, 10),
    ).to(device)
    images, labels = images.to(device), labels.to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for step in range(steps):
        part = slice(step % 4 * 64, step % 4 * 64 + 64)
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(images[part]), labels[part]).backward()
        optimizer.step()
    digest = hashlib.sha256()
    for parameter in model.parameters():
        digest.update(parameter.detach().cpu().numpy().tobytes())
    return digest.hexdigest()


def make_context(_: str) -> None:
    """Use the GPU at its import, as some apps do."""
    _kept.append(gpu_device.allocate(MIB))


def append(path: str, value: Any) -> None:
    with Path(path).open("a") as file:  # one write: lines of several processes do not mix
        file.write(json.dumps(value) + "\n")


def lines(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text().splitlines()]


# --- processes that tests start: python gpu_entries.py COMMAND ARGUMENTS AS JSON ---


def own_and_keep(folder: str, marker: str, with_loader: bool) -> None:
    """Own a pool whose child keeps memory."""
    nvml = open_nvml()
    (slot,) = slots(allotted_gpus([], nvml)[0], folder)
    with ChildPool(options(), nvml) as pool:
        run(pool, slot, "keep_with_loader" if with_loader else "keep", 512, marker, timeout_s=600)


def own_and_see(folder: str) -> None:
    """Print what a child sees."""
    nvml = open_nvml()
    (slot,) = slots(allotted_gpus([], nvml)[0], folder)
    with ChildPool(options(), nvml) as pool:
        print(json.dumps([run(pool, slot, "see")[0], gpu_device.cuda_library_in("self")]))


def own_and_stamp(folder: str, path: str, fits: int) -> None:
    """Be a run with two slots that does many fits."""
    nvml = open_nvml()
    mine = slots(allotted_gpus([], nvml)[0], folder, 2)
    with ChildPool(options(), nvml) as pool:

        def work(slot: Slot) -> None:
            for _ in range(fits):
                run(pool, slot, "stamp", path, 64, 0.2, need=Need(2 * GIB))

        threads = [threading.Thread(target=work, args=(slot,)) for slot in mine]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)


def take(mib: int, marker: str) -> None:
    """Be another program, which knows nothing of slots, until the standard input ends."""
    block = gpu_device.allocate(mib * MIB)
    reach(marker)
    with contextlib.suppress(KeyboardInterrupt):
        sys.stdin.read()
    del block


COMMANDS = {
    function.__name__: function for function in (own_and_keep, own_and_see, own_and_stamp, take)
}

if __name__ == "__main__":
    COMMANDS[sys.argv[1]](*json.loads(sys.argv[2]))
