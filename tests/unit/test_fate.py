"""What becomes of a job that gets a signal. Slurm's commands are small programs here."""

import signal
import subprocess
import time
from pathlib import Path

import pytest

from fedhpc import config, oversight, requeue
from fedhpc.cluster import scripts, submission
from fedhpc.environment import Environment
from fedhpc.errors import PlatformError
from fedhpc.oversight import ClientArray, ServerGone, ServerJob, ServerQueued
from fedhpc.paths import RunPaths

SAYS = "JobId=8 ArrayJobId=7 ArrayTaskId=3 JobName=a Requeue=1 "
CANCELLED = f"{SAYS} JobState=CANCELLED Restarts=1 PreemptTime=None"
REQUEUED = f"{SAYS} JobState=COMPLETING Restarts=2 PreemptTime=None"
IN_GRACE = f"{SAYS} JobState=RUNNING Restarts=1 PreemptTime=2026-11-23T14:20:08"
TOLD_TO_STOP = f"{SAYS} JobState=RUNNING Restarts=1 PreemptTime=None"
HERE = Environment("n1", "7_3", 3, 2, (), on_slurm=True, restarts=1)


@pytest.fixture
def commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The only folder of the PATH but for the system's own."""
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    return tmp_path


def write(folder: Path, name: str, script: str) -> None:
    path = folder / name
    path.write_text(f'#!/bin/bash\necho "{name} $*" >> {folder}/calls\n{script}\n')
    path.chmod(0o755)


def calls(folder: Path) -> list[str]:
    path = folder / "calls"
    return path.read_text().splitlines() if path.exists() else []


@pytest.mark.parametrize(
    ("says", "returns", "by_itself"),
    [
        (CANCELLED, False, False),
        (REQUEUED, True, False),
        (IN_GRACE, True, True),
        (TOLD_TO_STOP, False, False),
    ],
)
def test_after_a_sigterm_slurm_says_what_becomes_of_a_job(
    says: str, returns: bool, by_itself: bool, commands: Path
) -> None:
    write(commands, "scontrol", f"echo '{says}'")
    fate = requeue.foresee(signal.SIGTERM, HERE, 5)
    assert (fate.returns, fate.by_itself) == (returns, by_itself)
    assert calls(commands) == ["scontrol show job --oneliner 7_3"]


def test_a_job_that_slurm_does_not_speak_of_is_not_taken_for_a_cancelled_one(
    commands: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(requeue, "_ASK_TIMEOUT_S", 0.3)
    write(commands, "scontrol", "exec sleep 60")
    fate = requeue.foresee(signal.SIGTERM, HERE, 5)
    assert (fate.returns, fate.by_itself) == (True, False)


def test_a_job_queues_itself_again_as_often_as_it_may(commands: Path) -> None:
    assert requeue.foresee(signal.SIGUSR2, HERE, 2).by_itself
    fate = requeue.foresee(signal.SIGUSR2, HERE, 1)
    assert not fate.returns
    assert "queued again once, and cluster.max_requeues is 1" in fate.reason
    assert not calls(commands)  # the time is short, and all is known


@pytest.mark.parametrize(
    ("code", "restarts", "state", "again"),
    [
        (137, "0", "RUNNING", True),
        (137, "3", "RUNNING", False),  # cluster.max_requeues
        (137, "0", "COMPLETING", False),  # cancelled, and too slow to leave
        (143, "0", "RUNNING", False),
        (1, "0", "RUNNING", False),
        (0, "0", "RUNNING", False),
    ],
)
def test_the_script_queues_a_job_again_whose_process_was_killed(
    code: int, restarts: str, state: str, again: bool, commands: Path
) -> None:
    write(commands, "scontrol", "")
    write(commands, "squeue", f"echo {state}")
    raw = {"cluster": {"max_requeues": 3}, "data": {"root": "/data"}}
    text = scripts.texts(config.parse(raw, "test"), RunPaths(Path("/runs/a")))["server job"]
    lines = [line for line in text.splitlines() if not line.startswith("srun ")]
    env = {"PATH": f"{commands}:/usr/bin:/bin", "SLURM_JOB_ID": "7"}
    env |= {"SLURM_RESTART_COUNT": restarts} if restarts != "0" else {}
    script = "\n".join([*lines, f"(exit {code})"])
    done = subprocess.run(["bash", "-c", script], env=env, timeout=20, check=False)
    assert done.returncode == code
    assert ("scontrol requeue 7" in calls(commands)) is again


@pytest.fixture
def watched(commands: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunPaths:
    """A run with server job 7, of which Slurm is asked at every look."""
    monkeypatch.setattr(oversight, "_FIRST_LOOK_S", 0.0)
    monkeypatch.setattr(oversight, "_LOOK_S", (0.0, 0.0))
    paths = RunPaths(tmp_path / "run")
    paths.jobs.mkdir(parents=True)
    submission.write(paths, submission.Submission("slurm", "7"))
    return paths


def test_each_time_that_the_server_is_queued_it_is_waited_for_as_long(
    watched: RunPaths, commands: Path
) -> None:
    write(commands, "squeue", "echo '7|PENDING|BeginTime||'")
    server = ServerJob(watched, 1.0)
    server.check()
    assert server.queued
    time.sleep(1.1)
    server.expect_soon()  # it was there meanwhile, and is lost again
    server.check()
    time.sleep(1.1)
    with pytest.raises(ServerQueued, match="reattach_timeout_min"):
        server.check()


def test_what_others_learned_of_the_server_before_it_came_back_does_not_count(
    watched: RunPaths, commands: Path
) -> None:
    first, second = ServerJob(watched, 60), ServerJob(watched, 60)
    write(commands, "squeue", "echo '7|FAILED|NonZeroExitCode||'")
    with pytest.raises(ServerGone):
        first.check()
    write(commands, "squeue", "echo '7|RUNNING|None||n1'")
    second.expect_soon()
    second.check()
    assert not second.queued


def test_a_client_array_that_slurm_does_not_speak_of_is_not_taken_for_one_that_is_over(
    commands: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(oversight, "_ARRAY_GONE_S", 0.0)
    monkeypatch.setattr(oversight, "_FIRST_ASK_S", 0.0)
    paths = RunPaths(tmp_path / "run")
    paths.jobs.mkdir(parents=True)
    submission.write(paths, submission.Submission("slurm", "7", ["8_0", "8_1"]))
    array = ClientArray(paths, config.Cluster(executor="slurm"))
    nothing_known = "echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1"
    write(commands, "sacct", "exit 1")
    write(commands, "squeue", "echo 'Unable to contact slurm controller' >&2; exit 1")
    assert array.exists()
    write(commands, "squeue", nothing_known)
    assert not array.exists()  # every job is over, for long
    write(commands, "squeue", "echo '8_0|PENDING|Priority||'; echo '8_1|COMPLETED|None||n1'")
    assert array.exists()
    write(commands, "squeue", nothing_known)
    for _ in range(2):
        array.check(100.0, 0)
    assert array.exists()
    monkeypatch.setattr(oversight, "_ARRAY_UNKNOWN_S", 0.0)
    with pytest.raises(PlatformError, match="every array task has ended"):
        array.check(100.0, 0)
