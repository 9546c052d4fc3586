"""Small messages with file descriptors over Unix sockets, large data in anonymous memory.

A message is one datagram of a SOCK_SEQPACKET pair: a JSON object, with any number of file
descriptors attached. Large data never passes through the socket: it lies in a memfd, which has no
name, so nothing is left behind whoever dies, and which both sides map without a copy.
"""

import contextlib
import errno
import fcntl
import json
import mmap
import os
import socket
from collections.abc import Iterable, Sequence
from typing import Any

MAX_MESSAGE = 128 * 1024
MAX_FDS = 250  # the kernel's SCM_MAX_FD is 253

BytesLike = bytes | bytearray | memoryview


def pair() -> tuple[socket.socket, socket.socket]:
    """Return two connected message sockets."""
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)


def send(sock: socket.socket, message: dict[str, Any], fds: Sequence[int] = ()) -> None:
    """Send one message; the receiver gets its own copies of ``fds``.

    Raises
    ------
    OSError
        If the other side is gone.
    """
    socket.send_fds(sock, [json.dumps(message).encode()], list(fds))


def receive(sock: socket.socket) -> tuple[dict[str, Any], list[int]] | None:
    """Receive one message and its file descriptors; None if the other side is gone.

    Raises
    ------
    TimeoutError
        If the socket has a timeout and nothing came within it.
    """
    try:
        data, fds, flags, _ = socket.recv_fds(sock, MAX_MESSAGE, MAX_FDS, socket.MSG_CMSG_CLOEXEC)
    except ConnectionError:
        return None
    if not data:
        return None
    if flags & (socket.MSG_CTRUNC | socket.MSG_TRUNC):
        close_all(fds)
        raise OSError(errno.EMFILE, "no file descriptor is left for a buffer")
    return json.loads(data), list(fds)


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


def map_file(fd: int) -> memoryview:
    """Map a memfd or a file, read-only, without a copy; the descriptor may be closed after it."""
    size = os.fstat(fd).st_size
    if size == 0:
        return memoryview(b"")
    return memoryview(mmap.mmap(fd, size, prot=mmap.PROT_READ, flags=mmap.MAP_PRIVATE))


def close_all(fds: Iterable[int]) -> None:
    """Close descriptors."""
    for fd in fds:
        with contextlib.suppress(OSError):
            os.close(fd)
