"""Whether a node has a folder of its own for locks that all of a user's jobs there share."""

import fcntl
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fedhpc.doctor.report import Check

_NETWORK = re.compile(r"nfs|lustre|gpfs|beegfs|ceph|panfs|wekafs|afs|cifs|smb|fuse\.|9p")
_TRY_LOCK = """
import fcntl, sys
with open(sys.argv[1], "a") as file:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        sys.exit(3)
"""
_REFUSED = 3
_TIMEOUT_S = 20.0


@dataclass(frozen=True)
class Mount:
    """The mount that a path lies in.

    Attributes
    ----------
    point : str
        Where it is mounted.
    root : str
        Which folder of its file system is mounted there.
    kind : str
        tmpfs, ext4, nfs4, ...
    """

    point: str
    root: str
    kind: str


def candidates() -> list[Path]:
    """Return the folders of a node that locks could lie in."""
    found = [Path("/dev/shm")]  # noqa: S108
    try:
        found.append(Path(tempfile.gettempdir()))
    except FileNotFoundError:  # none that can be written
        found.append(Path("/tmp"))  # noqa: S108
    return list(dict.fromkeys(found))


def identities() -> dict[str, list[int]]:
    """Return device and inode of each candidate: where two jobs of a node differ, it is private."""
    return {
        str(folder): [folder.stat().st_dev, folder.stat().st_ino]
        for folder in candidates()
        if folder.is_dir()
    }


def kernel() -> str:
    """Return what two processes have in common exactly if they are on the same machine."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def mount_of(folder: Path, mountinfo: str) -> Mount:
    """Return the mount that a folder lies in.

    Parameters
    ----------
    folder : Path
        Absolute, without links.
    mountinfo : str
        As in /proc/self/mountinfo.
    """
    best = Mount("", "/", "unknown")
    for line in mountinfo.splitlines():
        before, _, after = line.partition(" - ")
        root, point = (_unescape(field) for field in before.split()[3:5])
        inside = folder == Path(point) or Path(point) in folder.parents
        if inside and len(point) >= len(best.point):  # a later one hides an earlier one
            best = Mount(point, root, after.split()[0])
    return best


def _unescape(field: str) -> str:
    return re.sub(r"\\(\d{3})", lambda match: chr(int(match[1], 8)), field)


def privacy(
    folder: Path, mount: Mount, job_id: str, mine: Sequence[int], theirs: Sequence[int] | None
) -> tuple[bool | None, str]:
    """Say whether a folder is private to this job.

    Parameters
    ----------
    folder : Path
        The folder.
    mount : Mount
        Of it.
    job_id : str
        Of this job.
    mine, theirs : sequence of int
        Device and inode of the folder here and in another job on the same node; None: there is
        no such job.

    Returns
    -------
    bool or None
        None: it cannot be told.
    str
        In words, with the evidence.
    """
    if theirs is not None and list(theirs) != list(mine):
        return True, "private to the job: the other job on this node has another one"
    if theirs is not None:
        return False, "shared with the other job on this node"
    numbers = [number for number in re.findall(r"\d+", job_id)[:1] if len(number) > 1]
    evidence = f"{folder} {mount.root}"
    if any(re.search(rf"(?<!\d){number}(?!\d)", evidence) for number in numbers):
        return True, f"private to the job: it is {mount.root} of its disk, named after the job"
    if mount.root not in ("/", str(folder)) and mount.point == str(folder):
        return None, f"perhaps private to the job: it is {mount.root} of its disk"
    return None, "nothing says that it is private to the job"


def check(where: str, job_id: str, other_job: Mapping[str, Sequence[int]] | None) -> Check:
    """Try locks in each candidate.

    Parameters
    ----------
    where : str
        This party.
    job_id : str
        Of this job.
    other_job : mapping or None
        `identities` in another job on the same node, if there is one.
    """
    mounts = Path("/proc/self/mountinfo").read_text()
    mine = identities()
    texts = []
    good: list[Path] = []
    private: list[Path] = []
    for folder in candidates():
        mount = mount_of(folder.resolve(), mounts)
        problem = _try_locks(folder, mount)
        if problem:
            texts.append(f"{folder} ({mount.kind}): {problem}")
            continue
        theirs = other_job.get(str(folder)) if other_job is not None else None
        is_private, words = privacy(folder, mount, job_id, mine[str(folder)], theirs)
        (private if is_private else good).append(folder)
        texts.append(f"{folder} ({mount.kind}): locks work; {words}")
    found = "\n".join(texts)
    if good:
        return Check("slot locks", where, "pass", found)
    if private:
        remedy = (
            "array tasks and runs that share a GPU of this node cannot see each other's locks: keep"
            " one array task on a GPU, or ask the site for a node-local folder that jobs share"
        )
        return Check("slot locks", where, "warn", found, remedy)
    remedy = "a node-local folder where flock works is needed: /dev/shm, or TMPDIR with cluster.env"
    return Check("slot locks", where, "fail", found, remedy)


def _try_locks(folder: Path, mount: Mount) -> str:
    """Return why locks in a folder are of no use; "" if they work."""
    try:
        with tempfile.TemporaryDirectory(prefix="fedhpc-doctor-", dir=folder) as own:
            path = Path(own) / "lock"
            with path.open("a") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                held = _lock_elsewhere(path)
            freed = _lock_elsewhere(path)
    except OSError as error:
        return f"cannot be used: {error.strerror}"
    except subprocess.TimeoutExpired:
        return f"a lock gave no answer within {_TIMEOUT_S:.0f} s"
    if held != _REFUSED:
        return "a second process got a lock that was held"
    if freed != os.EX_OK:
        return "a lock that was given back could not be taken again"
    if _NETWORK.search(mount.kind):
        return "not node-local"
    return ""


def _lock_elsewhere(path: Path) -> int:
    """Try a lock from a second process; return its exit code."""
    command = [sys.executable, "-c", _TRY_LOCK, str(path)]
    return subprocess.run(command, check=False, timeout=_TIMEOUT_S).returncode
