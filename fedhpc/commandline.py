"""What the commands share: their arguments, and how an error ends them."""

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import click
import typer
from typer.core import TyperCommand

from fedhpc.errors import ConfigError, FedHPCError, PlatformError
from fedhpc.files import is_of_disk
from fedhpc.paths import RunPaths, open_run_folder, run_folders

_WIDE = 200  # of a table that no terminal limits

RunDir = Annotated[Path, typer.Argument(metavar="RUN_DIR", show_default=False)]
RunsDir = Annotated[Path, typer.Option("--runs-dir", help="The folder that the runs are in.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")]
RUNS_DIR = Path("runs")


class Command(TyperCommand):
    """A command that an error of ours, or of the disk, ends with a line and its exit code."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command."""
        try:
            return super().invoke(ctx)
        except FedHPCError as error:
            typer.echo(f"error: {error}", err=True)
            raise typer.Exit(error.exit_code) from None
        except OSError as error:
            if not is_of_disk(error):
                raise
            typer.echo(f"error: {error}\n  Hint: the disk failed; try again", err=True)
            raise typer.Exit(PlatformError.exit_code) from None


def new_app() -> typer.Typer:
    """Return the Typer application of one command; give its function ``cls=Command``."""
    return typer.Typer(
        add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="markdown"
    )


def open_or_newest(run_dir: Path | None, runs_dir: Path) -> RunPaths:
    """Return the run that is named, or the newest one.

    Raises
    ------
    ConfigError
        If it is no run folder, or there is none.
    """
    if run_dir is not None:
        return open_run_folder(run_dir)
    found = run_folders(runs_dir)
    if not found:
        raise ConfigError(
            "command line",
            [f"RUN_DIR: expected a run folder in {runs_dir.absolute()}, found none"],
            "name a run folder, or the cluster.runs_dir of your runs with --runs-dir",
        )
    return found[0]


def print_json(value: Any) -> None:
    """Print a value as JSON, for a script."""
    sys.stdout.write(json.dumps(value, indent=1) + "\n")


def console() -> Any:
    """Return a rich Console; what reads its output has no width, so tables are not squeezed."""
    from rich.console import Console

    width = None if sys.stdout.isatty() else _WIDE
    return Console(width=width, highlight=False, markup=False)
