"""Calls that a kept child has ahead of their turn, so that it does not wait for the next one.

The child answers them in the order in which it was sent them. Nothing depends on that they are
there: if it ends, or leaves, each begins anew in another child when its turn comes.
"""

import contextlib
import select
import time
from collections.abc import Callable, Sequence
from typing import Any

from fedhpc.isolation import channel
from fedhpc.isolation.calls import Call
from fedhpc.isolation.children import Child, wanted_bytes

# Each reply would wake a thread, which takes a tenth of a call of a millisecond: while the child
# has more to do its replies wait here for each other.
_LINGER_S = 0.005
_UNWANTED_S = 1.0  # calls ahead are short


def send(
    child: Child, tag: str, message: dict[str, Any], buffers: Sequence[channel.Buffer]
) -> None:
    """Send a child a call.

    Raises
    ------
    OSError
        If it is gone, or its socket has no room in time.
    """
    channel.send_buffers(child.sock, message, buffers)
    child.sent.append(tag)


def send_following(child: Child, call: Call, message: dict[str, Any]) -> None:
    """Send a kept child what will follow, as far as it has room, and the memory that it needs."""
    child.sock.settimeout(0)
    for one in call.following:
        if one.tag in child.sent:
            continue
        if call.slot.gpus and call.slot.lock_folder:
            need = one.need()
            if wanted_bytes(need.total_bytes if need else None) > child.promise:
                return
        try:
            send(child, one.tag, message, one.buffers)
        except OSError:  # no room; or it is gone, or what it needs is: its own turn will tell
            return


def linger(child: Child) -> None:
    """Let replies of short calls come together, while the child has more to do."""
    more = len(child.sent) - 1
    poller = select.poll()
    poller.register(child.sock, select.POLLIN)
    if more > 0 and not poller.poll(0):
        time.sleep(min(_LINGER_S, more * child.took_s))


def pass_over(child: Child, tag: str, terms: Callable[[], dict[str, Any]]) -> bool:
    """Take the replies to calls ahead that nobody wants any more.

    Parameters
    ----------
    child : Child
        Who has them.
    tag : str
        The call that is wanted: those after it stay. If the child does not have it, none stays.
    terms : callable
        Returns what to tell the child if it asks.

    Returns
    -------
    bool
        Whether the child is to be used; else it has ended or left, or would take too long.
    """
    deadline_s = time.monotonic() + _UNWANTED_S
    with contextlib.suppress(OSError):  # a TimeoutError is one
        while child.sent and child.sent[0] != tag:
            child.sock.settimeout(max(0.001, deadline_s - time.monotonic()))
            received = channel.receive(child.sock)
            if received is None:
                return False
            if received.message.get("event") == "terms?":
                channel.send(child.sock, terms())
                continue
            channel.close_all(received.fds)
            child.sent.popleft()
            if received.message.get("last", True):
                return False
        return True
    return False
