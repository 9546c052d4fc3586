"""List the runs of a folder: ``python -m fedhpc.list``."""

import time
from typing import TYPE_CHECKING

import typer

from fedhpc import words
from fedhpc.commandline import RUNS_DIR, AsJson, Command, RunsDir, console, new_app, print_json
from fedhpc.paths import RunPaths, created_s, run_folders

if TYPE_CHECKING:
    from fedhpc.inspection import Standing

app = new_app()


@app.command(cls=Command)
def main(runs_dir: RunsDir = RUNS_DIR, as_json: AsJson = False) -> None:
    """List the runs of a folder, the newest first, with how they really stand."""
    from fedhpc import inspection

    runs = run_folders(runs_dir)
    standings = inspection.inspect_all(runs, jobs_of_ended=False)
    if as_json:
        print_json([_as_dict(*pair) for pair in zip(runs, standings, strict=True)])
    else:
        _print_table(runs, standings)
    if unsure := [standing for standing in standings if standing.on_slurm and standing.problem]:
        typer.echo(
            f"note: not checked, the state of {len(unsure)} is what status.json says:"
            f" {unsure[0].problem}",
            err=True,
        )


def _as_dict(paths: RunPaths, standing: "Standing") -> dict[str, object]:
    status = standing.status
    return {
        "run": paths.run_id,
        "run_dir": str(paths.root),
        **{name: status.get(name) for name in ("state", "reason", "round", "num_rounds")},
        "metrics": status.get("metrics") or {},
        "age_s": round(max(0.0, time.time() - created_s(paths)), 1),
        "problem": standing.problem,
    }


def _print_table(runs: list[RunPaths], standings: "list[Standing]") -> None:
    from rich.table import Table

    from fedhpc import overview

    table = Table("run", "state", "rounds", "metrics", "age", box=None, pad_edge=False)
    for paths, standing in zip(runs, standings, strict=True):
        status = standing.status
        problem = standing.problem if not standing.on_slurm else ""  # one note for all on Slurm
        table.add_row(
            paths.run_id,
            ", ".join(filter(None, [status["state"], problem])),
            overview.rounds(status),
            words.summary(status.get("metrics") or {}),
            words.age(time.time() - created_s(paths)),
        )
    console().print(table if runs else "no runs")


if __name__ == "__main__":
    app()
