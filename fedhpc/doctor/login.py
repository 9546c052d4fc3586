"""What the doctor looks at on the login node, before it submits anything."""

import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

from fedhpc.cluster import slurm
from fedhpc.config import Config
from fedhpc.doctor.report import Check
from fedhpc.errors import PlatformError
from fedhpc.paths import RunPaths

_SMALL_GB = 1.0


def check_commands(where: str) -> Check:
    """Check that Slurm's commands are there and answer."""
    name = "Slurm's commands"
    missing = [command for command in ("sbatch", "squeue", "scancel", "scontrol")
               if shutil.which(command) is None]  # fmt: skip
    if missing:
        remedy = "load the site's Slurm module, or call this on a login node"
        return Check(name, where, "fail", f"not on the PATH: {', '.join(missing)}", remedy)
    start_s = time.monotonic()
    try:
        slurm.control("ping")
        slurm.jobs(["1"])  # one that long is gone
    except PlatformError as error:
        return Check(name, where, "fail", error.message, error.hint or "see the message")
    seconds = time.monotonic() - start_s
    return Check(name, where, "pass", f"scontrol and squeue answered in {seconds:.2f} s")


def check_source(config: Config, where: str) -> Iterator[Check]:
    """Check that submit can read data.source; the nodes do not need it."""
    source = config.data.source
    if source and config.app.is_builtin and not Path(source).exists():
        found = f"data.source: expected a file or folder, found none at {source}"
        yield Check("data", where, "fail", found, "submit reads it: correct the path")


def check_space(paths: RunPaths, where: str) -> Check:
    """Check that there is room in the folder of the runs."""
    runs_dir = paths.root.parent
    status = os.statvfs(runs_dir)
    free_gb = status.f_bavail * status.f_frsize / 1e9
    found = f"{runs_dir} can be written, {free_gb:.1f} GB free"
    if free_gb < _SMALL_GB:
        remedy = "make room, or name another folder with --set cluster.runs_dir=DIR"
        return Check("shared folder", where, "warn", found, remedy)
    return Check("shared folder", where, "pass", found)
