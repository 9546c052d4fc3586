"""Which array task does which fit: a state machine without I/O, the clock passed in.

Events come in as method calls, what to do goes out as `actions`. Every message is answered exactly
once: by the first result that arrives, from whichever array task; by a failure, if the array tasks
that ran it were lost again and again; or by being withdrawn.
"""

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class Assign:
    """Send the message to the link's array task."""

    link: int
    message_id: str


@dataclass(frozen=True)
class Cancel:
    """The link's array task need not finish the message."""

    link: int
    message_id: str


@dataclass(frozen=True)
class Drop:
    """Close the link: it counts as lost."""

    link: int
    reason: str


@dataclass(frozen=True)
class Fail:
    """Answer the message with an error."""

    message_id: str
    reason: str


Action = Assign | Cancel | Drop | Fail


@dataclass
class _Message:
    message_id: str
    order: int
    pin: int | None
    links: set[int] = field(default_factory=set)
    losses: int = 0


@dataclass
class _Link:
    array_task: int
    slots: int
    heard_s: float
    assigned: set[str] = field(default_factory=set)


class Dispatch:
    """Assigns messages to links (the array tasks that are connected now).

    Parameters
    ----------
    array_tasks : int
        How many there are when all are connected; with ``pinned`` client k belongs to array task
        k modulo this.
    placement : {"any", "pinned"}
        Whether any array task may run a client's fits.
    min_array_tasks : int
        No work starts before so many were connected at the same time.
    liveness_timeout_s : float
        Silence after which a link counts as lost.
    max_losses : int
        How often a message may be lost with its array task before it fails; a fit that takes its
        node down must not take down every node.
    """

    def __init__(
        self,
        *,
        array_tasks: int,
        placement: Literal["any", "pinned"] = "any",
        min_array_tasks: int = 1,
        liveness_timeout_s: float = 15.0,
        max_losses: int = 3,
    ) -> None:
        self._array_tasks = array_tasks
        self._pinned = placement == "pinned"
        self._min_array_tasks = min_array_tasks
        self._liveness_timeout_s = liveness_timeout_s
        self._max_losses = max_losses
        self._started = False
        self._orders = 0
        self._messages: dict[str, _Message] = {}
        self._links: dict[int, _Link] = {}
        self._actions: list[Action] = []
        self._ticked_s: float | None = None

    # --- what is going on ---

    @property
    def array_tasks_connected(self) -> int:
        """How many array tasks are connected."""
        return len(self._links)

    @property
    def started(self) -> bool:
        """Whether the array tasks needed at the start have been there."""
        return self._started

    @property
    def running(self) -> int:
        """How many messages are with an array task."""
        return sum(1 for message in self._messages.values() if message.links)

    def running_on(self, link: int) -> int:
        """How many messages a link's array task has."""
        return len(self._links[link].assigned) if link in self._links else 0

    def links_of(self, array_task: int) -> list[int]:
        """Return the links of an array task."""
        return [number for number, link in self._links.items() if link.array_task == array_task]

    # --- events ---

    def submit(self, message_id: str, client_id: int) -> None:
        """Add a message that wants one answer.

        Raises
        ------
        ValueError
            If it is open already.
        """
        if message_id in self._messages:
            raise ValueError(f"message {message_id} is open already")
        pin = client_id % self._array_tasks if self._pinned else None
        self._messages[message_id] = _Message(message_id, self._orders, pin)
        self._orders += 1

    def withdraw(self, message_id: str) -> None:
        """Forget a message; whoever runs it is told."""
        message = self._messages.pop(message_id, None)
        if message is not None:
            self._release(message, cancel_except=None)

    def join(self, link: int, array_task: int, slots: int, held: list[str], now_s: float) -> None:
        """Note a new link of an array task; an older one of the same array task is dropped.

        Parameters
        ----------
        link : int
            A number never used before.
        array_task : int
            Its index.
        slots : int
            Fits it runs at a time.
        held : list of str
            Messages that it runs, or holds results of, from before.
        now_s : float
            The clock.
        """
        for older in self.links_of(array_task):
            self._lose(older, f"array task {array_task} connected again", blame=False)
        new = self._links[link] = _Link(array_task, slots, now_s)
        for message_id in held:
            message = self._messages.get(message_id)
            if message is None:
                self._actions.append(Cancel(link, message_id))
            else:
                message.links.add(link)
                new.assigned.add(message_id)
        if len(self._links) >= self._min_array_tasks:
            self._started = True

    def resize(self, link: int, slots: int) -> None:
        """Note how many fits a link's array task runs at a time from now on."""
        if link in self._links:
            self._links[link].slots = slots

    def hand_back(self, link: int, message_id: str, reason: str) -> None:
        """Note that a link's array task cannot run a message that it was given."""
        if link in self._links and message_id in self._links[link].assigned:
            self._links[link].assigned.discard(message_id)
            self._take_away(link, self._links[link], message_id, reason, blame=True)

    def leave(self, link: int, reason: str = "its stream broke") -> None:
        """Note that a link is gone."""
        if link in self._links:
            self._lose(link, reason)

    def heard(self, link: int, now_s: float) -> None:
        """Note a sign of life."""
        if link in self._links:
            self._links[link].heard_s = now_s

    def answered(self, link: int, message_id: str) -> bool:
        """Note a result; return whether it is the first one and so counts."""
        message = self._messages.pop(message_id, None)
        if link in self._links:
            self._links[link].assigned.discard(message_id)
        if message is None:
            return False
        self._release(message, cancel_except=link)
        return True

    def tick(self, now_s: float) -> None:
        """Let time pass. To be called several times within the liveness timeout."""
        if self._ticked_s is not None:
            gap_s = now_s - self._ticked_s
            if gap_s > self._liveness_timeout_s / 2:
                # We were stalled ourselves and read nothing meanwhile: blame nobody.
                for link in self._links.values():
                    link.heard_s = min(link.heard_s + gap_s, now_s)
        self._ticked_s = now_s
        for number, link in list(self._links.items()):
            silence_s = now_s - link.heard_s
            if silence_s > self._liveness_timeout_s:
                self._lose(number, f"array task {link.array_task} was silent for {silence_s:.0f} s")

    def actions(self) -> list[Action]:
        """Return what to do now, in order, and forget it."""
        self._assign()
        actions, self._actions = self._actions, []
        return actions

    # --- inside ---

    def _assign(self) -> None:
        if not self._started:
            return
        free = {
            number: link.slots - len(link.assigned)
            for number, link in self._links.items()
            if len(link.assigned) < link.slots
        }
        waiting = sorted(
            (message for message in self._messages.values() if not message.links),
            key=lambda message: message.order,
        )
        for message in waiting:
            if not free:
                return
            eligible = [
                number
                for number in free
                if message.pin is None or self._links[number].array_task == message.pin
            ]
            if not eligible:
                continue
            # The emptiest link first, so that few fits spread over all nodes.
            link = max(eligible, key=lambda number: (free[number], -number))
            message.links.add(link)
            self._links[link].assigned.add(message.message_id)
            self._actions.append(Assign(link, message.message_id))
            free[link] -= 1
            if free[link] == 0:
                del free[link]

    def _release(self, message: _Message, cancel_except: int | None) -> None:
        for number in sorted(message.links):
            self._links[number].assigned.discard(message.message_id)
            if number != cancel_except:
                self._actions.append(Cancel(number, message.message_id))

    def _lose(self, number: int, reason: str, *, blame: bool = True) -> None:
        link = self._links.pop(number)
        self._actions.append(Drop(number, reason))
        for message_id in sorted(link.assigned):
            self._take_away(number, link, message_id, reason, blame=blame)

    def _take_away(
        self, number: int, link: _Link, message_id: str, reason: str, *, blame: bool
    ) -> None:
        """Free a message for another link, unless it was lost too often."""
        message = self._messages[message_id]
        message.links.discard(number)
        message.losses += blame
        if message.losses >= self._max_losses and not message.links:
            del self._messages[message_id]
            self._actions.append(
                Fail(
                    message_id,
                    f"it was lost {message.losses} times with its array task or GPU; at last"
                    f" array task {link.array_task}: {reason}",
                )
            )
