"""The doctor with real jobs of the local executor, and with Slurm's answers made up."""

import os
import signal
import sys
from pathlib import Path

import pytest
from doctor_support import CANCELLED, PLATFORM, Doctor
from support import eventually, processes_of

from fedhpc.learning import data
from fedhpc.paths import RunPaths


@pytest.fixture
def doctor(tmp_path: Path) -> Doctor:
    return Doctor(tmp_path, "local")


def script(path: Path, text: str) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def test_a_sound_machine_passes_every_check(doctor: Doctor, data_root: Path) -> None:
    data.prepare("digits", data_root)
    visit = doctor.visit(f"data.root={data_root}", "isolation.device=cpu")
    assert visit.returncode == 0, visit
    assert {check["status"] for check in visit.checks} == {"pass"}
    for where in ("server job", "array task"):
        names = {check["name"] for check in visit.checks if where in check["where"]}
        assert names >= {"shared folder", "server's port", "cores", "data", "child"}
    visit.expect("pass", "data", "array task", "1442 examples")


def test_everything_that_is_wrong_is_told_at_once_with_its_remedy(
    doctor: Doctor, tmp_path: Path
) -> None:
    metadata = tmp_path / "torch-9.9.9.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text("Metadata-Version: 2.1\nName: torch\nVersion: 9.9.9\n")
    python = script(tmp_path / "python", f'PYTHONPATH={tmp_path} exec {sys.executable} "$@"')
    visit = doctor.visit(
        "cluster.interface=ib77",
        "cluster.gpus_per_task=1",
        f"cluster.python={python}",
        f"data.root={tmp_path}/nodata",
        CUDA_VISIBLE_DEVICES="63",
    )
    assert visit.returncode == PLATFORM
    visit.expect("fail", "server's port", "server job", "found 'ib77'")
    visit.expect("fail", "server's port", "array task", "the server job could not listen")
    visit.expect("fail", "data", "array task", f"found none at {tmp_path}/nodata")
    visit.expect("fail", "child on GPU 63", "array task", "-> install a torch build for this")
    visit.expect("fail", "versions", "everywhere", "9.9.9 on array task")


def test_a_mistake_in_the_config_ends_with_2_and_starts_nothing(doctor: Doctor) -> None:
    visit = doctor.visit("cluster.gpu_per_task=1")
    assert visit.returncode == 2
    assert "did you mean cluster.gpus_per_task?" in visit.errors


def test_a_job_that_dies_without_a_word_is_told_with_its_log(
    doctor: Doctor, tmp_path: Path
) -> None:
    python = script(tmp_path / "python", "echo no module named submitit >&2; exit 1")
    visit = doctor.visit(f"cluster.python={python}")
    assert visit.returncode == PLATFORM
    visit.expect("fail", "job ran", "", "no module named submitit")  # of whichever was seen first


def test_a_ctrl_c_ends_the_jobs_and_leaves_nothing(doctor: Doctor) -> None:
    process = doctor.start()
    eventually(lambda: list(doctor.runs_dir.glob("*/client-0.json")))
    (root,) = doctor.runs_dir.iterdir()
    process.send_signal(signal.SIGINT)
    assert doctor.end_of(process).returncode == CANCELLED
    eventually(lambda: processes_of(RunPaths(root)) == [])


def made_up_slurm(tmp_path: Path, sbatch: str, squeue: str = "true") -> dict[str, str]:
    """Write Slurm's commands as shell scripts; scancel notes what it is called with."""
    scancel = f'echo "$@" >> {tmp_path}/cancelled; touch {tmp_path}/gone'
    for name, text in {"sbatch": sbatch, "squeue": squeue, "scancel": scancel}.items():
        script(tmp_path / "slurm" / name, text)
    return {"PATH": f"{tmp_path}/slurm:{os.environ['PATH']}"}


def test_a_refused_job_is_an_error_with_what_to_do(tmp_path: Path) -> None:
    env = made_up_slurm(tmp_path, "echo 'invalid partition specified: gpuu' >&2; exit 1")
    visit = Doctor(tmp_path, "slurm").visit(**env)
    assert visit.returncode == PLATFORM
    assert "invalid partition specified: gpuu" in visit.errors
    assert "Hint: set cluster.slurm_partition" in visit.errors


@pytest.mark.parametrize(
    ("reason", "remedy"),
    [("PartitionTimeLimit", "cluster.time_min"), ("Resources", "--timeout-min")],
)
def test_jobs_that_do_not_start_are_cancelled_with_the_reason(
    tmp_path: Path, reason: str, remedy: str
) -> None:
    sbatch = f"echo x >> {tmp_path}/ids; wc -l < {tmp_path}/ids"
    pending = f"echo '1|PENDING|{reason}|N/A|'; echo '2_0|PENDING|Dependency|N/A|'"
    env = made_up_slurm(tmp_path, sbatch, f"test -e {tmp_path}/gone || {{ {pending}; }}")
    visit = Doctor(tmp_path, "slurm").visit(timeout_min=0.05, **env)
    assert visit.returncode == PLATFORM
    visit.expect("fail", "job ran", "server job", f"did not start: server job: PENDING ({reason})")
    visit.expect("fail", "job ran", "server job", remedy)
    assert f"server job: PENDING ({reason})" in visit.errors or reason == "PartitionTimeLimit"
    assert (tmp_path / "cancelled").read_text().split()[-2:] == ["2", "1"]
