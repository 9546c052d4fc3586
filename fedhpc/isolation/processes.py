"""A pool of child processes: calls in, replies out, each call in a slot."""

import contextlib
import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Literal, Self

from fedhpc.errors import FitDied, FitFailed, ForkServerDied, PlatformError
from fedhpc.isolation import channel
from fedhpc.isolation.launcher import Launcher
from fedhpc.isolation.slots import Slot

logger = logging.getLogger(__name__)

# Without torch._dynamo each child pays 1.1 s at its first optimizer step.
DEFAULT_PRELOAD = ("numpy", "torch", "torch._dynamo", "torch.optim")
_EXIT_TIMEOUT_S = 5.0
_START_TRIES = 5


@dataclass(frozen=True)
class PoolOptions:
    """How children are made.

    Attributes
    ----------
    start_method : {"forkserver", "spawn"}
        Fork from a process that has preloaded the slow modules, or start a new interpreter.
    fits_per_process : int
        Calls before a child is replaced; 1: always a fresh one; 0: never replaced.
    threads_per_fit : int
        Threads of torch and OpenMP in a child.
    standby : bool
        Prepare the next child while its predecessor works.
    preload : sequence of str
        Modules to import in the fork server; they must neither touch CUDA nor start threads.
    prepare : str, optional
        "module:function", called with ``prepare_arg`` in each child before its first call.
    prepare_early : bool
        Call it once in the fork server instead. It must neither touch CUDA nor start threads.
    huge_pages : bool
        Spend most of a second at the start of the fork server to make every fork cheaper.
    """

    start_method: Literal["forkserver", "spawn"] = "forkserver"
    fits_per_process: int = 1
    threads_per_fit: int = 1
    standby: bool = True
    preload: Sequence[str] = DEFAULT_PRELOAD
    prepare: str | None = None
    prepare_arg: str = ""
    prepare_early: bool = False
    huge_pages: bool = True

    def for_child(self) -> dict[str, Any]:
        """Return what each child is told."""
        return {
            "prepare": self.prepare,
            "prepare_arg": self.prepare_arg,
            "fits": self.fits_per_process,
            "threads": self.threads_per_fit,
        }

    def for_fork_server(self) -> dict[str, Any]:
        """Return what the fork server is told."""
        spawn = self.start_method == "spawn"
        return {
            "preload": [] if spawn else list(self.preload),
            "spawn": spawn,
            "huge_pages": self.huge_pages and not spawn,
            "prepare_early": self.prepare_early and not spawn,
            "child": self.for_child(),
        }

    def env(self) -> dict[str, str]:
        """Return the environment of the fork server and its children."""
        threads = str(self.threads_per_fit)
        return {
            "OMP_NUM_THREADS": threads,
            "MKL_NUM_THREADS": threads,
            "OPENBLAS_NUM_THREADS": threads,
            "PYTHONHASHSEED": "0",  # the order of sets is the same in every array task
            # torch.cuda.is_available() at an app's import then asks NVML and makes no context.
            "PYTORCH_NVML_BASED_CUDA_CHECK": "1",
        }


@dataclass
class Reply:
    """What a call returned.

    Attributes
    ----------
    buffers : list of int
        Descriptors of memfds, one for each buffer that the function returned. The receiver closes
        them (`close`).
    start_s, run_s, return_s : float
        Seconds from the call until the function was entered, inside it, and until its reply
        arrived.
    peak_rss_mb : float
        Highest resident memory of the child, shared pages of the fork server included.
    late_imports : list of str
        Modules (the first 100) that the child had to import itself, in their order.
    """

    buffers: list[int]
    start_s: float
    run_s: float
    return_s: float
    peak_rss_mb: float
    late_imports: list[str]

    def close(self) -> None:
        """Give the memory of the buffers back."""
        channel.close_all(self.buffers)
        self.buffers = []


@dataclass(eq=False)
class _Child:
    number: int
    generation: int  # of the fork server
    sock: socket.socket
    pid: int | None = None
    tag: str = ""
    doomed: bool = False
    exit_code: int | None = None
    exited: threading.Event = field(default_factory=threading.Event)

    def end(self, exit_code: int | None) -> None:
        self.exit_code = exit_code
        self.exited.set()
        with contextlib.suppress(OSError):
            self.sock.shutdown(socket.SHUT_RDWR)  # wakes a reader, also if a fork keeps it open


class ChildPool:
    """Calls functions in child processes, each call in a slot that the caller owns.

    ``run`` may be called from several threads at once, one for each slot.

    Parameters
    ----------
    options : PoolOptions
        How children are made.
    """

    def __init__(self, options: PoolOptions) -> None:
        self._options = options
        self._lock = threading.Lock()
        self._live: dict[int, _Child] = {}
        self._ready: list[_Child] = []
        self._kept: dict[int, _Child] = {}  # by slot
        self._numbers = 0
        self._generation = 0
        self._closed = False
        self._launcher: Launcher | None = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def start(self) -> None:
        """Start the fork server. It preloads in the background; the first call waits for it."""
        with self._lock:
            self._ensure_launcher()

    def close(self) -> None:
        """End the fork server and every child; returns when they are gone."""
        with self._lock:
            self._closed = True
            launcher, self._launcher = self._launcher, None
        if launcher is not None:
            launcher.close()

    def run(
        self,
        entry: str,
        buffers: Iterable[int],
        *,
        slot: Slot,
        timeout_s: float,
        tag: str = "",
    ) -> Reply:
        """Call ``entry`` in a child and return what it returned.

        Parameters
        ----------
        entry : str
            "module:function". It is called with one memoryview a buffer, and returns a sequence of
            at most 250 buffers, each a sequence of bytes-like parts.
        buffers : iterable of int
            Descriptors of at most 250 memfds or files; the caller keeps and closes them.
        slot : Slot
            Where it runs. One call at a time in each slot.
        timeout_s : float
            Deadline of the call. At it the child and all its descendants are killed.
        tag : str
            What `cancel` may know the call by.

        Raises
        ------
        FitFailed
            If the function raised; with the child's traceback.
        FitDied
            If the child ended without a reply, or passed the deadline.
        PlatformError
            If the pool is closed, or no child could be started.
        """
        called_s = time.monotonic()
        buffers = list(buffers)
        _check_buffers(buffers)
        child = self._take(slot, tag)
        try:
            if self._options.standby:
                self._prepare_successor()
            received = self._exchange(child, entry, slot, buffers, timeout_s)
        except BaseException:
            # Not waited for: whoever interrupts the caller must not wait for the child.
            child.doomed = True
            self._ask_to_kill(child)
            raise
        if received is None:
            raise self._death(child)
        reply, fds = received
        with self._lock:
            child.tag = ""
            if not (reply["last"] or child.doomed):
                self._kept[slot.index] = child
        if "error" in reply:
            raise FitFailed(reply["error"], reply["traceback"])
        return Reply(
            buffers=fds,
            start_s=reply["entered_s"] - called_s,
            run_s=reply["returned_s"] - reply["entered_s"],
            return_s=time.monotonic() - reply["returned_s"],
            peak_rss_mb=reply["peak_rss_mb"],
            late_imports=reply["late_imports"],
        )

    def cancel(self, tag: str) -> None:
        """Kill the children of calls with this tag; the calls raise `FitDied`."""
        with self._lock:
            children = [child for child in self._live.values() if tag and child.tag == tag]
            for child in children:
                child.doomed = True
        for child in children:
            self._ask_to_kill(child)

    def children(self) -> list[int]:
        """Return the pids of the live children."""
        with self._lock:
            return [child.pid for child in self._live.values() if child.pid is not None]

    # --- calls ---

    def _exchange(
        self, child: _Child, entry: str, slot: Slot, buffers: list[int], timeout_s: float
    ) -> tuple[dict[str, Any], list[int]] | None:
        """Send a call and wait for its reply; None if the child is gone."""
        try:
            channel.send(child.sock, {"entry": entry, "env": slot.env}, buffers)
            child.sock.settimeout(timeout_s)
            return channel.receive(child.sock)
        except ConnectionError:
            return None
        except TimeoutError:
            self._ask_to_kill(child)
            child.exited.wait(_EXIT_TIMEOUT_S)
            raise FitDied(
                f"no reply within {timeout_s:g} s; the child and its descendants were killed",
                "raise isolation.fit_timeout_s, or look for a hang in the app",
            ) from None
        except OSError as error:
            if child.exited.is_set():
                return None
            raise PlatformError(f"the channel to a child failed: {error.strerror}") from error

    def _death(self, child: _Child) -> FitDied:
        if not child.exited.wait(1.0):
            self._ask_to_kill(child)
            child.exited.wait(_EXIT_TIMEOUT_S)
            return FitDied(
                "the child closed its channel and lived on; it was killed",
                "does the app close descriptors that are not its own?",
            )
        code = child.exit_code
        if code is None:
            return ForkServerDied("the fork server ended, and the child with it", "see its log")
        if code >= 0:
            return FitDied(
                f"the child exited with code {code} before it replied",
                "does the app call exit()? its output is in the array task's log",
            )
        hints = {
            signal.SIGKILL: "often the kernel's out-of-memory killer: raise cluster.mem_gb,"
            " or lower isolation.slots",
            signal.SIGSEGV: "a crash in native code; try isolation.start_method: spawn",
        }
        try:
            known = signal.Signals(-code)
        except ValueError:  # a real-time signal
            return FitDied(f"the child was killed by signal {-code}")
        return FitDied(f"the child was killed by {known.name}", hints.get(known))

    # --- children ---

    def _take(self, slot: Slot, tag: str) -> _Child:
        """Return a child for a call: the slot's own, one that stands by, or a new one."""
        with self._lock:
            if self._closed:
                raise PlatformError("the pool of children is closed")
            kept = self._kept.pop(slot.index, None)
            candidates = [*([kept] if kept else []), *self._ready]
            child = next((child for child in candidates if not child.exited.is_set()), None)
            if child is None:
                child = self._start_child()
            elif child in self._ready:
                self._ready.remove(child)
            child.tag = tag
            return child

    def _prepare_successor(self) -> None:
        """Start the child that will follow one of those that work now."""
        if self._options.fits_per_process != 1:
            return  # kept children: the rare replacement is not worth an idle process
        with self._lock:
            busy = len(self._live) - len(self._ready)
            if len(self._ready) < busy and not self._closed:
                with contextlib.suppress(PlatformError):  # the next call will say it
                    self._ready.append(self._start_child())

    def _start_child(self) -> _Child:
        """Ask the fork server for a child; the lock is held."""
        for _ in range(_START_TRIES):
            launcher = self._ensure_launcher()
            ours, theirs = channel.pair()
            self._numbers += 1
            child = _Child(self._numbers, self._generation, ours)
            with theirs:
                try:
                    launcher.start_child(child.number, theirs)
                    if self._options.start_method == "spawn":
                        channel.send(ours, self._options.for_child())
                except ConnectionError:
                    ours.close()
                    self._launcher = None  # it just died: the next try starts another
                    continue
            self._live[child.number] = child
            return child
        raise PlatformError(
            f"no child could be started in {_START_TRIES} tries: the fork server dies",
            "its output is in this process's log",
        )

    def _ask_to_kill(self, child: _Child) -> None:
        with self._lock:
            if self._launcher is not None:
                self._launcher.kill_child(child.number)

    # --- the fork server ---

    def _ensure_launcher(self) -> Launcher:
        """Return a launcher whose fork server is believed to live; the lock is held."""
        if self._closed:
            raise PlatformError("the pool of children is closed")
        if self._launcher is None:
            self._generation = generation = self._generation + 1
            self._launcher = Launcher(
                self._options.for_fork_server(),
                self._options.env(),
                self._note,
                lambda: self._note_end(generation),
            )
        return self._launcher

    def _note(self, message: dict[str, Any]) -> None:
        """Note that a child has started or ended."""
        with self._lock:
            child = self._live.get(message["number"])
            if child is None:
                return
            if message["event"] == "started":
                child.pid = message["pid"]
                return
            del self._live[child.number]
            if child in self._ready:
                self._ready.remove(child)
        child.end(message["code"])

    def _note_end(self, generation: int) -> None:
        """Note that a fork server and its children are gone."""
        with self._lock:
            if not self._closed:
                logger.warning("the fork server ended unexpectedly")
                if generation == self._generation:
                    self._launcher = None  # the next call starts another
            children = [c for c in self._live.values() if c.generation == generation]
            for child in children:
                del self._live[child.number]
                if child in self._ready:
                    self._ready.remove(child)
        for child in children:
            child.end(None)


def _check_buffers(buffers: list[int]) -> None:
    if len(buffers) > channel.MAX_FDS:
        raise ValueError(f"expected at most {channel.MAX_FDS} buffers, found {len(buffers)}")
    for fd in buffers:
        os.fstat(fd)  # a bad descriptor is the caller's error, not the child's
