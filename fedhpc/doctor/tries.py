"""Try something in a child process, with a deadline."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from typing import Any


class Try:
    """A child process that runs `fedhpc.doctor.child`.

    Parameters
    ----------
    what : str
        imports or gpu.
    env : mapping, optional
        Environment over this process's own.
    """

    def __init__(self, what: str, env: Mapping[str, str] | None = None) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "fedhpc.doctor.child", what],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**os.environ, **(env or {})},
        )

    def wait(self, timeout_s: float) -> dict[str, Any]:
        """Return its answer, or a "problem" if it gave none before the deadline."""
        try:
            answer, errors = self._process.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            return {"problem": f"no answer within {timeout_s:.0f} s"}
        finally:
            self.end()
        code = self._process.returncode
        if code < 0:
            return {"problem": f"the process died of {signal.Signals(-code).name}"}
        try:
            value: dict[str, Any] = json.loads(answer)
        except ValueError:
            last = errors.decode(errors="replace").strip().rpartition("\n")[2]
            return {"problem": f"the process ended with exit code {code}: {last}"}
        return value

    def end(self) -> None:
        """End it, if it still lives."""
        self._process.kill()
        self._process.wait()
