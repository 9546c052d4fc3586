"""All commands under one name: ``fedhpc COMMAND``, which is ``python -m fedhpc.COMMAND``."""

import importlib

import click
import typer
from typer.core import TyperGroup

_COMMANDS = {
    "submit": "Submit a federation: one server job, and a job array of clients.",
    "status": "Show how a run stands: its jobs, rounds, fits and metrics.",
    "list": "List the runs of a folder, the newest first.",
    "logs": "Print or follow the log of the server or of an array task.",
    "report": "Draw the memory of a run over time, and write its page.",
    "cancel": "End every job of a run.",
    "clean": "Free what ended runs have left behind on the disk.",
    "data": "Download and pack a data set for the built-in app.",
    "doctor": "Check this machine, or the cluster, before a run.",
}


class _Commands(TyperGroup):
    """A group that imports a command when it is called, and not for the list of all."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name, _, rest = super().resolve_command(ctx, args)
        module = importlib.import_module(f"fedhpc.{name}")
        return name, typer.main.get_command(module.app), rest


def main() -> None:
    """Run a command."""
    _Commands(
        name="fedhpc",
        commands={name: click.Command(name, help=text) for name, text in _COMMANDS.items()},
        help="Federated learning with Flower and PyTorch on Slurm clusters.",
        no_args_is_help=True,
        suggest_commands=False,  # click does it
    )()


if __name__ == "__main__":
    main()
