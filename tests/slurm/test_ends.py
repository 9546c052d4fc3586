"""However a run ends on Slurm: nothing is left, and what is told is true."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from slurm_support import (
    LONG,
    SlurmSubmitter,
    all_ended,
    jobs_of,
    seconds_until,
    states_of,
)
from support import REPOSITORY, eventually

from fedhpc import run_state
from fedhpc.files import read_lines
from fedhpc.paths import RunPaths

FOREVER = ["federation.num_rounds=1000"]


def fedhpc(*words: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "fedhpc", *words],
        capture_output=True, text=True, timeout=90, check=False, cwd=REPOSITORY,
    )  # fmt: skip


def until_rounds(paths: RunPaths, count: int = 1) -> None:
    """Wait until some rounds are done."""
    eventually(lambda: sum(line["round"] > 0 for line in read_lines(paths.metrics)) >= count, 120)


def state(paths: RunPaths) -> str:
    return str(run_state.read(paths)["state"])


def test_cancel_empties_the_queue_within_10_seconds(submitter: SlurmSubmitter) -> None:
    paths = submitter.detach([*FOREVER, "cluster.array_tasks=8", "cluster.max_parallel=4"])
    until_rounds(paths)
    start_s = time.monotonic()
    done = fedhpc("cancel", str(paths.root))
    assert done.returncode == 0, done.stdout + done.stderr
    eventually(lambda: not submitter.queue(), 20)
    assert time.monotonic() - start_s < 10
    assert state(paths) == "cancelled"
    assert not paths.secrets.exists()


def test_a_killed_server_of_a_detached_run_takes_everything_with_it(
    submitter: SlurmSubmitter,
) -> None:
    paths = submitter.detach(
        [*FOREVER, "cluster.array_tasks=6", "cluster.max_parallel=2", "cluster.max_requeues=0"]
    )
    until_rounds(paths)
    os.kill(run_state.record(paths, "server")["pid"], signal.SIGKILL)
    eventually(lambda: jobs_of(paths)["server"].ended, 30)
    # Nobody watches but the array tasks themselves.
    assert seconds_until(lambda: all_ended(paths), 60) < 30
    assert state(paths) == "failed"
    assert "Slurm ended the server job" in run_state.read(paths)["reason"]
    assert "FAILED" in run_state.read(paths)["reason"]


def test_a_server_that_was_cancelled_is_reported_so(submitter: SlurmSubmitter) -> None:
    paths = submitter.detach([*FOREVER, "cluster.array_tasks=2"])
    until_rounds(paths)
    subprocess.run(["scancel", jobs_of(paths)["server"].job_id], check=True, timeout=30)
    assert seconds_until(lambda: all_ended(paths), 60) < 30
    assert state(paths) == "cancelled"


def test_array_tasks_whose_server_was_cancelled_in_the_queue_leave_at_once(
    submitter: SlurmSubmitter,
) -> None:
    paths = submitter.detach(["cluster.array_tasks=2", "cluster.server={extra: {begin: now+600}}"])
    assert jobs_of(paths)["server"].pending
    assert states_of(paths)["client-0"] == "PENDING"  # it has a dependency, and holds no node
    subprocess.run(["scancel", jobs_of(paths)["server"].job_id], check=True, timeout=30)
    assert seconds_until(lambda: all_ended(paths), 90) < 45
    assert state(paths) == "cancelled"
    assert "CANCELLED" in run_state.read(paths)["reason"]


def test_a_server_whose_array_was_cancelled_fails_and_says_why(submitter: SlurmSubmitter) -> None:
    process = submitter.start([*FOREVER, "cluster.array_tasks=2"])
    paths = submitter.newest(60)
    until_rounds(paths)
    array = jobs_of(paths)["client-0"].job_id.split("_")[0]
    subprocess.run(["scancel", array], check=True, timeout=30)
    output, _ = process.communicate(timeout=90)
    assert process.returncode == 75, output
    reason = run_state.read(paths)["reason"]
    assert "every array task has ended" in reason
    assert "CANCELLED" in reason
    eventually(lambda: all_ended(paths), 20)


def test_a_server_whose_clients_can_never_start_fails_at_its_deadline(
    submitter: SlurmSubmitter,
) -> None:
    process = submitter.start(
        ["cluster.clients={extra: {begin: now+600}}", "cluster.pending_timeout_min=0.2"]
    )
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 75, output
    paths = submitter.newest()
    reason = run_state.read(paths)["reason"]
    assert "cluster.pending_timeout_min" in reason
    assert "PENDING (BeginTime)" in reason
    eventually(lambda: all_ended(paths), 20)


def test_a_server_job_that_does_not_start_in_time_is_cancelled_with_the_run(
    submitter: SlurmSubmitter,
) -> None:
    process = submitter.start(
        ["cluster.server={extra: {begin: now+600}}", "cluster.pending_timeout_min=0.1"]
    )
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 1, output
    assert "cluster.pending_timeout_min" in output
    assert "BeginTime" in output
    eventually(lambda: all_ended(submitter.newest()), 20)


def test_a_refused_client_array_takes_the_server_job_with_it(
    submitter: SlurmSubmitter,
) -> None:
    process = submitter.start(["cluster.clients={slurm_partition: nowhere}"])
    output, _ = process.communicate(timeout=90)
    assert process.returncode == 75, output
    assert "invalid partition specified: nowhere" in output
    eventually(lambda: not submitter.queue(), 10)
    assert state(submitter.newest()) == "failed"


def test_a_run_at_its_time_limit_says_so(submitter: SlurmSubmitter) -> None:
    paths = submitter.detach(
        [*FOREVER, "cluster.time_min=1", "cluster.array_tasks=2", "cluster.max_requeues=0"]
    )
    eventually(lambda: state(paths) in run_state.ENDED, 120)
    assert state(paths) == "failed"
    assert "time limit" in run_state.read(paths)["reason"]
    eventually(lambda: all_ended(paths), 30)


def test_a_server_whose_clients_still_wait_near_its_time_limit_queues_again(
    submitter: SlurmSubmitter,
) -> None:
    paths = submitter.detach(
        ["cluster.server={time_min: 1}", "cluster.clients={extra: {begin: now+75}}"]
    )
    eventually(lambda: "no work has begun" in run_state.read(paths)["reason"], 90)
    assert "PENDING (BeginTime)" in run_state.read(paths)["reason"]
    # Slurm may send its warning up to a minute early, which is all of this limit.
    more_time = ["scontrol", "update", f"JobId={jobs_of(paths)['server'].job_id}", "TimeLimit=10"]
    subprocess.run(more_time, check=True, timeout=30)
    eventually(lambda: state(paths) == "finished", 150)
    assert run_state.read(paths)["attempt"] == 2


def test_a_finished_run_is_gone_within_10_seconds(submitter: SlurmSubmitter) -> None:
    paths = submitter.detach([*LONG, "cluster.array_tasks=4"])
    eventually(lambda: state(paths) == "finished", 120)
    assert seconds_until(lambda: all_ended(paths), 30) < 10
    assert set(states_of(paths).values()) == {"COMPLETED"}
    assert not paths.secrets.exists()


def test_a_run_that_has_finished_stays_so_when_its_server_is_queued_again(
    submitter: SlurmSubmitter,
) -> None:
    paths = submitter.detach([])
    eventually(lambda: state(paths) == "finished", 90)
    before = paths.status.read_text()
    eventually(lambda: all_ended(paths), 20)
    server = jobs_of(paths)["server"].job_id
    subprocess.run(["scontrol", "requeue", server], check=True, timeout=30)
    eventually(lambda: not jobs_of(paths)["server"].ended, 20)
    eventually(lambda: all_ended(paths), 60)
    assert paths.status.read_text() == before


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_sbatch_is_at_work_leaves_no_job(
    number: signal.Signals, submitter: SlurmSubmitter, tmp_path: Path
) -> None:
    slow = tmp_path / "bin" / "sbatch"
    slow.parent.mkdir()
    slow.write_text(f'#!/bin/bash\n{shutil.which("sbatch")} "$@"; touch {slow}.done; sleep 3\n')
    slow.chmod(0o755)
    process = submitter.start(FOREVER, env={"PATH": f"{slow.parent}:{os.environ['PATH']}"})
    eventually(slow.with_name("sbatch.done").exists, 60)
    os.killpg(process.pid, number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130, output
    paths = submitter.newest()
    eventually(lambda: not submitter.queue(), 20)
    assert state(paths) == "cancelled"
    assert not paths.secrets.exists()
