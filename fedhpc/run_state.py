"""status.json: how a run stands, and which of its processes live."""

import contextlib
import os
import socket
from pathlib import Path
from typing import Any, Literal

from fedhpc import files
from fedhpc.paths import RunPaths

State = Literal["pending", "running", "finished", "failed", "cancelled"]
ENDED = ("finished", "failed", "cancelled")


def write(
    paths: RunPaths,
    state: State,
    reason: str = "",
    *,
    patience_s: float | None = None,
    **more: Any,
) -> None:
    """Write status.json.

    Raises
    ------
    PlatformError
        If the disk refuses it, for ``patience_s``; see `files.persist`.
    """
    value = {"state": state, "reason": reason, **more}
    files.write_json(paths.status, value, patience_s=patience_s)


def read(paths: RunPaths) -> dict[str, Any]:
    """Return what status.json says; pending if there is nothing yet."""
    value = files.read_json(paths.status)
    if isinstance(value, dict) and {"state", "reason"} <= value.keys():
        return value
    return {"state": "pending", "reason": ""}


def register_process(paths: RunPaths, role: str, job_id: str) -> None:
    """Record this process, so that another one can find and signal it."""
    value = {
        "pid": os.getpid(),
        "start_ticks": _start_ticks(os.getpid()),
        "host": socket.gethostname(),
        "job_id": job_id,
    }
    files.write_json(paths.process(role), value)


def record(paths: RunPaths, role: str) -> dict[str, Any]:
    """Return what the latest process of a role recorded of itself; empty if none did."""
    value = files.read_json(paths.process(role))
    return value if isinstance(value, dict) else {}


def live_pid(paths: RunPaths, role: str) -> int | None:
    """Return the pid of a role's process on this machine; None if it ended.

    The start time is compared, so that another process with the same pid is not mistaken for it.
    """
    found = record(paths, role)
    if found.get("host") != socket.gethostname():
        return None
    pid = found.get("pid")
    if not isinstance(pid, int) or _start_ticks(pid) != found.get("start_ticks"):
        return None
    return pid


def _start_ticks(pid: int) -> int | None:
    """Return when a process started, in clock ticks since boot; None if there is none."""
    with contextlib.suppress(OSError, IndexError, ValueError):
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return None if fields[0] in "ZX" else int(fields[19])
    return None
