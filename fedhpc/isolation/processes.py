"""A pool of child processes: calls in, replies out, each call in a slot."""

import contextlib
import logging
import math
import os
import socket
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from fedhpc.errors import (
    FitDied,
    FitOutOfMemory,
    GpuLost,
    PlatformError,
)
from fedhpc.isolation import channel, failures, host_memory
from fedhpc.isolation.admission import Need, check_need
from fedhpc.isolation.calls import EXIT_CUDA_BEFORE_SLOT, Call, PoolOptions, Reply
from fedhpc.isolation.launcher import Launcher
from fedhpc.isolation.nvml import Nvml, Reading
from fedhpc.isolation.slots import Slot

logger = logging.getLogger(__name__)

_EXIT_TIMEOUT_S = 5.0
_START_TRIES = 5


@dataclass(eq=False)
class _Child:
    number: int
    generation: int  # of the fork server
    sock: socket.socket
    env: dict[str, str]  # of the slot it was made for
    pid: int | None = None
    tag: str = ""
    kept: bool = False
    promise: float = 0  # bytes of its GPU that it was admitted for; inf: all of them
    waits_for: str = ""
    doomed: bool = False
    over_memory: bool = False
    exit_code: int | None = None
    exited: threading.Event = field(default_factory=threading.Event)

    def end(self, exit_code: int | None) -> None:
        self.exit_code = exit_code
        self.exited.set()
        with contextlib.suppress(OSError):
            self.sock.shutdown(socket.SHUT_RDWR)  # wakes a reader, also if a fork keeps it open


class _Left(Exception):
    """A child that was kept, or stood by, has left: the call is another's."""


class ChildPool:
    """Calls functions in child processes, each call in a slot that the caller owns.

    ``run`` may be called from several threads at once, one for each slot.

    Parameters
    ----------
    options : PoolOptions
        How children are made.
    nvml : Nvml, optional
        Where the memory of GPUs is read. Without it slots alone decide who may start.
    """

    def __init__(self, options: PoolOptions, nvml: Nvml | None = None) -> None:
        self._options = options
        self._nvml = nvml
        self._lock = threading.Lock()
        self._live: dict[int, _Child] = {}
        self._ready: list[_Child] = []
        self._kept: dict[int, _Child] = {}  # by slot
        self._numbers = 0
        self._generation = 0
        self._closed = False
        self._cuda_before_slot = False
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
        slot_timeout_s: float | None = None,
        tag: str = "",
        label: str = "",
        need: Need | Callable[[], Need | None] | None = None,
        capped: bool = True,
        on_admitted: Callable[[int | None], None] | None = None,
    ) -> Reply:
        """Call ``entry`` in a child and return what it returned.

        A call that runs out of GPU memory runs once more, alone on its GPU.

        Parameters
        ----------
        entry, buffers, slot, timeout_s, slot_timeout_s, tag, label, need, capped, on_admitted
            See `Call`; ``need`` may also be one that does not change. Without ``slot_timeout_s``,
            ``timeout_s`` holds until the slot, and again from there.

        Raises
        ------
        FitFailed
            If the function raised; with the child's traceback. `FitOutOfMemory` if there was not
            enough GPU memory.
        FitDied
            If the child ended without a reply, or passed the deadline.
        SlotTimeout
            If there was no slot or no memory in time.
        GpuLost
            If the slot's GPU does not answer.
        PlatformError
            If the pool is closed, no child could be started, or a lock file cannot be used.
        """
        limit_s = timeout_s if slot_timeout_s is None else slot_timeout_s
        needs = need if callable(need) else lambda: need
        call = Call(
            entry, tuple(buffers), slot, timeout_s, limit_s, tag, label, needs, capped, on_admitted
        )
        _check_buffers(call.buffers)
        for gpu in slot.gpus:
            check_need(needs(), gpu.total_bytes, gpu.id)
        try:
            return self._run(call, alone=False)
        except FitOutOfMemory as error:
            if not slot.gpus:
                raise
            logger.warning("%s ran out of GPU memory; it runs again, alone", label or entry)
            first = error
        try:
            reply = self._run(call, alone=True)
        except FitOutOfMemory as error:
            error.need_bytes = max(error.need_bytes, first.need_bytes)
            raise
        reply.out_of_memory = True
        return reply

    def cancel(self, tag: str) -> None:
        """Kill the children of calls with this tag; the calls raise `FitDied`."""
        with self._lock:
            children = [child for child in self._live.values() if tag and child.tag == tag]
            for child in children:
                child.doomed = True
        for child in children:
            self._ask_to_kill(child)

    def kill_for_memory(self, pid: int) -> None:
        """Kill a child that used more host memory than it may; its call raises `FitDied`."""
        with self._lock:
            children = [child for child in self._live.values() if child.pid == pid]
            for child in children:
                child.doomed = child.over_memory = True
        for child in children:
            self._ask_to_kill(child)

    def children(self) -> dict[int, str]:
        """Return the live children by pid: the tag of their call, "" between calls."""
        with self._lock:
            return {child.pid: child.tag for child in self._live.values() if child.pid is not None}

    def waiting(self) -> list[str]:
        """Return what calls wait for that have no slot yet, in words."""
        with self._lock:
            return sorted({child.waits_for for child in self._live.values() if child.waits_for})

    def fork_server(self) -> int | None:
        """Return the pid of the fork server, if it lives."""
        with self._lock:
            return None if self._launcher is None else self._launcher.pid

    # --- calls ---

    def _run(self, call: Call, *, alone: bool) -> Reply:
        called_s = time.monotonic()
        oom_kills = host_memory.oom_kills()
        while True:
            child = self._take(call)
            try:
                received = self._exchange(child, call, alone=alone)
                break
            except _Left:
                continue
            except BaseException:
                # Not waited for: whoever interrupts the caller must not wait for the child.
                child.doomed = True
                self._ask_to_kill(child)
                raise
            finally:
                child.waits_for = ""
        if received is None:
            raise self._death(child, oom_kills)
        reply, fds, admitted = received
        with self._lock:
            child.tag = ""
            if not (reply["last"] or child.doomed):
                child.kept = True
                self._kept[call.slot.index] = child
        if lost := reply.get("lost_lock"):
            logger.warning(
                "isolation.lock_dir: %s was removed while a fit held it, so more fits than allowed"
                " may have run; nothing may clean that folder while jobs run",
                lost,
            )
        if "error" in reply:
            raise failures.raised(reply, self._options.host_memory_bytes)
        peak, context = reply.get("gpu_peak_bytes"), reply.get("gpu_context_bytes")
        return Reply(
            buffers=fds,
            wait_s=admitted["wait_s"],
            start_s=reply["entered_s"] - called_s - admitted["wait_s"],
            run_s=reply["returned_s"] - reply["entered_s"],
            return_s=time.monotonic() - reply["returned_s"],
            peak_rss_mb=reply["peak_rss_mb"],
            late_imports=reply["late_imports"],
            gpu_before_bytes=admitted["gpu_before_bytes"],
            gpu_peak_bytes=None if peak is None else peak + (context or 0),
            gpu_context_bytes=context,
            gone=child.exited if reply["last"] else None,
        )

    def _exchange(
        self, child: _Child, call: Call, *, alone: bool
    ) -> tuple[dict[str, Any], list[int], dict[str, Any]] | None:
        """Send a call, answer the child's questions and wait for its reply; None if it is gone."""
        deadline_s = time.monotonic() + call.slot_timeout_s
        admitted: dict[str, Any] | None = None
        message = call.message(alone=alone, host_bytes=self._options.host_memory_bytes)
        try:
            channel.send(child.sock, message, call.buffers)
            while True:
                child.sock.settimeout(max(0.001, deadline_s - time.monotonic()))
                received = channel.receive(child.sock)
                if received is None:
                    _gone(child, admitted)
                    return None
                answer, fds = received
                match answer.get("event"):
                    case "terms?":
                        terms = call.terms(self._read_memory(call.slot), alone=alone)
                        if admitted is None:
                            child.promise = _wanted(None if alone else terms["need_bytes"])
                        channel.send(child.sock, terms)
                    case "waiting":
                        child.waits_for = answer["reason"]
                        logger.info("%s waits: %s", call.label or call.entry, answer["reason"])
                    case "admitted":
                        admitted, child.waits_for = answer, ""
                        deadline_s = time.monotonic() + call.timeout_s
                        if self._options.standby:  # not sooner: the fork takes a core
                            self._prepare_successor(call.slot)
                        if call.on_admitted is not None:
                            call.on_admitted(answer["gpu_before_bytes"])
                    case _:
                        # Without a slot it can only be an error.
                        nothing = {"wait_s": 0.0, "gpu_before_bytes": None}
                        return answer, fds, admitted or nothing
        except ConnectionError:
            _gone(child, admitted)
            return None
        except TimeoutError:
            self._ask_to_kill(child)
            child.exited.wait(_EXIT_TIMEOUT_S)
            raise failures.too_late(call, child.waits_for, admitted=admitted is not None) from None
        except OSError as error:
            if child.exited.is_set():
                _gone(child, admitted)
                return None
            raise PlatformError(f"the channel to a child failed: {error.strerror}") from error

    def _read_memory(self, slot: Slot) -> Reading | str | None:
        """Return the memory of a slot's GPU, or why it cannot be told now; None: not at all."""
        if self._nvml is None or not slot.gpus or not slot.gpus[0].total_bytes:
            return None
        try:
            return self._nvml.memory(slot.gpus[0])
        except GpuLost:
            raise
        except PlatformError as error:
            return error.message

    def _death(self, child: _Child, oom_kills: tuple[int, int]) -> FitDied:
        told = child.exited.wait(1.0)
        if not told and not (_has_ended(child.pid) and child.exited.wait(_EXIT_TIMEOUT_S)):
            self._ask_to_kill(child)
            child.exited.wait(_EXIT_TIMEOUT_S)
            return FitDied(
                "the child closed its channel and lived on; it was killed",
                "does the app close descriptors that are not its own?",
            )
        if child.doomed and not child.over_memory:
            return failures.cancelled()
        limit = self._options.host_memory_bytes if child.over_memory else None
        return failures.died(child.exit_code, oom_kills, limit)

    # --- children ---

    def _take(self, call: Call) -> _Child:
        """Return a child for a call: the slot's own, one that stands by, or a new one."""
        slot, need = call.slot, call.need()
        wanted = _wanted(need.total_bytes if need else None)
        with self._lock:
            if self._closed:
                raise PlatformError("the pool of children is closed")
            kept = self._kept.pop(slot.index, None)
            if kept and slot.gpus and slot.lock_folder and wanted > kept.promise:
                kept.doomed = True  # it would use more than others know of: admission begins anew
                if self._launcher is not None:
                    self._launcher.kill_child(kept.number)
                kept = None
            fitting = [child for child in self._ready if child.env == slot.env]
            candidates = [*([kept] if kept else []), *fitting]
            child = next((child for child in candidates if not child.exited.is_set()), None)
            if child is None:
                # A context that an app's import makes must lie in a slot too.
                child = self._start_child(slot, prepare_now=not slot.gpus)
            elif child in self._ready:
                self._ready.remove(child)
            child.tag = call.tag
            return child

    def _prepare_successor(self, slot: Slot) -> None:
        """Start the child that will follow one of those that work now."""
        if self._options.fits_per_process != 1 or (slot.gpus and self._cuda_before_slot):
            return  # kept children: the rare replacement is not worth an idle process
        with self._lock:
            alike = [child for child in self._live.values() if child.env == slot.env]
            ready = sum(child in self._ready for child in alike)
            if ready < len(alike) - ready and not self._closed:
                with contextlib.suppress(PlatformError):  # the next call will say it
                    self._ready.append(self._start_child(slot, prepare_now=True))

    def _start_child(self, slot: Slot, *, prepare_now: bool) -> _Child:
        """Ask the fork server for a child; the lock is held."""
        options = {"env": slot.env, "prepare_now": prepare_now}
        for _ in range(_START_TRIES):
            launcher = self._ensure_launcher()
            ours, theirs = channel.pair()
            self._numbers += 1
            child = _Child(self._numbers, self._generation, ours, slot.env)
            with theirs:
                try:
                    launcher.start_child(child.number, theirs, options)
                    if self._options.start_method == "spawn":
                        channel.send(ours, {**self._options.for_child(), **options})
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
            if message["code"] == EXIT_CUDA_BEFORE_SLOT and not self._cuda_before_slot:
                self._cuda_before_slot = True
                logger.warning(
                    "the app's import uses CUDA: from now on no child is prepared in advance on a"
                    " GPU, as it would use memory outside of its slot"
                )
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


def _wanted(need_bytes: int | None) -> float:
    return math.inf if need_bytes is None else need_bytes


def _gone(child: _Child, admitted: dict[str, Any] | None) -> None:
    """Tell a child that had left by itself, before it saw the call, from one that died."""
    if admitted is not None or child.doomed:
        return
    child.exited.wait(_EXIT_TIMEOUT_S)
    on_gpu = bool(child.env["CUDA_VISIBLE_DEVICES"])  # there the next one is not made in advance
    if (child.kept and child.exit_code == 0) or (
        on_gpu and child.exit_code == EXIT_CUDA_BEFORE_SLOT
    ):
        raise _Left


def _has_ended(pid: int | None) -> bool:
    """Return whether a child has ended, though its fork server has not told yet."""
    if pid is None:
        return False
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except OSError:
        return True


def _check_buffers(buffers: tuple[int, ...]) -> None:
    if len(buffers) > channel.MAX_FDS:
        raise ValueError(f"expected at most {channel.MAX_FDS} buffers, found {len(buffers)}")
    for fd in buffers:
        os.fstat(fd)  # a bad descriptor is the caller's error, not the child's
