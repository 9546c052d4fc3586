"""The links of a server and their slots: part of `dispatch`, and as pure.

What follows from them is kept up to date, not found anew at each result: a run may have a thousand.
"""

from dataclasses import dataclass, field
from itertools import islice

_LEAST_AHEAD = 8  # of fits that take milliseconds: enough while others travel in batches


@dataclass
class Link:
    """A connected array task.

    Attributes
    ----------
    array_task : int
        Its index.
    slots : int
        Fits it runs at a time.
    heard_s : float
        When it was heard last.
    assigned : dict of str to bool
        Messages that it has, in the order in which it has got them, and whether their turn has
        come: the others are there ahead of it.
    """

    array_task: int
    slots: int
    heard_s: float
    assigned: dict[str, bool] = field(default_factory=dict)

    def turns(self) -> list[str]:
        """Return the messages whose turn has come since the last call."""
        begun = [name for name, had in islice(self.assigned.items(), self.slots) if not had]
        self.assigned.update(dict.fromkeys(begun, True))
        return begun


def ahead(slots: int) -> int:
    """Return how many messages a link may have ahead of their turn."""
    return max(slots, _LEAST_AHEAD)


class Occupancy:
    """Slots of all links.

    Attributes
    ----------
    slots, busy : int
        How many there are, and how many of them have a message.
    roomy : set of int
        Links with a slot that has neither a message nor an offer.
    early : set of int
        Links without, that may have one more message ahead of its turn: see `ahead`.
    behind : set of int
        Links that have a message ahead of its turn.
    """

    def __init__(self) -> None:
        self.slots = self.busy = 0
        self.roomy: set[int] = set()
        self.early: set[int] = set()
        self.behind: set[int] = set()
        self._counted: dict[int, tuple[int, int]] = {}

    def count(self, number: int, link: Link, offers: int) -> None:
        """Count a link anew, after whatever may have changed it."""
        self.remove(number)
        busy = min(link.slots, len(link.assigned))
        self._counted[number] = link.slots, busy
        self.slots += link.slots
        self.busy += busy
        taken = len(link.assigned) + offers
        if taken < link.slots:
            self.roomy.add(number)
        elif taken < link.slots + ahead(link.slots):
            self.early.add(number)
        if not all(islice(reversed(link.assigned.values()), 1)):
            self.behind.add(number)

    def remove(self, number: int) -> None:
        """Forget a link."""
        slots, busy = self._counted.pop(number, (0, 0))
        self.slots -= slots
        self.busy -= busy
        for links in (self.roomy, self.early, self.behind):
            links.discard(number)
