"""Slurm's commands when Slurm misbehaves: what no real cluster does on demand.

The commands are small programs on a PATH of their own; tests/slurm runs the real ones.
"""

import os
import stat
from pathlib import Path

import pytest

from fedhpc import environment
from fedhpc.cluster import slurm
from fedhpc.errors import PlatformError, SubmissionError


@pytest.fixture
def commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that comes first on the PATH, and where a command's calls are noted."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.setattr(slurm, "_FIRST_PAUSE_S", 0.01)
    return folder


def write(folder: Path, name: str, script: str) -> None:
    """Write a command; ``$N`` is how often it has been called."""
    path = folder / name
    path.write_text(
        f'#!/bin/bash\ncd {folder}\necho "$*" >> {name}.calls\n'
        f"N=$(wc -l < {name}.calls)\n{script}\n"
    )
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


def job(folder: Path) -> Path:
    path = folder / "job.sh"
    path.write_text("#!/bin/bash\n#SBATCH --time=5\n")
    return path


def calls(folder: Path, name: str) -> list[str]:
    path = folder / f"{name}.calls"
    return path.read_text().splitlines() if path.exists() else []


def test_one_call_tells_of_all_jobs_of_a_run(commands: Path) -> None:
    write(
        commands,
        "squeue",
        'printf "7|RUNNING|None|2026-01-01T10:00:00|n1\\n8_0|PENDING|Priority|N/A|\\n'
        '8_1|OUT_OF_MEMORY|OutOfMemory|2026-01-01T10:00:00|n2\\n"',
    )
    jobs = slurm.jobs(["7", "8_0", "8_1"])
    assert len(calls(commands, "squeue")) == 1
    assert jobs["7"].running
    assert jobs["7"].node == "n1"
    assert jobs["7"].reason == ""
    assert jobs["8_0"].pending
    assert jobs["8_0"].describe() == "PENDING (Priority)"
    assert jobs["8_0"].start == ""
    assert jobs["8_1"].ended


def test_a_job_that_squeue_forgot_is_asked_of_the_accounting(commands: Path) -> None:
    write(commands, "squeue", 'echo "slurm_load_jobs error: Invalid job id specified" >&2; exit 1')
    write(commands, "sacct", 'echo "7|CANCELLED by 1000|None|2026-01-01T10:00:00|n1"')
    assert slurm.jobs(["7"])["7"].state == "CANCELLED"


def test_a_site_without_accounting_just_does_not_know_old_jobs(commands: Path) -> None:
    write(commands, "squeue", 'echo "slurm_load_jobs error: Invalid job id specified" >&2; exit 1')
    write(commands, "sacct", 'echo "Slurm accounting storage is disabled" >&2; exit 1')
    assert slurm.jobs(["7"]) == {}


def test_a_busy_controller_is_asked_again(commands: Path) -> None:
    write(
        commands,
        "squeue",
        'if [ $N -lt 3 ]; then echo "slurm_load_jobs error: Socket timed out" >&2; exit 1; fi\n'
        'echo "7|RUNNING|None||n1"',
    )
    assert slurm.jobs(["7"])["7"].running
    assert len(calls(commands, "squeue")) == 3


def test_a_controller_that_stays_away_is_an_error_with_what_it_said(commands: Path) -> None:
    write(commands, "squeue", 'echo "Unable to contact slurm controller" >&2; exit 1')
    with pytest.raises(slurm.SlurmDoesNotAnswer) as caught:
        slurm.jobs(["7"], retry_s=0.1)
    assert "squeue" in caught.value.message
    assert "exit code 1" in caught.value.message
    assert "Unable to contact slurm controller" in caught.value.message


def test_a_command_that_hangs_is_ended_at_its_deadline(
    commands: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slurm, "_CALL_TIMEOUT_S", 0.3)
    write(commands, "squeue", "exec sleep 60")
    with pytest.raises(PlatformError, match="no answer within"):
        slurm.jobs(["7"], retry_s=0.0)


def test_a_missing_command_is_named(commands: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(commands))
    with pytest.raises(PlatformError, match="found no squeue on the PATH"):
        slurm.jobs(["7"])


def test_what_slurm_refuses_is_not_submitted_again(commands: Path) -> None:
    write(commands, "sbatch", 'echo "sbatch: error: invalid partition specified: no" >&2; exit 1')
    with pytest.raises(SubmissionError, match="invalid partition specified: no"):
        slurm.submit(job(commands), "name")
    assert len(calls(commands, "sbatch")) == 1


def test_a_job_is_submitted_once_though_the_answer_was_lost(commands: Path) -> None:
    write(commands, "sbatch", 'echo "sbatch: error: Socket timed out on send/recv" >&2; exit 1')
    write(commands, "squeue", "echo 42")
    assert slurm.submit(job(commands), "run-1-server") == "42"
    assert len(calls(commands, "sbatch")) == 1
    assert "--name=run-1-server" in calls(commands, "squeue")[0]


def test_a_job_whose_submission_failed_is_submitted_again(commands: Path) -> None:
    write(
        commands,
        "sbatch",
        'if [ $N -lt 2 ]; then echo "Unable to contact slurm controller" >&2; exit 1; fi; echo 43',
    )
    write(commands, "squeue", "true")
    assert slurm.submit(job(commands), "run-1-server") == "43"


def test_nothing_of_an_outer_job_leaks_into_a_new_one(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SLURM_JOB_ID", "SLURM_CPUS_PER_TASK", "SRUN_DEBUG", "SUBMITIT_EXECUTOR",
                 "FEDHPC_ARRAY_TASK", "CUDA_VISIBLE_DEVICES"):  # fmt: skip
        monkeypatch.setenv(name, "1")
    for name in ("SQUEUE_PARTITION", "SCANCEL_STATE", "SACCT_FORMAT"):
        monkeypatch.setenv(name, "of commands typed by hand")
    monkeypatch.setenv("SLURM_CONF", "slurm.conf")
    env = environment.for_new_jobs()
    told = ("SLURM", "SRUN", "SUBMITIT", "FEDHPC", "CUDA", "SQUEUE", "SCANCEL", "SACCT")
    left = {name for name in env if name.startswith(told)}
    assert left - {"FEDHPC_LOG_LEVEL"} == {"SLURM_CONF"}
    monkeypatch.delenv("SLURM_JOB_ID")
    assert environment.for_new_jobs()["CUDA_VISIBLE_DEVICES"] == "1"


def test_the_users_defaults_hold_where_a_script_is_silent(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("SBATCH_ACCOUNT", "SBATCH_PARTITION", "SBATCH_TIMELIMIT", "SBATCH_WAIT"):
        monkeypatch.setenv(name, "1")
    env = environment.for_sbatch(["partition", "time"])
    assert {name for name in env if name.startswith("SBATCH")} == {"SBATCH_ACCOUNT"}


def test_a_job_that_can_never_start_is_told_from_one_that_waits() -> None:
    assert slurm.Job("1", "PENDING", "PartitionTimeLimit").hopeless
    assert not slurm.Job("1", "PENDING", "Resources").hopeless
    assert not slurm.Job("1", "RUNNING", "").hopeless
