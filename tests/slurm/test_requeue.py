"""Jobs that Slurm takes away come back, and the run ends in the model of the undisturbed one."""

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from slurm_support import LONG, Cluster, SlurmSubmitter, all_ended, jobs_of, states_of
from support import DIGITS, REPOSITORY, Run, eventually

from fedhpc import run_state
from fedhpc.files import read_lines
from fedhpc.paths import RunPaths

pytestmark = pytest.mark.timeout(300)


def until_round(paths: RunPaths, number: int) -> None:
    """Wait until a round is done."""
    eventually(lambda: rounds(paths)[-1:] >= [number], 120)


def rounds(paths: RunPaths) -> list[int]:
    return [line["round"] for line in read_lines(paths.metrics)]


def reason(paths: RunPaths) -> str:
    return str(run_state.read(paths)["reason"])


def attempt(paths: RunPaths) -> int:
    return int(run_state.read(paths).get("attempt", 0))


def fedhpc(*words: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "fedhpc", *words],
        capture_output=True, text=True, timeout=90, check=False, cwd=REPOSITORY,
    )  # fmt: skip


def slurm(*words: str) -> None:
    subprocess.run(words, check=True, timeout=60, capture_output=True)


def server_job(paths: RunPaths) -> str:
    return jobs_of(paths)["server"].job_id


def more_time(*job_ids: str) -> None:
    """Undo a time limit of a minute, most of which Slurm's early warning takes."""
    for job_id in job_ids:
        slurm("scontrol", "update", f"JobId={job_id}", "TimeLimit=10")


def starts(paths: RunPaths) -> dict[int, int]:
    """Return how often each array task has started a fork server."""
    return {
        int(path.stem): sum(line["kind"] == "start" for line in read_lines(path))
        for path in paths.memory.glob("*.jsonl")
    }


def end_of(paths: RunPaths) -> Run:
    eventually(lambda: run_state.read(paths)["state"] in run_state.ENDED, 150)
    run = Run(paths, 0, "")
    assert rounds(paths) == list(range(run.metrics[-1]["round"] + 1))
    return run


@contextlib.contextmanager
def paused(paths: RunPaths) -> Iterator[None]:
    """Stop the array tasks, so that nothing ends while Slurm's clock runs."""
    pids = [run_state.record(paths, role)["pid"] for role in jobs_of(paths) if role != "server"]
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGCONT)


def test_a_server_that_is_timed_out_requeued_and_killed_goes_on_with_the_same_array_tasks(
    submitter: SlurmSubmitter, long_reference: Run
) -> None:
    paths = submitter.detach(
        [*LONG, "cluster.array_tasks=2", "cluster.server={time_min: 1}",
         "cluster.liveness_timeout_s=60"]
    )  # fmt: skip
    until_round(paths, 3)
    with paused(paths):
        eventually(lambda: "time limit" in reason(paths), 60)
        assert f"goes on at round {rounds(paths)[-1] + 1}" in reason(paths)
        more_time(server_job(paths))
    # Slurm says why a job pends when its scheduler next looks at it.
    eventually(lambda: jobs_of(paths)["server"].describe() == "PENDING (BeginTime)", 20)
    shown = fedhpc("status", str(paths.root)).stdout
    assert "pending (requeueing)" in shown
    assert "PENDING (BeginTime)" in shown
    assert f"after round {rounds(paths)[-1]}" in shown

    until_round(paths, 8)
    assert attempt(paths) == 2
    slurm("scontrol", "requeue", server_job(paths))
    eventually(lambda: "Slurm has queued it again" in reason(paths), 20)

    until_round(paths, 14)
    assert attempt(paths) == 3
    os.kill(run_state.record(paths, "server")["pid"], signal.SIGKILL)
    eventually(lambda: jobs_of(paths)["server"].pending, 20)
    assert json.loads(fedhpc("status", "--json", str(paths.root)).stdout)["state"] == "pending"

    assert end_of(paths).checksum == long_reference.checksum
    assert attempt(paths) == 4
    assert starts(paths) == {0: 1, 1: 1}  # the fork servers were there all the time
    eventually(lambda: all_ended(paths), 20)
    assert set(states_of(paths).values()) == {"COMPLETED"}


def preempt(node: str, tmp_path: Path) -> None:
    """Run a job of the partition that may preempt on a node, and wait for its end."""
    command = ["sbatch", "--wait", "--partition=gpu", "--exclusive", f"--nodelist={node}",
               f"--output={tmp_path}/log", "--wrap", "sleep 1"]  # fmt: skip
    subprocess.run(command, check=True, timeout=120, capture_output=True)


def test_preempted_array_tasks_and_a_preempted_server_come_back(
    cluster: Cluster, submitter: SlurmSubmitter, long_reference: Run, tmp_path: Path
) -> None:
    # In partition `grace` a job has a minute, in which Slurm will not queue it if it leaves.
    paths = submitter.detach(
        [*LONG, "cluster.array_tasks=2", "cluster.min_array_tasks=2",
         "cluster.slurm_partition=grace", "cluster.server={nodelist: n4}",
         "cluster.clients={exclude: 'n1,n4', cpus_per_task: 6}"]
    )  # fmt: skip
    until_round(paths, 3)
    preempt(jobs_of(paths)["client-1"].node, tmp_path)  # SIGTERM
    until_round(paths, 8)
    with cluster.configured("SlurmctldParameters=preempt_send_user_signal"):
        preempt(jobs_of(paths)["client-0"].node, tmp_path)  # USR2
        until_round(paths, 13)
        preempt("n4", tmp_path)
    ended = end_of(paths)
    assert ended.checksum == long_reference.checksum
    assert "it is preempted; its next attempt goes on at round" in ended.logs()
    assert attempt(paths) == 2
    assert starts(paths) == {0: 2, 1: 2}
    eventually(lambda: all_ended(paths), 20)
    assert set(states_of(paths).values()) == {"COMPLETED"}


def test_array_tasks_queue_behind_their_server_and_max_requeues_ends_a_run_that_can_be_resumed(
    submitter: SlurmSubmitter, long_reference: Run
) -> None:
    paths = submitter.detach(
        [*LONG, "cluster.array_tasks=2", "cluster.max_requeues=1",
         "cluster.reattach_timeout_min=0.05"]
    )  # fmt: skip
    until_round(paths, 2)
    # The server waits for both, as they are in the queue.
    clients = ("client-0", "client-1")
    slurm("scancel", "--signal=USR2", jobs_of(paths)["client-0"].job_id)
    slurm("scontrol", "requeue", jobs_of(paths)["client-1"].job_id)
    eventually(lambda: all(jobs_of(paths)[role].pending for role in clients), 20)
    until_round(paths, rounds(paths)[-1] + 2)
    assert attempt(paths) == 1

    eventually(lambda: all(jobs_of(paths)[role].running for role in clients), 30)
    slurm("scontrol", "requeuehold", server_job(paths))
    eventually(
        lambda: {jobs_of(paths)[role].describe() for role in clients} == {"PENDING (Dependency)"},
        60,
    )
    slurm("scontrol", "release", server_job(paths))
    eventually(lambda: attempt(paths) == 2 and run_state.read(paths)["state"] == "running", 60)
    before = rounds(paths)[-1]
    until_round(paths, before + 2)
    slurm("scancel", "--signal=USR2", server_job(paths))
    eventually(lambda: run_state.read(paths)["state"] == "failed", 20)
    assert "cluster.max_requeues is 1" in reason(paths)
    assert f"--resume {paths.root}" in reason(paths)
    eventually(lambda: all_ended(paths), 20)

    done = fedhpc("submit", "--resume", str(paths.root), "--detach")
    assert done.returncode == 0, done.stdout + done.stderr
    assert end_of(paths).checksum == long_reference.checksum
    assert attempt(paths) == 3


def sbatch_templates(submitter: SlurmSubmitter, *command: str, **env: str) -> RunPaths:
    """Start a long run with the templates."""
    done = subprocess.run(
        [*command, str(DIGITS), *submitter.options(LONG)],
        env=submitter.environment(**env),
        capture_output=True, text=True, timeout=90, check=False, cwd=REPOSITORY,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return submitter.newest(60)


def test_jobs_of_the_sbatch_templates_come_back_too(
    submitter: SlurmSubmitter, long_reference: Run
) -> None:
    paths = sbatch_templates(
        submitter, "slurm/submit.sh", ARRAY_TASKS="2",
        SERVER_OPTIONS="--time=1 --signal=USR2@10", CLIENT_OPTIONS="--time=10 --cpus-per-task=2",
    )  # fmt: skip
    until_round(paths, 3)
    with paused(paths):
        eventually(lambda: "time limit" in reason(paths), 60)
        more_time(server_job(paths))
    until_round(paths, 6)
    assert attempt(paths) == 2
    slurm("scancel", "--signal=USR2", jobs_of(paths)["client-1"].job_id)
    eventually(lambda: jobs_of(paths)["client-1"].pending, 20)
    os.kill(run_state.record(paths, "server")["pid"], signal.SIGKILL)
    eventually(lambda: jobs_of(paths)["server"].pending, 20)
    assert end_of(paths).checksum == long_reference.checksum
    assert attempt(paths) == 3
    assert starts(paths) == {0: 1, 1: 2}
    eventually(lambda: all_ended(paths), 20)
    assert states_of(paths) == dict.fromkeys(("server", "client-0", "client-1"), "COMPLETED")


def test_one_allocation_goes_on_with_its_run_when_the_job_starts_again(
    submitter: SlurmSubmitter, long_reference: Run, tmp_path: Path
) -> None:
    paths = sbatch_templates(
        submitter, "sbatch", "--ntasks=3", "--ntasks-per-node=1", "--cpus-per-task=2", "--time=10",
        f"--output={tmp_path}/job.log", f"--chdir={tmp_path}",
        f"{REPOSITORY}/slurm/one-allocation.sbatch",
    )  # fmt: skip
    until_round(paths, 3)
    slurm("scancel", "--signal=USR2", server_job(paths))
    run = end_of(paths)
    assert run.checksum == long_reference.checksum
    assert attempt(paths) == 2
    assert len({fit["host"] for fit in run.fits}) == 3
    assert len(list(submitter.runs_dir.glob("*"))) == 1
    eventually(lambda: all_ended(paths), 40)
    assert states_of(paths)["server"] == "COMPLETED", (tmp_path / "job.log").read_text()
