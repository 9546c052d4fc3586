"""Submit a federation: ``python -m fedhpc.submit CONFIG``.

Neither this module nor what it imports at the top loads torch, flwr or grpc: ``--help``,
``--dry-run`` and errors of the config answer at once, also on a login node.
"""

import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
from enum import StrEnum
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

import typer

from fedhpc import __version__, config, files
from fedhpc.config import Config
from fedhpc.errors import ConfigError, FedHPCError, PlatformError
from fedhpc.paths import RunPaths, create_run_folder

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

_PREFLIGHT_TIMEOUT_S = 3600.0  # a download may be part of it
_CANCELLED = 130
_LEAVE_TIMEOUT_S = 15.0


class Executor(StrEnum):
    """Where the jobs run."""

    auto = "auto"
    slurm = "slurm"
    local = "local"
    debug = "debug"


@app.command()
def main(
    config_file: Annotated[
        Path | None, typer.Argument(metavar="CONFIG", help="The experiment's YAML file.")
    ] = None,
    executor: Annotated[
        Executor | None,
        typer.Option(help="Where the jobs run; auto: Slurm where sbatch is found, else local."),
    ] = None,
    site: Annotated[
        Path | None, typer.Option(help="YAML file with what only this site knows.")
    ] = None,
    assignments: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Override a value. Repeatable."),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the plan and the resolved config only.")
    ] = False,
    prepare: Annotated[
        bool,
        typer.Option(
            "--prepare", help="Make the run folder and print its path; submit nothing (slurm/)."
        ),
    ] = False,
    follow: Annotated[
        bool | None,
        typer.Option(
            "--follow/--detach", help="Show progress until the end; default in a terminal."
        ),
    ] = None,
    schema: Annotated[
        bool, typer.Option("--schema", help="Print every key with its default, and exit.")
    ] = False,
) -> None:
    """Submit a federation: one server job, and a job array of clients."""
    try:
        if schema:
            sys.stdout.write(config.schema())
            return
        if config_file is None:
            raise ConfigError("command line", ["CONFIG: expected a YAML file, found nothing"])
        chosen = [*(assignments or [])]
        if executor is not None:
            chosen.append(f"cluster.executor={executor.value}")
        resolved = _resolve(config.load(config_file, site, chosen))
        if dry_run:
            _print_plan(resolved)
            return
        paths = _prepare(resolved, str(config_file))
        if prepare:
            typer.echo(paths.root)
            return
        code = _submit(resolved, paths, follow)
    except FedHPCError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(error.exit_code) from None
    raise typer.Exit(code)


def _resolve(loaded: Config) -> Config:
    """Decide what ``auto`` means, and make paths absolute: the jobs start elsewhere."""
    executor = loaded.cluster.executor
    if executor == "auto":
        executor = "slurm" if shutil.which("sbatch") else "local"
    elif executor == "slurm" and not shutil.which("sbatch"):
        raise ConfigError(
            "command line",
            ["cluster.executor: expected sbatch on the PATH for 'slurm', found none"],
            "run it on a login node, or use --executor local",
        )
    cluster, data, app = loaded.cluster, loaded.data, loaded.app
    runs_dir = _absolute("cluster.runs_dir", cluster.runs_dir)
    root, source = _absolute("data.root", data.root), _absolute("data.source", data.source)
    return loaded.model_copy(
        update={
            "cluster": cluster.model_copy(update={"executor": executor, "runs_dir": runs_dir}),
            "data": data.model_copy(update={"root": root, "source": source}),
            "app": app.model_copy(update={"dir": _absolute("app.dir", app.dir)}),
        }
    )


def _absolute(key: str, path: str | None) -> str | None:
    expanded = os.path.expandvars(path) if path else path
    if expanded and (unset := re.search(r"\$\{?(\w+)", expanded)):
        raise ConfigError(
            "command line", [f"{key}: expected ${unset[1]} to be set, found it unset in '{path}'"]
        )
    return expanded and str(Path(expanded).expanduser().absolute())


def _prepare(resolved: Config, source: str) -> RunPaths:
    """Make the run folder: everything that its jobs read."""
    paths = create_run_folder(Path(resolved.cluster.runs_dir), resolved.name)
    try:
        files.write_atomic(paths.config, config.dump(resolved))
        _preflight(paths, source)
        files.write_json(paths.manifest, _manifest())
    except BaseException:
        shutil.rmtree(paths.root, ignore_errors=True)  # nothing was started: leave nothing
        raise
    return paths


def _submit(resolved: Config, paths: RunPaths, follow: bool | None) -> int:
    typer.echo(f"run folder: {paths.root}")
    if resolved.cluster.executor == "debug":
        return _run_here(paths)
    return _start(resolved, paths, sys.stdout.isatty() if follow is None else follow)


def _preflight(paths: RunPaths, source: str) -> None:
    """Run the second stage of validation in a child process.

    Raises
    ------
    ConfigError, PlatformError
        What it found.
    """
    command = [sys.executable, "-m", "fedhpc.preflight", str(paths.root)]
    try:
        child = subprocess.run(
            command, capture_output=True, text=True, timeout=_PREFLIGHT_TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise PlatformError(f"validation took longer than {error.timeout:.0f} s") from error
    try:
        findings: dict[str, Any] = json.loads(child.stdout)
    except ValueError:
        raise PlatformError(
            f"validation ended with exit code {child.returncode}:\n{child.stderr[-4000:]}",
            "are torch, torchvision and flwr installed in this environment?",
        ) from None
    if findings["problems"]:
        raise ConfigError(source, findings["problems"], findings["hint"])
    if found := findings["platform"]:
        raise PlatformError(found["message"], found["hint"])


def _run_here(paths: RunPaths) -> int:
    """Run everything in this process, for a debugger."""
    from rich.console import Console

    from fedhpc.cluster import Submission, submission
    from fedhpc.follow import Follower
    from fedhpc.run_state import read
    from fedhpc.server import Server

    submission.write(paths, Submission("debug", str(os.getpid())))
    follower = Follower(paths, Console())
    code = Server(paths).run()
    follower.print_result(read(paths))
    return code


def _start(resolved: Config, paths: RunPaths, follow: bool) -> int:
    from rich.console import Console

    from fedhpc import cluster
    from fedhpc.follow import Follower

    submission = cluster.submit(resolved, paths)
    local = submission.executor == "local"
    if not follow:
        jobs = ", ".join(reversed(submission.whole_jobs()))
        typer.echo(f"submitted: {jobs}\nto see how it goes: fedhpc status {paths.root}")
        return 0
    follower = Follower(paths, Console())
    try:
        if local:  # timeout(1), a closed terminal: as a Ctrl-C
            for number in (signal.SIGTERM, signal.SIGHUP):
                signal.signal(number, signal.default_int_handler)
        status = follower.until_end()
        if local and (left := follower.wait_for_processes(_LEAVE_TIMEOUT_S)):
            typer.echo(f"still running after the end, ended by force: {', '.join(left)}", err=True)
            cluster.cancel(paths)
    except KeyboardInterrupt:
        if not local:
            typer.echo(f"\ndetached; the jobs go on. To cancel them: fedhpc cancel {paths.root}")
            return 0
        return _cancel_local(paths)
    follower.print_result(status)
    return int(status.get("exit_code", 1))


def _cancel_local(paths: RunPaths) -> int:
    from fedhpc import cluster, run_state

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # a second Ctrl-C must not leave half of it
    typer.echo("\ncancelling the local run ...")
    cluster.cancel(paths)
    shutil.rmtree(paths.secrets, ignore_errors=True)
    if run_state.read(paths)["state"] not in run_state.ENDED:
        run_state.write(paths, "cancelled", "by Ctrl-C", exit_code=_CANCELLED)
    typer.echo(f"cancelled; every process is gone. Run folder: {paths.root}")
    return _CANCELLED


def _print_plan(resolved: Config) -> None:
    from rich.console import Console
    from rich.table import Table

    federation, cluster = resolved.federation, resolved.cluster
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold")
    table.add_column()
    parallel = min(cluster.array_tasks, cluster.max_parallel or cluster.array_tasks)
    rows = {
        "executor": cluster.executor,
        "jobs": f"1 server job, 1 client array of {cluster.array_tasks} array tasks,"
        f" {parallel} at a time",
        "clients": f"{federation.num_clients}, {federation.clients_per_round} a round",
        "rounds": str(federation.num_rounds),
        "fits": str(federation.num_rounds * federation.clients_per_round),
        "slots an array task": str(resolved.isolation.slots),
        "run folder in": cluster.runs_dir,
    }
    for name, value in rows.items():
        table.add_row(name, value)
    Console().print(table, highlight=False)
    sys.stdout.write("\n" + config.dump(resolved))


def _manifest() -> dict[str, Any]:
    packages = ("torch", "torchvision", "flwr", "flwr-datasets", "submitit", "numpy", "grpcio")
    versions = {}
    for name in packages:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "not installed"
    git = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=40"],  # noqa: S607
        capture_output=True, text=True, check=False,
    ) if shutil.which("git") else None  # fmt: skip
    return {
        "fedhpc": __version__,
        "python": platform.python_version(),
        "packages": versions,
        "git": git.stdout.strip() if git and git.returncode == 0 else None,
        "host": platform.node(),
        "command": sys.argv,
        "directory": str(Path.cwd()),
    }


if __name__ == "__main__":
    app()
