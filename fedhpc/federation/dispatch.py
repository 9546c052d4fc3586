"""Which array task does which fit: a state machine without I/O, the clock passed in.

Events come in as method calls, what to do goes out as `actions`. Every message is answered exactly
once: by the first result that arrives, from whichever array task; by a failure, if the array tasks
that ran it were lost again and again; or by being withdrawn. What will take longest goes first, so
that a round does not end with one long fit and idle slots.

While more messages wait than the other array tasks have slots, an array task gets some ahead of
their turn, one for each slot and at least eight, so that none of its slots waits for the network. A
message that is ahead of its turn in one place moves on to a slot that is free in another.

An array task that comes back says which fits it has from before. Those that nobody has asked for
yet are *offers*: the server may be a new attempt that has not come as far again. An offer takes a
slot until it is asked for, has become pointless, or the slot is needed.
"""

import heapq
from bisect import insort
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from fedhpc.federation.actions import Action, Assign, Cancel, Drop, Fail, Keep, Turn
from fedhpc.federation.offers import Offers
from fedhpc.federation.roster import Link, Occupancy


@dataclass
class _Message:
    message_id: str
    order: tuple[float, int]
    pin: int | None
    fingerprint: str
    links: set[int] = field(default_factory=set)
    losses: int = 0


_Queue = list[tuple[tuple[float, int], str]]  # orders and ids of messages


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
        # By pin, in their order. That one was answered, withdrawn or assigned is found out later.
        self._waiting: defaultdict[int | None, _Queue] = defaultdict(list)
        self._changed: set[int | None] = set()  # pins whose messages or slots are to be looked at
        self._links: dict[int, Link] = {}
        self._occupancy = Occupancy()
        self._offers = Offers()
        self._actions: list[Action] = []
        self._awake_s: float | None = None
        self._patient_until_s = 0.0
        self._awaited: set[int] = set()  # array tasks that may come back with fits

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

    @property
    def has_messages(self) -> bool:
        """Whether messages wait for an answer."""
        return bool(self._messages)

    def occupancy(self) -> tuple[int, int]:
        """Return how many slots are connected, and how many of them have a message."""
        return self._occupancy.slots, self._occupancy.busy

    def running_on(self, link: int) -> int:
        """How many slots of a link's array task have a message, or an offer."""
        found = self._links.get(link)  # at once: other threads ask too
        return min(found.slots, len(found.assigned) + len(self._offers.of(link))) if found else 0

    def waiting_for(self, array_task: int) -> int:
        """How many messages wait for an array task, as they are pinned to it."""
        messages = list(self._messages.values())
        return sum(message.pin == array_task and not message.links for message in messages)

    def links_of(self, array_task: int) -> list[int]:
        """Return the links of an array task."""
        return [number for number, link in self._links.items() if link.array_task == array_task]

    # --- events ---

    def expect_back(self, until_s: float) -> None:
        """Give no work out until every array task is there: they may hold fits from before.

        Parameters
        ----------
        until_s : float
            When to wait no longer.
        """
        self._awaited = set(range(self._array_tasks))
        self._patient_until_s = until_s

    def submit(
        self, message_id: str, client_id: int | None, fingerprint: str = "", expected: float = 0.0
    ) -> None:
        """Add a message that wants one answer.

        Parameters
        ----------
        message_id : str
            The same for the same fit in every attempt of the server.
        client_id : int or None
            The one that is asked; None for work that any array task may do.
        fingerprint : str
            Of what is asked; an offer with another one is no answer.
        expected : float
            How long the fit will take compared with others, in any unit.

        Raises
        ------
        ValueError
            If it is open already.
        """
        if message_id in self._messages:
            raise ValueError(f"message {message_id} is open already")
        pin = client_id % self._array_tasks if self._pinned and client_id is not None else None
        message = _Message(message_id, (-expected, self._orders), pin, fingerprint)
        self._messages[message_id] = message
        self._wait_in_order(message)
        self._orders += 1
        for link, held in self._offers.ask(message_id):
            self._keep_or_cancel(link, message, held)

    def withdraw(self, message_id: str) -> None:
        """Forget a message; whoever runs it is told."""
        message = self._messages.pop(message_id, None)
        if message is not None:
            self._release(message, cancel_except=None)

    def join(
        self, link: int, array_task: int, slots: int, held: Mapping[str, str], now_s: float
    ) -> None:
        """Note a new link of an array task; an older one of the same array task is dropped.

        Parameters
        ----------
        link : int
            A number never used before.
        array_task : int
            Its index.
        slots : int
            Fits it runs at a time.
        held : mapping
            Messages that it runs, or holds results of, from before, with their fingerprints.
        now_s : float
            The clock.
        """
        for older in self.links_of(array_task):
            self._lose(older, f"array task {array_task} connected again", blame=False)
        self._awaited.discard(array_task)
        self._links[link] = Link(array_task, slots, now_s)
        for message_id, fingerprint in held.items():
            if message := self._messages.get(message_id):
                self._keep_or_cancel(link, message, fingerprint)
            elif self._offers.is_past(message_id):
                self._actions.append(Cancel(link, message_id))
            else:
                self._offers.add(link, message_id, fingerprint)
        self._count(link)
        if len(self._links) >= self._min_array_tasks:
            self._started = True

    def resize(self, link: int, slots: int) -> None:
        """Note how many fits a link's array task runs at a time from now on."""
        if link in self._links:
            self._links[link].slots = slots
            self._count(link)

    def hand_back(self, link: int, message_id: str, reason: str) -> None:
        """Note that a link's array task cannot run a message that it was given, or offered."""
        self._offers.remove(link, message_id)
        if link in self._links and self._links[link].assigned.pop(message_id, None) is not None:
            self._take_away(link, self._links[link], message_id, reason, blame=True)
        self._count(link)

    def leave(
        self, link: int, now_s: float, reason: str = "its stream broke", *, blame: bool = True
    ) -> None:
        """Note that a link is gone; its fits may be to ``blame``, unless it said goodbye.

        Soon after we were stalled ourselves it is not to blame: it will have found us silent. Then
        no work is given out until it is back, for up to the liveness timeout, so that others do
        not begin what it still holds.
        """
        self._note_awake(now_s)
        if link in self._links:
            patient = blame and now_s < self._patient_until_s
            if patient:
                self._awaited.add(self._links[link].array_task)
            self._lose(link, reason, blame=blame and not patient)

    def heard(self, link: int, now_s: float) -> None:
        """Note a sign of life."""
        if link in self._links:
            self._links[link].heard_s = now_s

    def answered(self, link: int, message_id: str) -> bool:
        """Note a result; return whether it is the first one and so counts."""
        message = self._messages.pop(message_id, None)
        if link in self._links:
            self._links[link].assigned.pop(message_id, None)
            self._count(link)
        if message is None:
            return False
        self._release(message, cancel_except=link)
        return True

    def tick(self, now_s: float) -> None:
        """Let time pass. To be called several times within the liveness timeout."""
        self._note_awake(now_s)
        if now_s >= self._patient_until_s:
            self._awaited.clear()
        for number, link in list(self._links.items()):
            silence_s = now_s - link.heard_s
            if silence_s > self._liveness_timeout_s:
                self._lose(number, f"array task {link.array_task} was silent for {silence_s:.0f} s")

    def actions(self) -> list[Action]:
        """Return what to do now, in order, and forget it."""
        for link, message_id in self._offers.past():
            self._cancel_offer(link, message_id)
        self._assign()
        actions, self._actions = self._actions, []
        return actions

    # --- inside ---

    def _note_awake(self, now_s: float) -> None:
        """Blame nobody for silence while we were stalled ourselves, and read nothing."""
        gap_s = 0.0 if self._awake_s is None else now_s - self._awake_s
        if gap_s > self._liveness_timeout_s / 2:
            for link in self._links.values():
                link.heard_s = min(link.heard_s + gap_s, now_s)
            self._patient_until_s = now_s + self._liveness_timeout_s
        self._awake_s = now_s

    def _wait_in_order(self, message: _Message) -> None:
        insort(self._waiting[message.pin], (message.order, message.message_id))
        self._changed.add(message.pin)

    def _count(self, number: int) -> None:
        """Count the slots of a link anew, after whatever may have changed them."""
        if link := self._links.get(number):
            self._actions += [Turn(number, message_id) for message_id in link.turns()]
            self._occupancy.count(number, link, len(self._offers.of(number)))
            self._changed |= {link.array_task, None} if self._pinned else {None}

    def _assign(self) -> None:
        if not self._started or self._awaited:
            return
        while self._changed:
            pin = self._changed.pop()
            if pin is None:
                self._assign_to(self._waiting[pin], None)
                if not self._pinned:
                    self._move_on()
            elif waiting := self._waiting.get(pin):
                self._assign_to(waiting, self.links_of(pin))

    def _assign_to(self, waiting: _Queue, eligible: list[int] | None) -> None:
        """Assign messages to links that may all run each of them; None: all links."""
        roomy, early = self._occupancy.roomy, self._occupancy.early
        # The emptiest link first, so that few fits spread over all nodes.
        may_run = roomy if eligible is None else roomy.intersection(eligible)
        emptiest = [(-self._free(number), number) for number in may_run]
        heapq.heapify(emptiest)
        while waiting:
            order, message_id = waiting[0]
            message = self._messages.get(message_id)
            if message is not None and message.order == order and not message.links:
                if emptiest:
                    _, link = heapq.heappop(emptiest)
                elif (found := self._make_room(message)) is not None:
                    link = found
                elif self._is_long(waiting, eligible) and (
                    may_have := early if eligible is None else early.intersection(eligible)
                ):
                    link = next(iter(may_have))
                else:
                    return
                self._assign_one(link, message)
                if (free := self._free(link)) > 0:
                    heapq.heappush(emptiest, (-free, link))
            del waiting[0]

    def _assign_one(self, number: int, message: _Message) -> None:
        message.links.add(number)
        self._links[number].assigned[message.message_id] = False
        self._actions.append(Assign(number, message.message_id))
        self._count(number)

    def _is_long(self, waiting: _Queue, eligible: list[int] | None) -> bool:
        """Return whether more messages wait than the other links that may run them have slots."""
        if self._pinned:
            return eligible is not None
        links = len(self._links)
        return len(waiting) * links > self._occupancy.slots * (links - 1)

    def _move_on(self) -> None:
        """Move messages that are ahead of their turn to slots that are free, as no others wait."""
        while not self._waiting[None] and self._occupancy.roomy and self._occupancy.behind:
            behind = max(self._occupancy.behind, key=lambda number: -self._free(number))
            message_id, _ = self._links[behind].assigned.popitem()
            message = self._messages[message_id]
            message.links.discard(behind)
            self._actions.append(Cancel(behind, message_id))
            self._count(behind)
            if not message.links:
                self._assign_one(max(self._occupancy.roomy, key=self._free), message)

    def _free(self, number: int) -> int:
        """Return how many slots of a link have neither a message nor an offer."""
        link = self._links[number]
        return link.slots - len(link.assigned) - len(self._offers.of(number))

    def _may_run(self, number: int, message: _Message) -> bool:
        return message.pin is None or self._links[number].array_task == message.pin

    def _make_room(self, message: _Message) -> int | None:
        """Cancel offers of a link that may run a message, and return it; None if there is none."""
        for number in self._offers.links():
            link = self._links[number]
            if len(link.assigned) < link.slots and self._may_run(number, message):
                while self._free(number) <= 0:
                    self._cancel_offer(number, min(self._offers.of(number)))
                return number
        return None

    def _keep_or_cancel(self, number: int, message: _Message, fingerprint: str) -> None:
        """Take what a link holds for an answer, if it answers what is asked."""
        if fingerprint == message.fingerprint:
            message.links.add(number)
            self._links[number].assigned[message.message_id] = False
            self._actions.append(Keep(number, message.message_id))
            self._count(number)
        else:
            self._actions.append(Cancel(number, message.message_id))
            self._count(number)  # it was an offer

    def _cancel_offer(self, number: int, message_id: str) -> None:
        self._offers.remove(number, message_id)
        self._count(number)
        self._actions.append(Cancel(number, message_id))

    def _release(self, message: _Message, cancel_except: int | None) -> None:
        for number in sorted(message.links):
            self._links[number].assigned.pop(message.message_id, None)
            if number != cancel_except:
                self._actions.append(Cancel(number, message.message_id))
            self._count(number)

    def _lose(self, number: int, reason: str, *, blame: bool = True) -> None:
        link = self._links.pop(number)
        self._occupancy.remove(number)
        self._offers.remove_all(number)
        self._actions.append(Drop(number, reason))
        for message_id, begun in sorted(link.assigned.items()):
            self._take_away(number, link, message_id, reason, blame=blame and begun)

    def _take_away(
        self, number: int, link: Link, message_id: str, reason: str, *, blame: bool
    ) -> None:
        """Free a message for another link, unless it was lost too often."""
        message = self._messages[message_id]
        message.links.discard(number)
        message.losses += blame
        if message.links:
            return
        if message.losses < self._max_losses:
            self._wait_in_order(message)
        else:
            del self._messages[message_id]
            self._actions.append(
                Fail(
                    message_id,
                    f"it was lost {message.losses} times with its array task or GPU; at last"
                    f" array task {link.array_task}: {reason}",
                )
            )
