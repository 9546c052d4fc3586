"""How long a run takes to start on Slurm: from the last needed array task to the first round.

    python benchmarks/slurm_startup.py [--repeats 5] [--array-tasks 4] [-- OPTIONS OF SUBMIT]

Needs Slurm's commands; on the devcluster add ``-- --set isolation.device=cpu``. Each repeat submits
configs/digits.yaml for one round and prints, in seconds: submission to the start of the server job,
to the start of the last array task (both are Slurm's), from there to round 1 (its work is handed
out), to the first fit (its fork server has loaded torch), and from the end of the run to an empty
queue. Times are Slurm's own, which are whole seconds, and the
files' of the run folder.
"""

import argparse
import statistics
import subprocess
import sys
import time
from datetime import datetime
from pathlib import Path
from tempfile import TemporaryDirectory

from fedhpc import files, run_state
from fedhpc.cluster import slurm, submission
from fedhpc.paths import RunPaths

CONFIG = Path(__file__).parents[1] / "configs" / "digits.yaml"
TIMEOUT_S = 600.0


def measure(array_tasks: int, options: list[str], runs_dir: Path) -> dict[str, float]:
    """Run once and return the seconds of each step."""
    command = [sys.executable, "-m", "fedhpc.submit", str(CONFIG), "--executor", "slurm",
               "--detach", "--set", f"cluster.runs_dir={runs_dir}", "--set",
               f"cluster.array_tasks={array_tasks}", "--set",
               f"cluster.min_array_tasks={array_tasks}", "--set", "federation.num_rounds=1",
               *options]  # fmt: skip
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, timeout=TIMEOUT_S)
    paths = RunPaths(max(runs_dir.iterdir(), key=lambda path: path.stat().st_mtime))
    submitted_s = paths.submission.stat().st_mtime
    if not files.wait_until(
        lambda: run_state.read(paths)["state"] in run_state.ENDED, TIMEOUT_S, max_pause_s=0.2
    ):
        sys.exit(f"the run {paths.root} did not end within {TIMEOUT_S:.0f} s")
    ended_s = time.time()
    status = run_state.read(paths)
    if status["state"] != "finished":
        sys.exit(f"the run {paths.root} {status['state']}: {status['reason']}")
    jobs = submission.read(paths)
    assert jobs is not None
    roles = dict(jobs.roles())
    if not files.wait_until(
        lambda: all(job.ended for job in slurm.jobs(roles.values()).values()), 60, max_pause_s=0.2
    ):
        sys.exit("the queue did not get empty within 60 s")
    gone_s = time.time()
    said = slurm.jobs(roles.values())
    starts = {role: _seconds(said[job_id].start) for role, job_id in roles.items()}
    last_s = max(start for role, start in starts.items() if role != "server")
    first_fit = min(files.read_lines(paths.fits), key=lambda fit: fit["time_s"])
    # fits.jsonl counts from the start of the server's process, which wrote its first attempt then.
    trained_s = paths.attempt(1).stat().st_mtime + first_fit["time_s"] - first_fit["return_s"]
    trained_s -= first_fit["run_s"]
    handed_s = trained_s - first_fit["start_s"] - first_fit["wait_s"]
    return {
        "submitted to server job": starts["server"] - submitted_s,
        "submitted to last array task": last_s - submitted_s,
        "last array task to round 1": handed_s - last_s,
        "last array task to first fit": trained_s - last_s,
        "end to empty queue": gone_s - ended_s,
    }


def _seconds(stamp: str) -> float:
    return datetime.fromisoformat(stamp).timestamp()


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--array-tasks", type=int, default=4)
    parser.add_argument("options", nargs="*", help="options of submit, after --")
    arguments = parser.parse_args()
    rows: list[dict[str, float]] = []
    with TemporaryDirectory(dir=Path.cwd(), prefix=".startup-") as folder:
        for _ in range(arguments.repeats):
            rows.append(measure(arguments.array_tasks, arguments.options, Path(folder)))
    for name in rows[0]:
        values = [row[name] for row in rows]
        print(f"{name:<30} median {statistics.median(values):5.1f} s"
              f"  ({min(values):.1f} to {max(values):.1f})")  # fmt: skip


if __name__ == "__main__":
    main()
