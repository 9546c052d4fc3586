"""Small messages with file descriptors over Unix sockets, large data in anonymous memory.

A message is one datagram of a SOCK_SEQPACKET pair: a JSON object, with any number of file
descriptors attached, and bytes behind it. Large data never passes through the socket: it lies in a
memfd, which has no name, so nothing is left behind whoever dies, and which both sides map without a
copy. To make and map one takes longer than to copy a few pages, so small data goes as bytes.
"""

import array
import contextlib
import errno
import fcntl
import json
import mmap
import os
import socket
import threading
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

MAX_MESSAGE = 192 * 1024  # a socket takes 212,992 bytes
MAX_INLINE = 64 * 1024  # of it, behind the JSON
MAX_FDS = 250  # the kernel's SCM_MAX_FD is 253

BytesLike = bytes | bytearray | memoryview
Buffer = int | BytesLike  # a descriptor, or small data itself

_PREFIX = 4  # bytes: how long the JSON is
_TRUNCATED = int(socket.MSG_CTRUNC | socket.MSG_TRUNC)  # as a number: enum's flags are slow


class Received(NamedTuple):
    """A message, and what came with it."""

    message: dict[str, Any]
    fds: list[int]
    inline: memoryview


def pair() -> tuple[socket.socket, socket.socket]:
    """Return two connected message sockets."""
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)


def send(
    sock: socket.socket,
    message: dict[str, Any],
    fds: Sequence[int] = (),
    inline: Iterable[BytesLike] = (),
) -> None:
    """Send one message; the receiver gets its own copies of ``fds``.

    Parameters
    ----------
    sock : socket
        Of a `pair`.
    message : dict
        With ``inline`` at most `MAX_MESSAGE` bytes.
    fds : sequence of int
        At most `MAX_FDS` descriptors.
    inline : iterable of bytes-like
        At most `MAX_INLINE` bytes.

    Raises
    ------
    OSError
        If the other side is gone.
    """
    text = json.dumps(message).encode()
    socket.send_fds(sock, [len(text).to_bytes(_PREFIX, "little"), text, *inline], list(fds))


def send_buffers(sock: socket.socket, message: dict[str, Any], buffers: Sequence[Buffer]) -> None:
    """Send a message with buffers; `buffers_of` returns them on the other side.

    Raises
    ------
    OSError
        If the other side is gone.
    """
    # How much of the inline data each one is; -1: a descriptor.
    sizes = [-1 if isinstance(buffer, int) else len(buffer) for buffer in buffers]
    send(sock, {**message, "buffers": sizes}, descriptors(buffers), inline_data(buffers))


def receive(sock: socket.socket) -> Received | None:
    """Receive one message; None if the other side is gone.

    Raises
    ------
    TimeoutError
        If the socket has a timeout and nothing came within it.
    """
    try:
        data, fds, flags = _receive(sock)
    except ConnectionError:
        return None
    if not data:
        return None
    if flags & _TRUNCATED:
        close_all(fds)
        raise OSError(errno.EMFILE, "no file descriptor is left for a buffer")
    end = _PREFIX + int.from_bytes(data[:_PREFIX], "little")
    return Received(json.loads(data[_PREFIX:end]), fds, memoryview(data)[end:])


class _Room(threading.local):
    """Where a thread receives.

    Not in new memory for each message: what a fork server takes, its children do not get
    (`fedhpc.isolation.image`).
    """

    def __init__(self) -> None:
        self.buffer = bytearray(_PREFIX + MAX_MESSAGE)


_room = _Room()


def _receive(sock: socket.socket) -> tuple[bytes, list[int], int]:
    try:
        return _receive_once(sock)
    except ConnectionResetError:
        # The kernel tells first that the other side ended without reading all, and only then what
        # that side had sent.
        return _receive_once(sock)


def _receive_once(sock: socket.socket) -> tuple[bytes, list[int], int]:
    """Receive a datagram and its descriptors; Python 3.11's recv_fds forgets the flags."""
    fds, buffer = array.array("i"), _room.buffer
    size, ancillary, flags, _ = sock.recvmsg_into(
        [buffer], socket.CMSG_LEN(MAX_FDS * fds.itemsize), socket.MSG_CMSG_CLOEXEC
    )
    for level, kind, data in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            fds.frombytes(data[: len(data) - len(data) % fds.itemsize])
    with memoryview(buffer) as view:
        return bytes(view[:size]), fds.tolist(), flags


def buffers_of(received: Received) -> list[Buffer]:
    """Return the buffers that came with a message from `send_buffers`."""
    found: list[Buffer] = []
    left, start = iter(received.fds), 0
    for size in received.message["buffers"]:
        found.append(next(left) if size < 0 else received.inline[start : start + size])
        start += max(size, 0)
    return found


def descriptors(buffers: Iterable[Buffer]) -> list[int]:
    """Return the buffers that are descriptors."""
    return [buffer for buffer in buffers if isinstance(buffer, int)]


def inline_data(buffers: Iterable[Buffer]) -> list[BytesLike]:
    """Return the buffers that are data themselves."""
    return [buffer for buffer in buffers if not isinstance(buffer, int)]


def write_memory(parts: Iterable[BytesLike]) -> int:
    """Write ``parts`` one after the other into a new memfd and return its descriptor.

    The parts are gathered by the kernel: one copy. The memory is sealed against change, so that
    several processes can map it.
    """
    fd = os.memfd_create("fedhpc", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        for part in parts:
            append_memory(fd, part)
        seal_memory(fd)
    except BaseException:
        os.close(fd)
        raise
    return fd


def append_memory(fd: int, part: BytesLike) -> None:
    """Append ``part`` to an unsealed memfd."""
    view = memoryview(part).cast("B")
    while len(view):
        view = view[os.write(fd, view) :]


def seal_memory(fd: int) -> None:
    """Forbid every further change of a memfd."""
    seals = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)


def view(buffer: Buffer) -> memoryview:
    """Return the data of a buffer, read-only; a descriptor may be closed after it."""
    return map_file(buffer) if isinstance(buffer, int) else memoryview(buffer).toreadonly()


def map_file(fd: int) -> memoryview:
    """Map a memfd or a file, read-only, without a copy; the descriptor may be closed after it."""
    size = os.fstat(fd).st_size
    if size == 0:
        return memoryview(b"")
    return memoryview(mmap.mmap(fd, size, prot=mmap.PROT_READ, flags=mmap.MAP_PRIVATE))


def close_all(buffers: Iterable[Buffer]) -> None:
    """Close those buffers that are descriptors."""
    for fd in descriptors(buffers):
        with contextlib.suppress(OSError):
            os.close(fd)
