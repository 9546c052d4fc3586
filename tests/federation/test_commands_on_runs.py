"""The commands beside real runs of this machine."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from support import Submitter, eventually, processes_of

from fedhpc import run_state
from fedhpc.files import read_lines
from fedhpc.paths import RunPaths


def start(*arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "fedhpc", *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def fedhpc(*arguments: object) -> str:
    """Run a command that must go well; return what it printed."""
    process = start(*arguments)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 0, output + errors
    return output


def status(paths: RunPaths) -> dict[str, Any]:
    value: dict[str, Any] = json.loads(fedhpc("status", paths.root, "--json"))
    return value


def detached(submitter: Submitter, *sets: str) -> RunPaths:
    """Start a run; return its folder once a fit has ended."""
    process = submitter.start(sets, follow=False)
    assert process.wait(timeout=60) == 0  # the jobs keep its pipe open
    paths = submitter.newest()
    eventually(lambda: len(list(read_lines(paths.fits))) > 1, 60)
    return paths


def test_a_run_is_seen_while_it_lasts_and_after_and_then_cleaned(submitter: Submitter) -> None:
    paths = detached(submitter, "federation.num_rounds=60", "cluster.array_tasks=2")
    following = start("logs", paths.root, "--follow")
    watching = start("status", paths.root, "--watch")
    known = status(paths)
    assert (known["state"], known["num_rounds"]) == ("running", 60)
    assert [job["state"] for job in known["jobs"].values()] == ["RUNNING"] * 3
    assert start("clean", paths.root, "--yes").wait(timeout=60) == 1

    followed, _ = following.communicate(timeout=90)
    watched, _ = watching.communicate(timeout=30)
    assert (following.returncode, watching.returncode) == (0, 0)
    assert " server INFO finished" in followed
    assert watched.count("running") > 1  # whenever something changed
    assert watched.rpartition("\nstate ")[2].split()[0] == "finished"

    eventually(lambda: processes_of(paths) == [], 30)
    known = status(paths)
    assert (known["state"], known["round"], known["problem"]) == ("finished", 60, "")
    assert {job["state"] for job in known["jobs"].values()} == {"ENDED"}
    assert " client-1 INFO " in fedhpc("logs", paths.root, "client", 1, "--lines", 5)
    runs_dir = ["--runs-dir", submitter.runs_dir]
    assert fedhpc("list", *runs_dir).splitlines()[1].split()[1:3] == ["finished", "60/60"]

    best = paths.best_checkpoint.resolve()
    kept = {
        path
        for path in files(paths)
        if path.suffix != ".pkl"
        and (paths.checkpoints not in path.parents or path.parent in (best, paths.checkpoint(60)))
    }
    fedhpc("clean", *runs_dir, "--yes")
    assert files(paths) == kept


def files(paths: RunPaths) -> set[Path]:
    return {path for path in paths.root.rglob("*") if path.is_file()}


def test_a_killed_server_never_stays_running_and_cancel_ends_what_it_left(
    submitter: Submitter,
) -> None:
    paths = detached(submitter, "federation.num_rounds=1000")
    shown = int(status(paths)["jobs"]["server"]["job_id"])
    os.kill(shown, signal.SIGKILL)  # the server itself, not submitit's process
    eventually(lambda: status(paths)["state"] == "failed", 30)
    known = run_state.read(paths)
    assert known["state"] == "failed"
    assert known["reason"] == "the server process ended without a word"
    assert "had already ended: failed" in fedhpc("cancel", paths.root)
    assert processes_of(paths) == []
    assert not paths.secrets.exists()


def test_cancel_leaves_no_process_of_a_detached_run(submitter: Submitter) -> None:
    paths = detached(submitter, "federation.num_rounds=1000", "cluster.array_tasks=2")
    following = start("logs", paths.root, "--follow")
    output = fedhpc("cancel", paths.root)
    assert "cancelling the server, array tasks 0 to 1" in output
    assert f"{paths.run_id}: cancelled; every job is gone" in output
    assert following.wait(timeout=30) == 0
    assert processes_of(paths) == []
    assert run_state.read(paths)["state"] == "cancelled"
    assert not paths.secrets.exists()
    assert "had already ended: cancelled" in fedhpc("cancel", paths.root)
