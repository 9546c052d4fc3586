"""What the jobs call, and how they find it: a function by its name, and its code.

A function is named, so that submitting loads neither flwr nor grpc.
"""

import gc
import importlib
import os
import shlex
import signal
import sys
from pathlib import Path
from typing import Any

import fedhpc
from fedhpc import config
from fedhpc.config import Config
from fedhpc.errors import PlatformError
from fedhpc.paths import RunPaths

JOB_ENV = {"PYTHONHASHSEED": "0"}  # the order of sets in strategies is the same in every run
SERVER = "fedhpc.server:run"
CLIENT = "fedhpc.client:run"


def call(reference: str, *arguments: Any) -> None:
    """Import ``module:function`` and call it."""
    # submitit ignores SIGTERM: while the imports last, which may take long, a job can be ended.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    # Slurm warns once: who is called unblocks this when it knows what to do about it.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR2})
    module, _, name = reference.partition(":")
    gc.disable()  # imports leave hardly any garbage, and what they made is not looked at again
    function = getattr(importlib.import_module(module), name)
    gc.freeze()
    gc.enable()
    function(*arguments)


def call_with_gpus(gpus: str | None, reference: str, *arguments: Any) -> None:
    """Call a function with the GPUs that submit saw; submitit's LocalExecutor hides them all."""
    if gpus is None:
        os.environ.pop("CUDA_VISIBLE_DEVICES", None)
    else:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpus
    call(reference, *arguments)


def python(config: Config, default: str) -> str:
    """Return the shell words that start a job's Python, ``default`` where the config has none.

    A Python that uses the run's copy of the code must not look into its working directory first.
    """
    words = config.cluster.python or default
    return f"{words} -P" if config.snapshot else words


def export_lines(config: Config, paths: RunPaths) -> list[str]:
    """Return the shell lines that set a job's environment, after ``cluster.setup``."""
    env = config.cluster.env
    lines = [f"export {name}={shlex.quote(value)}" for name, value in env.items()]
    if config.snapshot:
        copy = shlex.quote(_python_path(paths))
        # An empty entry would be the working directory.
        lines.append(f"export PYTHONPATH={copy}${{PYTHONPATH:+:$PYTHONPATH}}")
    return lines


def snapshot_env(paths: RunPaths, others: str | None) -> dict[str, str]:
    """Return the environment in which Python finds the run's copy of the code before ``others``."""
    return {"PYTHONPATH": os.pathsep.join(filter(None, [_python_path(paths), others]))}


def use_snapshot(run_dir: str) -> None:
    """Start this program again from the run's copy of the code, if there is one, unless it is.

    Jobs of submit never need it; those of the user's own sbatch scripts do, and those whose
    environment was lost on the way, e.g. into a container.

    Raises
    ------
    PlatformError
        If that does not help either.
    """
    paths = RunPaths(Path(run_dir).resolve())
    here = Path(fedhpc.__file__).resolve()
    if not paths.config.is_file() or not config.load(paths.config).snapshot:
        return
    if here.is_relative_to(paths.code):
        return
    before = os.environ.get("PYTHONPATH", "")
    if sys.flags.safe_path and before.startswith(_python_path(paths)):
        raise PlatformError(
            f"snapshot: wanted fedhpc from the run's copy in {paths.code}, found {here}",
            "was the folder `code` of the run folder removed? submit the run again",
        )
    os.environ.update(snapshot_env(paths, before))
    os.execv(sys.executable, [sys.executable, "-P", *sys.orig_argv[1:]])  # noqa: S606


def _python_path(paths: RunPaths) -> str:
    return f"{paths.code_packages}{os.pathsep}{paths.code_cwd}"
