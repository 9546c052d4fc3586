"""Check a cluster before a run: ``python -m fedhpc.doctor CONFIG``.

A pair of jobs of some seconds, with the options of a run's jobs, looks at what a run will need.
This module loads neither torch, flwr, grpc nor submitit at the top.
"""

import signal
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedhpc import commandline, config, submit
from fedhpc.errors import PlatformError

if TYPE_CHECKING:
    from fedhpc.doctor.checks import Check

__all__ = ["app", "main"]

app = commandline.new_app()

_CANCELLED = 130
_STYLES = {"pass": "green", "warn": "yellow", "fail": "bold red"}


@app.command(cls=commandline.Command)
def main(
    config_file: Annotated[
        Path, typer.Argument(metavar="CONFIG", help="The experiment's YAML file.")
    ],
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
    chosen = [*(assignments or [])]
    if executor is not None:
        chosen.append(f"cluster.executor={executor.value}")
    resolved = submit.resolve(config.load(config_file, site, chosen), needs_sbatch=True)
    for number in (signal.SIGTERM, signal.SIGHUP):  # timeout(1), a closed terminal: as a Ctrl-C
        signal.signal(number, signal.default_int_handler)
    try:
        from fedhpc.doctor import pair

        found = pair.examine(
            resolved, 60 * timeout_min, keep=keep, tell=lambda words: typer.echo(words, err=True)
        )
    except KeyboardInterrupt:
        typer.echo("\ncancelled", err=True)
        raise typer.Exit(_CANCELLED) from None
    counts = dict.fromkeys(_STYLES, 0) | Counter(check.status for check in found)
    if as_json:
        commandline.print_json({**counts, "checks": [asdict(check) for check in found]})
    else:
        _print_table(found)
        typer.echo(f"\n{', '.join(f'{count} {status}' for status, count in counts.items())}")
    raise typer.Exit(PlatformError.exit_code if counts["fail"] else 0)


def _print_table(checks: Sequence["Check"]) -> None:
    """Print a row a check; what to do stands below what was found."""
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for name in ("result", "check", "where", "found, and what to do"):
        table.add_column(name, overflow="fold", no_wrap=name == "result")
    for check in checks:
        found = Text(check.found)
        if check.remedy:
            found.append(f"\n-> {check.remedy}", style="bold")
        result = Text(check.status, style=_STYLES[check.status])
        table.add_row(result, Text(check.name), Text(check.where), found)
    commandline.console().print(table)
