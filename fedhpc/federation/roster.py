"""The links of a server and their slots: part of `dispatch`, and as pure.

What follows from them is kept up to date, not found anew at each result: a run may have a thousand.
"""

from dataclasses import dataclass, field


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
    assigned : set of str
        Messages that it has.
    """

    array_task: int
    slots: int
    heard_s: float
    assigned: set[str] = field(default_factory=set)


class Occupancy:
    """Slots of all links.

    Attributes
    ----------
    slots, busy : int
        How many there are, and how many of them have a message.
    roomy : set of int
        Links with a slot that has neither a message nor an offer.
    """

    def __init__(self) -> None:
        self.slots = self.busy = 0
        self.roomy: set[int] = set()
        self._counted: dict[int, tuple[int, int]] = {}

    def count(self, number: int, link: Link, offers: int) -> None:
        """Count a link anew, after whatever may have changed it."""
        self.remove(number)
        busy = min(link.slots, len(link.assigned))
        self._counted[number] = link.slots, busy
        self.slots += link.slots
        self.busy += busy
        if link.slots > len(link.assigned) + offers:
            self.roomy.add(number)

    def remove(self, number: int) -> None:
        """Forget a link."""
        slots, busy = self._counted.pop(number, (0, 0))
        self.slots -= slots
        self.busy -= busy
        self.roomy.discard(number)
