"""Fixtures of the tests on a real Slurm: the devcluster, brought up by ``make test-slurm``."""

import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from slurm_support import LONG, Cluster, SlurmSubmitter
from support import Run, Submitter

DEVCLUSTER = Path(__file__).parents[1] / "devcluster" / "devcluster.py"


@pytest.fixture(scope="session")
def cluster() -> Cluster:
    """The devcluster; its environment is this process's from now on."""
    command = [sys.executable, str(DEVCLUSTER)]
    if subprocess.run([*command, "status"], capture_output=True, check=False).returncode:
        pytest.skip("no devcluster is up: make test-slurm")
    lines = subprocess.run([*command, "env"], capture_output=True, text=True, check=True).stdout
    for line in lines.splitlines():
        name, _, value = line.removeprefix("export ").partition("=")
        os.environ[name] = shlex.split(value)[0]
    return Cluster(command)


@pytest.fixture(scope="session")
def data_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One packed copy of the digits for all tests."""
    return tmp_path_factory.mktemp("data")


@pytest.fixture
def submitter(cluster: Cluster, tmp_path: Path, data_root: Path) -> Iterator[SlurmSubmitter]:
    """A submitter whose jobs are gone after the test."""
    submitter = SlurmSubmitter(tmp_path, data_root)
    yield submitter
    submitter.cancel_all()
    cluster.all_nodes_up()


@pytest.fixture(scope="session")
def reference(tmp_path_factory: pytest.TempPathFactory, data_root: Path) -> Run:
    """The small run on the local executor."""
    run = Submitter(tmp_path_factory.mktemp("reference"), data_root).run()
    assert run.returncode == 0, run.output + run.logs()
    return run


@pytest.fixture(scope="session")
def long_reference(tmp_path_factory: pytest.TempPathFactory, data_root: Path) -> Run:
    """A run that is long enough to be disturbed, on the local executor, undisturbed."""
    run = Submitter(tmp_path_factory.mktemp("long"), data_root).run(LONG)
    assert run.returncode == 0, run.output + run.logs()
    return run
