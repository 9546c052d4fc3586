"""Slot locks: which fits may run on a GPU now, agreed on by all processes of a user on a node.

Each slot of a GPU is a file that a fit's child process opens and locks (flock) itself: the kernel
frees the lock when the child is gone, however it went. A gate, one more file, orders those who want
a slot: whoever holds it is next, and looks at slots and memory in peace. The files stay for ever:
to remove one would let two processes hold "the same" lock.
"""

import contextlib
import fcntl
import json
import os
import re
import stat
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from fedhpc.errors import PlatformError

_NETWORK_DISKS = re.compile("nfs|lustre|gpfs|beegfs|ceph|panfs|wekafs|cifs|smb|9p|afs|fuse")
_CHOOSE = "name a folder of the node with isolation.lock_dir, e.g. /var/tmp/fedhpc-$USER"
_MAX_RECORD = 4096
_MAX_LABEL = 256  # characters; JSON takes up to 12 bytes for one

# Locks of this process. A fork of it would keep them locked after its death.
_open: set[int] = set()


def _close_in_fork() -> None:
    for fd in _open:
        with contextlib.suppress(OSError):
            os.close(fd)
    _open.clear()


os.register_at_fork(after_in_child=_close_in_fork)


def default_folder() -> Path:
    """Return the folder that all processes of this user on this node use unless told otherwise."""
    # Not TMPDIR: sites set that for each job.
    return Path(f"/tmp/fedhpc-{os.geteuid()}")  # noqa: S108


def identity(folder: Path) -> str:
    """Return device and inode: processes of a node that see the same folder have the same."""
    status = folder.stat()
    return f"{status.st_dev}:{status.st_ino}"


def prepare_folder(folder: Path) -> None:
    """Make sure that locks in ``folder`` hold and nobody else can touch them.

    Raises
    ------
    PlatformError
        If it is not a folder of this user alone, or not of this node.
    """
    if not folder.is_absolute():
        raise PlatformError(f"isolation.lock_dir: expected an absolute path, found {folder}")
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = folder.lstat()
    except FileExistsError:
        raise PlatformError(
            f"isolation.lock_dir: expected a folder, found something else at {folder}", _CHOOSE
        ) from None
    except OSError as error:
        raise PlatformError(
            f"isolation.lock_dir: could not make {folder}: {error.strerror}", _CHOOSE
        ) from error
    if stat.S_ISLNK(status.st_mode):
        raise PlatformError(
            f"isolation.lock_dir: expected a folder, found a symbolic link at {folder}", _CHOOSE
        )
    if status.st_uid != os.geteuid():
        raise PlatformError(
            f"isolation.lock_dir: expected a folder of uid {os.geteuid()}, found {folder} of uid"
            f" {status.st_uid}",
            _CHOOSE,
        )
    if status.st_mode & 0o022:
        raise PlatformError(
            f"isolation.lock_dir: expected a folder that only its owner may write (0700), found"
            f" {folder} with mode {stat.S_IMODE(status.st_mode):04o}",
            f"chmod 700 {folder}, or {_CHOOSE}",
        )
    kind, _ = mount_of(folder)
    if _NETWORK_DISKS.match(kind):
        raise PlatformError(
            f"isolation.lock_dir: expected a folder of this node, found {folder} on a network disk"
            f" ({kind})",
            _CHOOSE,
        )
    _check_locks(folder)


def _check_locks(folder: Path) -> None:
    """Try a lock: some file systems know none, and some grant every one.

    Raises
    ------
    PlatformError
        If locks do not hold here.
    """
    path = folder / f".try-{os.getpid()}-{threading.get_native_id()}"
    fds = []
    try:
        fds = [_open_file(path), _open_file(path)]
        first, second = (_try_lock(fd, path, fcntl.LOCK_EX) for fd in fds)
    finally:
        for fd in fds:
            _close(fd)
        with contextlib.suppress(OSError):
            path.unlink()
    if not first or second:
        raise PlatformError(
            f"isolation.lock_dir: expected a disk with locks, found that {folder} grants"
            f" {'one lock twice' if first else 'none'}",
            _CHOOSE,
        )


def mount_of(folder: Path, mounts: str | None = None) -> tuple[str, str]:
    """Return the kind of file system of a folder, and which folder of it is mounted there."""
    folder = folder.resolve()  # /var/tmp may be a link to a disk of the network
    deepest, found = "", ("unknown", "/")
    for line in (mounts or Path("/proc/self/mountinfo").read_text()).splitlines():
        before, _, after = line.partition(" - ")
        root, point = before.split()[3:5]
        if folder.is_relative_to(point) and len(point) >= len(deepest):
            deepest, found = point, (after.split()[0], root)
    return found


def private_to_job(folder: Path, job_id: str, mounts: str | None = None) -> str:
    """Return the folder that is mounted below ``folder`` for one job alone; "" if none seems so.

    Sites give each job a /tmp of its own by mounting a folder named after the job there
    (job_container/tmpfs and the like): other jobs on the node then do not see the locks.
    """
    _, root = mount_of(folder, mounts)
    number = job_id.partition("_")[0]
    named_after_job = number.isdigit() and number in re.findall(r"\d+", root)
    return root if named_after_job or "systemd-private" in root else ""


@dataclass(frozen=True)
class Holder:
    """Who holds a slot, by its own words.

    Attributes
    ----------
    slot : int
        0-based, of its GPU.
    pid : int
        Of the child; 0 if it has not said anything.
    label : str
        The run, array task and fit.
    reserved_bytes : int or None
        GPU memory that it was promised; None: all of it.
    foreign_bytes : int
        GPU memory that was in use by others than holders of slots when it was admitted.
    """

    slot: int
    pid: int = 0
    label: str = "somebody"
    reserved_bytes: int | None = 0
    foreign_bytes: int = 0

    def __str__(self) -> str:
        return f"{self.label} (pid {self.pid})"


@dataclass
class SlotLock:
    """A slot that this process holds."""

    index: int
    fd: int
    path: Path

    def write(self, holder: Holder) -> None:
        """Say who holds it, and how much memory it is promised; to be called behind the gate."""
        record = {name: value for name, value in vars(holder).items() if name != "slot"}
        _write_record(self.fd, record)

    def is_in_place(self) -> bool:
        """Return whether others find the lock; not if somebody removed its file."""
        return _is_at(self.fd, self.path)

    def release(self) -> None:
        """Give it back before this process ends."""
        _close(self.fd)


class SlotGroup:
    """The slots of one GPU, or of a set of cores.

    Parameters
    ----------
    folder : Path
        See `prepare_folder`.
    key : str
        Of what is shared: the UUID of a GPU. Letters, digits, '-', '_' and '.'.
    """

    def __init__(self, folder: Path, key: str) -> None:
        self._folder = folder
        self._key = key

    def holders(self) -> list[Holder]:
        """Return who holds slots now, this process included."""
        found = []
        for path in self._slots():
            fd = _open_file(path)
            try:
                if not _try_lock(fd, path, fcntl.LOCK_SH):
                    index = int(path.name.rpartition(".")[2])
                    found.append(_holder(index, _read_record(fd)))
            finally:
                _close(fd)
        return sorted(found, key=lambda holder: holder.slot)

    def take(self, limit: int) -> SlotLock | None:
        """Take the first free one of the first ``limit`` slots; to be called behind the gate."""
        for index in range(limit):
            path = self._folder / f"{self._key}.{index}"
            fd = _open_file(path)
            if _try_lock(fd, path, fcntl.LOCK_EX):
                return SlotLock(index, fd, path)
            _close(fd)
        return None

    def gate(self) -> "Gate":
        """Return the gate of these slots."""
        return Gate(self._folder / f"{self._key}.gate")

    def _slots(self) -> Iterator[Path]:
        for path in self._folder.glob(f"{self._key}.*"):
            if path.name.removeprefix(f"{self._key}.").isdigit():  # not those of <key>.<more>
                yield path


class Gate:
    """Where those queue who want a slot; the kernel wakes them in their order."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._fd = -1
        self._on_queue: Callable[[str], None] | None = None

    def on_queue(self, function: Callable[[str], None]) -> None:
        """Call ``function`` with who is first ("": not known) when the gate must be waited for."""
        self._on_queue = function

    def __enter__(self) -> Self:
        while True:
            fd = _open_file(self._path)
            if not _lock(fd, self._path, fcntl.LOCK_EX | fcntl.LOCK_NB):
                if self._on_queue is not None:
                    self._on_queue(self.waiting())
                _lock(fd, self._path, fcntl.LOCK_EX)
            if _is_at(fd, self._path):
                _clear_record(fd)  # of one that was killed inside
                self._fd = fd
                return self
            _close(fd)

    def __exit__(self, *_: object) -> None:
        _clear_record(self._fd)
        _close(self._fd)
        self._fd = -1

    def announce(self, label: str) -> None:
        """Say that who is inside waits, so that idle holders make room; to be called inside."""
        _write_record(self._fd, {"pid": os.getpid(), "label": label})

    def waiting(self) -> str:
        """Return who waits inside; "" if nobody does."""
        fd = _open_file(self._path)
        try:
            if _try_lock(fd, self._path, fcntl.LOCK_SH):
                return ""
            record = _read_record(fd)
            return f"{record['label']} (pid {record['pid']})" if record.get("label") else ""
        finally:
            _close(fd)


def _open_file(path: Path) -> int:
    """Open a lock file, and refuse one that somebody else could have put there."""
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
    try:
        fd = os.open(path, flags, 0o600)
    except OSError as error:
        what = "a symbolic link" if path.is_symlink() else f"one that is unusable: {error.strerror}"
        raise PlatformError(
            f"isolation.lock_dir: expected a lock file of our own at {path}, found {what}",
            f"remove it, or {_CHOOSE}",
        ) from error
    status = os.fstat(fd)
    if not stat.S_ISREG(status.st_mode) or status.st_uid != os.geteuid() or status.st_nlink > 1:
        os.close(fd)
        raise PlatformError(
            f"isolation.lock_dir: expected a lock file of uid {os.geteuid()} at {path}, found one"
            f" of uid {status.st_uid} with {status.st_nlink} links, mode {status.st_mode:o}",
            f"remove it, or {_CHOOSE}",
        )
    _open.add(fd)
    return fd


def _close(fd: int) -> None:
    _open.discard(fd)
    os.close(fd)


def _lock(fd: int, path: Path, kind: int) -> bool:
    """Lock a file; return False if somebody else has it and ``kind`` says not to wait."""
    try:
        fcntl.flock(fd, kind)
    except BlockingIOError:
        return False
    except OSError as error:
        raise PlatformError(
            f"isolation.lock_dir: could not lock {path}: {error.strerror}", _CHOOSE
        ) from error
    return True


def _try_lock(fd: int, path: Path, kind: int) -> bool:
    if not _lock(fd, path, kind | fcntl.LOCK_NB):
        return False
    if not _is_at(fd, path):  # removed meanwhile: others lock another file
        fcntl.flock(fd, fcntl.LOCK_UN)
        return False
    return True


def _is_at(fd: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(fd), path.lstat())
    except FileNotFoundError:
        return False


def _write_record(fd: int, record: dict[str, Any]) -> None:
    record = {**record, "label": record["label"][:_MAX_LABEL]}  # the rest of it must be readable
    # Never truncated: ext4 would then write to the disk at once, 2 ms on the way to every fit.
    try:
        os.pwrite(fd, json.dumps(record).encode() + b"\n", 0)
    except OSError as error:
        raise PlatformError(
            f"isolation.lock_dir: could not write a promise of memory: {error.strerror}",
            f"free space there, or {_CHOOSE}",
        ) from error


def _clear_record(fd: int) -> None:
    if os.pread(fd, 1, 0) not in (b"", b"\n"):
        os.pwrite(fd, b"\n", 0)


def _read_record(fd: int) -> dict[str, Any]:
    try:
        record = json.loads(os.pread(fd, _MAX_RECORD, 0).partition(b"\n")[0])
    except ValueError:
        return {}
    return record if isinstance(record, dict) else {}


def _holder(index: int, record: dict[str, Any]) -> Holder:
    try:
        return Holder(
            slot=index,
            pid=int(record["pid"]),
            label=str(record["label"]),
            reserved_bytes=record["reserved_bytes"],
            foreign_bytes=int(record["foreign_bytes"]),
        )
    except (KeyError, TypeError, ValueError):  # it has just locked it, or is another version
        return Holder(index)
