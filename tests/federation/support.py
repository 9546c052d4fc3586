"""Real federations: every test here runs ``python -m fedhpc.submit`` or its parts for real."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from fedhpc.files import read_json, read_lines
from fedhpc.paths import RunPaths

REPOSITORY = Path(__file__).parents[2]
DIGITS = REPOSITORY / "configs" / "digits.yaml"
SMALL = [
    "federation.num_clients=6",
    "federation.clients_per_round=4",
    "federation.num_rounds=2",
    "training.epochs=1",
]


@dataclass
class Run:
    """A run that has ended."""

    paths: RunPaths
    returncode: int
    output: str

    @property
    def status(self) -> dict[str, Any]:
        value: dict[str, Any] = read_json(self.paths.status)
        return value

    @property
    def checksum(self) -> str:
        assert self.returncode == 0, self.output + self.logs()
        assert self.status["state"] == "finished"
        return str(self.status["model_sha256"])

    @property
    def metrics(self) -> list[dict[str, Any]]:
        return list(read_lines(self.paths.metrics))

    @property
    def fits(self) -> list[dict[str, Any]]:
        return list(read_lines(self.paths.fits))

    def logs(self) -> str:
        return "\n".join(path.read_text() for path in sorted(self.paths.jobs.glob("*.err")))


class Submitter:
    """Starts runs in a folder of its own."""

    def __init__(self, folder: Path, data_root: Path) -> None:
        self.runs_dir = folder / "runs"
        self.data_root = data_root
        self._common = [f"cluster.runs_dir={self.runs_dir}", f"data.root={data_root}"]

    def options(self, sets: Sequence[str] = ()) -> list[str]:
        """Return the options of submit for a small run."""
        assignments = [*self._common, *SMALL, *sets]
        return [word for assignment in assignments for word in ("--set", assignment)]

    def command(
        self,
        sets: Sequence[str] = (),
        *,
        config: Path = DIGITS,
        executor: str = "local",
        follow: bool = True,
    ) -> list[str]:
        """Return the command that submits a small run."""
        command = [sys.executable, "-m", "fedhpc.submit", str(config), "--executor", executor]
        return [*command, "--follow" if follow else "--detach", *self.options(sets)]

    def start(
        self,
        sets: Sequence[str] = (),
        *,
        config: Path = DIGITS,
        executor: str = "local",
        follow: bool = True,
        env: dict[str, str] | None = None,
    ) -> subprocess.Popen[str]:
        return subprocess.Popen(
            self.command(sets, config=config, executor=executor, follow=follow),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=REPOSITORY,
            env={**os.environ, **(env or {})},
            start_new_session=True,
            # A test run in the background ignores Ctrl-C, and would hand that down.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )

    def run(self, sets: Sequence[str] = (), timeout_s: float = 150, **more: Any) -> Run:
        process = self.start(sets, **more)
        try:
            output, _ = process.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGINT)
            output, _ = process.communicate(timeout=30)
            pytest.fail(f"no end within {timeout_s} s:\n{output}")
        assert list(self.runs_dir.glob("*")), f"no run folder was made:\n{output}"
        return Run(self.newest(), process.returncode, output)

    def newest(self, timeout_s: float = 30) -> RunPaths:
        """Return the newest run folder, waiting for it."""
        found: list[Path] = []

        def exists() -> bool:
            found[:] = sorted(self.runs_dir.glob("*"), key=lambda path: path.stat().st_mtime_ns)
            return bool(found)

        eventually(exists, timeout_s)
        return RunPaths(found[-1])


def eventually(condition: Callable[[], object], timeout_s: float = 30) -> None:
    """Wait until a condition holds; fail at the deadline."""
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline_s:
            pytest.fail(f"did not become true within {timeout_s} s: {condition}")
        time.sleep(0.05)


def processes_of(paths: RunPaths) -> list[str]:
    """Return the command lines of live processes that know the run folder or its children."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            environ = (entry / "environ").read_bytes()
        except OSError:
            continue
        mine = str(paths.root) in command or f"{paths.jobs}".encode() in environ
        if mine and int(entry.name) != os.getpid():
            found.append(f"{entry.name} {command}")
    return found
