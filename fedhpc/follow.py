"""Watch a run from outside, by what lies in its folder, and say how it ended."""

import shutil
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
_CLIENTS_GRACE_S = 15.0
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
                gone, grace_s = self._who_is_gone()
                if gone is None:
                    dead_since_s = None
                else:
                    dead_since_s = dead_since_s or time.monotonic()
                    self._ask_s = 0.0
                    if time.monotonic() - dead_since_s > grace_s:
                        return self._died(gone)
                time.sleep(_PAUSE_S)

    def _who_is_gone(self) -> tuple[str | None, float]:
        """Return the role without which the run cannot go on, and how long to wait for its word."""
        now_s = time.monotonic()
        local = self._submission.executor == "local"
        if not local and now_s < self._ask_s:
            return None, 0.0  # Slurm's controller serves many: it is asked rarely
        self._ask_s = now_s + _ASK_SLURM_S
        alive = cluster.alive(self._paths, self._submission)
        if "server" not in alive:
            return "server", _GRACE_S
        if local and alive == ["server"]:
            return "client-0", _CLIENTS_GRACE_S  # nothing here starts them again
        return None, 0.0

    def _died(self, role: str) -> dict[str, Any]:
        """End what is left of a run that cannot go on, and say why."""
        job_id = dict(self._submission.roles())[role]
        log = cluster.log_paths(self._paths, job_id)[-1]
        for line in _tail(log):
            self._console.print(line, style="dim", markup=False, highlight=False, soft_wrap=True)
        who = "the server process" if role == "server" else "every array task"
        if log.exists():
            reason = f"{who} ended without a word; its log: {log}"
        else:
            reason = f"job {job_id} ({role}) was gone before it started"
        cluster.cancel(self._paths)
        shutil.rmtree(self._paths.secrets, ignore_errors=True)
        known = run_state.read(self._paths) | {"exit_code": 1}
        del known["state"], known["reason"]
        run_state.write(self._paths, "failed", reason, **known)
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
            for name in _shown(metrics, ("loss", "accuracy", "f1")):
                table.add_row(name, f"{metrics[name]:.4f}")
        if failed := status.get("fits_failed"):
            table.add_row("failed fits", f"{failed}, see {self._paths.errors}")
        table.add_row("wall time", _duration(time.monotonic() - self._start_s))
        if digest := status.get("model_sha256"):
            table.add_row("model", f"{self._paths.model}\nsha256 {digest}")
        table.add_row("run folder", str(self._paths.root))
        self._console.print(table)


def _summary(metrics: dict[str, Any]) -> str:
    names = _shown(metrics, ("loss", "accuracy", "train_loss"))
    return "  ".join(f"{name} {metrics[name]:.4f}" for name in names)


def _shown(metrics: dict[str, Any], wanted: tuple[str, ...]) -> list[str]:
    """Return the names of the metrics to show: the usual ones, or the first of an app's own."""
    numbers = [name for name, value in metrics.items() if isinstance(value, int | float)]
    return [name for name in wanted if name in numbers] or numbers[:3]


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def _tail(path: Path) -> list[str]:
    try:
        return path.read_text(errors="replace").splitlines()[-_LOG_LINES:]
    except OSError:
        return []
