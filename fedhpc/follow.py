"""Watch a run from outside, by what lies in its folder, and say how it ended."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn
from rich.table import Table

from fedhpc import cluster, files, run_state
from fedhpc.cluster import Submission
from fedhpc.paths import RunPaths

_PAUSE_S = 0.2
_GRACE_S = 3.0
_ASK_SLURM_S = 10.0
_LOG_LINES = 20


class Follower:
    """Shows a run's progress until it ends.

    Parameters
    ----------
    paths : RunPaths
        Of the run.
    submission : Submission
        Its jobs.
    console : Console
        Where to show it: bars in a terminal, a line a round elsewhere.
    """

    def __init__(self, paths: RunPaths, submission: Submission, console: Console) -> None:
        self._paths = paths
        self._submission = submission
        self._console = console
        self._rounds_shown = 0
        self._ask_s = 0.0
        self._start_s = time.monotonic()

    def until_end(self) -> dict[str, Any]:
        """Show progress until the run has ended; return the last status."""
        with self._bars() as show:
            dead_since_s: float | None = None
            while True:
                status = run_state.read(self._paths)
                show(status)
                if status["state"] in run_state.ENDED:
                    return status
                if self._server_lives():
                    dead_since_s = None
                else:
                    dead_since_s = dead_since_s or time.monotonic()
                    self._ask_s = 0.0
                    if time.monotonic() - dead_since_s > _GRACE_S:
                        return self._died()
                time.sleep(_PAUSE_S)

    def _server_lives(self) -> bool:
        now_s = time.monotonic()
        if self._submission.executor == "slurm" and now_s < self._ask_s:
            return True  # the controller serves many: it is asked rarely
        self._ask_s = now_s + _ASK_SLURM_S
        return "server" in cluster.alive(self._paths, self._submission)

    def _died(self) -> dict[str, Any]:
        logs = cluster.log_paths(self._paths, self._submission.server)
        reason = f"the server process ended without a word; its log: {logs[-1]}"
        run_state.write(self._paths, "failed", reason, exit_code=1)
        for line in _tail(logs[-1]):
            self._console.print(line, style="dim", markup=False, highlight=False)
        return run_state.read(self._paths)

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
            return
        done = sum(1 for line in files.read_lines(self._paths.metrics) if line["round"] > 0)
        total = status.get("num_rounds") or None
        note = _summary(status.get("metrics") or {})
        if total and status.get("round_s"):
            note += f"  ETA {_duration((total - done) * status['round_s'])}"
        if not done and not status.get("array_tasks"):
            note = "waiting for array tasks"
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
        lines = list(files.read_lines(self._paths.metrics))
        for line in lines[self._rounds_shown :]:
            metrics = line.get("evaluate") or line.get("evaluate_clients") or line.get("train", {})
            self._console.print(
                f"round {line['round']}: {_summary(metrics)}  ({line['round_s']:.2f} s)",
                highlight=False,
            )
        self._rounds_shown = len(lines)

    def print_result(self, status: dict[str, Any]) -> None:
        """Print the table of results."""
        lines = list(files.read_lines(self._paths.metrics))
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
            for name in ("loss", "accuracy", "f1"):
                if name in metrics:
                    table.add_row(name, f"{metrics[name]:.4f}")
        if failed := status.get("fits_failed"):
            table.add_row("failed fits", f"{failed}, see {self._paths.errors}")
        table.add_row("wall time", _duration(time.monotonic() - self._start_s))
        if digest := status.get("model_sha256"):
            table.add_row("model", f"{self._paths.model}\nsha256 {digest}")
        table.add_row("run folder", str(self._paths.root))
        self._console.print(table)


def _summary(metrics: dict[str, Any]) -> str:
    wanted = ("loss", "accuracy", "train_loss")
    shown = [
        f"{name} {metrics[name]:.4f}"
        for name in wanted
        if isinstance(metrics.get(name), int | float)
    ]
    return "  ".join(shown)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def _tail(path: Path) -> list[str]:
    try:
        return path.read_text(errors="replace").splitlines()[-_LOG_LINES:]
    except OSError:
        return []
