"""The address file: the server publishes where it is, array tasks find it.

It is written beside and moved into place. Liveness is a counter that moves, never a time: the
clocks of two machines are not compared.
"""

import logging
import os
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from typing import Literal

from fedhpc import files, run_state
from fedhpc.errors import RendezvousTimeout, Superseded
from fedhpc.paths import RunPaths, latest_attempt

logger = logging.getLogger(__name__)

BEAT_S = 2.0
_LAST_WORD_S = 5.0
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


class Fence:
    """Lets a server write only while nobody has claimed a higher attempt; see `files.fenced`.

    Parameters
    ----------
    paths : RunPaths
        Of the run.
    attempt : int
        Of this server.
    """

    def __init__(self, paths: RunPaths, attempt: int) -> None:
        self._paths = paths
        self._attempt = attempt
        self._higher = 0

    def check(self) -> None:
        """Look at the run folder.

        Raises
        ------
        Superseded
            Now and ever after, once a higher attempt was seen.
        OSError
            If the disk does not tell.
        """
        if not self._higher and (latest := latest_attempt(self._paths)) > self._attempt:
            self._higher = latest
        if self._higher:
            raise Superseded(
                f"attempt {self._higher} of the server has come; this one, attempt"
                f" {self._attempt}, leaves and writes nothing more"
            )

    def is_passed(self) -> bool:
        """Return whether a higher attempt is there; if the disk does not tell, as known so far."""
        try:
            self.check()
        except Superseded:
            return True
        except OSError as error:
            logger.warning("whether there is another server is not known: %s", error)
        return False


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
        self._fence = Fence(paths, first.attempt)
        self._current = first
        self._superseded = superseded
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="rendezvous", daemon=True)

    def start(self) -> None:
        """Publish for the first time and begin to beat.

        Raises
        ------
        PlatformError
            If the disk refuses it.
        """
        self._write()
        self._thread.start()

    def end(self, phase: Phase) -> None:
        """Publish the last phase and stop.

        Raises
        ------
        PlatformError
            If the disk refuses it.
        """
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(BEAT_S)
        with self._lock:
            self._current = replace(self._current, phase=phase)
        if not self._fence.is_passed():
            self._write(_LAST_WORD_S)

    def _beat(self) -> None:
        failing = False
        while not self._stop.wait(BEAT_S):
            try:
                self._fence.check()
                self._write(0.0)  # the next beat comes soon
                failing = False
            except Superseded:
                self._superseded()
                return
            except Exception as error:  # whatever it is: without beats the server counts as dead
                if not failing:
                    logger.warning("could not refresh the rendezvous: %s", error)
                failing = True

    def _write(self, patience_s: float | None = None) -> None:
        with self._lock:
            self._current = replace(self._current, heartbeat=self._current.heartbeat + 1)
            files.write_json(self._paths.rendezvous, asdict(self._current), patience_s=patience_s)


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
            exists = os.path.lexists(self._paths.rendezvous)  # Path.exists() raises ESTALE
            return "it is half-written or garbage" if exists else "it does not exist"
        if found.run_id != self._paths.run_id:
            return f"it is of another run, {found.run_id}"
        if found.attempt < self._attempt:
            return f"it is of attempt {found.attempt}, older than {self._attempt}"
        if (latest := self._latest_attempt()) > found.attempt:
            return f"it is of attempt {found.attempt}, and attempt {latest} has not published yet"
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

    def _latest_attempt(self) -> int:
        try:
            return latest_attempt(self._paths)
        except OSError:  # it is looked at again soon
            return 0
