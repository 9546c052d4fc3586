"""What children call in the tests of slots and GPU memory, and what these tests share.

Who is in a slot when is told by lines in a file, written by the children themselves.
"""

import contextlib
import fcntl
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import simulated_nvml
from entries import Background, _sleeper, entry, read, wait_until
from simulated_nvml import CARD, GB, SimulatedNvml

from fedhpc.isolation import ChildPool, Need, PoolOptions, Reply, Slot, channel
from fedhpc.isolation.admission import Request, Terms, admit
from fedhpc.isolation.locks import SlotGroup

KEY = CARD.id
PRELOAD = ["json", "sharing_entries"]

# --- the tests' side ---


def light(**options: Any) -> PoolOptions:
    return PoolOptions(**{"preload": PRELOAD, "standby": False, "huge_pages": False, **options})


def slots(folder: Path, count: int, *, limit: int | None = None, key: str = KEY) -> list[Slot]:
    """Return slots of one run on the simulated GPU."""
    return [Slot(index, (CARD,), folder, key, limit or count) for index in range(count)]


def reply_of(
    pool: ChildPool, slot: Slot, name: str, *args: Any, need_gb: float | None = None, **more: Any
) -> Reply:
    """Call one of the functions below in a child."""
    fd = channel.write_memory([json.dumps(args).encode()])
    need = None if need_gb is None else Need(int(need_gb * GB), 0)
    defaults = {"timeout_s": 30.0, "slot_timeout_s": 30.0, "capped": False, "need": need}
    try:
        return pool.run(f"sharing_entries:{name}", [fd], slot=slot, **{**defaults, **more})
    finally:
        os.close(fd)


def value_of(pool: ChildPool, slot: Slot, name: str, *args: Any, **more: Any) -> Any:
    reply = reply_of(pool, slot, name, *args, **more)
    try:
        return json.loads(read(reply.buffers[0]))
    finally:
        reply.close()


def lines(log: Path) -> list[dict[str, Any]]:
    """Return what children have noted, in the order of time."""
    if not log.exists():
        return []
    noted = [json.loads(line) for line in log.read_text().splitlines()]
    return sorted(noted, key=lambda line: line["ns"])


def most_at_once(noted: Iterable[dict[str, Any]]) -> int:
    inside = most = 0
    for line in noted:
        inside += {"in": 1, "out": -1}.get(line["what"], 0)
        most = max(most, inside)
    return most


def held(folder: Path, key: str = KEY) -> list[int]:
    """Return the pids of those who hold slots."""
    return [holder.pid for holder in SlotGroup(folder, key).holders()]


def queue_length(file: Path) -> int:
    """Return how many wait for the lock of a file, by the kernel's own list."""
    if not file.exists():
        return 0
    inode = f":{file.stat().st_ino} "
    return sum("->" in line and inode in line for line in _kernel_locks())


def _kernel_locks() -> list[str]:
    return Path("/proc/locks").read_text().splitlines()


def owner(stage: str, **settings: Any) -> subprocess.Popen[str]:
    """Start a process of its own that does one of the functions at the end of this file."""
    command = [sys.executable, __file__, stage, json.dumps(settings)]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


def finish(owners: list[subprocess.Popen[str]], timeout_s: float) -> list[Any]:
    """Wait for processes and return what they answered."""
    answers = []
    try:
        for process in owners:
            out, err = process.communicate(timeout=timeout_s)
            assert process.returncode == 0, err
            answers.append(json.loads(out))
    finally:
        for process in owners:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.communicate()
    return answers


# --- what children call ---


def note(log: str | Path, what: str, **more: Any) -> None:
    line = json.dumps({"what": what, "pid": os.getpid(), "ns": time.monotonic_ns(), **more})
    fd = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.write(fd, f"{line}\n".encode())
    os.close(fd)


@entry
def pid() -> int:
    return os.getpid()


@entry
def occupy(log: str, seconds: float, name: str = "") -> int:
    note(log, "in", name=name)
    time.sleep(seconds)
    note(log, "out", name=name)
    return os.getpid()


@entry
def occupy_together(log: str, number: int) -> int:
    """Stay until so many have been inside at once; 10 s at most."""
    note(log, "in")
    wait_until(lambda: most_at_once(lines(Path(log))) >= number, 10)
    time.sleep(0.02)
    note(log, "out")
    return os.getpid()


@entry
def occupy_until(log: str, marker: str, name: str = "") -> int:
    note(log, "in", name=name)
    wait_until(Path(marker).exists, 20)
    note(log, "out", name=name)
    return os.getpid()


@entry
def use_memory(log: str, folder: str, gb: float, seconds: float, name: str = "") -> int:
    """Use memory of the GPU, but not at once."""
    note(log, "in", name=name)
    time.sleep(seconds / 2)
    simulated_nvml.allocate(folder, int(gb * GB))
    time.sleep(seconds / 2)
    note(log, "out", name=name)
    return os.getpid()


@entry
def use_memory_together(log: str, folder: str, gb: float, number: int) -> int:
    note(log, "in")
    simulated_nvml.allocate(folder, int(gb * GB))
    wait_until(lambda: most_at_once(lines(Path(log))) >= number, 10)
    time.sleep(0.02)
    note(log, "out")
    return os.getpid()


def _out_of_memory(kind: str) -> BaseException:
    text = "CUDA out of memory. Tried to allocate 20.00 GiB."
    if kind == "torch":
        import torch

        return torch.cuda.OutOfMemoryError(text)
    if kind == "cublas":
        error = ValueError("the model failed")
        error.__cause__ = RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling")
        return error
    return RuntimeError(text)


@entry
def fail_at_first(log: str, marker: str, number: int = 1, kind: str = "text") -> int:
    """Run out of memory the first time, when so many are inside; be fine the second time."""
    again = Path(marker).exists()
    note(log, "in", again=again)
    if again:
        time.sleep(0.1)
    else:
        Path(marker).touch()
        wait_until(lambda: most_at_once(lines(Path(log))) >= number, 10)
    note(log, "out", again=again)
    if not again:
        raise _out_of_memory(kind)
    return os.getpid()


@entry
def run_out_of_memory(log: str) -> None:
    note(log, "in")
    note(log, "out")
    raise _out_of_memory("text")


def impatient(seconds: str) -> None:
    """Let a kept child leave after so long without work."""
    from fedhpc.isolation import child

    child._IDLE_TIMEOUT_S = float(seconds)


def lock_files_of(process: int | str, folder: Path) -> list[str]:
    """Return the lock files that a process has open."""
    found = []
    for fd in Path(f"/proc/{process}/fd").iterdir():
        with contextlib.suppress(OSError):
            if fd.readlink().is_relative_to(folder):
                found.append(fd.readlink().name)
    return found


def _forked(start: Callable[[], None] = lambda: time.sleep(600)) -> int:
    child = os.fork()
    if child == 0:
        start()
        os._exit(0)
    return child


@entry
def have_descendants(kinds: list[str], marker: str) -> None:
    """Start processes in every way that apps do; tell their pids, and stay."""
    found: dict[str, int] = {}
    kept: list[Any] = []
    if "fork" in kinds:
        found["fork"] = _forked()
    if "session" in kinds:
        found["session"] = _forked(lambda: (os.setsid(), time.sleep(600)))  # type: ignore[arg-type]
    if "multiprocessing" in kinds:
        context = multiprocessing.get_context("fork")
        worker = context.Process(target=time.sleep, args=(600,), daemon=True)
        worker.start()
        found["multiprocessing"] = worker.pid or 0
    if "subprocess" in kinds:
        found["subprocess"] = subprocess.Popen(_sleeper(), close_fds=False).pid
    if "loader" in kinds:
        import torch
        from torch.utils.data import DataLoader, TensorDataset

        loader = DataLoader(TensorDataset(torch.arange(64.0)), batch_size=8, num_workers=2)
        iterator = iter(loader)
        next(iterator)
        kept.append(iterator)
        found |= {f"loader {n}": w.pid for n, w in enumerate(iterator._workers)}  # type: ignore[attr-defined]
    time.sleep(0.3)  # until the last has called exec
    beside = Path(f"{marker}.new")
    beside.write_text(json.dumps(found))
    beside.replace(marker)
    time.sleep(600)


def use_cuda(log: str) -> None:
    """Do as an app does whose import makes a CUDA context, as far as torch tells of it."""
    import torch

    places = [fd for fd in Path("/proc/self/fd").iterdir() if fd.exists()]
    inside = any(str(fd.readlink()).endswith(".0") for fd in places)
    note(log, "prepared", inside=inside)
    if not inside:
        time.sleep(0.7)  # so that a call finds it before it leaves
    torch.cuda.is_initialized = lambda: True
    torch.cuda.reset_peak_memory_stats = lambda *_: None
    torch.cuda.max_memory_reserved = lambda *_: 3 * GB
    torch.cuda.memory_reserved = lambda *_: 2 * GB


# --- processes of their own: python sharing_entries.py STAGE SETTINGS ---


def make_calls(
    folder: str,
    calls: list[list[Any]],
    limit: int,
    need_gb: float | None = None,
    memory: str | None = None,
    tells: bool = True,
    **options: Any,
) -> list[int]:
    """Make calls in a pool, as many at once as the limit says; return who answered."""
    nvml = None if memory is None else SimulatedNvml(folder=Path(memory))
    if nvml is not None:
        nvml.tells_processes = tells
    with ChildPool(light(**options), nvml) as pool:  # type: ignore[arg-type]
        queue = iter(calls)

        def work(slot: Slot) -> list[int]:
            return [value_of(pool, slot, *call, need_gb=need_gb) for call in queue]

        workers = [Background(work, slot) for slot in slots(Path(folder), limit)]
        return [pid for worker in workers for pid in worker.result(60)]


def contend(folder: str, limit: int, count: int, log: str, remove_gate: bool = False) -> list[int]:
    """Fork contenders that queue one after the other, then open the gate; return the order."""
    gate = SlotGroup(Path(folder), KEY).gate()
    path = Path(folder) / f"{KEY}.gate"
    contenders = []
    with gate:
        for number in range(count):
            contenders.append(_forked(lambda number=number: _contend(folder, limit, number, log)))
            assert wait_until(lambda number=number: queue_length(path) == number + 1, 10)
        if remove_gate:
            path.unlink()
    for contender in contenders:
        assert os.waitstatus_to_exitcode(os.waitpid(contender, 0)[1]) == 0
    return [line["number"] for line in lines(Path(log)) if line["what"] == "in"]


def _contend(folder: str, limit: int, number: int, log: str) -> None:
    code = 1
    try:

        def behind_the_gate() -> Terms:  # asked when a slot has been taken
            note(log, "in", number=number)
            return Terms()

        request = Request(folder, KEY, limit, f"contender {number}", gpu=True)
        admit(request, behind_the_gate, lambda _: None)
        time.sleep(0.005)
        note(log, "out", number=number)
        code = 0
    finally:
        os._exit(code)


def lock_and_stay(path: str, marker: str) -> None:
    """Lock a file as a foreign program would."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    fcntl.flock(fd, fcntl.LOCK_EX)
    Path(marker).touch()
    time.sleep(600)


if __name__ == "__main__":
    print(json.dumps(globals()[sys.argv[1]](**json.loads(sys.argv[2]))))
