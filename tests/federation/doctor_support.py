"""The doctor, called as a person does, for tests with the local executor and on a real Slurm."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from support import DIGITS, REPOSITORY

PLATFORM = 75
CANCELLED = 130


@dataclass
class Visit:
    """A doctor's visit that has ended."""

    returncode: int
    checks: list[dict[str, Any]]
    errors: str

    def expect(self, status: str, name: str, where: str, said: str) -> None:
        """Look for a check and compare what came of it."""
        found = [c for c in self.checks if c["name"] == name and where in c["where"]][-1]
        assert found["status"] == status
        assert said in f"{found['found']} -> {found['remedy']}"


class Doctor:
    """Calls the doctor with a folder of its own, of which nothing may be left."""

    def __init__(self, tmp: Path, executor: str, *sets: str) -> None:
        self.runs_dir = tmp / "runs"
        self._sets = (f"cluster.executor={executor}", f"cluster.runs_dir={self.runs_dir}", *sets)

    def start(self, *sets: str, timeout_min: float = 2, **env: str) -> "subprocess.Popen[str]":
        command = [sys.executable, "-m", "fedhpc.doctor", str(DIGITS), "--json"]
        command += [f"--timeout-min={timeout_min}", *(f"--set={s}" for s in (*self._sets, *sets))]
        return subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=REPOSITORY,
            env={**os.environ, **env},
            # A test run in the background ignores Ctrl-C, and would hand that down.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )  # fmt: skip

    def end_of(self, process: "subprocess.Popen[str]") -> Visit:
        output, errors = process.communicate(timeout=120)
        assert not list(self.runs_dir.glob("*"))
        return Visit(process.returncode, json.loads(output)["checks"] if output else [], errors)

    def visit(self, *sets: str, **more: Any) -> Visit:
        return self.end_of(self.start(*sets, **more))
