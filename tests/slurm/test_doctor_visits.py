"""The doctor on a real Slurm: jobs on two nodes, and what only a cluster can get wrong."""

import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from doctor_support import CANCELLED, PLATFORM, Doctor
from slurm_support import Cluster
from support import eventually

from fedhpc.learning import data

TWO_NODES = ["cluster.server.nodelist=n1", "cluster.clients.nodelist=n2"]
CPU = "isolation.device=cpu"


@pytest.fixture
def doctor(cluster: Cluster, tmp_path: Path, data_root: Path) -> Iterator[Doctor]:
    """A doctor that leaves no job in the queue."""
    data.prepare("digits", data_root)
    yield Doctor(tmp_path, "slurm", f"data.root={data_root}")
    assert queue() == []


def queue() -> list[list[str]]:
    """Return job id and name of the doctor's jobs in the queue."""
    command = ["squeue", "--noheader", "--format=%i,%j"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    return [line.split(",") for line in done.stdout.split() if ",doctor-" in line]


def test_a_sound_cluster_passes_every_check_between_two_nodes(doctor: Doctor) -> None:
    visit = doctor.visit(*TWO_NODES, CPU, "cluster.cpus_per_task=1")
    assert visit.returncode == 0, visit
    assert {check["status"] for check in visit.checks} == {"pass"}
    visit.expect("pass", "server's port", "array task (n2)", "reached 10.77.0.1")
    visit.expect("pass", "Slurm's commands", "server job (n1)", "squeue and scontrol answer")


def test_an_interface_out_of_reach_and_unusable_gpus_are_told(doctor: Doctor) -> None:
    visit = doctor.visit(*TWO_NODES, "cluster.interface=lo", "cluster.gpus_per_task=2")
    assert visit.returncode == PLATFORM
    visit.expect("fail", "server's port", "array task (n2)", "--set cluster.interface=eth0")
    # Made of /dev/null, they have no NVML.
    visit.expect(
        "warn", "GPUs", "array task (n2)", "2 asked for, sees 0, 1; their memory cannot be"
    )
    # The devcluster's are device nodes, no more.
    visit.expect("fail", "child on GPU 1", "array task (n2)", "GPU 1 was allotted, but torch")


def test_a_server_job_that_is_lost_is_told_with_slurms_reason(doctor: Doctor) -> None:
    process = doctor.start(CPU, *TWO_NODES, "cluster.clients.extra.begin=now+300")
    eventually(lambda: list(doctor.runs_dir.glob("*/server.json")), 60)
    (server,) = [job_id for job_id, name in queue() if name.endswith("-server")]
    subprocess.run(["scancel", server], check=True, timeout=60)
    visit = doctor.end_of(process)
    assert visit.returncode == PLATFORM
    visit.expect("fail", "job ran", "server job", "CANCELLED")


def test_a_ctrl_c_cancels_jobs_that_wait(doctor: Doctor) -> None:
    process = doctor.start(CPU, "cluster.server.extra.begin=now+300")
    eventually(lambda: len(queue()) == 2, 60)
    process.send_signal(signal.SIGINT)
    assert doctor.end_of(process).returncode == CANCELLED
