"""What the children of these tests call, and what the tests of this folder share.

Only the standard library and fedhpc.isolation: children import this module.
"""

import collections
import ctypes
import functools
import gc
import importlib
import itertools
import json
import multiprocessing
import os
import random
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

from fedhpc.isolation import ChildPool, PoolOptions, Reply, Slot, channel

GONE_WITHIN_S = 5.0  # what the design promises
SLOT = Slot(0)
Buffers = list[list[Any]]
TOKEN = "FEDHPC_TEST_TOKEN"

# --- the tests' side ---


def call(
    pool: ChildPool,
    name: str,
    *args: Any,
    slot: Slot = SLOT,
    timeout_s: float = 30.0,
    tag: str = "",
) -> Any:
    """Call one of the functions below in a child; arguments and result travel as JSON."""
    reply = call_for_reply(pool, name, *args, slot=slot, timeout_s=timeout_s, tag=tag)
    try:
        return json.loads(read(reply.buffers[0]))
    finally:
        reply.close()


def call_for_reply(
    pool: ChildPool,
    name: str,
    *args: Any,
    slot: Slot = SLOT,
    timeout_s: float = 30.0,
    tag: str = "",
) -> Reply:
    fd = channel.write_memory([json.dumps(args).encode()])
    try:
        return pool.run(f"entries:{name}", [fd], slot=slot, timeout_s=timeout_s, tag=tag)
    finally:
        os.close(fd)


def read(fd: int) -> bytes:
    return bytes(channel.view(fd))


def wait_until(condition: Callable[[], Any], timeout_s: float = GONE_WITHIN_S) -> bool:
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline_s:
            return False
        time.sleep(0.01)
    return True


class Background:
    """A call in a thread of its own, whose end is waited for with a deadline."""

    def __init__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        self._value: Any = None
        self._error: BaseException | None = None
        self._thread = threading.Thread(
            target=self._run, args=(function, args, kwargs), daemon=True
        )
        self._thread.start()

    def _run(self, function: Callable[..., Any], args: Any, kwargs: Any) -> None:
        try:
            self._value = function(*args, **kwargs)
        except BaseException as error:
            self._error = error

    def running(self) -> bool:
        return self._thread.is_alive()

    def result(self, timeout_s: float) -> Any:
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            raise TimeoutError(f"still running after {timeout_s} s")
        if self._error is not None:
            raise self._error
        return self._value


def parent_of(pid: int) -> int:
    return int(_stat(pid)[1])


def is_alive(pid: int) -> bool:
    try:
        return _stat(pid)[0] != "Z"
    except (OSError, IndexError):
        return False


def _stat(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


def children_of(pid: int) -> list[int]:
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if parent_of(int(folder.name)) == pid:
                found.append(int(folder.name))
        except (OSError, IndexError):
            continue
    return found


def fork_server_of(owner: int) -> int:
    """Return the pid of the fork server of the only pool in process ``owner``."""
    for pid in children_of(owner):
        command = Path(f"/proc/{pid}/cmdline").read_bytes()
        if b"fedhpc.isolation.forkserver" in command:
            return pid
    raise AssertionError(f"process {owner} has no fork server")


def processes_with(token: str) -> list[tuple[int, str]]:
    """Return the live processes whose environment had the token when they started."""
    needle = f"{TOKEN}={token}".encode()
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if needle in (folder / "environ").read_bytes() and is_alive(int(folder.name)):
                command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()
                found.append((int(folder.name), command))
        except OSError:
            continue
    return found


def open_descriptors() -> dict[int, str]:
    """Return the memfds, sockets and pipes that this process has open."""
    found = {}
    for entry in Path("/proc/self/fd").iterdir():
        try:
            target = str(entry.readlink())
        except OSError:
            continue
        if target.startswith(("/memfd:fedhpc", "socket:", "pipe:")):
            found[int(entry.name)] = target
    return found


def _shared_memory() -> set[str]:
    return {str(path) for path in Path("/dev/shm").iterdir()}


def _held(path: str) -> bool:
    """Whether a live process, ours or not, uses a file of /dev/shm."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if path in (folder / "maps").read_text():
                return True
            if any(str(fd.readlink()) == path for fd in (folder / "fd").iterdir()):
                return True
        except OSError:
            continue
    return False


def nothing_is_left(token: str, sockets: int = 0) -> Iterator[None]:
    """Fail when a process, a descriptor or shared memory of the test is still there after it."""
    old, shared = set(open_descriptors().values()), _shared_memory()
    yield

    def leftovers() -> dict[str, Any]:
        now = open_descriptors()
        return {
            "processes": processes_with(token),
            "zombies": [pid for pid in children_of(os.getpid()) if not is_alive(pid)],
            "descriptors": collections.Counter(
                target.split(":")[0] for target in now.values() if target not in old
            )
            - collections.Counter({"socket": sockets}),
            "shared memory": [path for path in _shared_memory() - shared if not _held(path)],
        }

    def clean() -> bool:
        if any(leftovers().values()):
            gc.collect()  # slow, so only where something is left
        return not any(leftovers().values())

    if wait_until(clean):
        return
    left = leftovers()
    for pid, _ in left["processes"]:
        os.kill(pid, signal.SIGKILL)
    raise AssertionError(f"left behind: {left}")


def memory_mb(key: str = "VmRSS") -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) / 1024
    raise KeyError(key)


# --- what children call ---


def entry(function: Callable[..., Any]) -> Callable[..., Buffers]:
    @functools.wraps(function)
    def called(*buffers: memoryview) -> Buffers:
        return [[json.dumps(function(*json.loads(bytes(buffers[0])))).encode()]]

    return called


def echo(*buffers: memoryview) -> Buffers:
    return [[view] for view in buffers]


def do(view: memoryview, *more: memoryview) -> Buffers:
    """Do what the call says, and return the pid with the result; zeros in a buffer of their own."""
    what, *args = json.loads(bytes(view))
    found: Any = None
    match what:
        case "echo":
            (found,) = args
        case "sleep":
            time.sleep(args[0])
        case "append":
            with Path(args[0]).open("a") as file:
                file.write("x")
        case "once":
            how, mark = args
            found = "again"
            if not Path(mark).exists():
                Path(mark).touch()
                os.kill(os.getpid(), signal.SIGKILL) if how == "kill" else os._exit(3)
        case "set":
            os.environ[args[0]] = args[1]
        case "get":
            found = os.environ.get(args[0])
        case "length":
            time.sleep(args[1])
            found = len(args[0])
        case "length of the second":
            found = len(more[0])
    zeros = [[bytes(args[0])]] if what == "zeros" else []
    return [[json.dumps([os.getpid(), found]).encode()], *zeros]


def in_parts(*_: memoryview) -> Buffers:
    return [
        [b"ab", bytearray(b"cd"), memoryview(b"ef")],
        [],
        [b""],
        [memoryview(bytes(8)).cast("d")],
    ]


def returns_none(*_: memoryview) -> None:
    return None


def returns_text(*_: memoryview) -> list[list[str]]:
    return [["text"]]


def many_buffers(view: memoryview) -> Buffers:
    """Return as many buffers as the input says, each too large to go as bytes."""
    content = bytes(channel.MAX_INLINE + 1)
    return [[content] for _ in range(int(bytes(view)))]


def measure_input(view: memoryview) -> Buffers:
    """Read every page of the input, and tell where its memory lies."""
    total = sum(view[::4096])
    maps = Path("/proc/self/maps").read_text().splitlines()
    inodes = [int(line.split()[4]) for line in maps if "memfd:fedhpc" in line]
    seen = {
        "total": total,
        "inodes": inodes,
        "anonymous_mb": memory_mb("RssAnon"),
        "shared_mb": memory_mb("RssShmem"),
        "writable": not view.readonly,
    }
    return [[json.dumps(seen).encode()]]


def slow_reply(view: memoryview) -> list[Generator[bytes, None, None]]:
    """Reply in parts that never end; the file named in the input tells that it began."""
    path = Path(json.loads(bytes(view))[0])

    def parts() -> Generator[bytes, None, None]:
        for number in itertools.count():
            yield bytes(1 << 20)
            if number == 10:
                path.touch()
            time.sleep(0.02)

    return [parts()]


@entry
def pid() -> int:
    return os.getpid()


def convolve(_: str) -> None:
    """Run some of torch's code, in one thread."""
    import torch

    weights = torch.randn(6, 3, 5, 5, requires_grad=True)
    torch.nn.functional.conv2d(torch.randn(8, 3, 32, 32), weights).sum().backward()


@entry
def faults_of(megabytes: int, block_bytes: int = 2**20) -> int:
    """Write to that much new memory, and return how often the kernel had to give some."""
    count = megabytes * 2**20 // block_bytes
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    blocks = [bytearray(b"x") * block_bytes for _ in range(count)]
    assert len(blocks) == count > 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def leave_holes(_: str) -> None:
    """Free 8 MB between blocks that stay."""
    blocks = [bytearray(4000) for _ in range(4000)]
    _kept.append(blocks[::2])


_kept: list[Any] = []


@entry
def environment(name: str) -> list[Any]:
    return [os.getpid(), os.environ.get(name)]


@entry
def add(a: int, b: int) -> int:
    return a + b


@entry
def working_time(seconds: float) -> int:
    time.sleep(seconds)
    return os.getpid()


@entry
def raise_error(message: str) -> None:
    raise ValueError(message)


@entry
def raise_unprintable() -> None:
    class Unprintable(Exception):
        def __str__(self) -> str:
            raise RuntimeError("no text")

    raise Unprintable


@entry
def raise_system_exit() -> None:
    sys.exit("the app left")


@entry
def raise_interrupt() -> None:
    raise KeyboardInterrupt


@entry
def leave_with(code: int) -> None:
    os._exit(code)


@entry
def kill_self(number: int) -> None:
    import faulthandler

    faulthandler.disable()
    if number == signal.SIGSEGV:
        ctypes.string_at(0)
    elif number == signal.SIGABRT:
        os.abort()
    os.kill(os.getpid(), number)
    time.sleep(60)


@entry
def kill_self_in(pid: int, number: int) -> int:
    """Die if this is that process."""
    if os.getpid() == pid:
        os.kill(pid, number)
    return os.getpid()


@entry
def hang(path: str) -> None:
    Path(path).write_text(str(os.getpid()))
    time.sleep(600)


def _sleeper() -> list[str]:
    return [sys.executable, "-c", "import time; time.sleep(600)"]


def _descendants(kinds: list[str]) -> None:
    if "same group" in kinds:
        subprocess.Popen(_sleeper())
    if "new session" in kinds:
        subprocess.Popen(_sleeper(), start_new_session=True)
    if "daemon" in kinds:
        _daemon(lambda: time.sleep(600))
    if "family of daemons" in kinds:  # each in a session of its own

        def have_a_child() -> None:
            subprocess.Popen(_sleeper(), start_new_session=True)
            time.sleep(600)

        _daemon(have_a_child)
    if "fork" in kinds and os.fork() == 0:  # has the child's channel open
        time.sleep(600)
        os._exit(0)


def _daemon(work: Callable[[], None]) -> None:
    first = os.fork()
    if first == 0:
        os.setsid()
        if os.fork() == 0:
            work()
        os._exit(0)
    os.waitpid(first, 0)


@entry
def hang_with_descendants(path: str, kinds: list[str]) -> None:
    _descendants(kinds)
    time.sleep(0.15)  # until the daemons have their own
    Path(path).write_text(str(os.getpid()))
    time.sleep(600)


@entry
def leave_descendants(kinds: list[str]) -> int:
    _descendants(kinds)
    time.sleep(0.15)
    return os.getpid()


@entry
def die_with_descendants(kinds: list[str]) -> None:
    _descendants(kinds)
    os.kill(os.getpid(), signal.SIGKILL)


@entry
def close_everything_and_hang() -> None:
    os.closerange(3, 1024)
    time.sleep(600)


@entry
def stop_self() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


@entry
def run_threads(count: int) -> int:
    results: list[int] = []
    threads = [threading.Thread(target=results.append, args=(n,)) for n in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(results)


@entry
def leave_thread_running() -> int:
    threading.Thread(target=time.sleep, args=(600,)).start()
    return os.getpid()


@entry
def run_subprocess() -> str:
    command = [sys.executable, "-c", "print('from a subprocess')"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def square(number: int) -> int:
    return number * number


@entry
def run_process_pool(method: str) -> list[int]:
    with multiprocessing.get_context(method).Pool(2) as pool:  # type: ignore[attr-defined]
        return list(pool.map(square, range(5)))


def _loader(workers: int) -> Any:
    import torch
    from torch.utils.data import DataLoader, TensorDataset

    data = TensorDataset(torch.arange(64.0))
    return DataLoader(data, batch_size=8, num_workers=workers, persistent_workers=workers > 0)


@entry
def run_data_loader(workers: int) -> float:
    return float(sum(batch.sum() for (batch,) in _loader(workers)))


@entry
def data_loader_error() -> None:
    import torch
    from torch.utils.data import DataLoader

    class Broken(torch.utils.data.Dataset[int]):
        def __len__(self) -> int:
            return 4

        def __getitem__(self, index: int) -> int:
            raise ValueError("a broken sample")

    list(DataLoader(Broken(), num_workers=2))


@entry
def hang_in_data_loader(path: str) -> None:
    iterator = iter(_loader(2))
    next(iterator)
    Path(path).write_text(str(os.getpid()))
    time.sleep(600)


@entry
def torch_threads() -> int:
    import torch

    return torch.get_num_threads()


@entry
def fork_server_state() -> dict[str, Any]:
    import torch

    server = os.getppid()
    return {
        "threads": len(list(Path(f"/proc/{server}/task").iterdir())),
        "threads of the child's torch": torch.get_num_threads(),
        "cuda": torch.cuda.is_initialized(),
        "cuda_library": "libcuda.so" in Path(f"/proc/{server}/maps").read_text(),
        "cuda_device": any(
            "nvidia" in str(fd.readlink()) for fd in Path(f"/proc/{server}/fd").iterdir()
        ),
    }


@entry
def train_step() -> float:
    import torch

    torch.manual_seed(1)
    model = torch.nn.Linear(4, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loss = torch.nn.functional.cross_entropy(model(torch.ones(3, 4)), torch.zeros(3).long())
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()


@entry
def main_module() -> str | None:
    return getattr(sys.modules["__main__"], "__file__", None)


_prepared = ""


def remember(argument: str) -> None:
    global _prepared
    _prepared = f"{argument} by {os.getpid()}"


@entry
def recall() -> list[Any]:
    return [_prepared, os.getpid()]


def refuse(argument: str) -> None:
    raise LookupError(f"cannot prepare {argument}")


def leave_in_prepare(argument: str) -> None:
    sys.exit(f"left with {argument}")


def die_in_prepare(argument: str) -> None:
    os._exit(int(argument))


def prepare_slowly(path: str) -> None:
    """Take long once, the first time: later children find the file."""
    marker = Path(path)
    if not marker.exists():
        marker.write_text(str(os.getpid()))
        time.sleep(600)


def prepare_second_slowly(path: str) -> None:
    """Be quick in the first child, and take long in the second."""
    first, second = Path(f"{path}.first"), Path(path)
    if first.exists() and not second.exists():
        second.write_text(str(os.getpid()))
        time.sleep(600)
    first.touch()


def jitter(_: str) -> None:
    time.sleep(random.SystemRandom().random() * 0.02)


# --- the owner of a pool that is killed: python entries.py STAGE OPTIONS MARKER ---


def own_a_pool(stage: str, options: str, marker: str) -> None:
    """Bring a pool to a stage and stay there."""
    with ChildPool(PoolOptions(**json.loads(options))) as pool:
        if stage == "standby idle":
            call(pool, "pid")
            wait_until(lambda: pool.children(), 10)
            Path(marker).touch()
            time.sleep(600)
        names = {"reply": "slow_reply", "interrupt": "working_time"}
        if stage == "interrupt":
            signal.signal(signal.SIGINT, lambda *_: print("interrupted", flush=True))
            call(pool, "pid")  # the fork server is up
            Path(marker).touch()
            print("answer", call(pool, "working_time", 0.7), flush=True)
            return
        if stage == "descendants":
            call(pool, "hang_with_descendants", marker, ["same group", "new session", "daemon"])
        call(pool, names.get(stage, "hang"), marker, timeout_s=600)


if __name__ == "__main__":
    own_a_pool(*sys.argv[1:])


@entry
def import_all(*names: str) -> None:
    for name in names:
        importlib.import_module(name)


@entry
def import_with(variable: str, name: str) -> None:
    os.environ[variable] = "1"
    importlib.import_module(name)
