"""What the grid asks of whatever carries messages to array tasks and results back."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from fedhpc.federation import grid_pb2
from fedhpc.federation.breakdown import SlotSeconds
from fedhpc.federation.payload import Packed

_STALLED_S = 5.0


@dataclass(frozen=True)
class Request:
    """A message for a client.

    Attributes
    ----------
    message_id, client_id, packed
        What is asked, and of whom.
    expected : float
        Its work compared with others', in any unit.
    anywhere : bool
        Whether any array task may do it, also if clients are pinned.
    """

    message_id: str
    client_id: int
    packed: Packed
    expected: float = 0.0
    anywhere: bool = False


@dataclass(frozen=True)
class Response:
    """The one answer to a message.

    Attributes
    ----------
    payload : Payload or None
        The reply, if there is one.
    blobs : dict
        Bytes of the reply's arrays, by digest.
    files : dict
        Sizes of those arrays of the reply that are files of the run folder, by digest.
    failure : Failure or None
        Why there is no reply.
    fit : Fit or None
        How the fit went, if a child ran it.
    array_task : int or None
        Where it ran, and on which ``host``.
    held_s : float
        Seconds from its turn on that array task until its result was there.
    """

    message_id: str
    payload: grid_pb2.Payload | None = None
    blobs: dict[str, memoryview] = field(default_factory=dict, repr=False)
    files: dict[str, int] = field(default_factory=dict)
    failure: grid_pb2.Failure | None = None
    fit: grid_pb2.Fit | None = None
    array_task: int | None = None
    host: str = ""
    held_s: float = 0.0


class WorkClock:
    """Seconds in which work could go on, read about every second by somebody who waits.

    Between two readings far from each other this process was stalled, or busy itself: what has
    been answered meanwhile is not late.

    Parameters
    ----------
    now_s : float
        The clock.
    """

    def __init__(self, now_s: float) -> None:
        self._now_s = now_s
        self._worked_s = 0.0

    def read(self, now_s: float, *, at_work: bool) -> float:
        """Return the seconds so far; those since the last reading count if somebody is at work."""
        step_s, self._now_s = now_s - self._now_s, now_s
        if at_work and step_s < _STALLED_S:
            self._worked_s += step_s
        return self._worked_s


class Transport(Protocol):
    """Carries requests to where they run."""

    def send(self, requests: Sequence[Request]) -> None:
        """Take requests; each is answered exactly once unless it is withdrawn."""

    def receive(self, message_ids: Iterable[str], timeout_s: float) -> list[Response]:
        """Return the answers that are there, waiting up to ``timeout_s`` for the first of them.

        Raises
        ------
        PlatformError
            If nobody is there, or will be, to answer.
        """

    def clock_s(self) -> float:
        """Return a clock for deadlines, to be read about every second; see `WorkClock`."""

    def slot_seconds(self) -> SlotSeconds:
        """Return what slots have done so far; all 0 where there are none."""

    def withdraw(self, message_ids: Iterable[str]) -> list[Response]:
        """Forget requests; running fits are cancelled. Returns answers that have come already."""
