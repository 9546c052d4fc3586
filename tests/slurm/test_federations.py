"""Federations on a real Slurm end in the model of the local executor, whatever happens."""

import subprocess
from pathlib import Path

import pytest
from slurm_support import LONG, Cluster, SlurmSubmitter, all_ended, hosts_of, jobs_of, seconds_until
from support import DIGITS, REPOSITORY, Run, Submitter, eventually

from fedhpc import run_state
from fedhpc.files import read_json, read_lines
from fedhpc.paths import RunPaths

HUNDRED = ["federation.num_clients=100", "federation.clients_per_round=24",
           "data.partitioner={name: iid}"]  # fmt: skip


def test_four_nodes_and_100_clients_end_in_the_model_of_the_local_executor(
    submitter: SlurmSubmitter, tmp_path: Path, data_root: Path
) -> None:
    local = Submitter(tmp_path / "local", data_root).run(HUNDRED)
    run = submitter.run(
        [*HUNDRED, "cluster.array_tasks=4", "cluster.min_array_tasks=4",
         "cluster.clients={cpus_per_task: 6}"],
    )  # fmt: skip
    assert run.checksum == local.checksum
    assert hosts_of(run) == {"n1", "n2", "n3", "n4"}
    assert {(fit["array_task"], fit["slot"]) for fit in run.fits} == {
        (task, slot) for task in range(4) for slot in range(2)
    }


def test_server_and_clients_on_different_nodes_find_each_other(
    submitter: SlurmSubmitter, reference: Run
) -> None:
    run = submitter.run(
        ["cluster.array_tasks=2", "cluster.server={nodelist: n4}", "cluster.clients={exclude: n4}"]
    )
    assert run.checksum == reference.checksum
    assert read_json(run.paths.rendezvous)["host"] == "n4"
    assert "n4" not in hosts_of(run)


def test_two_federations_at_once_do_not_disturb_each_other(
    submitter: SlurmSubmitter, reference: Run
) -> None:
    first, second = (submitter.start(["cluster.array_tasks=2"]) for _ in range(2))
    outputs = [process.communicate(timeout=150)[0] for process in (first, second)]
    assert [first.returncode, second.returncode] == [0, 0], outputs
    folders = [RunPaths(folder) for folder in submitter.runs_dir.glob("*")]
    assert len(folders) == 2
    assert {run_state.read(paths)["model_sha256"] for paths in folders} == {reference.checksum}


def test_an_array_larger_than_the_cluster_finishes_and_leaves_nothing_pending(
    submitter: SlurmSubmitter, reference: Run
) -> None:
    run = submitter.run(["cluster.array_tasks=16", "cluster.max_parallel=4"])
    assert run.checksum == reference.checksum
    assert seconds_until(lambda: not submitter.queue(), 20) < 10


@pytest.mark.timeout(400)
def test_nodes_that_go_down_in_the_middle_change_nothing(
    submitter: SlurmSubmitter, cluster: Cluster, long_reference: Run
) -> None:
    process = submitter.start(
        [*LONG, "cluster.array_tasks=2", "cluster.min_array_tasks=2",
         "cluster.liveness_timeout_s=3", "cluster.server={nodelist: n1}",
         "cluster.clients={exclude: n1, cpus_per_task: 6}"]
    )  # fmt: skip
    paths = submitter.newest(60)
    eventually(lambda: len(list(read_lines(paths.metrics))) > 3, 120)
    hosts = {fit["host"] for fit in read_lines(paths.fits)}
    assert len(hosts) == 2
    cluster.do("node-down", min(hosts))
    eventually(lambda: len(list(read_lines(paths.metrics))) > 10, 60)
    cluster.do("node-down", "n1", "--tell")  # the server's
    eventually(lambda: jobs_of(paths)["server"].pending, 20)
    cluster.do("node-up", "n1")
    output, _ = process.communicate(timeout=150)
    assert process.returncode == 0, output
    assert run_state.read(paths)["model_sha256"] == long_reference.checksum


def test_a_controller_that_restarts_in_the_middle_changes_nothing(
    submitter: SlurmSubmitter, cluster: Cluster, long_reference: Run
) -> None:
    process = submitter.start([*LONG, "cluster.array_tasks=2"])
    paths = submitter.newest(60)
    eventually(lambda: len(list(read_lines(paths.metrics))) > 3, 120)
    cluster.do("restart-controller")
    output, _ = process.communicate(timeout=150)
    assert process.returncode == 0, output
    assert run_state.read(paths)["model_sha256"] == long_reference.checksum


def test_a_run_is_submitted_from_inside_a_job(submitter: SlurmSubmitter, reference: Run) -> None:
    command = submitter.command(["cluster.array_tasks=2"])
    done = subprocess.run(
        ["srun", "--cpus-per-task=2", "--gpus=1", "--job-name=outer", *command],
        capture_output=True, text=True, timeout=150, check=False, cwd=REPOSITORY,
    )  # fmt: skip
    run = Run(submitter.newest(), done.returncode, done.stdout + done.stderr)
    assert run.checksum == reference.checksum


def test_a_client_array_without_a_dependency_waits_for_its_server(
    submitter: SlurmSubmitter, reference: Run
) -> None:
    run = submitter.run(["cluster.dependency=false", "cluster.server={extra: {begin: now+5}}"])
    assert run.checksum == reference.checksum


def test_the_sbatch_templates_end_in_the_same_model(
    submitter: SlurmSubmitter, reference: Run
) -> None:
    done = subprocess.run(
        ["slurm/submit.sh", str(DIGITS), *submitter.options()],
        env=submitter.environment(
            ARRAY_TASKS="2", SERVER_OPTIONS="--time=5", CLIENT_OPTIONS="--time=5 --cpus-per-task=2"
        ),
        capture_output=True, text=True, timeout=90, check=False, cwd=REPOSITORY,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    paths = submitter.newest()
    eventually(lambda: run_state.read(paths)["state"] in run_state.ENDED, 90)
    run = Run(paths, 0, done.stdout)
    assert run.checksum == reference.checksum
    assert {fit["array_task"] for fit in run.fits} == {0, 1}
    eventually(lambda: all_ended(paths), 10)
    assert set(jobs_of(paths)) == {"server", "client-0", "client-1"}


def test_an_array_task_gives_its_node_back_while_its_server_waits_in_the_queue(
    submitter: SlurmSubmitter, reference: Run
) -> None:
    paths = submitter.detach(
        ["cluster.dependency=false", "cluster.reattach_timeout_min=0.05",
         "cluster.server={extra: {begin: now+40}}"]
    )  # fmt: skip
    eventually(lambda: jobs_of(paths)["client-0"].running, 30)
    eventually(lambda: jobs_of(paths)["client-0"].describe() == "PENDING (Dependency)", 60)
    assert jobs_of(paths)["server"].pending
    eventually(lambda: run_state.read(paths)["state"] in run_state.ENDED, 120)
    assert Run(paths, 0, "").checksum == reference.checksum
