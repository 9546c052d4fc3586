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

from fedhpc import __version__, config, files, plan, snapshot
from fedhpc.config import Config
from fedhpc.errors import ConfigError, FedHPCError, PlatformError
from fedhpc.paths import RunPaths, checkpointed_rounds, create_run_folder, open_run_folder

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
    resume_dir: Annotated[
        Path | None,
        typer.Option(
            "--resume",
            metavar="RUN_DIR",
            help="Go on with a run that ended early, or has more rounds to do now.",
        ),
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
        bool,
        typer.Option(
            "--dry-run", help="Print the plan, the sbatch scripts and the resolved config only."
        ),
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
        if (config_file is None) == (resume_dir is None):
            found = "nothing" if config_file is None else "both"
            raise ConfigError(
                "command line", [f"CONFIG: expected a YAML file or --resume RUN_DIR, found {found}"]
            )
        earlier = resume_dir and open_run_folder(resume_dir)
        config_file = earlier.config if earlier else config_file
        assert config_file is not None  # noqa: S101
        chosen = [*(assignments or [])]
        if executor is not None:
            chosen.append(f"cluster.executor={executor.value}")
        loaded = config.load(config_file, site, chosen)
        resolved = resolve(loaded, needs_sbatch=not dry_run)
        if dry_run:
            plan.show(resolved, maybe_on_slurm=loaded.cluster.executor in ("auto", "slurm"))
            return
        if earlier:
            paths = _resume(resolved, earlier)
        else:
            resolved, paths = _prepare(resolved, str(config_file))
        if prepare:
            typer.echo(paths.root)
            return
        code = _submit(resolved, paths, follow)
    except FedHPCError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(error.exit_code) from None
    raise typer.Exit(code)


def resolve(loaded: Config, *, needs_sbatch: bool) -> Config:
    """Decide what ``auto`` means, and make paths absolute: the jobs start elsewhere."""
    executor = loaded.cluster.executor
    if executor == "auto":
        executor = "slurm" if shutil.which("sbatch") else "local"
    elif executor == "slurm" and needs_sbatch and not shutil.which("sbatch"):
        raise ConfigError(
            "command line",
            ["cluster.executor: expected sbatch on the PATH for 'slurm', found none"],
            "run it on a login node, or use --executor local",
        )
    cluster, data, app = loaded.cluster, loaded.data, loaded.app
    runs_dir = _absolute("cluster.runs_dir", cluster.runs_dir)
    root, source = _absolute("data.root", data.root), _absolute("data.source", data.source)
    container = cluster.container.model_copy(
        update={"image": _expanded("cluster.container.image", cluster.container.image)}
    )
    places = {"executor": executor, "runs_dir": runs_dir, "container": container}
    return loaded.model_copy(
        update={
            # A debugger wants the files that its breakpoints are in, and nothing is queued.
            "snapshot": loaded.snapshot and executor != "debug",
            "cluster": cluster.model_copy(update=places),
            "data": data.model_copy(update={"root": root, "source": source}),
            "app": app.model_copy(update={"dir": _absolute("app.dir", app.dir)}),
        }
    )


def _absolute(key: str, path: str | None) -> str | None:
    expanded = _expanded(key, path)
    return expanded and str(Path(expanded).absolute())


def _expanded(key: str, path: str | None) -> str | None:
    """Put variables and the home folder into a path."""
    expanded = os.path.expandvars(path) if path else path
    if expanded and (unset := re.search(r"\$\{?(\w+)", expanded)):
        raise ConfigError(
            "command line", [f"{key}: expected ${unset[1]} to be set, found it unset in '{path}'"]
        )
    return expanded and os.path.expanduser(expanded)  # noqa: PTH111  (of an image, also a URL)


def _prepare(resolved: Config, source: str) -> tuple[Config, RunPaths]:
    """Make the run folder: everything that its jobs read; return the config that they read."""
    paths = create_run_folder(Path(resolved.cluster.runs_dir), resolved.name)
    try:
        git = snapshot.git_state(resolved)
        copy = None
        if resolved.snapshot:
            resolved, copy = snapshot.take(resolved, paths)
        files.write_atomic(paths.config, config.dump(resolved))
        _preflight(resolved, paths, source)
        files.write_json(paths.manifest, {**_manifest(), "git": git, "snapshot": copy})
    except BaseException:
        shutil.rmtree(paths.root, ignore_errors=True)  # nothing was started: leave nothing
        raise
    return resolved, paths


def _resume(resolved: Config, paths: RunPaths) -> RunPaths:
    """Make a run folder ready to go on."""
    from fedhpc import resume

    changes = resume.check(paths, resolved)
    prepared = files.read_json(paths.data) if resolved.app.is_builtin else None
    if prepared is not None and not Path(prepared["packed"]).exists():
        _preflight(resolved, paths, str(paths.config))
    resume.prepare(paths, resolved, changes, sys.argv)
    done = max(checkpointed_rounds(paths), default=0)
    text = f"after round {done}" if done else "at round 1: there is no checkpoint"
    typer.echo(f"going on {text}", err=True)
    return paths


def _submit(resolved: Config, paths: RunPaths, follow: bool | None) -> int:
    typer.echo(f"run folder: {paths.root}")
    if resolved.cluster.executor == "debug":
        return _run_here(paths)
    return _start(resolved, paths, sys.stdout.isatty() if follow is None else follow)


def _preflight(resolved: Config, paths: RunPaths, source: str) -> None:
    """Run the second stage of validation in a child process, which sees the code as the jobs will.

    Raises
    ------
    ConfigError, PlatformError
        What it found.
    """
    from fedhpc import preflight
    from fedhpc.cluster import entries

    copied = resolved.snapshot
    if not copied and preflight.is_remembered(resolved, paths):
        return
    command = [sys.executable, *(["-P"] if copied else []), "-m", "fedhpc.preflight"]
    copy_env = entries.snapshot_env(paths, os.environ.get("PYTHONPATH")) if copied else {}
    try:
        child = subprocess.run(
            [*command, str(paths.root)],
            capture_output=True,
            text=True,
            timeout=_PREFLIGHT_TIMEOUT_S,
            check=False,
            env={**os.environ, **copy_env},
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
    if problems := findings["problems"]:
        hint = findings["hint"]
        if copied and any(problem.startswith("app.") for problem in problems):
            hint = "; ".join(filter(None, [hint, "a snapshot has no files that git ignores"]))
        raise ConfigError(source, problems, hint)
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
    from fedhpc import cluster
    from fedhpc.commandline import console
    from fedhpc.follow import Follower

    local = resolved.cluster.executor == "local"
    follower = Follower(paths, console())  # before there are jobs that a Ctrl-C must reach
    submission = None
    try:
        submission = cluster.submit(resolved, paths)
        if not follow:
            jobs = ", ".join(reversed(submission.whole_jobs()))
            typer.echo(f"submitted: {jobs}\nto see how it goes: fedhpc status {paths.root}")
            return 0
        if local:  # timeout(1), a closed terminal: as a Ctrl-C
            for number in (signal.SIGTERM, signal.SIGHUP):
                signal.signal(number, signal.default_int_handler)
        status = follower.until_end()
        if local and (left := follower.wait_for_processes(_LEAVE_TIMEOUT_S)):
            typer.echo(f"still running after the end, ended by force: {', '.join(left)}", err=True)
            cluster.cancel(paths)
    except KeyboardInterrupt:
        if submission is None:
            typer.echo("\ncancelled before everything was submitted", err=True)
            return _CANCELLED
        if not local:
            typer.echo(f"\ndetached; the jobs go on. To cancel them: fedhpc cancel {paths.root}")
            return 0
        return _cancel_local(paths)
    follower.print_result(status)
    return int(status.get("exit_code", 1))


def _cancel_local(paths: RunPaths) -> int:
    from fedhpc import cluster, inspection, run_state

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # a second Ctrl-C must not leave half of it
    typer.echo("\ncancelling the local run ...")
    had_ended = run_state.read(paths)["state"] in run_state.ENDED
    cluster.cancel(paths)
    shutil.rmtree(paths.secrets, ignore_errors=True)
    if not had_ended:
        inspection.write_cancelled(paths, "by Ctrl-C")
    typer.echo(f"cancelled; every process is gone. Run folder: {paths.root}")
    return _CANCELLED


def _manifest() -> dict[str, Any]:
    packages = ("torch", "torchvision", "flwr", "flwr-datasets", "submitit", "numpy", "grpcio")
    versions = {}
    for name in packages:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return {
        "fedhpc": __version__,
        "python": platform.python_version(),
        "packages": versions,
        "host": platform.node(),
        "command": sys.argv,
        "directory": str(Path.cwd()),
    }


if __name__ == "__main__":
    app()
