"""The children of a pool: made, prepared ahead, kept between calls, and noted when they end."""

import contextlib
import logging
import math
import socket
import threading
from collections import deque
from dataclasses import dataclass, field
from typing import Any

from fedhpc.errors import PlatformError
from fedhpc.isolation import channel
from fedhpc.isolation.calls import EXIT_CUDA_BEFORE_SLOT, Call, PoolOptions
from fedhpc.isolation.launcher import Launcher
from fedhpc.isolation.slots import Slot

logger = logging.getLogger(__name__)

_START_TRIES = 5
_MAX_LESSONS = 4  # each holds up the forks for as long as the imports take, twice


@dataclass(eq=False)
class Child:
    """A child process as its pool knows it.

    Attributes
    ----------
    number, pid : int
        How the fork server calls it, and the kernel, once it has started.
    generation : int
        Which fork server it came from.
    sock : socket
        The channel to it.
    slot : int
        Index of the slot that it was made for; another one may take it, if it is like that.
    env : dict
        Of that slot.
    tag : str
        Of the call that it works on, or that it ends after; "" between calls.
    kept : bool
        Whether it has answered calls before.
    promise : float
        Bytes of its GPU that it was admitted for; inf: all of them.
    waits_for : str
        What its call waits for that has no slot yet, in words.
    sent : deque of str
        Tags of the calls that it was sent, in their order, until their replies are taken.
    answered_s, took_s : float
        When it had done the last call whose reply was taken, and how long that took.
    doomed, over_memory : bool
        Whether it was to be killed, and for what it used of the host.
    exit_code : int or None
        Set when it has ended; None also if its fork server was killed.
    exited : Event
        Set when it has ended.
    """

    number: int
    generation: int
    sock: socket.socket
    slot: int
    env: dict[str, str]
    pid: int | None = None
    tag: str = ""
    kept: bool = False
    promise: float = 0
    waits_for: str = ""
    sent: deque[str] = field(default_factory=deque)
    answered_s: float = 0
    took_s: float = 0
    doomed: bool = False
    over_memory: bool = False
    exit_code: int | None = None
    exited: threading.Event = field(default_factory=threading.Event)

    def end(self, exit_code: int | None) -> None:
        """Note that it has ended."""
        self.exit_code = exit_code
        self.exited.set()
        with contextlib.suppress(OSError):
            self.sock.shutdown(socket.SHUT_RDWR)  # wakes a reader, also if a fork keeps it open


class Children:
    """All children of a pool, and their fork server. Safe for several threads.

    Parameters
    ----------
    options : PoolOptions
        How children are made.
    """

    def __init__(self, options: PoolOptions) -> None:
        self._options = options
        self._lock = threading.Lock()
        self._live: dict[int, Child] = {}
        self._ready: list[Child] = []
        self._kept: dict[int, Child] = {}  # by slot
        self._numbers = 0
        self._generation = 0
        self._closed = False
        self._cuda_before_slot = False
        self._learned: list[str] = []
        self._lessons = 0
        self._launcher: Launcher | None = None

    def start(self) -> None:
        """Start the fork server."""
        with self._lock:
            self._ensure_launcher()

    def close(self) -> None:
        """End the fork server and every child; returns when they are gone."""
        with self._lock:
            self._closed = True
            launcher, self._launcher = self._launcher, None
        if launcher is not None:
            launcher.close()

    # --- who is there ---

    def pids(self) -> dict[int, str]:
        """Return live children by pid: the tag of their call until they end; "" between calls."""
        with self._lock:
            return {child.pid: child.tag for child in self._live.values() if child.pid is not None}

    def standing_by(self) -> set[int]:
        """Return the pids of children that have had no call yet."""
        with self._lock:
            return {child.pid for child in self._ready if child.pid is not None}

    def waiting(self) -> list[str]:
        """Return what calls wait for that have no slot yet, in words."""
        with self._lock:
            return sorted({child.waits_for for child in self._live.values() if child.waits_for})

    def fork_server(self) -> int | None:
        """Return the pid of the fork server, if it lives."""
        with self._lock:
            return None if self._launcher is None else self._launcher.pid

    # --- for calls ---

    def take(self, call: Call) -> Child:
        """Return a child for a call: the slot's own, one that stands by, or a new one.

        Raises
        ------
        PlatformError
            If the pool is closed, or no child could be started.
        """
        slot, need = call.slot, call.need()
        wanted = wanted_bytes(need.total_bytes if need else None)
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
            fitting.sort(key=lambda child: child.slot != slot.index)  # its own first
            candidates = [*([kept] if kept else []), *fitting]
            child = next(
                # One that has ended may have answered it before.
                (c for c in candidates if call.tag in c.sent or not c.exited.is_set()), None
            )  # fmt: skip
            if child is None:
                # A context that an app's import makes must lie in a slot too.
                child = self._start_child(slot, prepare_now=not slot.gpus)
            elif child in self._ready:
                self._ready.remove(child)
            child.tag = call.tag
            return child

    def take_back(self, slot: Slot) -> Child | None:
        """Return the child that is kept for a slot, if it was sent calls ahead."""
        with self._lock:
            child = self._kept.get(slot.index)
            return self._kept.pop(slot.index) if child and child.sent else None

    def prepare_successor(self, slot: Slot) -> None:
        """Start the child that will follow one that has just begun to work."""
        if not self._may_stand_by(slot):
            return
        with self._lock:
            alike = [child for child in self._live.values() if child.env == slot.env]
            ready = sum(child in self._ready for child in alike)
            at_work = max(1, len(alike) - ready)  # that one may have ended meanwhile
            if ready < at_work:
                self._make_ready(slot)

    def stand_by(self, slot: Slot) -> None:
        """Start the child that will have the next call in a slot that has nothing to do."""
        if self._may_stand_by(slot):
            with self._lock:
                if all(child.slot != slot.index for child in self._ready):
                    self._make_ready(slot)

    def _may_stand_by(self, slot: Slot) -> bool:
        # Of kept children the rare replacement is not worth an idle process.
        return self._options.fits_per_process == 1 and not (slot.gpus and self._cuda_before_slot)

    def _make_ready(self, slot: Slot) -> None:
        """Start a child ahead of its call; the lock is held."""
        if not self._closed:
            with contextlib.suppress(PlatformError, OSError):  # the next call will say it
                self._ready.append(self._start_child(slot, prepare_now=True))

    def answered(self, child: Child, slot: Slot, *, keep: bool) -> None:
        """Note that a child has answered its call; ``keep`` it for the next one in its slot."""
        with self._lock:
            if keep and not child.doomed:
                child.tag = ""  # one that ends is at work until it has: it still holds memory
                child.kept = True
                self._kept[slot.index] = child

    def learn(self, modules: list[str]) -> None:
        """Let the fork server import what a child had to import for itself."""
        with self._lock:
            new = [name for name in modules if name not in self._learned]
            if new and self._lessons < _MAX_LESSONS and self._launcher is not None:
                self._lessons += 1
                self._learned += new
                self._launcher.preload(new)

    def cancel(self, tag: str) -> None:
        """Kill the children of calls with this tag; the calls raise `FitCancelled`."""
        with self._lock:
            children = [child for child in self._live.values() if tag and child.tag == tag]
            for child in children:
                child.doomed = True
        for child in children:
            self.kill(child)

    def kill_for_memory(self, pid: int) -> None:
        """Kill a child that used more host memory than it may; its call raises `FitDied`."""
        with self._lock:
            children = [child for child in self._live.values() if child.pid == pid]
            for child in children:
                child.doomed = child.over_memory = True
        for child in children:
            self.kill(child)

    def _start_child(self, slot: Slot, *, prepare_now: bool) -> Child:
        """Ask the fork server for a child; the lock is held."""
        options = {"env": slot.env, "prepare_now": prepare_now}
        for _ in range(_START_TRIES):
            launcher = self._ensure_launcher()
            ours, theirs = channel.pair()
            self._numbers += 1
            child = Child(self._numbers, self._generation, ours, slot.index, slot.env)
            with theirs:
                try:
                    launcher.start_child(child.number, theirs, options)
                    if self._options.start_method == "spawn":
                        channel.send(ours, {**self._options.for_child(), **options})
                except OSError as error:
                    ours.close()
                    if not isinstance(error, ConnectionError):
                        raise
                    self._launcher = None  # it just died: the next try starts another
                    continue
            self._live[child.number] = child
            return child
        raise PlatformError(
            f"no child could be started in {_START_TRIES} tries: the fork server dies",
            "its output is in this process's log",
        )

    def kill(self, child: Child) -> None:
        """Ask the fork server to kill a child and all that came from it."""
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
            if self._learned:
                self._launcher.preload(self._learned)
        return self._launcher

    def _note(self, message: dict[str, Any]) -> None:
        """Note that a child has started or ended, or what the fork server has learned."""
        if message["event"] == "preloaded":
            logger.info(
                "the fork server has imported %d modules that each fit had imported late (%.1f s)",
                message["modules"], message["seconds"],
            )  # fmt: skip
            return
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


def wanted_bytes(need_bytes: int | None) -> float:
    """Return what a need comes to; all of a GPU if it is not known."""
    return math.inf if need_bytes is None else need_bytes
