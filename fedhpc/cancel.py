"""End every job of a run: ``python -m fedhpc.cancel RUN_DIR``."""

import shutil

import typer

from fedhpc import words
from fedhpc.commandline import Command, RunDir, new_app
from fedhpc.errors import PlatformError
from fedhpc.paths import open_run_folder

app = new_app()


@app.command(cls=Command)
def main(run_dir: RunDir) -> None:
    """End every job of a run, and wait until they are gone.

    Also what a run that has ended already has left in the queue.
    """
    from fedhpc import cluster, inspection, run_state

    paths = open_run_folder(run_dir)
    standing = inspection.inspect(paths)
    if standing.submission and standing.problem and not standing.on_slurm:
        raise PlatformError(f"{paths.run_id}: {standing.problem}", "call fedhpc cancel there")
    if standing.ended:
        typer.echo(f"{paths.run_id} had already ended: {standing.status['state']}")
    there = [role for role, job in standing.jobs.items() if not job.ended]
    if there or standing.problem or not standing.ended:
        if there:
            typer.echo(f"cancelling {words.roles(there)} ...")
        if left := cluster.cancel(paths):
            raise PlatformError(
                f"{paths.run_id}: still there: {words.roles(left)}",
                "Slurm may still be ending them; see fedhpc status, and try again",
            )
    if not standing.ended:
        inspection.write_cancelled(paths, "by fedhpc cancel")
        typer.echo(f"{paths.run_id}: {run_state.read(paths)['state']}; every job is gone")
    elif there:
        typer.echo(f"cancelled {words.roles(there)}")
    shutil.rmtree(paths.secrets, ignore_errors=True)


if __name__ == "__main__":
    app()
