"""Show how a run stands: ``python -m fedhpc.status [RUN_DIR]``."""

import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedhpc.commandline import (
    RUNS_DIR,
    AsJson,
    Command,
    RunsDir,
    console,
    new_app,
    open_or_newest,
    print_json,
)
from fedhpc.errors import PlatformError
from fedhpc.paths import RunPaths

if TYPE_CHECKING:
    from fedhpc.inspection import Standing

app = new_app()

_LOOK_S = 1.0


@app.command(cls=Command)
def main(
    run_dir: Annotated[Path | None, typer.Argument(metavar="[RUN_DIR]")] = None,
    watch: Annotated[bool, typer.Option("--watch", help="Show it until the run ends.")] = False,
    as_json: AsJson = False,
    runs_dir: RunsDir = RUNS_DIR,
) -> None:
    """Show how a run stands: its state, rounds, fits, metrics and jobs.

    Without RUN_DIR it is the newest run in --runs-dir.
    """
    from fedhpc import inspection

    paths = open_or_newest(run_dir, runs_dir)
    if watch:
        _watch(paths, as_json=as_json)
        return
    standing = inspection.inspect(paths)
    _show(paths, standing, as_json=as_json)
    if standing.on_slurm and standing.problem and standing.status["state"] == "pending":
        raise PlatformError(
            "Slurm did not answer, and the server has not said anything yet", "try again later"
        )


def _show(paths: RunPaths, standing: "Standing", *, as_json: bool) -> None:
    from fedhpc import overview

    if as_json:
        print_json(overview.as_dict(paths, standing))
    else:
        console().print(overview.as_table(paths, standing))


def _watch(paths: RunPaths, *, as_json: bool) -> None:
    """Show the run until it ends: in place in a terminal, else whenever something changes."""
    from rich.live import Live

    from fedhpc import overview

    if sys.stdout.isatty() and not as_json:
        with Live(console=console(), auto_refresh=False) as live:
            for standing in _looks(paths):
                live.update(overview.as_table(paths, standing), refresh=True)
        return
    shown: object = None
    for standing in _looks(paths):
        if (changing := _what_matters(standing)) != shown:
            _show(paths, standing, as_json=as_json)
            sys.stdout.flush()
            shown = changing


def _looks(paths: RunPaths) -> Iterator["Standing"]:
    from fedhpc import inspection

    watch = inspection.Watch(paths)
    while True:
        standing = watch.look()
        yield standing
        if standing.ended and watch.is_fresh:
            return
        time.sleep(_LOOK_S)


def _what_matters(standing: "Standing") -> Any:
    """Return what is worth another print; that one more fit has ended is not."""
    names = ("state", "reason", "round", "metrics", "fits_failed")
    jobs = {role: (job.state, job.reason, job.node) for role, job in standing.jobs.items()}
    return [standing.status.get(name) for name in names], standing.problem, jobs


if __name__ == "__main__":
    app()
