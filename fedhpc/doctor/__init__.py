"""Check a cluster before a run: ``python -m fedhpc.doctor CONFIG``.

A pair of jobs of some seconds, with the options of a run's jobs, looks at what a run will need.
This module loads neither torch, flwr, grpc nor submitit at the top.
"""

import contextlib
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedhpc import commandline, config, submit
from fedhpc.errors import ConfigError, PlatformError

if TYPE_CHECKING:
    from fedhpc.doctor.pair import Outcome

__all__ = ["app", "main"]

app = commandline.new_app()

_CANCELLED = 130


@app.command(cls=commandline.Command)
def main(
    config_file: Annotated[
        Path | None, typer.Argument(metavar="CONFIG", help="The experiment's YAML file.")
    ] = None,
    executor: Annotated[
        submit.Executor | None,
        typer.Option(help="Where the jobs run; auto: Slurm where sbatch is found, else local."),
    ] = None,
    site: Annotated[
        Path | None, typer.Option(help="YAML file with what only this site knows.")
    ] = None,
    assignments: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Override a value. Repeatable."),
    ] = None,
    timeout_min: Annotated[
        float,
        typer.Option(min=0.01, max=10_000, help="How long the jobs may take to start and end."),
    ] = 10.0,
    keep: Annotated[bool, typer.Option("--keep", help="Leave the folder with the logs.")] = False,
    as_json: commandline.AsJson = False,
) -> None:
    """Check with two short jobs what a run of CONFIG will need; exit code 0 if nothing failed."""
    if config_file is None:
        raise ConfigError("command line", ["CONFIG: expected a YAML file, found nothing"])
    chosen = [*(assignments or [])]
    if executor is not None:
        chosen.append(f"cluster.executor={executor.value}")
    resolved = submit._resolve(config.load(config_file, site, chosen), needs_sbatch=True)
    start_s = time.monotonic()
    try:
        with _interrupts(), _progress() as show:
            from fedhpc.doctor import pair

            outcome = pair.examine(resolved, 60 * timeout_min, keep=keep, show=show)
    except KeyboardInterrupt:
        typer.echo("\ncancelled; the jobs are gone", err=True)
        raise typer.Exit(_CANCELLED) from None
    _print(outcome, time.monotonic() - start_s, as_json=as_json)
    raise typer.Exit(PlatformError.exit_code if outcome.failed else 0)


@contextlib.contextmanager
def _interrupts() -> Iterator[None]:
    """Take timeout(1) and a closed terminal as a Ctrl-C."""
    before = {}
    for number in (signal.SIGTERM, signal.SIGHUP):
        before[number] = signal.signal(number, signal.default_int_handler)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _progress() -> Iterator[Callable[[str], None]]:
    """Show on standard error what is being waited for: one line in a terminal, else a line each."""
    from rich.console import Console
    from rich.markup import escape

    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda words: typer.echo(words, err=True)
        return
    with console.status("starting") as status:
        yield lambda words: status.update(escape(words))


def _print(outcome: "Outcome", seconds: float, *, as_json: bool) -> None:
    from fedhpc.doctor import report

    folder = str(outcome.folder) if outcome.folder else None
    if as_json:
        more = {"folder": folder, "logs": outcome.logs}
        commandline.print_json(report.to_json(outcome.checks, seconds, **more))
        return
    console = commandline.console()
    report.print_table(console, outcome.checks)
    for role, lines in outcome.logs.items():
        console.print(f"\nthe end of the {role}'s log:", style="bold")
        console.print(lines, style="dim", soft_wrap=True)
    if folder:
        console.print(f"\nfolder: {folder}", soft_wrap=True)
    console.print(f"\n{report.summary(outcome.checks, seconds)}")
