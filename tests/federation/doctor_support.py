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
_VISIT_S = 90


@dataclass
class Visit:
    """A doctor's visit that has ended."""

    returncode: int
    found: dict[str, Any]
    errors: str

    def status(self, name: str, role: str) -> str:
        """Return the worst status of a check."""
        wanted = [c for c in self.found["checks"] if c["name"] == name and role in c["where"]]
        assert wanted, f"no check {name} of {role}: {self}"
        return str(min((c["status"] for c in wanted), key=["fail", "warn", "info", "pass"].index))

    def text(self, name: str, role: str) -> str:
        """Return all that was found and advised in a check."""
        checks = [c for c in self.found["checks"] if c["name"] == name and role in c["where"]]
        return "\n".join(f"{c['found']} -> {c['remedy']}" for c in checks)


class Doctor:
    """Calls the doctor with a folder of its own."""

    def __init__(self, tmp: Path, executor: str, *common: str) -> None:
        self.runs_dir = tmp / "runs"
        self._executor = executor
        self._common = common

    def start(self, *arguments: str, env: dict[str, str] | None = None) -> subprocess.Popen[str]:
        """Call the doctor."""
        command = [sys.executable, "-m", "fedhpc.doctor", str(DIGITS), "--json"]
        command += ["--executor", self._executor, "--set", f"cluster.runs_dir={self.runs_dir}"]
        return subprocess.Popen(
            [*command, *self._common, *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=REPOSITORY,
            env={**os.environ, **(env or {})},
            # A test run in the background ignores Ctrl-C, and would hand that down.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )

    def visit(self, *arguments: str, env: dict[str, str] | None = None) -> Visit:
        """Call the doctor and wait for what it says."""
        return self.end_of(self.start(*arguments, env=env))

    def end_of(self, process: subprocess.Popen[str]) -> Visit:
        """Wait for what the doctor says."""
        output, errors = process.communicate(timeout=_VISIT_S)
        assert output, errors
        return Visit(process.returncode, json.loads(output), errors)

    def nothing_is_left(self) -> bool:
        """Return whether the doctor's folder is gone."""
        return list(self.runs_dir.iterdir()) == []
