"""What a process for every fit costs on one GPU: python benchmarks/gpu_isolation.py [--quick].

The work of a fit is a small CNN on random images of CIFAR-10's shape, long (about 0.6 s) and short
(about 0.1 s) on the machine where this is run. Prints, each as min / median / max over repeats:
the time of a fit in fresh, replaced and kept children and in spawned interpreters, as a ratio to
one process that does the same work; the GPU memory that each further slot takes; and the fits per
second with 1 to 8 slots. Needs Python, torch and numpy, and a GPU that nobody else uses; its memory
is read by nvidia-ml-py or nvidia-smi. Takes under 8 minutes: what does not fit in is left out.
"""

import argparse
import importlib.util
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if importlib.util.find_spec("fedhpc") is None:
    sys.path.insert(0, str(ROOT))

from fedhpc.isolation import (  # noqa: E402
    ChildPool,
    Gpu,
    Need,
    Nvml,
    PoolOptions,
    Slot,
    allotted_gpus,
    channel,
    cpu_slots,
    gpu_slots,
)
from fedhpc.isolation.calls import DEFAULT_PRELOAD  # noqa: E402
from fedhpc.isolation.devices import driver_version  # noqa: E402
from fedhpc.isolation.nvml import open_nvml  # noqa: E402

MIB = 1 << 20
LONG_S, SHORT_S = 0.6, 0.1
MODES: dict[str, dict[str, Any]] = {
    "fits_per_process=1": {},
    "... with standby": {"standby": True},
    "fits_per_process=10": {"fits_per_process": 10},
    "fits_per_process=0": {"fits_per_process": 0},
    "spawn": {"start_method": "spawn"},
    "spawn with standby": {"start_method": "spawn", "standby": True},
}
NEED = Need(2_500_000_000)  # so that 8 fits may share a card of 24 GB
SLOTS = (1, 2, 4, 8)
FIT_TIMEOUT_S = 120.0
PRELOAD = (*DEFAULT_PRELOAD, "gpu_isolation")

# --- the work of a fit: children import this module ---


def train(view: memoryview) -> list[list[bytes]]:
    """Train for so many steps, with so many parameters sent back, as a client does."""
    steps, device_name, folder, seconds = json.loads(bytes(view))
    result = _train(steps, device_name)
    if folder:  # hold everything until all are there, and have been measured
        Path(folder, f"{os.getpid()}.there").touch()
        deadline_s = time.monotonic() + seconds
        while not Path(folder, "go").exists() and time.monotonic() < deadline_s:
            time.sleep(0.02)
    return [[result]]


_data: dict[str, Any] = {}  # a process that does several fits makes its images once


def _train(steps: int, device_name: str) -> bytes:
    import torch

    torch.manual_seed(1)
    if not _data:
        _data["images"] = torch.randn(512, 3, 32, 32).to(device_name)
        _data["labels"] = torch.randint(10, (512,)).to(device_name)
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 32, 3, padding=1),
        torch.nn.ReLU(),
        torch.nn.MaxPool2d(2),
        torch.nn.Conv2d(32, 64, 3, padding=1),
        torch.nn.ReLU(),
        torch.nn.MaxPool2d(2),
        torch.nn.Flatten(),
        torch.nn.Linear(64 * 8 * 8, 10),
    ).to(device_name)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    for step in range(steps):
        part = slice(step % 16 * 32, step % 16 * 32 + 32)
        optimizer.zero_grad()
        logits = model(_data["images"][part])
        torch.nn.functional.cross_entropy(logits, _data["labels"][part]).backward()
        optimizer.step()
    parameters = [parameter.detach().cpu().numpy() for parameter in model.parameters()]
    return b"".join(parameter.tobytes() for parameter in parameters)


# --- one process that does the same: python gpu_isolation.py --one-process DEVICE ---


def one_process(device_name: str) -> None:
    """Answer each number of steps on the standard input with the seconds that they took."""
    import torch

    torch.set_num_threads(1)
    for line in sys.stdin:
        began_s = time.monotonic()
        _train(int(line), device_name)
        print(time.monotonic() - began_s, flush=True)


class OneProcess:
    """A process that does fit after fit without any isolation."""

    def __init__(self, device_name: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__, "--one-process", device_name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )

    def fit_s(self, steps: int) -> float:
        """Return the seconds of a fit."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{steps}\n")
        self._process.stdin.flush()
        if not (line := self._process.stdout.readline()):
            sys.exit("the one process that does the same work died")
        return float(line)

    def close(self) -> None:
        """End it."""
        self._process.kill()
        self._process.communicate()


# --- the machine ---


class Machine:
    """Where the fits run, and what is known of it."""

    def __init__(self, device_name: str) -> None:
        self.device_name = device_name
        self._nvml: Nvml | None = None
        self._gpu: Gpu | None = None
        self._smi = shutil.which("nvidia-smi")
        if device_name == "cuda":
            self._nvml = open_nvml()
            gpus = allotted_gpus([], self._nvml)
            if not gpus:
                sys.exit("no GPU here; --device cpu tries this benchmark out, and measures nothing")
            self._gpu = gpus[0]

    def describe(self) -> str:
        """Return the card, driver, cores and versions."""
        code = "import torch; print(torch.__version__, torch.version.cuda)"
        if self._gpu is not None:
            code += "; print(torch.cuda.get_device_properties(0))"
        asked = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120
        )
        if asked.returncode:
            sys.exit(f"torch cannot use {self.device_name}:\n{asked.stderr}")
        torch, *card = asked.stdout.splitlines()
        cores = f"{len(os.sched_getaffinity(0))} cores, Python {sys.version.split()[0]}"
        if self._gpu is None:
            return f"ON THE CPU: these figures say nothing about GPUs\n{cores}, torch {torch}"
        return f"{card[0]}\n{driver_version()}\n{cores}, torch (and its CUDA) {torch}"

    def pool(self, **options: Any) -> ChildPool:
        """Return a pool that is not started yet."""
        return ChildPool(
            PoolOptions(**{"standby": False, "preload": PRELOAD, **options}), self._nvml
        )

    def counts(self) -> list[int]:
        """Return the numbers of slots whose fits have room together."""
        total = self._gpu.total_bytes if self._gpu is not None else 0
        return [n for n in SLOTS if not total or n * NEED.total_bytes < 0.9 * total]

    def slots(self, count: int, folder: str) -> list[Slot]:
        """Return so many slots."""
        locks = Path(folder)
        if self._gpu is None:
            return cpu_slots(count, cpus=count, threads_per_fit=1, lock_folder=locks)
        return gpu_slots([self._gpu], count, cpus=count, threads_per_fit=1, lock_folder=locks)

    def used_bytes(self) -> int | None:
        """Return the memory in use on the GPU."""
        if self._gpu is None:
            return None
        if self._nvml is not None:
            return self._nvml.memory(self._gpu).used_bytes
        if self._smi is None:
            return None
        query = ["--query-gpu=memory.used", "--format=csv,noheader,nounits", "-i", self._gpu.id]
        asked = subprocess.run(
            [self._smi, *query], capture_output=True, text=True, check=True, timeout=30
        )
        return int(asked.stdout) * MIB


def fit(
    pool: ChildPool, slot: Slot, steps: int, device_name: str, folder: str = "", seconds: float = 0
) -> threading.Event:
    """Run a fit; return the event of its process's end."""
    arguments = [steps, device_name, folder, seconds]
    fd = channel.write_memory([json.dumps(arguments).encode()])
    try:
        reply = pool.run(
            "gpu_isolation:train", [fd], slot=slot, timeout_s=FIT_TIMEOUT_S, need=NEED, capped=False
        )
    finally:
        os.close(fd)
    reply.close()
    return reply.gone


@contextmanager
def lock_folder() -> Iterator[str]:
    with tempfile.TemporaryDirectory(prefix="fedhpc-benchmark-") as folder:
        yield folder


def shown(values: Sequence[float], digits: int = 2) -> str:
    low, middle, high = min(values), statistics.median(values), max(values)
    return f"{low:8.{digits}f} {middle:8.{digits}f} {high:8.{digits}f}"


# --- what is measured ---


def calibrate(one: OneProcess, seconds: float) -> int:
    """Return the steps that take about so long."""
    one.fit_s(20)  # contexts, kernels, caches
    per_step_s = min(one.fit_s(100) for _ in range(3)) / 100
    return max(1, round(seconds / per_step_s))


def time_of_fits(machine: Machine, repeats: int, fits: dict[str, int], seconds: float) -> None:
    """Print the time of a fit in each mode, as a ratio to one process, in turn."""
    start_s = time.monotonic()
    one = OneProcess(machine.device_name)
    steps = {"long": calibrate(one, LONG_S), "short": calibrate(one, SHORT_S)}
    found: dict[tuple[str, str], list[float]] = {}
    took: dict[tuple[str, str], list[float]] = {}
    with lock_folder() as folder:
        for repeat in range(repeats):
            if repeat and time.monotonic() - start_s > seconds * repeat / (repeat + 1):
                print(f"  only {repeat} of {repeats} repeats: no time left")
                break
            for mode, options in MODES.items():
                with machine.pool(**options) as pool:
                    (slot,) = machine.slots(1, folder)
                    fit(pool, slot, 1, machine.device_name)  # the fork server is up
                    for size, count in steps.items():
                        bare_s = statistics.median(one.fit_s(count) for _ in range(3))
                        number = fits[size] if "spawn" not in mode else 2
                        began_s = time.monotonic()
                        for _ in range(number):
                            fit(pool, slot, count, machine.device_name)
                        each_s = (time.monotonic() - began_s) / number
                        found.setdefault((mode, size), []).append(each_s / bare_s)
                        took.setdefault((mode, size), []).append(each_s)
                        bare = took.setdefault(("one process", size), [])
                        bare.append(bare_s)
    one.close()
    print("\nTime of a fit, one after the other: min / median / max")
    print(f"  {'':<30} {'seconds':>26} {'ratio to one process':>28}")
    for size, count in steps.items():
        bare_text = shown(took["one process", size], 3)
        print(f"  {size + f' ({count} steps)':<30} {bare_text}   (one process)")
        for mode in MODES:
            print(f"    {mode:<28} {shown(took[mode, size], 3)}   {shown(found[mode, size])}")


def memory_per_slot(machine: Machine, repeats: int) -> None:
    """Print what the device has in use while n children hold a context, the model and the data."""
    time.sleep(1)  # the last process before has left
    before = machine.used_bytes()
    if before is None:
        print("\nMemory per slot: left out, as no GPU's memory can be read here")
        if machine.device_name == "cuda":
            return
    found: dict[int, list[float]] = {}
    with machine.pool() as pool:
        for _ in range(repeats):
            for count in machine.counts():
                with lock_folder() as locks, lock_folder() as meeting:
                    used = _while_all_hold(machine, pool, count, locks, meeting)
                    if used is not None and before is not None:
                        found.setdefault(count, []).append((used - before) / MIB)
    if found:
        print(f"\nGPU memory in use above the start ({before // MIB} MiB), in MiB:")  # type: ignore[operator]
        print("  slots               min / median / max     median per slot")
    for count, values in found.items():
        print(f"  {count:<8} {shown(values, 0)} {statistics.median(values) / count:12.0f}")


def _while_all_hold(
    machine: Machine, pool: ChildPool, count: int, locks: str, meeting: str
) -> int | None:
    """Return what is in use while so many children hold what a fit holds."""
    go = Path(meeting, "go")

    def hold(slot: Slot) -> None:
        fit(pool, slot, 5, machine.device_name, meeting, FIT_TIMEOUT_S / 2).wait(10)

    threads = _in_threads(hold, machine.slots(count, locks))
    try:
        deadline_s = time.monotonic() + FIT_TIMEOUT_S / 2
        while len(list(Path(meeting).glob("*.there"))) < count:
            if time.monotonic() > deadline_s or not any(map(threading.Thread.is_alive, threads)):
                sys.exit(f"{count} children were not there together: not enough GPU memory?")
            time.sleep(0.02)
        return machine.used_bytes()
    finally:
        go.touch()
        for thread in threads:
            thread.join(FIT_TIMEOUT_S)


def throughput(machine: Machine, repeats: int, fits: int, seconds: float) -> None:
    """Print the fits in a second for some numbers of slots."""
    one = OneProcess(machine.device_name)
    steps = calibrate(one, LONG_S)
    bare = [1 / one.fit_s(steps) for _ in range(max(3, repeats))]
    one.close()
    print(f"\nFits in a second ({steps} steps each): min / median / max, ratio of the medians")
    print(f"  {'one process':<28} {shown(bare)}       1.00")
    modes = {"fits_per_process=1": {}, "... with standby": {"standby": True}}
    modes["fits_per_process=0"] = {"fits_per_process": 0}
    end_s = time.monotonic() + seconds
    for mode, options in modes.items():
        with lock_folder() as folder, machine.pool(**options) as pool:
            for count in machine.counts():
                rates: list[float] = []
                slots = machine.slots(count, folder)
                each = max(2, fits // count)
                while len(rates) < repeats and time.monotonic() < end_s:
                    _all(lambda slot: _fits(machine, pool, slot, 1, 1), slots)
                    start_s = time.monotonic()
                    _all(lambda slot: _fits(machine, pool, slot, each, steps), slots)  # noqa: B023
                    rates.append(each * count / (time.monotonic() - start_s))
                label = f"  {mode + f', {count} slots':<28}"
                if not rates:
                    print(f"{label} left out: no time left")
                    continue
                ratio = statistics.median(rates) / statistics.median(bare)
                print(f"{label} {shown(rates)} {ratio:10.2f}", flush=True)


def _fits(machine: Machine, pool: ChildPool, slot: Slot, number: int, steps: int) -> None:
    for _ in range(number):
        fit(pool, slot, steps, machine.device_name)


def _in_threads(work: Callable[[Slot], Any], slots: list[Slot]) -> list[threading.Thread]:
    threads = [threading.Thread(target=work, args=(slot,)) for slot in slots]
    for thread in threads:
        thread.start()
    return threads


def _all(work: Callable[[Slot], Any], slots: list[Slot]) -> None:
    """Do the work for all slots at once; stop if one of them fails."""
    failed: list[BaseException] = []

    def guarded(slot: Slot) -> None:
        try:
            work(slot)
        except BaseException as error:
            failed.append(error)

    for thread in _in_threads(guarded, slots):
        thread.join(10 * FIT_TIMEOUT_S)
    if failed:
        raise failed[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument(
        "--quick", action="store_true", help="one repeat, few fits: a minute or two"
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--one-process", metavar="DEVICE", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one_process:
        one_process(options.one_process)
        return
    here = [str(Path(__file__).parent), str(ROOT)]  # where children find this module and fedhpc
    os.environ["PYTHONPATH"] = os.pathsep.join(
        [*here, *filter(None, [os.environ.get("PYTHONPATH")])]
    )
    machine = Machine(options.device)
    repeats = 1 if options.quick else options.repeats
    fits = {"long": 2, "short": 4} if options.quick else {"long": 5, "short": 11}
    began_s = time.monotonic()
    print(machine.describe(), flush=True)
    time_of_fits(machine, repeats, fits, seconds=240)
    memory_per_slot(machine, repeats)
    left_s = 400 - (time.monotonic() - began_s)
    throughput(machine, repeats, fits=4 if options.quick else 8, seconds=max(30.0, left_s))
    print(f"\n{repeats} repeats, {time.monotonic() - began_s:.0f} s in all")


if __name__ == "__main__":
    main()
