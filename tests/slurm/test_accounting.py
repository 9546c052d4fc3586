"""fedhpc works with accounting (devcluster up --accounting) and without."""

import shutil
import subprocess

import pytest
from slurm_support import SlurmSubmitter
from support import Run, eventually

from fedhpc.cluster import slurm, submission


def has_accounting() -> bool:
    return (
        shutil.which("sacct") is not None
        and subprocess.run(["sacct"], capture_output=True, timeout=60, check=False).returncode == 0
    )


def test_neither_submit_nor_the_jobs_say_a_word_of_sacct(
    submitter: SlurmSubmitter, reference: Run
) -> None:
    run = submitter.run(["cluster.array_tasks=2"])
    assert run.checksum == reference.checksum
    assert "sacct" not in run.output + run.logs()


def test_jobs_that_squeue_has_forgotten_are_known_where_there_is_accounting(
    submitter: SlurmSubmitter, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = submitter.run(["cluster.array_tasks=2"])
    jobs = submission.read(run.paths)
    assert jobs is not None
    ids = [job_id for _, job_id in jobs.roles()]
    # Slurm forgets a job minutes after its end; then this is all that squeue says.
    monkeypatch.setattr(slurm, "_FORMAT", "")
    if has_accounting():  # it lags behind
        eventually(lambda: {job.state for job in slurm.jobs(ids).values()} == {"COMPLETED"}, 20)
        assert set(slurm.jobs(ids)) == set(ids)
    else:
        assert slurm.jobs(ids) == {}
