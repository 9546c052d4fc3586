"""Who may start on a GPU now: a slot is free, and the memory that the fit needs is too.

All of it happens in the fit's child process, behind the gate of its GPU, so that two runs cannot
both take the last free memory. What holders of slots were promised and have not used yet counts as
used.
"""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from fedhpc.errors import PlatformError
from fedhpc.isolation.locks import Holder, SlotGroup, SlotLock
from fedhpc.isolation.nvml import Reading

GB = 1e9

_SLOT_POLL_S = 0.002
_LONG_POLL_S = 0.01
_MEMORY_POLL_S = 0.05
_TELL_FIRST_S = 0.2  # most waits are for the end of a fit that is about to end
_TELL_AGAIN_S = 1.0


@dataclass(frozen=True)
class Need:
    """GPU memory of one fit.

    Attributes
    ----------
    total_bytes : int
        All of it.
    context_bytes : int
        Of these, what CUDA takes for itself: a context, loaded kernels, libraries. torch may have
        the rest.
    least_bytes : int, optional
        What is enough where it has no neighbours: a margin must not keep a fit off a GPU that it
        fills. None: ``total_bytes``.
    """

    total_bytes: int
    context_bytes: int = 1_000_000_000
    least_bytes: int | None = None

    @property
    def cap_bytes(self) -> int:
        """What torch's allocator may hold."""
        return max(self.total_bytes - self.context_bytes, self.total_bytes // 2)


@dataclass(frozen=True)
class Request:
    """What a fit wants before it starts; travels to its child as JSON.

    Attributes
    ----------
    folder, key : str
        Of the `SlotGroup`.
    limit : int
        Slots that this run uses: the first ones.
    label : str
        Who it is, for those that wait for it.
    gpu : bool
        Whether it is about a GPU, with memory to be shared.
    need_bytes : int or None
        GPU memory that it needs; None: not known.
    least_bytes : int or None
        GPU memory that is enough where it has no neighbours; None: ``need_bytes``.
    alone : bool
        Whether it wants the GPU for itself. So does a fit whose need is not known.
    exclusive : bool
        Whether the GPU lets one process at a time use it.
    """

    folder: str
    key: str
    limit: int
    label: str
    gpu: bool = False
    need_bytes: int | None = None
    least_bytes: int | None = None
    alone: bool = False
    exclusive: bool = False

    @property
    def place(self) -> str:
        """What is shared, in words."""
        return self.key if self.gpu else "these cores"


@dataclass(frozen=True)
class Admission:
    """A slot, and what it took to get it.

    Attributes
    ----------
    lock : SlotLock
        Held until the process ends.
    wait_s : float
        How long it took.
    terms : Terms
        The terms that it was admitted on.
    """

    lock: SlotLock
    wait_s: float
    terms: "Terms"


@dataclass(frozen=True)
class Terms:
    """What the array task knows of a GPU and a fit at one moment; both may change while it waits.

    Attributes
    ----------
    reading : Reading, str or None
        The memory of the GPU; text: why it cannot be read just now; None: it cannot be read at
        all, and slots must do.
    need_bytes, least_bytes, cap_bytes : int or None
        As in `Request` and `Need`.
    """

    reading: Reading | str | None = None
    need_bytes: int | None = None
    least_bytes: int | None = None
    cap_bytes: int | None = None


def admit(request: Request, ask: Callable[[], Terms], tell: Callable[[str], None]) -> Admission:
    """Wait for a slot and memory, and take them. It has no deadline: the child's owner kills it.

    Parameters
    ----------
    request : Request
        What is wanted.
    ask : callable
        Returns the terms of this moment; called if it is about a GPU.
    tell : callable
        Called with what is waited for, when that changes.

    Raises
    ------
    PlatformError
        If a lock file cannot be used.
    """
    start_s = time.monotonic()
    tell_s = start_s + _TELL_FIRST_S
    group = SlotGroup(Path(request.folder), request.key)
    gate = group.gate()
    told, announced = "", False

    def queue(first: str) -> None:
        nonlocal told
        told = f"{first or 'another fit'} is first in the queue of {request.place}"
        tell(told)  # at once: until it is its turn it cannot say any more

    gate.on_queue(queue)
    with gate:
        while True:
            try:
                lock, terms = _take(request, group, ask)
            except _Wait as wait:
                if not announced:
                    gate.announce(request.label)
                    announced = True
                if time.monotonic() > tell_s:
                    tell_s = time.monotonic() + _TELL_AGAIN_S
                    if (reason := wait.reason()) != told:
                        told = reason
                        tell(told)
                # Who has waited for long can wait a little more, and leave the core to others.
                waited_s = time.monotonic() - start_s
                time.sleep(max(wait.pause_s, min(_LONG_POLL_S, waited_s / 1000)))
            else:
                return Admission(lock, time.monotonic() - start_s, terms)


def _take(request: Request, group: SlotGroup, ask: Callable[[], Terms]) -> tuple[SlotLock, Terms]:
    """Take a slot if there is one, and memory for it; raise `_Wait` if not."""
    lock = group.take(request.limit)
    if lock is None:
        raise _Wait(lambda: _held(request, group), _SLOT_POLL_S)
    others: list[Holder] = []
    reading, terms = None, Terms()
    try:
        if request.gpu:
            others = [holder for holder in group.holders() if holder.slot != lock.index]
            terms = ask()
            request = replace(request, need_bytes=terms.need_bytes, least_bytes=terms.least_bytes)
            if isinstance(terms.reading, str):
                raise _Wait(partial(str, terms.reading), _MEMORY_POLL_S)
            reading = terms.reading
            if missing := shortage(request, reading, others):
                raise _Wait(partial(str, missing), _MEMORY_POLL_S)
        lock.write(_as_holder(request, lock.index, reading, others))
    except BaseException:
        lock.release()
        raise
    return lock, terms


def _held(request: Request, group: SlotGroup) -> str:
    """Return who holds the slots that a fit waits for."""
    names = ", ".join(map(str, group.holders()[: request.limit]))
    slots = "the slot" if request.limit == 1 else f"all {request.limit} slots"
    return f"{slots} of {request.place} held by {names or 'somebody'}"


class _Wait(Exception):
    """Not now: look again after a pause; the reason is asked for only where it is told."""

    def __init__(self, reason: Callable[[], str], pause_s: float) -> None:
        super().__init__()
        self.reason = reason
        self.pause_s = pause_s


def shortage(request: Request, reading: Reading | None, others: list[Holder]) -> str:
    """Return why a fit cannot start next to the other holders, in words; "" if it can.

    Parameters
    ----------
    request : Request
        What the fit wants.
    reading : Reading or None
        The memory of its GPU; None if it cannot be read.
    others : list of Holder
        Who holds slots of it, in this and other runs.
    """
    if request.exclusive and reading is not None and reading.processes:
        pids = ", ".join(map(str, reading.processes))
        return f"{request.place} lets one process at a time use it, now pid {pids}"
    by = ", ".join(map(str, others))
    needs_all = request.alone or (reading is not None and request.need_bytes is None)
    if any(holder.reserved_bytes is None for holder in others):
        return f"{request.place} is reserved for one fit alone: {by}"
    if others and needs_all:
        why = "after it ran out of memory" if request.alone else "as its need is not known yet"
        return f"wants {request.place} alone {why}, held by {by}"
    if request.need_bytes is None or reading is None:
        return ""
    need = request.need_bytes
    if not others and request.least_bytes is not None:
        need = request.least_bytes
    room = _room(reading, others)
    if room >= need:
        return ""
    return (
        f"needs {need / GB:.1f} GB of {request.place}, {max(room, 0) / GB:.1f} of"
        f" {reading.total_bytes / GB:.1f} GB can be had;"
        f" in use or promised: {_who(reading, others)}"
    )


def _room(reading: Reading, others: list[Holder]) -> int:
    """Return the bytes that are free and not promised to a holder who has not used them yet."""
    reserved = sum(holder.reserved_bytes or 0 for holder in others)
    used = {
        holder.pid: reading.processes[holder.pid]
        for holder in others
        if holder.pid in reading.processes
    }
    if not others or (used and None not in used.values()):
        # NVML tells who uses what; whom it does not list has not begun to use the GPU.
        unused = (
            max(0, (holder.reserved_bytes or 0) - (used.get(holder.pid) or 0)) for holder in others
        )
        return reading.free_bytes - sum(unused)
    # NVML does not tell who uses what, as in a container: go by what others used before them.
    return min(reading.free_bytes, reading.total_bytes - _foreign(reading, others) - reserved)


def _foreign(reading: Reading, others: list[Holder]) -> int:
    """Return about how much is in use by others than holders of slots."""
    reserved = sum(holder.reserved_bytes or 0 for holder in others)
    before = max((holder.foreign_bytes for holder in others), default=0)
    # What was there before a neighbour may have gone: no more is there than is in use.
    return min(reading.used_bytes, max(reading.used_bytes - reserved, before))


def _as_holder(
    request: Request, slot: int, reading: Reading | None, others: list[Holder]
) -> Holder:
    reserved: int | None = 0
    if request.alone:
        reserved = None
    elif reading is not None:
        reserved = request.need_bytes
    return Holder(
        slot=slot,
        pid=os.getpid(),
        label=request.label,
        reserved_bytes=reserved,
        foreign_bytes=_foreign(reading, others) if reading else 0,
    )


def _who(reading: Reading, others: list[Holder]) -> str:
    """Return who has how much of a GPU's memory."""
    parts = []
    for holder in others:
        used = reading.processes.get(holder.pid)
        has = "" if used is None else f", has {used / GB:.1f}"
        parts.append(f"{holder}: promised {(holder.reserved_bytes or 0) / GB:.1f} GB{has}")
    known = {holder.pid for holder in others}
    foreign = {pid: used for pid, used in reading.processes.items() if pid not in known}
    for pid, used in sorted(foreign.items(), key=lambda item: -(item[1] or 0)):
        amount = "an unknown amount" if used is None else f"{used / GB:.1f} GB"
        parts.append(f"pid {pid} of another program: {amount}")
    told = sum(used or 0 for used in reading.processes.values())
    if (untold := reading.used_bytes - told) > reading.total_bytes // 50:
        parts.append(f"{untold / GB:.1f} GB by processes that cannot be seen from here")
    return "; ".join(parts) or "nobody that can be seen from here"


def can_be_met(need: Need | None, total_bytes: int) -> bool:
    """Return whether a GPU has what a fit needs (0 bytes: it is not known what it has)."""
    if need is None or not total_bytes:
        return True
    return (need.total_bytes if need.least_bytes is None else need.least_bytes) <= total_bytes


def check_need(need: Need | None, total_bytes: int, gpu: str) -> None:
    """Refuse a need that no wait can meet.

    Raises
    ------
    PlatformError
        If a fit needs more memory than its GPU has.
    """
    if need is not None and not can_be_met(need, total_bytes):
        raise PlatformError(
            f"isolation.gpu_memory_gb: expected at most the {total_bytes / GB:.1f} GB of {gpu},"
            f" found {need.total_bytes / GB:.1f}",
            "lower it, or use a GPU with more memory",
        )
