"""`fedhpc submit` as the benchmarks call it: on this machine, as a user would."""

import os
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path


def command(config: Path, sets: Iterable[str], runs_dir: Path, how: str = "--follow") -> list[str]:
    """Return the command of a run.

    Parameters
    ----------
    config : Path
        Its config.
    sets : iterable of str
        "section.key=value" each, over the config.
    runs_dir : Path
        Where its folder goes.
    how : str, default "--follow"
        Follow the run to its end, or --prepare its folder only.
    """
    values = [*sets, f"cluster.runs_dir={runs_dir}"]
    options = ["--executor", "local", how, *(part for value in values for part in ("--set", value))]
    return [sys.executable, "-m", "fedhpc.submit", str(config), *options]


def run(command: list[str], cwd: Path | None = None, env: Mapping[str, str] | None = None) -> str:
    """Run a command and return what it printed; if it fails, that is the end of this program.

    Parameters
    ----------
    command : list of str
        With its arguments.
    cwd : Path, optional
        Where it runs.
    env : mapping, optional
        What differs in its environment.
    """
    environment = {**os.environ, **(env or {})}
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=cwd, env=environment
    )
    if done.returncode:
        sys.exit(done.stdout + done.stderr)
    return done.stdout


def newest(runs_dir: Path) -> Path:
    """Return the folder of the run that was submitted last."""
    return max(runs_dir.glob("*/"), key=lambda path: path.stat().st_mtime_ns)


def federate(config: Path, sets: Iterable[str], runs_dir: Path) -> Path:
    """Run a federation to its end and return its folder."""
    run(command(config, sets, runs_dir))
    return newest(runs_dir)
