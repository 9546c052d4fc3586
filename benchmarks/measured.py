"""Commands as the benchmarks run them: wall time, CPU and memory of all processes they start."""

import contextlib
import ctypes
import os
import resource
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import submitting

from fedhpc.files import read_lines
from fedhpc.isolation.host_memory import children_of, proportional_bytes

_PR_SET_CHILD_SUBREAPER = 36
_TICKS = os.sysconf("SC_CLK_TCK")
_INTERVAL_S = 0.5
_MOST_OF_A_CORE = 0.02  # to read the memory of all takes 60 ms, from what is measured too
_STRAYS_S = 20.0
_TIMEOUT_S = 1800.0


@dataclass(frozen=True)
class Measured:
    """A command that ended well.

    Attributes
    ----------
    output : str
        What it printed.
    wall_s : float
        From its start until it and all that came from it were gone.
    cpu_s : float
        User and system seconds of it and all that came from it.
    peak_mb : float
        The highest sum of the proportional memory (PSS) of all its processes, seen every 0.5 s, or
        as often as takes 2 % of a core.
    """

    output: str
    wall_s: float
    cpu_s: float
    peak_mb: float


def measure(command: list[str]) -> Measured:
    """Run a command; this program ends with the command's output if it fails.

    Whatever loses its parent becomes a child of this process, so that its CPU is counted too.
    """
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    start_s, before_s = time.monotonic(), _waited_for_s()
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
        watch = _Watch()
        try:
            code = process.wait(_TIMEOUT_S)
            reaped = _reap_strays()
        except BaseException:
            _kill_all(os.getpid())
            raise
        finally:
            watch.stop()
        wall_s = time.monotonic() - start_s
        output.seek(0)
        text = output.read()
    if code:
        sys.exit(f"{' '.join(command)} ended with {code}:\n{text}")
    cpu_s = _waited_for_s() - before_s + watch.lost_s({process.pid, *reaped})
    return Measured(text, wall_s, cpu_s, watch.peak_bytes / 1e6)


def federate(
    config: Path, sets: list[str], runs_dir: Path, rounds: int
) -> tuple[Path, list[float], Measured]:
    """Run a federation as a user does; the server evaluates its last model only.

    Returns
    -------
    run_dir : Path
        Its folder.
    seconds : list of float
        Of each round but the first and the last, from the end of the one before it to its own end.
    measured : Measured
        Of all its processes.
    """
    sets = [*sets, f"federation.num_rounds={rounds}", "federation.evaluate_every=0"]
    measured = measure(submitting.command(config, sets, runs_dir))
    run_dir = submitting.newest(runs_dir)
    ends_s = [line["time_s"] for line in read_lines(run_dir / "metrics.jsonl") if line["round"]]
    return (
        run_dir,
        [end - begin for begin, end in pairwise(ends_s[:-1])],
        measured,
    )


class _Watch:
    """Looks at the processes that come from this one until it is stopped."""

    def __init__(self) -> None:
        self.peak_bytes = 0
        self._unwaited: dict[int, float] = {}
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._stopped.set()
        self._thread.join()

    def lost_s(self, reaped: set[int]) -> float:
        """Return the CPU of those whose parent waits for nobody (Ray's), as last seen."""
        return sum(cpu_s for pid, cpu_s in self._unwaited.items() if pid not in reaped)

    def _run(self) -> None:
        memory_due_s = 0.0
        while not self._stopped.wait(_INTERVAL_S):
            pids = list(self._look_for_processes())
            if time.monotonic() < memory_due_s:
                continue
            before_s = time.thread_time()
            self.peak_bytes = max(self.peak_bytes, sum(proportional_bytes([pid]) for pid in pids))
            took_s = time.thread_time() - before_s
            memory_due_s = time.monotonic() + took_s / _MOST_OF_A_CORE

    def _look_for_processes(self) -> Iterator[int]:
        todo = [os.getpid()]
        while todo:
            parent = todo.pop()
            unwaited = _ignores_children(parent)
            for pid in children_of(parent):
                todo.append(pid)
                if unwaited:
                    self._unwaited[pid] = sum(_cpu_s(pid))
                yield pid


def _reap_strays() -> set[int]:
    """Wait for what is left of a command and return its pids; kill what does not end."""
    reaped = set()
    deadline_s = time.monotonic() + _STRAYS_S
    with contextlib.suppress(ChildProcessError):
        while True:
            pid, _ = os.waitpid(-1, os.WNOHANG)
            if pid:
                reaped.add(pid)
                continue
            if time.monotonic() > deadline_s:
                _kill_all(os.getpid())
            time.sleep(0.01)
    return reaped


def _kill_all(parent: int) -> None:
    """Kill what comes from a process."""
    for pid in children_of(parent):
        _kill_all(pid)
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def _waited_for_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def _ignores_children(pid: int) -> bool:
    """Return whether a process ignores SIGCHLD: then nobody is told what its children used."""
    return bool(
        int(field_of(f"/proc/{pid}/status", "SigIgn:") or "0", 16) >> signal.SIGCHLD - 1 & 1
    )


def own_cpu_s(pid: int) -> float:
    """Return the seconds that a process has used itself; 0 if it has ended."""
    return sum(_cpu_s(pid)[:2])


def _cpu_s(pid: int) -> list[float]:
    """Return seconds: user and system, of a process and of the children that it has waited for."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return [0.0] * 4
    return [int(ticks) / _TICKS for ticks in fields[11:15]]


def field_of(path: str, name: str) -> str:
    """Return the first value in a line of a file of /proc; "" if it is not there."""
    with contextlib.suppress(OSError):
        for line in Path(path).read_text().splitlines():
            if line.startswith(name):
                return line.split()[1]
    return ""
