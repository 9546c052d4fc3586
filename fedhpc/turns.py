"""Whose turn it is: which slot of an array task runs which fit next."""

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


class Turns:
    """Gives fits to slots: one at a time to each, and short ones ahead of their turn.

    Parameters
    ----------
    slots : sequence of Slot
        Of the array task.
    binds_ahead : bool
        Whether a slot may have fits ahead of their turn.
    clock : callable
        Returns seconds.
    """

    def __init__(
        self,
        slots: Sequence[Slot],
        *,
        binds_ahead: bool,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._binds_ahead = binds_ahead
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
        self._took_s: dict[int, float] = {}

    def slots(self) -> list[Slot]:
        """Return the slots that are not lost."""
        with self._lock:
            return list(self._slots)

    def give(self, held: Held) -> None:
        """Give a fit to the slot that is free for longest, on the GPU that has fewest."""
        with self._lock:
            self._give(held)

    def next(self, slot: Slot) -> Held | None:
        """Wait for the next fit of a slot; None if the slot is lost."""
        number, given = slot.index, self._given_to[slot.index]
        while True:
            with self._lock:
                self._idle.pop(number, None)
                if slot not in self._slots:
                    return None
                if not given.empty():
                    return given.get()
                if found := self._ahead[number] or self._waiting:
                    return found.popleft()
                if stuck := self._stuck():
                    return stuck.pop()
                self._idle[number] = slot
                others_have = any(self._ahead.values())
            try:
                held = given.get(timeout=_AHEAD_S if others_have else None)
            except queue.Empty:
                continue
            return held

    def bind_ahead(self, slot: Slot) -> list[Held]:
        """Return the fits that will follow in a slot, more of them if its fits are short.

        Until `began` nobody else takes them.
        """
        with self._lock:
            self._since_s.pop(slot.index, None)  # nobody takes what is just being sent
            ahead = self._ahead[slot.index]
            took_s = self._took_s.get(slot.index, _AHEAD_S)
            while (
                self._binds_ahead
                and self._waiting
                and len(ahead) < _MOST_AHEAD
                and (len(ahead) + 1) * took_s < _AHEAD_S
            ):
                ahead.append(self._waiting.popleft())
            return list(ahead)

    def began(self, slot: Slot) -> None:
        """Note that a slot's fit runs; from now on others may take what it has ahead."""
        with self._lock:
            self._since_s[slot.index] = self._clock()

    def ended(self, slot: Slot, took_s: float | None) -> None:
        """Note that a slot's fit has ended, and how long it ran, where that is known."""
        with self._lock:
            self._since_s.pop(slot.index, None)
            self._took_s[slot.index] = _AHEAD_S if took_s is None else took_s

    def has_next(self, slot: Slot) -> bool:
        """Return whether a slot's next fit is here already."""
        with self._lock:
            return bool(self._ahead[slot.index] or self._waiting)

    def lose(self, slots: Sequence[Slot]) -> list[Slot]:
        """Give the fits of slots that are lost to others; return those that are left."""
        with self._lock:
            self._slots = [slot for slot in self._slots if slot not in slots]
            for slot in slots:
                ahead = self._ahead[slot.index]
                while ahead:
                    self._give(ahead.popleft())
            return list(self._slots)

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
