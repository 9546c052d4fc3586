"""Whose turn it is: which slot of an array task runs which fit next."""

import contextlib
import math
import queue
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence

from fedhpc.held import Held
from fedhpc.isolation import Slot

# A kept child that has its next fits already does not wait for them, and its replies travel
# together. Bound to a slot are at most so many, which shall take so long.
_MOST_AHEAD = 6
_AHEAD_S = 0.02
# How long results may wait for others: each message on its own costs the server and the array task
# 2 ms of CPU.
_LEAST_UNTOLD_S = 0.01
_MOST_UNTOLD_S = 0.2


class Turns:
    """Gives fits to slots: one at a time to each, and short ones ahead of their turn.

    Parameters
    ----------
    slots : sequence of Slot
        Of the array task.
    binds_ahead : bool
        Whether a slot may have fits ahead of their turn.
    alone : bool
        Whether no other array task could run what waits here.
    closes_early : bool
        Whether the server may have enough results before all fits have ended.
    clock : callable
        Returns seconds.
    """

    def __init__(
        self,
        slots: Sequence[Slot],
        *,
        binds_ahead: bool,
        alone: bool = True,
        closes_early: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._binds_ahead = binds_ahead
        # The server moves the last fits that wait here to slots that are free elsewhere. Until it
        # knows that a fit has ended, it takes the next one, which has begun, for one that waits.
        self._least_behind = math.inf if closes_early else 1 if alone else 1 + len(slots)
        self._clock = clock
        self._lock = threading.Lock()
        self._slots = list(slots)
        self._waiting: deque[Held] = deque()  # every slot is busy
        self._idle: dict[int, Slot] = {}
        self._given_to: dict[int, queue.SimpleQueue[Held]] = {
            slot.index: queue.SimpleQueue() for slot in slots
        }
        self._ahead: dict[int, deque[Held]] = {slot.index: deque() for slot in slots}
        self._since_s: dict[int, float] = {}
        self._took_s: dict[str, float] = {}  # the last fit of each verb

    def give(self, held: Held) -> None:
        """Give a fit to the slot that is free for longest, on the GPU that has fewest."""
        with self._lock:
            self._give(held)

    def next(self, slot: Slot, on_idle: Callable[[], None]) -> Held | None:
        """Wait for the next fit of a slot; None if the slot is lost.

        Parameters
        ----------
        slot : Slot
            Whose turn it is.
        on_idle : callable
            Called once before it waits.
        """
        number, given = slot.index, self._given_to[slot.index]
        told = False
        while True:
            with self._lock:
                self._idle.pop(number, None)
                if not given.empty():
                    return given.get()
                if slot not in self._slots:
                    return None
                if found := self._ahead[number] or self._waiting:
                    return found.popleft()
                if stuck := self._stuck():
                    return stuck.pop()
                if told:
                    self._idle[number] = slot
                others_have = any(self._ahead.values())
            if not told:
                on_idle()
                told = True
                continue
            with contextlib.suppress(queue.Empty):
                return given.get(timeout=_AHEAD_S if others_have else None)

    def bind_ahead(self, slot: Slot) -> list[Held]:
        """Return the fits that will follow in a slot, more of them where those are short."""
        with self._lock:
            # From now on it counts as stuck, also if it waits for a process or for memory.
            self._since_s[slot.index] = self._clock()
            ahead = self._ahead[slot.index]
            took_s = sum(map(self._expected_s, ahead))
            while self._binds_ahead and self._waiting and len(ahead) < _MOST_AHEAD:
                took_s += self._expected_s(self._waiting[0])
                if took_s >= _AHEAD_S:
                    break
                ahead.append(self._waiting.popleft())
            return list(ahead)

    def ended(self, slot: Slot, held: Held, took_s: float | None) -> None:
        """Note that a slot's fit has ended, and how long it ran, where that is known."""
        with self._lock:
            self._since_s.pop(slot.index, None)
            self._took_s[held.verb] = _AHEAD_S if took_s is None else took_s

    def time_to_tell_s(self, slot: Slot) -> float:
        """Return how long the server need not know that a slot's fit has ended.

        That is two of the next fit, as far as is known, if it is here already and no slot is idle,
        and more of them where another array task could be given the last ones. Not at all where
        the server may be waiting for just this result.
        """
        with self._lock:
            following = [*self._ahead[slot.index], *self._waiting]
            if self._idle or len(following) < self._least_behind:
                return 0.0
            return min(max(_LEAST_UNTOLD_S, 2 * self._expected_s(following[0])), _MOST_UNTOLD_S)

    def lose(self, slots: Sequence[Slot]) -> list[Slot]:
        """Give the fits of slots that are lost to others; return those that are left."""
        with self._lock:
            self._slots = [slot for slot in self._slots if slot not in slots]
            for slot in slots:
                ahead = self._ahead[slot.index]
                while ahead:
                    self._give(ahead.popleft())
            return list(self._slots)

    def _expected_s(self, held: Held) -> float:
        return self._took_s.get(held.verb, _AHEAD_S)

    def _give(self, held: Held) -> None:
        """See `give`; the lock is held."""
        busy = Counter(
            gpu for slot in self._slots if slot.index not in self._idle for gpu in slot.gpus
        )
        if free := [slot for slot in self._idle.values() if slot in self._slots]:
            slot = min(free, key=lambda slot: sum(busy[gpu] for gpu in slot.gpus))
            del self._idle[slot.index]
            self._given_to[slot.index].put(held)
        else:
            self._waiting.append(held)

    def _stuck(self) -> deque[Held] | None:
        """Return what waits behind a fit that takes longer than was believed; locked."""
        long_ago_s = self._clock() - _AHEAD_S
        for number, since_s in self._since_s.items():
            if since_s < long_ago_s and self._ahead[number]:
                return self._ahead[number]
        return None
