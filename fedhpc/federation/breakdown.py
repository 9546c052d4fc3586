"""Where the time of a round went: that of the server's thread, and that of all slots.

Only durations are added up, each measured by one clock: those of two machines are never compared.
"""

import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

# What the server's thread does in a round (`clients`: it waits for them); the rest is OTHER.
OTHER = "other"
PHASES = ("configure", "send", "clients", "receive", "aggregate", "evaluate", "checkpoint", OTHER)

# What slots do. Of a fit that was of use: it waited for its slot and memory, its child started,
# the app ran, the reply was handed over in the array task; what is left of the time from its turn
# (it was assigned, and a slot was free) until its result was there is the link's. `lost` are fits
# that were of no use: failed, cancelled, late, or lost with their array task. Without a fit a slot
# is `idle` while clients are asked something (at the end of a round: its tail), and `between` while
# they are not.
OF_FIT = ("wait", "start", "run", "return")
USES = (*OF_FIT, "link", "lost", "idle", "between")


class Stopwatch:
    """Adds up the seconds of one thread by what it does; each moment counts once.

    Parameters
    ----------
    clock : callable
        Returns seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._since_s = clock()
        self._phase = OTHER
        self._seconds: defaultdict[str, float] = defaultdict(float)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the time inside as this phase's, and not as that of one around it."""
        outer = self._switch(name)
        try:
            yield
        finally:
            self._switch(outer)

    def lap(self) -> dict[str, float]:
        """Return the seconds of each phase since the last lap: in all, the time since then."""
        self._switch(self._phase)
        seconds, self._seconds = self._seconds, defaultdict(float)
        return dict(seconds)

    def _switch(self, name: str) -> str:
        now_s = self._clock()
        self._seconds[self._phase] += now_s - self._since_s
        self._since_s = now_s
        before, self._phase = self._phase, name
        return before


@dataclass(frozen=True)
class SlotSeconds:
    """Slot-seconds of all array tasks that were connected, since the beginning.

    Attributes
    ----------
    busy_s : float
        With a fit, from its turn until its result was there.
    idle_s : float
        Without one, while clients were asked something.
    between_s : float
        Without one, while they were not.
    """

    busy_s: float = 0.0
    idle_s: float = 0.0
    between_s: float = 0.0

    def __sub__(self, other: "SlotSeconds") -> "SlotSeconds":
        return SlotSeconds(
            self.busy_s - other.busy_s,
            self.idle_s - other.idle_s,
            self.between_s - other.between_s,
        )


class SlotLedger:
    """Adds up `SlotSeconds`. One thread notes what has changed, any may read.

    Parameters
    ----------
    now_s : float
        The clock.
    """

    def __init__(self, now_s: float) -> None:
        self._lock = threading.Lock()
        self._now_s = now_s
        self._slots = 0
        self._busy = 0
        self._asked = False
        self._sums = SlotSeconds()

    def note(self, now_s: float, *, slots: int, busy: int, asked: bool) -> None:
        """Note what holds from now on.

        Parameters
        ----------
        now_s : float
            The clock.
        slots, busy : int
            Of all array tasks that are connected, and those of them with a fit.
        asked : bool
            Whether clients are asked something.
        """
        with self._lock:
            self._advance(now_s)
            self._slots, self._busy, self._asked = slots, busy, asked

    def read(self, now_s: float) -> SlotSeconds:
        """Return the sums until now."""
        with self._lock:
            self._advance(now_s)
            return self._sums

    def _advance(self, now_s: float) -> None:
        step_s = max(0.0, now_s - self._now_s)
        self._now_s = max(now_s, self._now_s)
        busy_s = step_s * self._busy
        free_s = step_s * max(0, self._slots - self._busy)
        idle_s, between_s = (free_s, 0.0) if self._asked else (0.0, free_s)
        sums = self._sums
        self._sums = SlotSeconds(
            sums.busy_s + busy_s, sums.idle_s + idle_s, sums.between_s + between_s
        )


class SlotAccount:
    """Splits slot-seconds into what slots do (`USES`)."""

    def __init__(self) -> None:
        self._before = SlotSeconds()
        self._of_fits: defaultdict[str, float] = defaultdict(float)
        self._early: defaultdict[str, float] = defaultdict(float)

    def add(self, held_s: float, of_fit: dict[str, float]) -> float:
        """Note a fit that was of use; return the link's part of it.

        Parameters
        ----------
        held_s : float
            Seconds from its turn until its result was there.
        of_fit : dict
            What the array task says that they went into: seconds for each of `OF_FIT`.
        """
        # One that came back with its array task, or was there ahead of its turn, has begun earlier:
        # while the result before it, in the same slot, was still on its way.
        share = min(1.0, held_s / told_s) if (told_s := sum(of_fit.values())) > 0 else 1.0
        for use, seconds in of_fit.items():
            self._of_fits[use] += share * seconds
            self._early[use] += (1 - share) * seconds
        link_s = held_s - share * told_s
        self._of_fits["link"] += link_s
        return link_s

    def lap(self, now: SlotSeconds) -> dict[str, float]:
        """Return the slot-seconds of each use since the last lap; {} if there was no slot."""
        passed, self._before = now - self._before, now
        uses, self._of_fits = self._of_fits, defaultdict(float)
        early, self._early = self._early, defaultdict(float)
        if (early_s := sum(early.values())) > 0:
            on_the_way_s = min(uses["link"], early_s)
            uses["link"] -= on_the_way_s
            for use, seconds in early.items():
                uses[use] += seconds * on_the_way_s / early_s
        uses["lost"] = max(0.0, passed.busy_s - sum(uses.values()))
        uses["idle"], uses["between"] = passed.idle_s, passed.between_s
        return dict(uses) if sum(uses.values()) > 0 else {}
