"""Watch a run from outside, by what lies in its folder, and say how it ended."""

import contextlib
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Generic, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn
from rich.table import Table

from fedhpc import cluster, config, files, inspection, run_state, words
from fedhpc.cluster import submission
from fedhpc.errors import PlatformError
from fedhpc.paths import RunPaths

_PAUSE_S = 0.2
_LOCAL_PAUSE_S = 0.1  # no shared disk is asked
_ASK_LOCAL_S = 1.0
_FIRST_ASK_SLURM_S = 3.0
_MAX_ASK_SLURM_S = 20.0
_LAST_CLIENT_S = 15.0
_LOG_LINES = 20

T = TypeVar("T")


class Follower:
    """Shows a run's progress until it ends.

    Parameters
    ----------
    paths : RunPaths
        Of the run.
    console : Console
        Where to show it: bars in a terminal, a line a round elsewhere.
    """

    def __init__(self, paths: RunPaths, console: Console) -> None:
        self._paths = paths
        self._cluster = config.load(paths.config).cluster
        self._local = self._cluster.executor != "slurm"
        self._console = console
        self._rounds_shown = 0
        self._status = _Reader(paths.status, lambda: run_state.read(paths), local=self._local)
        self._rounds = _Reader(
            paths.metrics, lambda: list(files.read_lines(paths.metrics)), local=self._local
        )
        self._start_s = time.monotonic()
        self._pause_s = _ASK_LOCAL_S if self._local else _FIRST_ASK_SLURM_S
        self._ask_s = self._start_s + self._pause_s
        self._alone_since_s: float | None = None
        self._queued_since_s: float | None = None
        self._waiting = ""

    def until_end(self) -> dict[str, Any]:
        """Show progress until the run has ended; return the last status."""
        with self._bars() as show:
            while True:
                status = self._status.read()
                if status["state"] not in run_state.ENDED and time.monotonic() > self._ask_s:
                    status = self._look()
                show(status)
                if status["state"] in run_state.ENDED:
                    self._show_log(status)
                    return status
                time.sleep(_LOCAL_PAUSE_S if self._local else _PAUSE_S)

    def wait_for_processes(self, timeout_s: float) -> list[str]:
        """Wait until the processes of a local run are gone; return the roles that are not."""
        left: list[str] = []

        def gone() -> bool:
            jobs = inspection.inspect(self._paths).jobs
            left[:] = [role for role, job in jobs.items() if job.state == "RUNNING"]
            return not left

        files.wait_until(gone, timeout_s)
        return left

    def _look(self) -> dict[str, Any]:
        """Check the run's state against its jobs, and end a run that cannot go on."""
        standing = inspection.inspect(self._paths)
        if not self._local:  # Slurm's controller serves many: it is asked more and more rarely
            self._pause_s = min(1.5 * self._pause_s, _MAX_ASK_SLURM_S)
        now_s = time.monotonic()
        self._ask_s = now_s + self._pause_s
        self._waiting = _pending(standing)
        reason = self._why_hopeless(standing, now_s)
        ended = standing.status["state"] in run_state.ENDED
        if reason or (ended and standing.status["state"] != "finished"):
            with contextlib.suppress(PlatformError):
                cluster.cancel(self._paths)
        if reason and not ended:
            inspection.write_end(self._paths, reason)
            return run_state.read(self._paths)
        return standing.status

    def _why_hopeless(self, standing: inspection.Standing, now_s: float) -> str | None:
        server = standing.jobs.get("server")
        clients = [job for role, job in standing.jobs.items() if role != "server"]
        limit_s = 60 * self._cluster.pending_timeout_min
        queued = server is not None and server.pending
        self._queued_since_s = (self._queued_since_s or now_s) if queued else None
        if server and self._queued_since_s and now_s - self._queued_since_s > limit_s:
            return (
                f"cluster.pending_timeout_min: the server job {server.job_id} did not start within"
                f" {limit_s / 60:g} min: {server.describe()}"
            )
        alone = self._local and clients and all(job.ended for job in clients)
        self._alone_since_s = (self._alone_since_s or now_s) if alone else None
        if self._alone_since_s and now_s - self._alone_since_s > _LAST_CLIENT_S:
            return "every array task ended without a word"  # and nothing here starts them again
        return None

    def _show_log(self, status: dict[str, Any]) -> None:
        """Show the end of the log of a run that ended without a word of its own."""
        jobs = submission.read(self._paths)
        if status["state"] == "finished" or jobs is None or not jobs.server:
            return
        job_id = jobs.server
        if "array task" in status["reason"] and jobs.clients:
            job_id = jobs.clients[0]
        lines = _tail(cluster.log_paths(self._paths, job_id)[-1])
        for line in lines:
            self._console.print(line, style="dim", markup=False, highlight=False, soft_wrap=True)

    @contextmanager
    def _bars(self) -> Iterator[Any]:
        if not self._console.is_terminal:
            yield self._print_rounds
            return
        with Progress(
            TextColumn("{task.description:<8}"),
            BarColumn(bar_width=40),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            console=self._console,
            transient=True,
        ) as progress:
            rounds = progress.add_task("rounds", total=None, note="waiting for the server")
            fits = progress.add_task("fits", total=None, note="")
            yield lambda status: self._update(progress, rounds, fits, status)

    def _update(
        self, progress: Progress, rounds: TaskID, fits: TaskID, status: dict[str, Any]
    ) -> None:
        if status["state"] == "pending":
            if self._waiting:
                progress.update(rounds, note=self._waiting)
            return
        done = sum(1 for line in self._rounds.read() if line["round"] > 0)
        total = status.get("num_rounds") or None
        note = words.summary(status.get("metrics") or {})
        if total and status.get("round_s"):
            note += f"  ETA {words.duration((total - done) * status['round_s'])}"
        if not done and not status.get("array_tasks"):
            note = self._waiting or "waiting for array tasks"
        progress.update(rounds, completed=done, total=total, note=note)
        failed = status.get("fits_failed")
        progress.update(
            fits,
            completed=status.get("fits_done", 0),
            total=status.get("fits_total") or None,
            description=status.get("verb") or "fits",
            note=f"{failed} failed so far" if failed else "",
        )

    def _print_rounds(self, _status: dict[str, Any]) -> None:
        lines = self._rounds.read()
        for line in lines[self._rounds_shown :]:
            metrics = line.get("evaluate") or line.get("evaluate_clients") or line.get("train", {})
            self._console.print(
                f"round {line['round']}: {words.summary(metrics)}  ({line['round_s']:.2f} s)",
                highlight=False,
            )
        self._rounds_shown = len(lines)

    def print_result(self, status: dict[str, Any]) -> None:
        """Print the table of results."""
        lines = self._rounds.read()
        table = Table(show_header=False, box=None, pad_edge=False)
        table.add_column(style="bold")
        table.add_column(overflow="fold")
        table.add_row("run", status["state"])
        if status["reason"]:
            table.add_row("reason", status["reason"])
        table.add_row("rounds", str(max((line["round"] for line in lines), default=0)))
        evaluated = [line for line in lines if "evaluate" in line or "evaluate_clients" in line]
        if evaluated:
            metrics = evaluated[-1].get("evaluate") or evaluated[-1]["evaluate_clients"]
            for name in words.shown(metrics, ("loss", "accuracy", "f1")):
                table.add_row(name, f"{metrics[name]:.4f}")
        if failed := status.get("fits_failed"):
            table.add_row("failed fits", f"{failed}, see {self._paths.errors}")
        table.add_row("wall time", words.duration(time.monotonic() - self._start_s))
        if digest := status.get("model_sha256"):
            table.add_row("model", f"{self._paths.model}\nsha256 {digest}")
        table.add_row("run folder", str(self._paths.root))
        self._console.print(table)


class _Reader(Generic[T]):
    """Reads a file; one of this machine only where it has changed."""

    def __init__(self, path: Path, read: Callable[[], T], *, local: bool) -> None:
        self._path = path
        self._read = read
        self._local = local
        self._found: T | None = None
        self._version: tuple[int, int, int] | None = None

    def read(self) -> T:
        """Return what the file says."""
        version = None
        if self._local:
            with contextlib.suppress(OSError):
                found = self._path.stat()
                version = found.st_ino, found.st_size, found.st_mtime_ns
        if version is None or version != self._version or self._found is None:
            self._found, self._version = self._read(), version
        return self._found


def _pending(standing: inspection.Standing) -> str:
    """Say what the run waits for in the queue."""
    server = standing.jobs.get("server")
    if server is not None and server.pending:
        expected = f", expected at {server.start}" if server.start else ""
        return f"server job {server.job_id}: {server.describe()}{expected}"
    waiting = [job for role, job in standing.jobs.items() if role != "server" and job.pending]
    return f"{len(waiting)} array tasks: {waiting[0].describe()}" if waiting else ""


def _tail(path: Path) -> list[str]:
    try:
        return path.read_text(errors="replace").splitlines()[-_LOG_LINES:]
    except OSError:
        return []
