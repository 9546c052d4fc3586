"""Memory of processes on the host, and whether the kernel killed one for it."""

import contextlib
import os
import re
import resource
from collections.abc import Iterable
from functools import cache
from pathlib import Path

MB = 1e6

_REFUSED = ("can't allocate memory", "Cannot allocate memory", "std::bad_alloc")


def families(heads: Iterable[int]) -> dict[int, list[int]]:
    """Return for each process itself and all that come from it, as far as they live."""
    known = None if _tells_children() else _all_children()  # a large node has 3,000 processes
    found: dict[int, list[int]] = {}
    for head in heads:
        family = found[head] = [head]
        for pid in family:  # it grows meanwhile
            family += _children(pid) if known is None else known.get(pid, [])
    return found


@cache
def _tells_children() -> bool:
    """Return whether the kernel has CONFIG_PROC_CHILDREN."""
    return Path(f"/proc/self/task/{os.getpid()}/children").exists()


def children_of(pid: int) -> list[int]:
    """Return the live processes that a process has started itself."""
    return _children(pid) if _tells_children() else _all_children().get(pid, [])


def _children(pid: int) -> list[int]:
    found: list[int] = []
    with contextlib.suppress(OSError):  # it has just ended
        for task in os.listdir(f"/proc/{pid}/task"):  # noqa: PTH208  (Path would cost more)
            with contextlib.suppress(OSError):
                found += map(int, Path(f"/proc/{pid}/task/{task}/children").read_text().split())
    return found


def _all_children() -> dict[int, list[int]]:
    """Return the children of every process of the machine."""
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError, IndexError, ValueError):
            parent = int(stat.read_text().rpartition(")")[2].split()[1])
            children.setdefault(parent, []).append(int(stat.parent.name))
    return children


def proportional_bytes(pids: Iterable[int], *, of_files: bool = True) -> int:
    """Return the resident memory of processes; a page that n processes share counts 1/n in each.

    Takes some milliseconds a process that has loaded torch. Pages of mapped files, which the kernel
    takes back when it needs them, count only if ``of_files``.
    """
    total = 0
    for pid in pids:
        with contextlib.suppress(OSError):  # it has just ended
            text = Path(f"/proc/{pid}/smaps_rollup").read_text()
            found = dict(re.findall(r"^(Pss|Pss_File):\s+(\d+) kB", text, re.MULTILINE))
            total += 1024 * int(found.get("Pss", 0))
            if not of_files:
                total -= 1024 * int(found.get("Pss_File", 0))
    return total


def own_bytes() -> int:
    """Return the memory of this process that comes from no file, exactly; takes milliseconds.

    A page that is still the fork server's counts in full, one of shared memory by its share.
    """
    text = Path("/proc/self/smaps_rollup").read_text()
    found = re.findall(r"^(?:Anonymous|Pss_Shmem):\s+(\d+) kB", text, re.MULTILINE)
    return 1024 * sum(map(int, found))


def limit_own_data(more_bytes: int) -> None:
    """Let this process allocate at most ``more_bytes`` more than it has now.

    The kernel then refuses memory (RLIMIT_DATA), in this process and in each that it starts. Not
    for processes that use CUDA: it maps far more than it uses.
    """
    text = Path("/proc/self/status").read_text()
    match = re.search(r"^VmData:\s+(\d+) kB", text, re.MULTILINE)
    now = 1024 * int(match[1]) if match else 0
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    limit = now + more_bytes
    if hard != resource.RLIM_INFINITY:
        limit = min(limit, hard)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, hard))


def lift_limit() -> None:
    """Undo `limit_own_data`."""
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (hard, hard))


def is_refused(error: BaseException) -> bool:
    """Return whether an exception, or what it came from, says that the host gave no memory."""
    seen: BaseException | None = error
    for _ in range(20):  # a chain could be a ring
        if seen is None:
            return False
        if isinstance(seen, MemoryError) or (
            isinstance(seen, RuntimeError | OSError)
            and any(words in str(seen) for words in _REFUSED)
        ):
            return True
        seen = seen.__cause__ or seen.__context__
    return False


def oom_kills() -> tuple[int, int]:
    """Return how many processes the kernel has killed for want of memory.

    Returns
    -------
    in_job : int
        Within this process's own memory limit (its control group, and so its Slurm job); 0 where
        the kernel does not tell.
    on_node : int
        On the whole machine.
    """
    group = _counts_of_own_group()
    return _count(group) if group else 0, _count("/proc/vmstat")


@cache
def _counts_of_own_group() -> str | None:
    """Return the file with the counts of this process's control group, if there is one."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _, controllers, group = line.split(":", 2)
            if controllers == "memory":  # version 1
                return f"/sys/fs/cgroup/memory{group}/memory.oom_control"
            if not controllers:
                events = f"/sys/fs/cgroup{group}/memory.events"
                if Path(events).exists():
                    return events
    return None


def _count(path: str) -> int:
    """Return a file's count; read at every call, so in 30 and not in 100 microseconds."""
    with contextlib.suppress(OSError, ValueError):
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            found = (b"\n" + os.read(descriptor, 65536)).partition(b"\noom_kill ")[2]
        finally:
            os.close(descriptor)
        return int(found.partition(b"\n")[0])
    return 0
