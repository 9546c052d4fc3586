"""The doctor's folder: what its three parties tell each other, and whether they see it."""

import contextlib
import os
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from fedhpc import files
from fedhpc.doctor.report import Check
from fedhpc.errors import PlatformError
from fedhpc.paths import RunPaths

Role = Literal["login", "server", "client"]

_ASK_TIMEOUT_S = 70.0  # NFS clients may trust what they know of a folder for 60 s
_ANSWER_PAUSE_S = 0.1
_SLOW_S = 5.0


@dataclass(frozen=True)
class Echo:
    """An answer to a question that was asked through the folder.

    Attributes
    ----------
    seconds : float
        From the question to the answer, seen by the one who asked.
    clock_s : float
        How far the other's clock is ahead, within half of ``seconds``.
    """

    seconds: float
    clock_s: float


class Folder:
    """The doctor's folder, as one of its parties uses it.

    Parameters
    ----------
    root : Path
        A run folder.
    me : {"login", "server", "client"}
        Whose words this process writes.
    """

    def __init__(self, root: Path, me: Role) -> None:
        self.paths = RunPaths(root)
        self.me = me
        self.where = f"{me} ({socket.gethostname()})"
        self._mail = root / "mail"
        self._stop = root / "stop.json"

    def say(self, what: str, value: Any, by: Role | None = None) -> None:
        """Write something that the others can read.

        Raises
        ------
        PlatformError
            If the disk refuses it.
        """
        files.write_json(self._file(what, by or self.me), value)

    def heard(self, what: str, by: Role) -> dict[str, Any] | None:
        """Return what somebody said; None if it is not to be seen yet."""
        files.refresh_directory(self.paths.root)
        value = files.read_json(self._file(what, by))
        return value if isinstance(value, dict) else None

    def wait_for(self, what: str, by: Role, timeout_s: float) -> dict[str, Any] | None:
        """Wait for somebody's word; None at the deadline, or when the doctor said stop."""
        found: list[dict[str, Any]] = []

        def ready() -> bool:
            value = self.heard(what, by)
            if value is not None:
                found.append(value)
            return value is not None or self.stopped()

        files.wait_until(ready, timeout_s, 0.05, 0.2)
        return found[-1] if found else None

    def stop(self) -> None:
        """Tell both jobs to end."""
        files.write_json(self._stop, {})

    def stopped(self) -> bool:
        """Return whether the jobs were told to end."""
        files.refresh_directory(self.paths.root)
        return self._stop.exists()

    def open_mail(self) -> None:
        """Make the folder of questions and answers."""
        self._mail.mkdir(exist_ok=True)

    def answer_in_background(self) -> None:
        """Answer what this party is asked, from a thread, as long as the process lives."""

        def answer() -> None:
            while True:
                with contextlib.suppress(PlatformError, OSError):
                    self.answer()
                time.sleep(_ANSWER_PAUSE_S)

        threading.Thread(target=answer, name="answers", daemon=True).start()

    def answer(self) -> None:
        """Answer every new question to this party, with its content."""
        for path in self._mail.glob(f"*.{self.me}.question"):
            answer = path.with_suffix(".answer")
            question = files.read_json(path)
            if question is None or (files.read_json(answer) or {}).get("content") == question:
                continue
            files.write_json(answer, {"content": question, "time": time.time()})

    def ask(self, other: Role, timeout_s: float) -> Echo:
        """Write a question to another party and wait for its answer.

        Raises
        ------
        PlatformError
            If none came before the deadline.
        """
        question = self._mail / f"{self.me}.{other}.question"
        answer = question.with_suffix(".answer")
        content = os.urandom(8).hex()
        sent, sent_s = time.time(), time.monotonic()
        files.write_json(question, content)
        found: list[dict[str, Any]] = []

        def answered() -> bool:
            files.refresh_directory(self._mail)
            value = files.read_json(answer)
            if isinstance(value, dict) and value.get("content") == content:
                found.append(value)
            return bool(found)

        if not files.wait_until(answered, timeout_s, max_pause_s=_ANSWER_PAUSE_S):
            raise PlatformError(
                f"wrote {question}, saw no answer of the {other} within {timeout_s:.0f} s",
                "the runs folder must be on a disk that all nodes see and write: name another one"
                " with --set cluster.runs_dir=DIR",
            )
        seconds = time.monotonic() - sent_s
        return Echo(seconds, found[0]["time"] - (sent + seconds / 2))

    def check_exchange(self, other: Role, host: str) -> Iterator[Check]:
        """Check that another party sees what this one writes, and the reverse, and how late.

        Parameters
        ----------
        other : {"login", "server", "client"}
            The other party.
        host : str
            Where it is.
        """
        name = "shared folder"
        try:
            echo = self.ask(other, _ASK_TIMEOUT_S)
        except PlatformError as error:
            yield Check(name, self.where, "fail", error.message, error.hint or "")
            return
        found = f"a file for the {other} ({host}) was seen and answered in {echo.seconds:.2f} s"
        if echo.seconds > _SLOW_S:
            remedy = (
                "a run starts, and notices lost jobs, later by as much; is there a faster shared"
                " disk for cluster.runs_dir?"
            )
            yield Check(name, self.where, "warn", found, remedy)
        else:
            yield Check(name, self.where, "pass", found)
        if other == "login":
            found = (
                f"{abs(echo.clock_s):.2f} s {'behind' if echo.clock_s > 0 else 'ahead of'} the"
                f" login node's, give or take {echo.seconds / 2:.2f} s; nothing depends on it"
            )
            yield Check("clock", self.where, "info", found)

    def _file(self, what: str, by: Role) -> Path:
        return self.paths.root / f"{by}-{what}.json"
