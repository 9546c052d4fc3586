"""Download and pack a data set for the built-in app: ``python -m fedhpc.data cifar10``."""

import os
from pathlib import Path
from typing import Annotated

import typer

from fedhpc.config import Data
from fedhpc.errors import FedHPCError
from fedhpc.learning.data import NAMES, prepare

app = typer.Typer(add_completion=False)


# Not the argument's own help: typer 0.20 with click 8.5 does not show it.
@app.command(epilog=f"NAME is one of: {', '.join(NAMES)}.")
def main(
    name: str,
    root: Annotated[str, typer.Option(help="folder for data sets, as data.root")] = Data().root,
    source: Annotated[
        Path | None, typer.Option(help="folder or zip that the data lie in, as data.source")
    ] = None,
) -> None:
    """Download a data set if need be, pack it, and print the packed folder."""
    try:
        folder = prepare(name, Path(os.path.expandvars(root)).expanduser(), source)
    except FedHPCError as error:
        typer.echo(error, err=True)
        raise typer.Exit(error.exit_code) from error
    typer.echo(folder)


if __name__ == "__main__":
    app()
