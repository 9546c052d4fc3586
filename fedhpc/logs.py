"""Print or follow the log of a job: ``python -m fedhpc.logs RUN_DIR [server|client K]``."""

import os
import shutil
import sys
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedhpc import files, words
from fedhpc.commandline import Command, RunDir, new_app
from fedhpc.errors import ConfigError, PlatformError
from fedhpc.paths import RunPaths, open_run_folder

if TYPE_CHECKING:
    from fedhpc.cluster.submission import Submission

app = new_app()

_PAUSE_S = 0.3
_QUIET_S = 1.5
_LAST_LINES_S = 15.0


@app.command(cls=Command)
def main(
    run_dir: RunDir,
    role: Annotated[str, typer.Argument(metavar="[server|client]", show_default=False)] = "server",
    array_task: Annotated[int | None, typer.Argument(metavar="[K]", show_default=False)] = None,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Go on until the run ends.")
    ] = False,
    lines: Annotated[
        int | None, typer.Option("--lines", "-n", min=0, help="Only the last lines of each file.")
    ] = None,
) -> None:
    """Print the log of the server job (the default), or of array task K of the client array.

    Standard output and standard error are files of their own; where both have something, both are
    printed, each with its name. All attempts of a job are in the same files.
    """
    from fedhpc import cluster
    from fedhpc.cluster import submission

    paths = open_run_folder(run_dir)
    jobs = submission.read(paths)
    if jobs is None:
        raise PlatformError(
            f"{paths.run_id} has no logs: its jobs were not submitted, or have not started yet"
        )
    wanted = _role(jobs, role, array_task)
    streams = cluster.log_paths(paths, dict(jobs.roles())[wanted])
    printer = _Printer(streams, lines)
    if follow:
        _follow(paths, printer)
    elif not any(path.exists() for path in streams):
        raise _no_log(paths, jobs, wanted)
    else:
        printer.print_news()
    if not printer.has_printed:
        typer.echo(f"the log of {words.roles([wanted])} is empty", err=True)


def _role(jobs: "Submission", role: str, array_task: int | None) -> str:
    """Return the role that is meant.

    Raises
    ------
    ConfigError
        If there is none such.
    """
    wanted = role if array_task is None else f"{role}-{array_task}"
    if wanted == "client" and len(jobs.clients) == 1:
        wanted = "client-0"
    roles = dict(jobs.roles())
    if wanted not in roles:
        indices = [words.array_task_of(known) for known in roles if known != "server"]
        known = ["server"] if "server" in roles else []
        if indices:
            known.append(f"client K, K being one of {words.ranges(indices)}")
        found = role if array_task is None else f"{role} {array_task}"
        raise ConfigError("command line", [f"ROLE: expected {' or '.join(known)}, found '{found}'"])
    return wanted


def _no_log(paths: RunPaths, jobs: "Submission", wanted: str) -> PlatformError:
    from fedhpc import cluster, inspection

    roles = dict(jobs.roles())
    job = inspection.inspect(paths, retry_s=0.0).jobs.get(wanted)
    there = [
        role
        for role, job_id in roles.items()
        if any(path.exists() for path in cluster.log_paths(paths, job_id))
    ]
    state = f": job {roles[wanted]} is {job.describe()}" if job else ""
    return PlatformError(
        f"there is no log of {words.roles([wanted])} yet{state}",
        f"there are logs of {words.roles(there)}" if there else None,
    )


class _Printer:
    """Prints what files have got since the last time, with their names where there are several.

    Parameters
    ----------
    streams : sequence of Path
        The files; they need not exist yet.
    lines : int or None
        How many lines of what is there already are wanted; None: all.
    """

    def __init__(self, streams: Sequence[Path], lines: int | None) -> None:
        self._offsets = {path: 0 if lines is None else _start(path, lines) for path in streams}
        self._last: Path | None = None
        self.has_printed = False

    def print_news(self) -> bool:
        """Print what is new; return whether there was something."""
        sizes = {path: _size(path) for path in self._offsets}
        several = sum(size > 0 for size in sizes.values()) > 1
        new = [path for path, size in sizes.items() if size > self._offsets[path]]
        for path in new:
            if several and path != self._last:
                typer.echo("\n" * (self._last is not None) + f"==> {path} <==")
            self._last = path
            sys.stdout.flush()
            with path.open("rb") as file:
                file.seek(self._offsets[path])
                shutil.copyfileobj(file, sys.stdout.buffer)
                self._offsets[path] = file.tell()
        sys.stdout.flush()
        self.has_printed |= bool(new)
        return bool(new)


def _size(path: Path) -> int:
    """Return the size of a file, 0 if there is none; opening it makes a network disk look anew."""
    try:
        with path.open("rb") as file:
            return file.seek(0, os.SEEK_END)
    except FileNotFoundError:
        return 0


def _start(path: Path, lines: int) -> int:
    """Return where the last lines of a file begin, in bytes."""
    if not path.exists():
        return 0
    position, starts = 0, deque[int](maxlen=lines)
    with path.open("rb") as file:
        for line in file:
            starts.append(position)
            position += len(line)
    return starts[0] if starts else position


def _follow(paths: RunPaths, printer: _Printer) -> None:
    """Print what comes until the run has ended, and the last lines after that."""
    from fedhpc import inspection

    watch = inspection.Watch(paths)
    while not watch.look().ended:
        files.refresh_directory(paths.jobs)
        printer.print_news()
        time.sleep(_PAUSE_S)
    deadline_s = time.monotonic() + _LAST_LINES_S
    quiet_s = 0.0
    while quiet_s < _QUIET_S and time.monotonic() < deadline_s:
        quiet_s = 0.0 if printer.print_news() else quiet_s + _PAUSE_S
        time.sleep(_PAUSE_S)


if __name__ == "__main__":
    app()
