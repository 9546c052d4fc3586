"""Files that several processes share: atomic writes and waits with a deadline."""

import contextlib
import errno
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from fedhpc.errors import PlatformError


def write_atomic(
    path: Path, data: str | bytes | Sequence[bytes | bytearray | memoryview], mode: int = 0o644
) -> None:
    """Write a file so that a reader sees the old content or the new, never a part.

    The data (text, bytes, or bytes in parts) goes into a file beside it (unique per process), is
    synced, and replaces ``path``.

    Raises
    ------
    PlatformError
        If the disk refuses it (full, read-only, no permission).
    """
    text = data.encode() if isinstance(data, str) else data
    parts = [text] if isinstance(text, bytes) else text
    beside = path.with_name(f".{path.name}.{os.uname().nodename}.{os.getpid()}.tmp")
    try:
        fd = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode)
        with os.fdopen(fd, "wb") as file:
            file.writelines(parts)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            beside.unlink()
        if not isinstance(error, OSError):
            raise
        raise PlatformError(
            f"could not write {path}: {error.strerror}",
            "check space, quota and permissions of the disk",
        ) from error


def write_json(path: Path, value: Any, mode: int = 0o644) -> None:
    """Write ``value`` as JSON with `write_atomic`."""
    write_atomic(path, json.dumps(value, indent=1) + "\n", mode)


def read_json(path: Path) -> Any | None:
    """Return the JSON value of a file, or None if it is missing, half-written or garbage."""
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None


def append_line(path: Path, value: Any) -> None:
    """Append ``value`` as one JSON line, in a single write.

    Raises
    ------
    PlatformError
        If the disk refuses it.
    """
    line = (json.dumps(value, separators=(",", ":")) + "\n").encode()
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            written = os.write(fd, line)
            if written < len(line):  # the disk is full: a half line would spoil the next one
                os.ftruncate(fd, os.fstat(fd).st_size - written)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        finally:
            os.close(fd)
    except OSError as error:
        raise PlatformError(
            f"could not append to {path}: {error.strerror}", "check the disk"
        ) from error


def read_lines(path: Path) -> Iterator[Any]:
    """Yield the values of a JSON-lines file, without a last line that is still being written."""
    try:
        text = path.read_text(errors="replace")
    except FileNotFoundError:
        return
    for line in text.splitlines():
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
    try:
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644))
    except OSError as error:
        if error.errno == errno.EEXIST:
            return False
        raise PlatformError(
            f"could not create {path}: {error.strerror}", "check the disk"
        ) from error
    return True
