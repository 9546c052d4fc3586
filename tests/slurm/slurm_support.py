"""What the tests on a real Slurm share."""

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from support import Run, Submitter, eventually

from fedhpc.cluster import cancel, slurm, submission
from fedhpc.paths import RunPaths

# The devcluster's GPUs are fake; 8 cores a node, so that one array task of 6 fills it.
ON_SLURM = ["isolation.device=cpu", "isolation.slots=2", "cluster.cpus_per_task=2",
            "cluster.time_min=10"]  # fmt: skip
LONG = ["federation.num_rounds=40", "training.epochs=20"]  # 20 s


class Cluster:
    """The devcluster, and what Slurm says of it."""

    def __init__(self, command: Sequence[str]) -> None:
        self._command = list(command)

    def do(self, *arguments: str) -> None:
        """Run a subcommand of the devcluster: node-down, node-up, restart-controller, ..."""
        done = subprocess.run(
            [*self._command, *arguments], capture_output=True, text=True, timeout=90, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr

    @contextlib.contextmanager
    def configured(self, line: str) -> Iterator[None]:
        """Add a line to slurm.conf for a while."""
        conf = Path(os.environ["SLURM_CONF"])
        before = conf.read_text()
        try:
            conf.write_text(f"{before}{line}\n")
            subprocess.run(["scontrol", "reconfigure"], timeout=60, check=True)
            yield
        finally:
            conf.write_text(before)
            subprocess.run(["scontrol", "reconfigure"], timeout=60, check=True)

    def all_nodes_up(self) -> None:
        """Bring back the nodes that a test took down."""
        command = ["sinfo", "--noheader", "--Node", "--format=%N %T"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
        for name, state in {tuple(line.split()) for line in done.stdout.splitlines()}:
            if "down" in state or state.endswith("*"):
                self.do("node-up", name)


class SlurmSubmitter(Submitter):
    """Submits to the devcluster."""

    def __init__(self, folder: Path, data_root: Path) -> None:
        super().__init__(folder, data_root)
        self._common += ON_SLURM

    def start(self, sets: Sequence[str] = (), **more: Any) -> "subprocess.Popen[str]":
        return super().start(sets, **{"executor": "slurm", **more})

    def command(self, sets: Sequence[str] = (), **more: Any) -> list[str]:
        return super().command(sets, **{"executor": "slurm", **more})

    def environment(self, **more: str) -> dict[str, str]:
        """Return an environment in which `python` is this one."""
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        return {**os.environ, "PATH": path, **more}

    def queue(self) -> list[str]:
        """Return "job state" of everything in the queue that is of this submitter's runs."""
        command = ["squeue", "--noheader", "--array", "--format=%i %T %j"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
        mine = [paths.name for paths in self.runs_dir.glob("*")]
        return [line for line in done.stdout.splitlines() if any(name in line for name in mine)]

    def cancel_all(self) -> None:
        """End what is left of this submitter's runs."""
        for folder in self.runs_dir.glob("*"):
            cancel(RunPaths(folder))
        eventually(lambda: not self.queue(), 60)

    def detach(self, sets: Sequence[str] = (), **more: Any) -> RunPaths:
        """Submit and return at once."""
        process = self.start(sets, follow=False, **more)
        output, _ = process.communicate(timeout=90)
        assert process.returncode == 0, output
        return self.newest()


def jobs_of(paths: RunPaths) -> dict[str, slurm.Job]:
    """Return what Slurm says of a run's jobs, by role."""
    jobs = submission.read(paths)
    assert jobs is not None
    found = slurm.jobs(job_id for _, job_id in jobs.roles())
    return {role: found[job_id] for role, job_id in jobs.roles() if job_id in found}


def states_of(paths: RunPaths) -> dict[str, str]:
    """Return Slurm's states of a run's jobs, by role."""
    return {role: job.state for role, job in jobs_of(paths).items()}


def all_ended(paths: RunPaths) -> bool:
    """Return whether no job of a run is in the queue."""
    return all(job.ended for job in jobs_of(paths).values())


def seconds_until(condition: Any, timeout_s: float) -> float:
    """Wait until a condition holds and return how long it took."""
    start_s = time.monotonic()
    eventually(condition, timeout_s)
    return time.monotonic() - start_s


def hosts_of(run: Run) -> set[str]:
    """Return the nodes that a run's fits ran on."""
    return {fit["host"] for fit in run.fits}
