"""The address file: the server publishes where it is, array tasks find it.

It is written beside and moved into place. Liveness is a counter that moves, never a time: the
clocks of two machines are not compared.
"""

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from typing import Literal

from fedhpc import files, run_state
from fedhpc.errors import PlatformError, RendezvousTimeout
from fedhpc.paths import RunPaths, latest_attempt

logger = logging.getLogger(__name__)

BEAT_S = 2.0
Phase = Literal["serving", "requeueing", "finished", "failed"]


@dataclass(frozen=True)
class Rendezvous:
    """What the file says.

    Attributes
    ----------
    run_id : str
        Of the run.
    attempt : int
        Of the server, 1 or more.
    address : str
        "host:port" of its gRPC service.
    host, pid, job_id
        Where it runs.
    phase : str
        serving, requeueing, finished or failed.
    heartbeat : int
        Grows as long as the server lives.
    """

    run_id: str
    attempt: int
    address: str
    host: str
    pid: int
    job_id: str
    phase: Phase
    heartbeat: int


def read(paths: RunPaths) -> Rendezvous | None:
    """Return what the file says; None if it is missing, half-written or garbage."""
    value = files.read_json(paths.rendezvous)
    if not isinstance(value, dict):
        return None
    types = {"attempt": int, "pid": int, "heartbeat": int}
    for field in fields(Rendezvous):
        if not isinstance(value.get(field.name), types.get(field.name, str)):
            return None
    return Rendezvous(**{field.name: value[field.name] for field in fields(Rendezvous)})


class Publisher:
    """Keeps the file fresh while the server lives.

    Parameters
    ----------
    paths : RunPaths
        Of the run.
    first : Rendezvous
        What to publish.
    superseded : callable
        Called once, from the publisher's thread, when a server with a higher attempt has come;
        nothing is written from then on.
    """

    def __init__(self, paths: RunPaths, first: Rendezvous, superseded: Callable[[], None]) -> None:
        self._paths = paths
        self._current = first
        self._superseded = superseded
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="rendezvous", daemon=True)

    def start(self) -> None:
        """Publish for the first time and begin to beat."""
        self._write()
        self._thread.start()

    def end(self, phase: Phase) -> None:
        """Publish the last phase and stop."""
        self._stop.set()
        self._thread.join(BEAT_S)
        with self._lock:
            self._current = replace(self._current, phase=phase)
        if latest_attempt(self._paths) == self._current.attempt:
            self._write()

    def _beat(self) -> None:
        while not self._stop.wait(BEAT_S):
            try:
                if latest_attempt(self._paths) > self._current.attempt:
                    self._superseded()
                    return
                self._write()
            except (PlatformError, OSError) as error:
                logger.warning("could not refresh the rendezvous: %s", error)

    def _write(self) -> None:
        with self._lock:
            self._current = replace(self._current, heartbeat=self._current.heartbeat + 1)
            files.write_json(self._paths.rendezvous, asdict(self._current))


class Seeker:
    """Finds the server, again and again if need be.

    A file is believed once without waiting. If the server it names could not be reached, it is
    believed again only after its counter has moved.

    Parameters
    ----------
    paths : RunPaths
        Of the run.
    server_job : str
        For the message.
    """

    def __init__(self, paths: RunPaths, server_job: str) -> None:
        self._paths = paths
        self._server_job = server_job
        self._attempt = 0
        self._unreachable: Rendezvous | None = None

    def failed(self, found: Rendezvous) -> None:
        """Note that the server could not be reached, or was lost."""
        self._unreachable = found

    def wait(self, timeout_s: float, stopped: Callable[[], bool]) -> Rendezvous | None:
        """Return a live server; None if ``stopped`` turned true or the run has ended.

        A server that has ended is returned too: look at the phase.

        Raises
        ------
        RendezvousTimeout
            If none was there before the deadline.
        """
        start_s = time.monotonic()
        latest: list[Rendezvous] = []
        why = "it does not exist"

        def ready() -> bool:
            nonlocal why
            files.refresh_directory(self._paths.root)
            if stopped() or run_state.read(self._paths)["state"] in run_state.ENDED:
                return True
            found = read(self._paths)
            reason = self._reject(found)
            if reason is None and found is not None:
                latest.append(found)
                return True
            why = reason or why
            return False

        if not files.wait_until(ready, timeout_s):
            waited_s = time.monotonic() - start_s
            raise RendezvousTimeout(
                f"no live server within {waited_s:.0f} s: wanted {self._paths.rendezvous} from"
                f" server job {self._server_job}, found that {why}",
                "see the server's log in the run folder's jobs/; is the run folder on a disk that"
                " both nodes see?",
            )
        if not latest:
            return None
        self._attempt = latest[0].attempt
        return latest[0]

    def _reject(self, found: Rendezvous | None) -> str | None:
        """Return why a file is not believed; None if it is."""
        if found is None:
            exists = self._paths.rendezvous.exists()
            return "it is half-written or garbage" if exists else "it does not exist"
        if found.run_id != self._paths.run_id:
            return f"it is of another run, {found.run_id}"
        if found.attempt < self._attempt:
            return f"it is of attempt {found.attempt}, older than {self._attempt}"
        if found.phase == "requeueing":
            return f"the server of attempt {found.attempt} is being requeued"
        last = self._unreachable
        if last and (found.attempt, found.address, found.heartbeat, found.phase) == (
            last.attempt,
            last.address,
            last.heartbeat,
            last.phase,
        ):
            return (
                f"its heartbeat stands still at {found.heartbeat} and {found.address} could not be"
                " reached"
            )
        return None
