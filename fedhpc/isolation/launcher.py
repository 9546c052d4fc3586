"""The fork server, seen from the array task: started, asked for children, and surely ended."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fedhpc.isolation import channel

_EXIT_TIMEOUT_S = 5.0
_MARK = "FEDHPC_POOL"


class Launcher:
    """One fork server process.

    Parameters
    ----------
    options : dict
        What the fork server is told; see `fedhpc.isolation.forkserver.ForkServer`.
    env : dict
        Environment of it and its children, over this process's own.
    on_event : callable
        Called with each message of the fork server, from a thread of the launcher's own.
    on_end : callable
        Called once, when the fork server and all that it started are gone.
    """

    def __init__(
        self,
        options: dict[str, Any],
        env: dict[str, str],
        on_event: Callable[[dict[str, Any]], None],
        on_end: Callable[[], None],
    ) -> None:
        self._on_event = on_event
        self._on_end = on_end
        # Every descendant inherits it, also one that left its group and lost its parents.
        self._mark = uuid.uuid4().hex
        self._control, theirs = channel.pair()
        # It finds modules where this process does, also without the working directory.
        python = [sys.executable, *(["-P"] if sys.flags.safe_path else [])]
        with theirs:
            self._process = subprocess.Popen(
                [*python, "-m", "fedhpc.isolation.forkserver", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                env={**os.environ, **env, _MARK: self._mark},
                start_new_session=True,  # a Ctrl-C in the terminal is the array task's to handle
            )
        with contextlib.suppress(ConnectionError):  # it died already: the thread will tell
            channel.send(self._control, options)
        self._thread = threading.Thread(target=self._watch, name="fork-server", daemon=True)
        self._thread.start()

    @property
    def pid(self) -> int:
        """Of the fork server."""
        return self._process.pid

    def start_child(self, number: int, sock: socket.socket, options: dict[str, Any]) -> None:
        """Ask for a child with this number, this socket as its channel, and options of its own.

        Raises
        ------
        ConnectionError
            If the fork server is gone.
        """
        request = {"request": "start", "number": number, "child": options}
        channel.send(self._control, request, [sock.fileno()])

    def preload(self, modules: list[str]) -> None:
        """Ask the fork server to import more modules, those that it may."""
        with contextlib.suppress(OSError):
            channel.send(self._control, {"request": "preload", "modules": modules})

    def kill_child(self, number: int) -> None:
        """Ask for a child's end, if it still lives."""
        with contextlib.suppress(OSError):
            channel.send(self._control, {"request": "kill", "number": number})

    def close(self) -> None:
        """End the fork server and all that it started; returns when they are gone."""
        with contextlib.suppress(OSError):
            self._control.shutdown(socket.SHUT_RDWR)  # it kills all and leaves
        self._thread.join(2 * _EXIT_TIMEOUT_S)

    def _watch(self) -> None:
        try:
            while (received := channel.receive(self._control)) is not None:
                self._on_event(received.message)
        finally:
            self._end()

    def _end(self) -> None:
        """Make sure that nothing is left, however the fork server ended."""
        try:
            self._process.wait(_EXIT_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        while marked := self._marked():
            for pid in marked:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.kill(pid, signal.SIGKILL)
        self._on_end()
        self._control.close()  # not sooner: who asks for a child meanwhile is told that it is gone

    def _marked(self) -> list[int]:
        """Return the live processes that carry this fork server's mark."""
        mark = f"{_MARK}={self._mark}".encode()
        found = []
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):  # another user's, or gone
                if mark in (process / "environ").read_bytes():  # a zombie's is empty
                    found.append(int(process.name))
        return found
