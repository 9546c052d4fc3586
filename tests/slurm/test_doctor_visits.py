"""The doctor on a real Slurm: jobs on two nodes, and what only a cluster can get wrong."""

import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from doctor_support import CANCELLED, PLATFORM, Doctor
from slurm_support import Cluster
from support import eventually

from fedhpc.learning import data

TWO_NODES = ["--set", "cluster.server.nodelist=n1", "--set", "cluster.clients.nodelist=n2"]
CPU = ["--set", "isolation.device=cpu"]


@pytest.fixture
def doctor(cluster: Cluster, tmp_path: Path, data_root: Path) -> Iterator[Doctor]:
    """A doctor that leaves no job in the queue."""
    data.prepare("digits", data_root)
    doctor = Doctor(tmp_path, "slurm", "--set", f"data.root={data_root}")
    yield doctor
    eventually(lambda: not queue(), 60)


def queue() -> list[list[str]]:
    """Return job id and name of the doctor's jobs in the queue."""
    command = ["squeue", "--noheader", "--format=%i %j"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    jobs = [line.split() for line in done.stdout.splitlines()]
    return [job for job in jobs if job[1].startswith("doctor-")]


def test_a_sound_cluster_passes_every_check_between_two_nodes(doctor: Doctor) -> None:
    visit = doctor.visit(*TWO_NODES, *CPU, "--set", "cluster.cpus_per_task=1")
    assert visit.returncode == 0, visit
    for role in ("server (n1)", "client (n2)"):
        for name in ("shared folder", "imports", "data", "cores", "Slurm's commands"):
            assert visit.status(name, role) == "pass", (name, role)
    assert visit.status("server's port", "client (n2)") == "pass"
    assert "10.77.0.1 (eth0)" in visit.text("server's port", "client")
    assert doctor.nothing_is_left()


def test_an_interface_that_other_nodes_do_not_reach_and_unusable_gpus_are_told(
    doctor: Doctor,
) -> None:
    visit = doctor.visit(
        *TWO_NODES, "--set", "cluster.interface=lo", "--set", "cluster.gpus_per_task=2"
    )
    assert visit.returncode == PLATFORM
    assert visit.status("server's port", "client (n2)") == "fail"
    assert "--set cluster.interface=eth0" in visit.text("server's port", "client")
    assert visit.status("GPUs", "client (n2)") == "pass"  # allotted, as asked for
    for gpu in ("GPU 0", "GPU 1"):  # by name; the devcluster's are device nodes, no more
        assert visit.status(gpu, "client (n2)") == "fail"
    assert doctor.nothing_is_left()


def test_two_jobs_on_one_node_are_a_warning(doctor: Doctor) -> None:
    visit = doctor.visit(*CPU, "--set", "cluster.nodelist=n3")
    assert visit.returncode == 0
    assert visit.status("server's port", "client (n3)") == "warn"
    assert "shared with the other job on this node" in visit.text("slot locks", "client")


def test_a_server_job_that_is_lost_is_told_with_slurms_reason(doctor: Doctor) -> None:
    process = doctor.start(*CPU, *TWO_NODES, "--set", "cluster.clients.extra.begin=now+300")
    eventually(lambda: list(doctor.runs_dir.glob("*/server-hello.json")), 60)
    (server,) = [job_id for job_id, name in queue() if name.endswith("-server")]
    subprocess.run(["scancel", server], check=True, timeout=60)
    visit = doctor.end_of(process)
    assert visit.returncode == PLATFORM
    assert "CANCELLED" in visit.text("job ran", "server")
    assert Path(visit.found["folder"]).is_dir()


def test_a_ctrl_c_cancels_jobs_that_wait(doctor: Doctor) -> None:
    process = doctor.start(*CPU, "--set", "cluster.server.extra.begin=now+300")
    eventually(lambda: len(queue()) == 2, 60)
    os.kill(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=90)
    assert process.returncode == CANCELLED, errors
    assert doctor.nothing_is_left()
    assert queue() == []
