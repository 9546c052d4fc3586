"""Free what ended runs have left on the disk: ``python -m fedhpc.clean [RUN_DIR ...]``."""

import os
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedhpc import words
from fedhpc.commandline import RUNS_DIR, Command, RunsDir, console, new_app
from fedhpc.errors import ConfigError, PlatformError, RunError
from fedhpc.paths import RunPaths, created_s, is_run_folder, run_folders

if TYPE_CHECKING:
    from fedhpc.inspection import Standing

app = new_app()

_DAY_S = 86400.0


@dataclass
class _Waste:
    """What can be freed of a run.

    Attributes
    ----------
    paths : RunPaths
        Of the run.
    parts : dict
        By its name for a person: files and folders.
    """

    paths: RunPaths
    parts: dict[str, list[Path]]

    def size(self, name: str) -> int:
        """Return the bytes of a part."""
        return sum(_size(path) for path in self.parts[name])


@app.command(cls=Command)
def main(
    run_dirs: Annotated[list[Path] | None, typer.Argument(metavar="[RUN_DIR]...")] = None,
    runs_dir: RunsDir = RUNS_DIR,
    older_than: Annotated[
        float | None,
        typer.Option(metavar="DAYS", min=0, help="Only runs that ended so many days ago."),
    ] = None,
    whole: Annotated[
        bool, typer.Option("--whole", help="Remove the run folders entirely.")
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
) -> None:
    """Free what ended runs have left: blobs, submitit's pickles, older checkpoints, keys.

    The newest checkpoint and the best stay, and configs, metrics, fits, memory, errors, logs,
    models and reports, unless --whole is given.
    Without RUN_DIR it is all ended runs in --runs-dir. It shows what would go, and asks.
    """
    if whole and not run_dirs and older_than is None:
        raise ConfigError(
            "command line",
            ["--whole: expected RUN_DIR or --older-than with it, found neither"],
            "--whole --older-than 0 removes all ended runs of --runs-dir",
        )
    named = [_named(path) for path in dict.fromkeys(run_dirs or [])]
    runs = _ended(named or run_folders(runs_dir), refuse=bool(named))
    if older_than is not None:
        runs = [paths for paths in runs if _ended_days_ago(paths) >= older_than]
    wastes = [waste for paths in runs if any((waste := _waste(paths, whole=whole)).parts.values())]
    if not wastes:
        typer.echo("nothing to free")
        return
    total = _print_table(wastes)
    what = "Remove these run folders with all that is in them" if whole else "Free these files"
    if not yes:
        typer.confirm(f"{what}, {_mb(total)} MB?", abort=True)
    for waste in wastes:
        for path in (path for paths in waste.parts.values() for path in paths):
            _remove(path)
    typer.echo(f"freed {_mb(total)} MB")


def _ended_days_ago(paths: RunPaths) -> float:
    """Return for how long a run has ended; 0 if the clock of its disk is ahead of ours."""
    try:
        ended_s = paths.status.stat().st_mtime
    except OSError:  # nobody could write it
        ended_s = created_s(paths)
    return max(0.0, time.time() - ended_s) / _DAY_S


def _named(path: Path) -> RunPaths:
    """Return the run folder that is named.

    Raises
    ------
    ConfigError
        If it is not one; a config.yaml alone does not make one here.
    """
    folder = path.resolve()
    if not is_run_folder(folder):
        raise ConfigError("command line", [f"RUN_DIR: expected a run folder, found {path}"])
    return RunPaths(folder)


def _ended(runs: Sequence[RunPaths], *, refuse: bool) -> list[RunPaths]:
    """Return the runs that have ended, as far as anybody can tell, with all their jobs.

    Raises
    ------
    RunError
        If one has not, and ``refuse``.
    """
    from fedhpc import inspection

    standings = inspection.inspect_all(runs)
    busy = {
        paths: why
        for paths, standing in zip(runs, standings, strict=True)
        if (why := _why_not(standing))
    }
    if busy and refuse:
        problems = "".join(f"\n  {paths.run_id}: {why}" for paths, why in busy.items())
        raise RunError(
            f"only runs that have ended can be cleaned:{problems}", "fedhpc cancel RUN_DIR ends one"
        )
    if busy:
        typer.echo(f"left alone, as they have not ended: {len(busy)}", err=True)
    return [paths for paths in runs if paths not in busy]


def _why_not(standing: "Standing") -> str:
    """Return why a run must not be touched; "" if it may be."""
    if not standing.ended:
        return ", ".join(filter(None, [standing.status["state"], standing.problem]))
    there = [role for role, job in standing.jobs.items() if not job.ended]
    return f"{standing.status['state']}, but still there: {words.roles(there)}" if there else ""


def _waste(paths: RunPaths, *, whole: bool) -> _Waste:
    if whole:
        return _Waste(paths, {"run folder": [paths.root]})
    checkpoints = list(_entries(paths.checkpoints))
    best = paths.best_checkpoint
    kept = {path.name for path in checkpoints[-1:]}
    if best.is_symlink():
        kept |= {best.name, best.readlink().name}
    return _Waste(
        paths,
        {
            "blobs": list(_entries(paths.blobs)),
            "pickles": [path for path in _entries(paths.jobs) if path.suffix == ".pkl"],
            "checkpoints": [path for path in checkpoints if path.name not in kept],
            "secrets": [paths.secrets] if os.path.lexists(paths.secrets) else [],
        },
    )


def _entries(folder: Path) -> Iterator[Path]:
    """Yield what lies in a folder, by name; nothing if it is a link, which may lead elsewhere."""
    if folder.is_dir() and not folder.is_symlink():
        yield from sorted(folder.iterdir())


def _size(path: Path) -> int:
    """Return the bytes of a file, or of all files of a folder; links are not followed."""
    if path.is_dir() and not path.is_symlink():
        return sum(
            _size(Path(folder) / name) for folder, _, names in os.walk(path) for name in names
        )
    try:
        return path.lstat().st_size
    except FileNotFoundError:  # somebody else was faster
        return 0


def _remove(path: Path) -> None:
    """Remove a file, a link, or a folder with all that is in it; links are not followed."""
    try:
        if path.is_symlink() or not path.is_dir():
            path.unlink(missing_ok=True)
        else:
            shutil.rmtree(path)
    except OSError as error:
        raise PlatformError(
            f"could not remove {error.filename or path}: {error.strerror}", "check its permissions"
        ) from error


def _print_table(wastes: Sequence[_Waste]) -> int:
    """Show what can be freed; return the bytes in all."""
    from rich.table import Table

    names = list(wastes[0].parts)
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("run")
    for name in names:
        table.add_column(f"{name}, MB", justify="right")
    total = 0
    for waste in wastes:
        sizes = [waste.size(name) for name in names]
        total += sum(sizes)
        table.add_row(waste.paths.run_id, *map(_mb, sizes))
    console().print(table)
    return total


def _mb(size: int) -> str:
    return f"{size / 1e6:.1f}"


if __name__ == "__main__":
    app()
