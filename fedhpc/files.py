"""Files that several processes share: atomic writes, a disk that fails, waits with a deadline."""

import contextlib
import errno
import hashlib
import json
import logging
import mmap
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from fedhpc.errors import PlatformError

logger = logging.getLogger(__name__)
T = TypeVar("T")

# How long a write that matters waits for a disk that is full, or has lost its server.
PATIENCE_S = 60.0
READ_PATIENCE_S = 5.0
_MAY_PASS = {
    errno.ENOSPC, errno.EDQUOT,  # others are removing files, perhaps
    errno.ESTALE, errno.EIO, errno.ETIMEDOUT, errno.ENOTCONN, errno.ESHUTDOWN, errno.EREMOTEIO,
    errno.EAGAIN, errno.EINTR,
}  # fmt: skip
_HINTS = {
    errno.ENOSPC: "free space on the disk",
    errno.EDQUOT: "free space: the quota is used up",
    errno.EROFS: "the disk is read-only on this node: another node may do, or ask the site",
}
_fence: Callable[[], None] | None = None


@contextlib.contextmanager
def fenced(check: Callable[[], None]) -> Iterator[None]:
    """Call ``check`` in the last moment before anything is written here; it raises to prevent it.

    It holds for the whole process, so that no writer can be forgotten.
    """
    global _fence
    _fence = check
    try:
        yield
    finally:
        _fence = None


def is_of_disk(error: OSError) -> bool:
    """Return whether the disk failed, rather than that somebody asked for the impossible."""
    return error.errno in _MAY_PASS | _HINTS.keys()


def persist(action: Callable[[], T], what: str, patience_s: float | None = None) -> T:
    """Do something with the disk; again, while it fails in a way that may pass.

    Parameters
    ----------
    action : callable
        May be called many times; raises OSError.
    what : str
        For the log and the error: "write /a/file".
    patience_s : float, optional
        How long to try; `PATIENCE_S` unless told otherwise. A stale handle gets a second try in
        any case: to open the file again is all it needs.

    Raises
    ------
    PlatformError
        If it does not work before the deadline, or never will.
    """
    patience_s = PATIENCE_S if patience_s is None else patience_s
    start_s = time.monotonic()
    tries = 0
    while True:
        try:
            result = action()
        except OSError as error:
            waited_s = time.monotonic() - start_s
            stale = error.errno == errno.ESTALE and tries == 0
            if not stale and (error.errno not in _MAY_PASS or waited_s >= patience_s):
                after = f" (for {waited_s:.0f} s)" if waited_s >= 1 else ""
                raise PlatformError(
                    f"could not {what}: {error.strerror or error}{after}",
                    _HINTS.get(error.errno or 0, "check space, quota and permissions of the disk"),
                ) from error
            if tries == 1:
                logger.warning("could not %s: %s; waiting %.0f s", what, error, patience_s)
            time.sleep(min(0.05 * (2**tries - 1), 1.0))
            tries += 1
        else:
            if tries > 1:
                logger.warning("could %s after %.1f s", what, time.monotonic() - start_s)
            return result


def write_atomic(
    path: Path,
    data: str | bytes | Sequence[bytes | bytearray | memoryview],
    mode: int = 0o644,
    *,
    patience_s: float | None = None,
) -> None:
    """Write a file so that a reader sees the old content or the new, never a part.

    The data (text, bytes, or bytes in parts) goes into a file beside it (unique per thread), is
    synced, and replaces ``path``.

    Raises
    ------
    PlatformError
        If the disk refuses it: no permission, read-only, or full for longer than ``patience_s``
        (see `persist`).
    """
    text = data.encode() if isinstance(data, str) else data
    parts = [text] if isinstance(text, bytes) else text
    who = f"{os.uname().nodename}.{threading.get_native_id()}"
    beside = path.with_name(f".{path.name}.{who}.tmp")

    def write() -> None:
        try:
            fd = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode)
            with os.fdopen(fd, "wb") as file:
                file.writelines(parts)
                file.flush()
                os.fsync(file.fileno())
            if _fence is not None:
                _fence()
            beside.replace(path)
        except BaseException:
            with contextlib.suppress(OSError):
                beside.unlink()
            raise

    persist(write, f"write {path}", patience_s)


def write_json(
    path: Path, value: Any, mode: int = 0o644, *, patience_s: float | None = None
) -> None:
    """Write ``value`` as JSON with `write_atomic`."""
    write_atomic(path, json.dumps(value, indent=1) + "\n", mode, patience_s=patience_s)


def read_json(path: Path) -> Any | None:
    """Return the JSON value of a file; None if it is missing, unreadable, half-written, garbage."""
    try:
        return json.loads(persist(path.read_bytes, f"read {path}", READ_PATIENCE_S))
    except (PlatformError, ValueError):
        return None


def append_line(path: Path, *values: Any, patience_s: float | None = None) -> None:
    """Append each of ``values`` as one JSON line, in a single write.

    What a process that was killed has left of a line stays a line of its own.

    Raises
    ------
    PlatformError
        If the disk refuses it; see `write_atomic`.
    """
    text = "".join(json.dumps(value, separators=(",", ":")) + "\n" for value in values)
    line = text.encode()
    again = False

    def append() -> None:
        nonlocal again
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            size = os.fstat(fd).st_size
            tail = os.pread(fd, len(line), max(0, size - len(line)))
            if again and tail == line:  # only to close the file failed
                return
            again = True
            _append(fd, line if tail[-1:] in (b"", b"\n") else b"\n" + line)
        finally:
            os.close(fd)

    persist(append, f"append to {path}", patience_s)


def _append(fd: int, line: bytes) -> None:
    if _fence is not None:
        _fence()
    written = os.write(fd, line)
    if written == len(line):
        return
    try:
        os.write(fd, line[written:])  # full: this says so
    except OSError:
        end = os.lseek(fd, 0, os.SEEK_CUR)
        if os.fstat(fd).st_size == end:
            os.ftruncate(fd, end - written)
        raise


def read_lines(path: Path) -> Iterator[Any]:
    """Yield the values of a JSON-lines file, without a last line that is still being written.

    Raises
    ------
    PlatformError
        If the disk refuses it.
    """

    def read() -> str:
        try:
            return path.read_text(errors="replace")
        except FileNotFoundError:
            return ""

    for line in persist(read, f"read {path}", READ_PATIENCE_S).splitlines():
        try:
            yield json.loads(line)
        except ValueError:
            continue


def refresh_directory(folder: Path) -> None:
    """Make a network file system look the folder up again instead of trusting its cache.

    NFS clients cache names that do not exist; opening and listing the folder makes them ask.
    """
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        next(entries, None)


def wait_until(
    ready: Callable[[], bool],
    timeout_s: float,
    first_pause_s: float = 0.02,
    max_pause_s: float = 1.0,
) -> bool:
    """Poll ``ready`` with growing pauses until it is true; return False at the deadline."""
    deadline = time.monotonic() + timeout_s
    pause_s = first_pause_s
    while not ready():
        left_s = deadline - time.monotonic()
        if left_s <= 0:
            return False
        time.sleep(min(pause_s, left_s))
        pause_s = min(pause_s * 1.5, max_pause_s)
    return True


def claim(path: Path) -> bool:
    """Create an empty file if nobody has; return whether this call created it (O_EXCL)."""

    def create() -> bool:
        try:
            os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644))
        except FileExistsError:
            return False
        return True

    return persist(create, f"create {path}")


def open_whole(path: Path, size: int | None = None, timeout_s: float = 30.0) -> int:
    """Return a descriptor of a file that another node has written, once all of it is seen here.

    Where ``size`` is not known the file counts as whole as soon as it is there.

    Raises
    ------
    PlatformError
        If that is not so before the deadline.
    """
    found: list[int] = []
    seen = "no file"

    def whole() -> bool:
        nonlocal seen
        refresh_directory(path.parent)
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            seen = error.strerror or "no file"
            return False
        length = os.fstat(fd).st_size
        if size is None or length == size:
            found.append(fd)
            return True
        os.close(fd)
        seen = f"{length} bytes"
        return False

    if not wait_until(whole, timeout_s):
        raise PlatformError(
            f"wanted {path}{f' with {size} bytes' if size else ''}, found {seen} for"
            f" {timeout_s:.0f} s",
            "is the run folder on a disk that this node sees?",
        )
    return found[0]


def map_whole(path: Path, size: int | None = None, timeout_s: float = 30.0) -> memoryview:
    """Return the content of a file that another node has written; see `open_whole`."""
    fd = open_whole(path, size, timeout_s)
    try:
        return memoryview(mmap.mmap(fd, 0, prot=mmap.PROT_READ))
    finally:
        os.close(fd)


def unload(data: memoryview) -> None:
    """Let the pages of a mapped file leave this process's memory; what is mapped stays readable.

    All of them, as the kernel maps some more around each that is touched. Other memory is left
    alone.
    """
    mapping = data.obj
    if isinstance(mapping, mmap.mmap) and len(mapping):
        mapping.madvise(mmap.MADV_DONTNEED)


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file's content, as 64 hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def remove(path: Path) -> None:
    """Remove a file that nobody needs any more; a disk that refuses it keeps some waste."""
    try:
        if _fence is not None:
            _fence()
        path.unlink(missing_ok=True)
    except OSError as error:
        logger.warning("could not remove %s: %s", path, error.strerror)
