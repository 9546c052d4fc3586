"""Fixtures of the federations."""

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import Run, Submitter, processes_of

from fedhpc.paths import RunPaths


@pytest.fixture(scope="session")
def data_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One packed copy of the digits for all tests."""
    return tmp_path_factory.mktemp("data")


@pytest.fixture
def submitter(tmp_path: Path, data_root: Path) -> Iterator[Submitter]:
    """A submitter whose runs leave no process behind."""
    submitter = Submitter(tmp_path, data_root)
    yield submitter
    for folder in submitter.runs_dir.glob("*"):
        paths = RunPaths(folder)
        deadline_s = time.monotonic() + 10
        while (left := processes_of(paths)) and time.monotonic() < deadline_s:
            time.sleep(0.1)
        for line in left:
            os.kill(int(line.split()[0]), signal.SIGKILL)
        assert not left, f"left behind: {left}"


@pytest.fixture(scope="session")
def reference(tmp_path_factory: pytest.TempPathFactory, data_root: Path) -> Run:
    """The undisturbed small run: one array task, two slots."""
    submitter = Submitter(tmp_path_factory.mktemp("reference"), data_root)
    run = submitter.run(["isolation.slots=2"])
    assert run.returncode == 0, run.output + run.logs()
    return run
