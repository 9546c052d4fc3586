"""A pool of child processes: the array task's side of the fork server."""

import contextlib
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Literal, Self

from fedhpc.errors import FitDied, FitFailed, PlatformError
from fedhpc.isolation import channel
from fedhpc.isolation.slots import Slot

logger = logging.getLogger(__name__)

# Without torch._dynamo each child pays 1.1 s at its first optimizer step.
DEFAULT_PRELOAD = ("numpy", "torch", "torch._dynamo", "torch.optim")
_EXIT_TIMEOUT_S = 5.0


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
    """

    start_method: Literal["forkserver", "spawn"] = "forkserver"
    fits_per_process: int = 1
    threads_per_fit: int = 1
    standby: bool = True
    preload: Sequence[str] = DEFAULT_PRELOAD
    prepare: str | None = None
    prepare_arg: str = ""
    prepare_early: bool = False

    def child_options(self) -> dict[str, Any]:
        """Return what each child is told."""
        return {
            "prepare": self.prepare,
            "prepare_arg": self.prepare_arg,
            "fits": self.fits_per_process,
            "threads": self.threads_per_fit,
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
        Modules (the first 100) that the child had to import itself.
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
    sock: socket.socket
    tag: str = ""
    pid: int | None = None
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
        self._closed = False
        self._server: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None

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
            self._ensure_server()

    # --- calls ---

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
            buffers, each a sequence of bytes-like parts.
        buffers : iterable of int
            Descriptors of memfds or files; the caller keeps and closes them.
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
        """
        called_s = time.monotonic()
        child = self._take(slot)
        child.tag = tag
        try:
            if self._options.standby:
                self._prepare_successor()
            try:
                channel.send(child.sock, {"entry": entry, "env": slot.env}, list(buffers))
                child.sock.settimeout(timeout_s)
                received = channel.receive(child.sock)
            except TimeoutError:
                self._kill(child)
                raise FitDied(
                    f"no reply within {timeout_s:g} s; the child and its descendants were killed",
                    "raise isolation.fit_timeout_s, or look for a hang in the app",
                ) from None
            except OSError:
                received = None
        except BaseException:
            self._forget(child)
            raise
        if received is None:
            self._forget(child)
            raise self._death(child)
        reply, fds = received
        child.tag = ""
        if reply["last"]:
            self._forget(child)
        else:
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

    def children(self) -> list[int]:
        """Return the pids of the live children."""
        with self._lock:
            return [child.pid for child in self._live.values() if child.pid is not None]

    def cancel(self, tag: str) -> None:
        """Kill the children of calls with this tag; the calls raise `FitDied`."""
        with self._lock:
            children = [child for child in self._live.values() if child.tag == tag]
        for child in children:
            self._kill(child)

    def close(self) -> None:
        """End the fork server and every child, at most a few seconds later."""
        with self._lock:
            self._closed = True
            server, control = self._server, self._control
            self._server = self._control = None
        if control is not None:
            with contextlib.suppress(OSError):
                control.shutdown(socket.SHUT_RDWR)  # the fork server kills all and leaves
        if server is not None:
            try:
                server.wait(_EXIT_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                self._kill_server(server)

    # --- children ---

    def _take(self, slot: Slot) -> _Child:
        kept = self._kept.pop(slot.index, None)
        if kept is not None and not kept.exited.is_set():
            return kept
        with self._lock:
            while self._ready:
                child = self._ready.pop(0)
                if not child.exited.is_set():
                    return child
            return self._start_child()

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
        control = self._ensure_server()
        ours, theirs = channel.pair()
        self._numbers += 1
        child = _Child(self._numbers, ours)
        self._live[child.number] = child
        try:
            channel.send(control, {"request": "start", "number": child.number}, [theirs.fileno()])
            if self._options.start_method == "spawn":
                channel.send(ours, self._options.child_options())
        except OSError as error:
            child.end(None)
            del self._live[child.number]
            raise PlatformError(f"the fork server is gone: {error.strerror}") from error
        finally:
            theirs.close()
        return child

    def _kill(self, child: _Child) -> None:
        with self._lock:
            control = self._control
            if control is not None:
                with contextlib.suppress(OSError):
                    channel.send(control, {"request": "kill", "number": child.number})
        child.exited.wait(_EXIT_TIMEOUT_S)

    def _forget(self, child: _Child) -> None:
        with self._lock:
            if child in self._ready:
                self._ready.remove(child)

    def _death(self, child: _Child) -> FitDied:
        child.exited.wait(_EXIT_TIMEOUT_S)
        code = child.exit_code
        if code is None:
            return FitDied("the fork server ended, and the child with it", "see its log")
        if code >= 0:
            return FitDied(
                f"the child exited with code {code} before it replied",
                "does the app call exit()? its output is in the array task's log",
            )
        name = signal.Signals(-code).name
        hints = {
            signal.SIGKILL: "often the kernel's out-of-memory killer: raise cluster.mem_gb,"
            " or lower isolation.slots",
            signal.SIGSEGV: "a crash in native code; try isolation.start_method: spawn",
        }
        return FitDied(f"the child was killed by {name}", hints.get(signal.Signals(-code)))

    # --- the fork server ---

    def _ensure_server(self) -> socket.socket:
        """Return the control socket of a running fork server; the lock is held."""
        if self._closed:
            raise PlatformError("the pool of children is closed")
        if self._control is not None:
            return self._control
        ours, theirs = channel.pair()
        options = self._options
        spawn = options.start_method == "spawn"
        env = dict(os.environ)
        for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
            env[name] = str(options.threads_per_fit)
        env["PYTHONHASHSEED"] = "0"  # the order of sets is the same in every array task
        # torch.cuda.is_available() at an app's import then asks NVML and makes no CUDA context.
        env["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
        with theirs:
            self._server = subprocess.Popen(
                [sys.executable, "-m", "fedhpc.isolation.forkserver", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                env=env,
                start_new_session=True,  # a Ctrl-C in the terminal is the array task's to handle
            )
        channel.send(
            ours,
            {
                "preload": [] if spawn else list(options.preload),
                "spawn": spawn,
                "prepare_early": options.prepare_early and not spawn,
                "child": options.child_options(),
            },
        )
        self._control = ours
        threading.Thread(
            target=self._watch_server, args=(ours, self._server), name="fork-server", daemon=True
        ).start()
        return ours

    def _watch_server(self, control: socket.socket, server: subprocess.Popen[bytes]) -> None:
        """Note which children started and ended, until the fork server is gone."""
        while (received := channel.receive(control)) is not None:
            message = received[0]
            with self._lock:
                child = self._live.get(message.get("number", -1))
                if child is None:
                    continue
                if message["event"] == "started":
                    child.pid = message["pid"]
                elif message["event"] == "exited":
                    del self._live[child.number]
                    if child in self._ready:
                        self._ready.remove(child)
                    child.end(message["code"])
        with self._lock:
            if self._control is control:
                self._control = None  # the next call starts another
                logger.warning("the fork server ended unexpectedly")
            children = list(self._live.values())
            self._live.clear()
            self._ready.clear()
        for child in children:
            # PDEATHSIG ends the children; their own children are in their groups.
            if child.pid is not None:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(child.pid, signal.SIGKILL)
            child.end(None)
        control.close()
        self._kill_server(server)

    def _kill_server(self, server: subprocess.Popen[bytes]) -> None:
        try:
            server.wait(1.0)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait(_EXIT_TIMEOUT_S)
